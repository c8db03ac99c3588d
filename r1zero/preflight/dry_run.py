"""The dry run: placement, batch sizes, and estimates of memory and of a step's time, without
starting anything.

Memory per rank (B = bytes of a parameter: 2 in bf16, 4 in fp32; N = parameters on the rank; of all
ranks of a role the fullest is shown):

  weights      N x B; on train ranks twice when a step has several updates, since old log-probs of later
               minibatches are taken with the weights that drew them. With actor_rollout.lora those of the
               model once, and N is from here on the number of the adapters' parameters
  gradients    N x 4: Megatron accumulates and reduces them in fp32
  optimizer    N x 12 in bf16 (fp32 master weight and two moments), N x 8 in fp32, shared by the ranks
               that hold the same parameters, by the distributed optimizer (Rajbhandari et al. 2020,
               ZeRO stage 1): of experts TP x CP x DP / EP ranks, of all else CP x DP. With
               training.optimizer_offload that is in host memory, and here what visits at a time: as much
               of 32 M parameters, or of the largest tensor on the rank
  activations  T tokens of a microbatch on a CP rank. With full recomputation the input of every layer,
               T x hidden x B,
               plus what one layer keeps for its backward pass; without, what every layer keeps (counted as
               by Korthikanti et al. 2022, with fused attention and a gated MLP, and experts chosen
               evenly), the keys and values of all CP ranks among it; times the microbatches in flight
               on that stage (PP - stage, at most). Plus the output layer: three chunks of logits and,
               where it learns, its gradient, both fp32
  KV cache     2 x layers x kv heads / TP x head size x B for each token of a replica's prompts, once, and of
               its responses, in whole blocks; max_tokens_to_oom tokens at most, and as many with
               eval_data_path, whose problems are answered all at once
  routes       in host memory, in a line of its own: what is replayed of a token, for all responses of a
               step that a replica learns from, as long as allowed, on each of its ranks
  buckets      broadcasts of weights under way: to rollout ranks, and to ref ranks that are ever reset

The step is predicted by a model of it (step_model.py), with rates that are a guess.

Not counted: kernels' workspaces and the allocator's fragmentation. Communication buffers stand in a
table of their own (scale.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from r1zero.config.load import dump
from r1zero.config.own_code import is_own
from r1zero.config.schema import Config, filled
from r1zero.distributed.npu_environment import present, tensor_megabytes
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.models.config import ModelConfig
from r1zero.models.family import family_of
from r1zero.models.lora import adapter_params, lora_config
from r1zero.models.params import (
    ParamSpec,
    Shards,
    Stages,
    num_elements,
    param_table,
    stage_of,
    stage_params,
)
from r1zero.models.sizes import (
    BUCKETS_IN_FLIGHT,
    CPU_CACHE_BLOCK,
    LOGIT_CHUNK_ELEMENTS,
    NPU_CACHE_BLOCK,
    OFFLOAD_VISIT_ELEMENTS,
)
from r1zero.preflight.advice import look_ahead
from r1zero.preflight.files import absent
from r1zero.preflight.found import Found, dtype_of
from r1zero.preflight.replay import replay_line, route_bytes
from r1zero.preflight.run import Run
from r1zero.preflight.scale import Load, Network, count, scale_table
from r1zero.preflight.step_model import Step
from r1zero.preflight.step_rates import guessed_lengths, guessed_rates, job_of
from r1zero.rollout.engines import choose_engine

CACHE_BLOCK = max(CPU_CACHE_BLOCK, NPU_CACHE_BLOCK)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank in one role."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    kv_cache: float = 0
    buckets: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of a train rank that lie in host memory, whatever the device."""

    optimizer: float  # with training.optimizer_offload
    routes: float  # of all responses of a step that its replica learns from

    @property
    def total(self) -> float:
        return self.optimizer + self.routes


def report(found: Found) -> str:
    """Describe the run: configuration, placement, batches, memory, and what could not be looked
    at."""
    cfg = found.config
    placed = found.placement
    assert placed is not None, "checked before"
    table = placement_table(placed, found.node_of_rank)
    parts = [dump(cfg).rstrip(), table, batch_line(cfg, placed)]
    parts.append(replay_line(cfg, found.actor.shape))
    parts.append(memory_table(cfg, placed, found.actor.shape, found.reference_shape))
    parts.append(groups_table(cfg, placed, found.actor.shape))
    parts.append(outlook_table(cfg, placed, found.actor.shape))
    missing = absent(cfg)
    parts.append("\n".join(f"not checked: {path} is not on this machine" for path in missing))
    return "\n\n".join(part for part in parts if part)


def banner(run: Run, node_of_rank: Sequence[int]) -> str:
    """What a run is about to do, on the nodes that its ranks found themselves on: roles, batches,
    memory."""
    cfg = run.config
    parts = [roles_table(run.placement, node_of_rank), batch_line(cfg, run.placement)]
    parts.append(replay_line(cfg, run.actor.shape))
    parts.append(memory_table(cfg, run.placement, run.actor.shape, run.reference_shape))
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
    """TP, PP and DP; CP and EP where a role that looks at whole sequences has them."""
    shown = ["tp", "pp", "dp"]
    for axis in ("cp", "ep"):
        sizes = [getattr(span, axis) for span in placed.grids if span.role != "rollout"]
        if max(sizes) > 1:
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
    cfg: Config, placed: Placement, policy: ModelConfig | None, reference: ModelConfig | None
) -> str:
    """Gigabytes of the fullest rank of each role."""
    if policy is None or (reference is None and placed.ref is not None):
        return (
            "memory: the shape of the model is not known here (neither its folder nor a model file)"
        )
    rows = [["GB per rank", *(entry.name.replace("_", " ") for entry in fields(Memory)), "total"]]
    found = memory(cfg, placed, policy, reference)
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


def outlook_table(cfg: Config, placed: Placement, policy: ModelConfig | None) -> str:
    """How long a step may take on NPUs: as it is, with each option, with the best split."""
    if policy is None:
        return ""
    if cfg.training.distributed_backend in ("gloo", "nccl"):
        return "the time of a step: guessed for NPUs only; a run tells after its first steps"
    outlook = look_ahead(
        cfg, placed, job_of(cfg), guessed_rates(cfg, placed, policy), guessed_lengths(cfg)
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


def memory(
    cfg: Config, placed: Placement, policy: ModelConfig, reference: ModelConfig | None
) -> dict[str, Memory]:
    """Estimate the memory of the fullest rank of each role. A run without a reference has no
    `reference`."""
    models = {}  # of any other role that of the policy
    if reference is not None:
        models["ref"] = reference
    found = {}
    for role, span in placed.roles.items():
        shape = models.get(role, policy)
        stages = [ESTIMATES[role](cfg, shape, span, stage) for stage in range(span.pp)]
        found[role] = max(stages, key=lambda item: item.total)
    return found


def host_memory(cfg: Config, placed: Placement, policy: ModelConfig) -> HostMemory:
    """Estimate what the fullest train rank keeps in host memory. Every rank of a replica has the
    routes of all that the replica learns from."""
    train = placed.train
    optimizer = 0.0
    if cfg.training.optimizer_offload:
        stages = range(train.pp)
        optimizer = max(_optimizer_state(cfg, policy, train, stage) for stage in stages)
    tokens = cfg.num_samples * cfg.response_budget / train.dp
    return HostMemory(optimizer, tokens * route_bytes(cfg, policy))


def _train_memory(cfg: Config, shape: ModelConfig, span: RankGrid, stage: int) -> Memory:
    size = dtype_of(cfg).itemsize
    frozen = 0
    learning = _rank_elements(_learning(cfg, shape, span, stage), span)
    if lora_config(cfg.actor_rollout) is not None:
        frozen = stage_parameters(shape, span, stage)
    copies = 2 if cfg.keeps_start_weights else 1
    return Memory(
        weights=(frozen + learning * copies) * size,
        gradients=learning * 4,
        optimizer=_optimizer_here(cfg, shape, span, stage),
        activations=_train_activations(cfg, shape, span, stage),
        buckets=_bucket_bytes(cfg) * (1 if cfg.ref.reset_interval is None else 2),
    )


def _optimizer_state(cfg: Config, shape: ModelConfig, span: RankGrid, stage: int) -> float:
    """Bytes of the optimizer's state that belong to a train rank: each parameter's is shared out among
    the ranks that hold it."""
    shards = Shards.of_grid(span)
    elements = 0.0
    for spec in _learning(cfg, shape, span, stage):
        holders = span.expert_data_size if spec.cut == "experts" else span.cp * span.dp
        elements += num_elements(spec, shards) / holders
    return elements * dtype_of(cfg).optimizer_bytes


def _optimizer_here(cfg: Config, shape: ModelConfig, span: RankGrid, stage: int) -> float:
    """Bytes of it on the device: all, or what visits where it lies in host memory."""
    state = _optimizer_state(cfg, shape, span, stage)
    if not cfg.training.optimizer_offload:
        return state
    shards = Shards.of_grid(span)
    largest = max(num_elements(spec, shards) for spec in _learning(cfg, shape, span, stage))
    visit = max(OFFLOAD_VISIT_ELEMENTS, largest)
    return min(state, visit * dtype_of(cfg).optimizer_bytes)


def _learning(cfg: Config, shape: ModelConfig, span: RankGrid, stage: int) -> Sequence[ParamSpec]:
    """What learns on a stage: its parameters, or those of adapters."""
    stages = Stages.of(shape.num_layers, span)
    lora = lora_config(cfg.actor_rollout)
    if lora is None:
        return stage_params(shape, stage, stages)
    return [spec for spec in adapter_params(shape, lora) if stage_of(spec, stages) == stage]


def _train_activations(cfg: Config, shape: ModelConfig, span: RankGrid, stage: int) -> float:
    """Bytes that a train rank keeps for the backward pass."""
    actor = cfg.actor_rollout
    size = dtype_of(cfg).itemsize
    sequence_parallel = cfg.training.sequence_parallel
    microbatch = actor.max_tokens_per_microbatch or actor.micro_batch_size * cfg.training.seq_length
    tokens = -(-microbatch // span.cp)
    layers = Stages.of(shape.num_layers, span).layers(stage)
    kept = [
        layer_activations(shape, span.tp, tokens, size, sequence_parallel, layer)
        for layer in layers
    ]
    gathered = gathered_keys(shape, span, tokens) * size
    if actor.recompute_granularity == "full":
        cut = span.tp if sequence_parallel else 1
        in_flight = (span.pp - stage) * len(layers) * tokens * shape.hidden_size * size / cut
        activations = in_flight + max(kept) + gathered
    else:
        activations = (span.pp - stage) * (sum(kept) + len(layers) * gathered)
    if stage < span.pp - 1:
        return activations
    activations += logits_bytes(shape, span.tp, tokens)
    if actor.lora.rank:  # the output layer does not learn
        return activations
    return activations + shape.vocab_size / span.tp * shape.hidden_size * 4


def _rollout_memory(cfg: Config, shape: ModelConfig, span: RankGrid, stage: int) -> Memory:
    actor = cfg.actor_rollout
    size = dtype_of(cfg).itemsize
    prompts = -(-cfg.training.global_batch_size // span.dp)
    samples = prompts * actor.n_samples_per_prompt
    token = family_of(shape).kv_cache_elements(shape, span.tp) * size
    # the first with the rest of the prompt
    blocks = samples * (-(-cfg.response_budget // CACHE_BLOCK) + 1)
    tokens = prompts * actor.max_prompt_length + blocks * CACHE_BLOCK
    if cfg.training.evaluates or tokens > actor.max_tokens_to_oom:
        tokens = actor.max_tokens_to_oom
    prefill = largest_layer(shape, span, stage, actor.max_prompt_length, size, False)
    running = min(samples, actor.max_running_samples or samples)
    logits = 2 * running * shape.vocab_size * 4  # of all vocabulary shards, and the probabilities
    return Memory(
        weights=stage_parameters(shape, span, stage) * size,
        activations=prefill + logits,
        kv_cache=token * tokens,
        buckets=_bucket_bytes(cfg),
    )


def _ref_memory(cfg: Config, shape: ModelConfig, span: RankGrid, stage: int) -> Memory:
    size = dtype_of(cfg).itemsize
    microbatch = (
        cfg.ref.max_tokens_per_microbatch or cfg.ref.micro_batch_size * cfg.training.seq_length
    )
    tokens = -(-microbatch // span.cp)
    sequence_parallel = shape.experts is not None  # which ask for it, whatever train does
    layer = largest_layer(shape, span, stage, tokens, size, sequence_parallel)
    if stage == span.pp - 1:
        logits = logits_bytes(shape, span.tp, tokens)
    else:
        logits = 0
    return Memory(
        weights=stage_parameters(shape, span, stage) * size,
        activations=layer + gathered_keys(shape, span, tokens) * size + logits,
        buckets=0 if cfg.ref.reset_interval is None else _bucket_bytes(cfg),
    )


# How the memory of a rank on a stage is estimated, by the name of its role.
ESTIMATES: Mapping[str, Callable[[Config, ModelConfig, RankGrid, int], Memory]] = {
    "train": _train_memory,
    "rollout": _rollout_memory,
    "ref": _ref_memory,
}


def stage_parameters(shape: ModelConfig, span: RankGrid, stage: int) -> int:
    """Parameters on one rank of a pipeline stage.

    A tied output layer is the embedding itself, unless that lives on another stage.
    """
    return _rank_elements(stage_params(shape, stage, Stages.of(shape.num_layers, span)), span)


def _rank_elements(specs: Sequence[ParamSpec], span: RankGrid) -> int:
    """Elements of these parameters on one rank that holds them."""
    shards = Shards.of_grid(span)
    return sum(num_elements(spec, shards) for spec in specs)


def layer_activations(
    shape: ModelConfig, tp: int, tokens: int, size: int, sequence_parallel: bool, layer: int
) -> float:
    """Bytes that one layer keeps for its backward pass."""
    return tokens * size * family_of(shape).activation_elements(shape, layer, tp, sequence_parallel)


def largest_layer(
    shape: ModelConfig, span: RankGrid, stage: int, tokens: int, size: int, sequence_parallel: bool
) -> float:
    """The same of the layer of a stage that keeps most: with experts in some layers only, they differ."""
    return max(
        layer_activations(shape, span.tp, tokens, size, sequence_parallel, layer)
        for layer in Stages.of(shape.num_layers, span).layers(stage)
    )


def gathered_keys(shape: ModelConfig, span: RankGrid, tokens: int) -> float:
    """Elements of the keys and values that a rank takes from the others of its CP group, in one
    layer."""
    return (span.cp - 1) * tokens * 2 * shape.num_kv_heads / span.tp * shape.head_dim


def logits_bytes(shape: ModelConfig, tp: int, tokens: int) -> float:
    """Bytes of three chunks of fp32 logits: the logits, their exponentials, and the product of
    both."""
    return 3 * 4 * min(LOGIT_CHUNK_ELEMENTS, tokens * shape.vocab_size / tp)


def _bucket_bytes(cfg: Config) -> float:
    return BUCKETS_IN_FLIGHT * cfg.training.publish_bucket_megabytes * 2**20


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
