"""What a world asks of a rank, against counts by hand and against what is really sent."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from support.publishing import expert_model
from support.shapes import small_shape

from r1zero.algo.dealing import SampleTable
from r1zero.distributed import route_wire, wire
from r1zero.distributed.placement import Placement, RoleSize, place
from r1zero.errors import BadInput
from r1zero.models.params import Shards, num_elements, param_table
from r1zero.preflight.scale import (
    DRAWN_BYTES,
    LOOKED_AT_BYTES,
    Load,
    Network,
    Scale,
    count,
    scale_table,
)
from r1zero.types import Group, Prompt, RecordedRoutes, Sample
from r1zero.weight_sync import plan as plan_module

SHAPE = small_shape()
NETWORK = Network(tensors=param_table(SHAPE), num_layers=2, element_size=2)
LOAD = Load(groups=6, group_size=4, tokens=10)
MIB = 2**20


def world(train: int, rollout: int, ref: int) -> Placement:
    sizes = {
        "train": RoleSize(train, tp=2, pp=2),
        "rollout": RoleSize(rollout, tp=2),
        "ref": RoleSize(ref),
    }
    return place(sizes, colocate=False)


def counted(placed: Placement) -> Scale:
    return count(placed, placed.rollout, NETWORK, LOAD, bucket_megabytes=4, tensor_megabytes=100)


def shard(tp: int) -> int:
    """Bytes of all tensors on one TP rank."""
    return (
        sum(num_elements(tensor, Shards(tp)) for tensor in NETWORK.tensors) * NETWORK.element_size
    )


def test_groups_and_their_memory_by_hand() -> None:
    roles = counted(world(train=8, rollout=4, ref=2)).roles
    # train has DP 2. Connected at the start: tp, dp and pp with 100 MB, all with 16, and one group
    # of publishing with 4, in which it gives to both rollout replicas; two buffers each.
    assert roles["train"].publish_groups == 1
    assert roles["train"].hccl_bytes == 2 * (3 * 100 + 16 + 4) * MIB
    # rollout: tp, and a group for each of the four sources that hold something of its shard, two
    # replicas of two stages.
    assert roles["rollout"].publish_groups == 4
    assert roles["rollout"].hccl_bytes == 2 * (100 + 4 * 4) * MIB
    assert roles["ref"].publish_groups == roles["ref"].hccl_bytes == 0


def test_every_rollout_rank_takes_its_shard_in_once() -> None:
    for placed in (world(4, 2, 1), world(8, 4, 2), world(16, 8, 1)):
        roles = counted(placed).roles
        assert roles["rollout"].published_in == shard(2)
        assert roles["train"].published_in == 0
        # What each replica of two senders gives away is about half; no more than all of a stage.
        assert 0 < roles["train"].published_out < shard(2)


def test_more_ranks_cost_a_rank_no_more_groups() -> None:
    """What keeps a world of thousands possible."""
    small = counted(world(8, 8, 4)).roles
    large = counted(world(64, 256, 32)).roles
    for role, one in small.items():
        for name in ("host_groups", "device_groups", "publish_groups", "hccl_bytes"):
            assert getattr(large[role], name) == getattr(one, name), (role, name)


def test_a_checkpoint_is_shared_out_among_the_replicas() -> None:
    once = counted(world(4, 2, 1)).roles["train"].checkpoint
    twice = counted(world(8, 2, 1)).roles["train"].checkpoint
    assert once == pytest.approx(2 * twice, abs=8)
    # The first of two layers and the embedding on TP 2: weights of 2 bytes, 12 of the optimizer.
    first = [tensor for tensor in NETWORK.tensors if tensor.layer == 0 or tensor.place == "first"]
    assert once == sum(num_elements(tensor, Shards(2)) for tensor in first) * 14


def test_a_model_with_experts_by_hand() -> None:
    """TP 2, PP 2, DP 4, EP 8 to two replicas of TP 2; two layers of eight experts."""
    shape = expert_model(layers=2)
    tensors = param_table(shape)
    network = Network(tensors=tensors, num_layers=2, element_size=2)
    sizes = {
        "train": RoleSize(16, tp=2, pp=2, ep=8),
        "rollout": RoleSize(4, tp=2),
    }
    placed = place(sizes, colocate=False)
    roles = count(placed, placed.rollout, network, LOAD, 4, 100).roles
    # A rollout rank gets four of the eight parts of each stage's experts.
    assert roles["rollout"].publish_groups == 2 * 4
    assert roles["rollout"].published_in == 2 * sum(
        num_elements(spec, Shards(tp=2, ep=2)) for spec in tensors
    )
    assert roles["train"].publish_groups == 1 and roles["train"].published_in == 0
    # Of the last stage, which has the last norm, too: experts without copies, all else shared out among four replicas.
    held = [spec for spec in tensors if spec.layer == 1 or spec.place == "last"]
    experts = sum(num_elements(spec, Shards(ep=8)) for spec in held if spec.cut == "experts")
    rest = sum(num_elements(spec, Shards(tp=2)) for spec in held if spec.cut == "tp")
    assert roles["train"].checkpoint == int((experts + rest / 4) * 14)


def test_sources_that_share_a_group_hear_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "GROUPS_OF_A_RECEIVER", 1)
    placed = world(train=4, rollout=2, ref=1)
    roles = counted(placed).roles
    assert roles["rollout"].publish_groups == roles["train"].publish_groups == 1
    assert roles["rollout"].published_in == shard(2)
    # the other stage's, of the two that give to a rollout rank
    assert 0 < roles["train"].published_in < shard(2)


def samples_of(load: Load, looked_at: bool) -> list[Group]:
    def sample() -> Sample:
        logprobs = np.zeros(load.tokens, np.float32)
        found = Sample(np.zeros(load.tokens, np.int32), logprobs, False, 0, reward=1.0)
        if looked_at:
            found.ref_logprobs = logprobs
        return found

    prompt = Prompt(0, "", np.zeros(3, np.int32), "")
    return [
        Group(position, prompt, [sample() for _ in range(load.group_size)])
        for position in range(load.groups)
    ]


@pytest.mark.parametrize("looked_at", [False, True])
def test_samples_take_the_bytes_that_are_sent(looked_at: bool) -> None:
    sent = wire.pack(samples_of(LOAD, looked_at)).numel()
    token = LOOKED_AT_BYTES if looked_at else DRAWN_BYTES
    assert 0 <= sent - LOAD.bytes(token) <= 16  # the two counts in front


def test_the_table_takes_the_bytes_of_its_columns() -> None:
    table = SampleTable.of(samples_of(LOAD, looked_at=True), LOAD.group_size)
    columns = [getattr(table, column.name) for column in fields(table)]
    assert sum(column.nbytes for column in columns) == LOAD.table_bytes


def test_bytes_of_samples_by_hand() -> None:
    """Six groups of four samples of ten tokens."""
    roles = counted(world(train=8, rollout=4, ref=2)).roles
    drawn = 6 * 40 + 24 * (48 + 80)
    looked_at = 6 * 40 + 24 * (48 + 120)
    table = LOAD.table_bytes
    assert roles["rollout"].samples_out == drawn // 2
    assert roles["ref"].samples_in == drawn // 2 + table
    # Replicas of four ranks, told in two rounds; eight train ranks, told the table in three.
    assert roles["train"].samples_in == table + looked_at // 2
    assert roles["train"].samples_out == 3 * table + 2 * (looked_at // 2)


def test_bytes_of_routes_by_hand() -> None:
    """As above, with prompts of five tokens and three bytes of experts for each token."""
    placed = world(train=8, rollout=4, ref=2)
    load = replace(LOAD, prompt_tokens=5, route_bytes=3)
    without = counted(placed).roles
    roles = count(placed, placed.rollout, NETWORK, load, 4, 100).roles
    responses = 24 * 10 * 3
    prompts = 6 * 5 * 3
    assert load.response_routes == responses and load.prompt_routes == prompts
    # both train replicas learn from each prompt
    rollout = responses // 2 + prompts + 2 * load.table_bytes
    assert roles["rollout"].samples_out - without["rollout"].samples_out == rollout
    train = responses // 2 + prompts
    assert roles["train"].samples_in - without["train"].samples_in == train
    assert roles["train"].samples_out - without["train"].samples_out == 2 * train
    assert roles["ref"] == without["ref"]


def test_routes_take_the_bytes_that_are_sent() -> None:
    def ids(tokens: int) -> np.ndarray:
        return np.zeros((tokens, 1, 3), np.uint8)

    load = replace(LOAD, prompt_tokens=5, route_bytes=3)
    routes = RecordedRoutes(
        prompts={group: ids(5) for group in range(load.groups)},
        samples={sample: ids(9) for sample in range(load.samples)},
    )
    sent = route_wire.pack_routes(routes).numel()
    counted = load.response_routes + load.prompt_routes
    # a row of 16 bytes for each; no routes of a response's last token
    assert sent - counted == 32 + 16 * (6 + 24) - 24 * 3


def test_the_table_has_a_line_for_each_role() -> None:
    scale = counted(world(8, 4, 2))
    rows = scale_table(scale)
    assert [row[0] for row in rows] == ["a rank of", "train", "rollout", "ref"]
    assert len({len(row) for row in rows}) == 1


def test_a_cut_that_does_not_divide_is_refused() -> None:
    sizes = {"train": RoleSize(3, tp=3), "rollout": RoleSize(1)}
    with pytest.raises(BadInput, match="tensor parallel size 3 does not divide"):
        counted(place(sizes, colocate=False))
