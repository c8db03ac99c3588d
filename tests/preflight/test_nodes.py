"""Context parallelism over two nodes is told, and not refused."""

from __future__ import annotations

from r1zero.preflight.cautions import node_cautions
from r1zero.preflight.checks import check_found
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config


def test_context_parallelism_over_two_nodes_is_a_caution() -> None:
    """Train ranks 0 to 3 are two groups of two."""
    ranks = ["actor_rollout.num_gpus_for_train=4", "resource_pool.actor_rollout=[6]"]
    cfg, _ = load_config(
        "tiny", [*ranks, "training.context_parallel_size=2", "resource_pool.ref=[2]"]
    )
    inside = look(cfg, node_of_rank=[0, 0, 0, 0, 1, 1, 1, 1])
    assert node_cautions(inside) == []
    across = look(cfg, node_of_rank=[0, 0, 0, 1, 1, 1, 1, 1])
    assert check_found(across, absent_ok=True) == []
    [caution] = node_cautions(across)
    assert caution.startswith(
        "training.context_parallel_size: 2: the context-parallel group of train ranks [2, 3] lies on "
        "the nodes [0, 1]"
    )
