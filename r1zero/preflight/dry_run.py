"""The dry run: placement, batch sizes, and estimates of memory and of a step's time, without
starting anything.

Memory is estimated in memory.py, communication buffers are counted in scale.py, and the step is
predicted by a model of it (step_model.py), with rates that are a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from r1zero.config.load import dump
from r1zero.config.own_code import is_own
from r1zero.config.schema import Config, filled
from r1zero.distributed.npu_environment import present, tensor_megabytes
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.models.config import ModelConfig
from r1zero.models.lora import adapter_params, lora_config
from r1zero.models.params import param_table
from r1zero.preflight.advice import look_ahead
from r1zero.preflight.files import absent
from r1zero.preflight.found import Found, dtype_of
from r1zero.preflight.memory import Memory, host_memory, memory
from r1zero.preflight.replay import replay_line, route_bytes
from r1zero.preflight.run import Run
from r1zero.preflight.scale import Load, Network, count, scale_table
from r1zero.preflight.step_model import Step
from r1zero.preflight.step_rates import guessed_lengths, guessed_rates, job_of
from r1zero.rollout.engines import choose_engine


def report(found: Found) -> str:
    """Describe the run: configuration, placement, batches, memory, and what could not be looked
    at."""
    cfg = found.config
    placed = found.placement
    assert placed is not None, "checked before"
    table = placement_table(placed, found.node_of_rank)
    parts = [dump(cfg).rstrip(), table, batch_line(cfg, placed)]
    parts.append(replay_line(cfg, found.actor.shape))
    parts.append(
        memory_table(cfg, placed, found.actor.shape, found.reference_shape, found.reward_shape)
    )
    parts.append(groups_table(cfg, placed, found.actor.shape))
    parts.append(outlook_table(cfg, placed, found.actor.shape, found.reward_shape))
    missing = absent(cfg)
    parts.append("\n".join(f"not checked: {path} is not on this machine" for path in missing))
    return "\n\n".join(part for part in parts if part)


def banner(run: Run, node_of_rank: Sequence[int]) -> str:
    """What a run is about to do, on the nodes that its ranks found themselves on: roles, batches,
    memory."""
    cfg = run.config
    parts = [roles_table(run.placement, node_of_rank), batch_line(cfg, run.placement)]
    parts.append(replay_line(cfg, run.actor.shape))
    parts.append(
        memory_table(cfg, run.placement, run.actor.shape, run.reference_shape, run.reward_shape)
    )
    return "\n".join(part for part in parts if part)


def roles_table(placed: Placement, node_of_rank: Sequence[int]) -> str:
    """One line a role: its ranks, its nodes, its grid."""
    axes = _shown_axes(placed)
    rows = [["role", "ranks", "nodes", *(axis.upper() for axis in axes)]]
    for span in placed.grids:
        on = sorted({node_of_rank[rank] for rank in span.ranks})
        sizes = [str(getattr(span, axis)) for axis in axes]
        rows.append([span.role, _range(span.ranks), _range(on), *sizes])
    return aligned(rows)


def placement_table(placed: Placement, node_of_rank: Sequence[int]) -> str:
    """One line a rank: its node, its roles, and its place in the grid of each."""
    axes = _shown_axes(placed)
    rows = [["rank", "node", "role", *(axis.upper() for axis in axes)]]
    for rank in range(placed.world_size):
        for role in placed.roles_of(rank):
            span = placed.roles[role]
            index = span.index_of(rank) | {"ep": span.expert_index(rank)}
            place = [str(index[axis]) for axis in axes]
            rows.append([str(rank), str(node_of_rank[rank]), role, *place])
    return aligned(rows)


def _shown_axes(placed: Placement) -> list[str]:
    """TP, PP and DP; CP and EP where a role that looks at whole sequences has them, EP also where
    replicas of rollout share experts."""
    shown = ["tp", "pp", "dp"]
    for axis in ("cp", "ep"):
        cut = any(getattr(span, axis) > 1 for span in placed.grids if span.role != "rollout")
        if cut or (axis == "ep" and placed.rollout.experts_span_replicas):
            shown.append(axis)
    return shown


def batch_line(cfg: Config, placed: Placement) -> str:
    """Work the batch sizes out, as in `120 prompts x 4 = 480 samples -> 8 updates of 60 -> ...`."""
    actor = cfg.actor_rollout
    replicas = placed.train.dp
    updates = cfg.num_samples // cfg.minibatch_size
    if actor.ppo_epochs > 1:
        epochs = f" x {actor.ppo_epochs} epochs"
    else:
        epochs = ""
    if actor.max_tokens_per_microbatch is not None:
        micro = f"microbatches of at most {actor.max_tokens_per_microbatch} tokens"
    else:
        count = -(-cfg.minibatch_size // (replicas * actor.micro_batch_size))
        even = cfg.minibatch_size % (replicas * actor.micro_batch_size) == 0
        size = f"{'' if even else 'at most '}{actor.micro_batch_size}"
        micro = f"{count} microbatch{'es' if count > 1 else ''} of {size}"
    if placed.train.cp > 1:
        micro = f"CP {placed.train.cp} x {micro}"
    prompts = cfg.training.global_batch_size
    plural = "s" if updates > 1 else ""
    return (
        f"{prompts} prompts x {actor.n_samples_per_prompt} = {cfg.num_samples} samples -> "
        f"{updates} update{plural} of {cfg.minibatch_size}{epochs} -> DP {replicas} x "
        f"{micro}"
    )


def memory_table(
    cfg: Config,
    placed: Placement,
    policy: ModelConfig | None,
    reference: ModelConfig | None,
    reward: ModelConfig | None = None,
) -> str:
    """Gigabytes of the fullest rank of each role."""
    lacks_reference = reference is None and placed.ref is not None
    lacks_reward = reward is None and "reward" in placed.roles
    if policy is None or lacks_reference or lacks_reward:
        return (
            "memory: the shape of the model is not known here (neither its folder nor a model file)"
        )
    rows = [["GB per rank", *(entry.name.replace("_", " ") for entry in fields(Memory)), "total"]]
    found = memory(cfg, placed, policy, reference, reward)
    for role, item in found.items():
        values = [getattr(item, entry.name) for entry in fields(item)]
        rows.append([role, *(f"{value / 1e9:.2f}" for value in (*values, item.total))])
    lines = [aligned(rows)]
    if placed.colocated:
        lines.append(
            f"a rank has all roles: {sum(item.total for item in found.values()) / 1e9:.2f} GB"
        )
    host = host_memory(cfg, placed, policy)
    if host.optimizer:
        lines.append(f"host memory of the optimizer: {host.optimizer / 1e9:.2f} GB a train rank")
    if host.routes:
        lines.append(f"host memory of routes: up to {host.routes / 1e9:.2f} GB on each train rank")
    missing = absent(cfg)
    loaded = [(cfg.actor_rollout.load, cfg.actor_rollout.model)]
    if cfg.has_reference:
        loaded.append((filled(cfg.ref.load), cfg.ref.model))
    if cfg.has_reward_model:
        loaded.append((filled(cfg.reward.load), cfg.reward.model))
    lines += dict.fromkeys(
        f"the shape of {load} is taken from the model file {model}"
        for load, model in loaded
        if load in missing
    )
    return "\n".join(lines)


def groups_table(cfg: Config, placed: Placement, policy: ModelConfig | None) -> str:
    """What a rank of each role has of groups, device memory for them, and bytes (scale.py)."""
    if policy is None:
        return ""
    lora = lora_config(cfg.actor_rollout)
    scale = count(
        placed,
        _engine_grid(cfg, placed),
        Network(
            tensors=param_table(policy),
            num_layers=policy.num_layers,
            element_size=dtype_of(cfg).itemsize,
            adapters=() if lora is None else adapter_params(policy, lora),
        ),
        Load(
            groups=cfg.training.global_batch_size,
            group_size=cfg.actor_rollout.n_samples_per_prompt,
            tokens=cfg.response_budget,
            prompt_tokens=cfg.actor_rollout.max_prompt_length,
            route_bytes=route_bytes(cfg, policy),
        ),
        cfg.training.publish_bucket_megabytes,
        tensor_megabytes(present()),
        resets_reference=cfg.ref.reset_interval is not None,
    )
    return f"{aligned(scale_table(scale))}\nat most, of one step with the longest responses; of HCCL on NPUs"


def _engine_grid(cfg: Config, placed: Placement) -> RankGrid:
    """The rollout ranks as the engine cuts weights over them; ours, which needs torch, by TP."""
    name = cfg.actor_rollout.engine
    if is_own(name):
        return choose_engine(name).layout.grid(placed.rollout)
    return placed.rollout


def outlook_table(
    cfg: Config,
    placed: Placement,
    policy: ModelConfig | None,
    reward: ModelConfig | None = None,
) -> str:
    """How long a step may take on NPUs: as it is, with each option, with the best split."""
    if policy is None:
        return ""
    if cfg.training.distributed_backend in ("gloo", "nccl"):
        return "the time of a step: guessed for NPUs only; a run tells after its first steps"
    outlook = look_ahead(
        cfg, placed, job_of(cfg), guessed_rates(cfg, placed, policy, reward), guessed_lengths(cfg)
    )
    rows = [["a step", "seconds", *(f"{role} idle" for role in placed.roles), "tokens/s a rank"]]
    rows.append(_outlook_row("as it is", outlook.now))
    rows += [_outlook_row(told, step) for told, step in outlook.options.items()]
    lines = [aligned(rows)]
    if outlook.split is not None:
        lines[0] = aligned([*rows, _outlook_row("the split below", outlook.split.step)])
        lines.append(f"the split that would be fastest: {outlook.split.keys}")
    elif not placed.colocated:
        lines.append(
            f"no other split of these {placed.world_size} ranks with these TP, PP, CP and EP would be "
            "notably faster"
        )
    lengths = f"responses of {guessed_lengths(cfg).mean:.0f} tokens on average"
    lines.append(f"{outlook.source}, with {lengths}: trust the order, not the seconds")
    return "\n".join(lines)


def _outlook_row(told: str, step: Step) -> list[str]:
    idle = [f"{step.idle(role):.0%}" for role in step.busy]
    return [told, f"{step.seconds:.3g}", *idle, f"{step.tokens_per_second_per_rank:.0f}"]


# How the memory of a rank on a stage is estimated, by the name of its role.


def _range(numbers: Sequence[int]) -> str:
    """First and last of consecutive numbers."""
    if len(numbers) == 1:
        return str(numbers[0])
    return f"{numbers[0]}-{numbers[-1]}"


def aligned(rows: list[list[str]]) -> str:
    """Align columns: text to the left, the rest to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        lines.append(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    return "\n".join(line.rstrip() for line in lines)
