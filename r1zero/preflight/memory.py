"""Estimates of memory, for the dry run and the doctor.

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
               where it learns, its gradient, both fp32. Where rollout replicas share experts, the
               tokens that they exchange
  KV cache     2 x layers x kv heads / TP x head size x B for each token of a replica's prompts, once, and of
               its responses, in whole blocks; max_tokens_to_oom tokens at most, and as many with
               eval_data_path, whose problems are answered all at once
  routes       in host memory, in a line of its own: what is replayed of a token, for all responses of a
               step that a replica learns from, as long as allowed, on each of its ranks
  buckets      broadcasts of weights under way: to rollout ranks, and to ref ranks that are ever reset

Not counted: kernels' workspaces and the allocator's fragmentation. Communication buffers are in
scale.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from r1zero.config.schema import Config
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.models.config import ModelConfig
from r1zero.models.family import family_of
from r1zero.models.lora import adapter_params, lora_config
from r1zero.models.params import (
    ParamSpec,
    Shards,
    Stages,
    num_elements,
    stage_of,
    stage_params,
)
from r1zero.models.sizes import (
    BUCKETS_IN_FLIGHT,
    CHOICE_COPIES,
    CPU_CACHE_BLOCK,
    EXCHANGE_COPIES,
    EXCHANGED_TOKENS,
    LOGIT_CHUNK_ELEMENTS,
    NPU_CACHE_BLOCK,
    OFFLOAD_VISIT_ELEMENTS,
)
from r1zero.preflight.found import dtype_of
from r1zero.preflight.replay import route_bytes

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


def memory(
    cfg: Config,
    placed: Placement,
    policy: ModelConfig,
    reference: ModelConfig | None,
    reward: ModelConfig | None = None,
) -> dict[str, Memory]:
    """Estimate the memory of the fullest rank of each role. A run without a reference has no
    `reference`, one without a reward model no `reward`."""
    models = {}  # of any other role that of the policy
    if reference is not None:
        models["ref"] = reference
    if reward is not None:
        models["reward"] = reward
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
    exchanged = 0
    if span.experts_span_replicas:
        assert shape.experts is not None, "replicas share experts"
        copies = EXCHANGE_COPIES + CHOICE_COPIES * shape.experts.top_k
        exchanged = copies * EXCHANGED_TOKENS * shape.hidden_size * size
    return Memory(
        weights=stage_parameters(shape, span, stage) * size,
        activations=prefill + logits + exchanged,
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


def _reward_memory(cfg: Config, shape: ModelConfig, span: RankGrid, stage: int) -> Memory:
    """As a reference's, without logits: the head has a row or two."""
    size = dtype_of(cfg).itemsize
    reward = cfg.reward
    tokens = reward.max_tokens_per_microbatch or reward.micro_batch_size * cfg.training.seq_length
    layer = largest_layer(shape, span, stage, tokens, size, shape.experts is not None)
    return Memory(weights=stage_parameters(shape, span, stage) * size, activations=layer)


ESTIMATES: Mapping[str, Callable[[Config, ModelConfig, RankGrid, int], Memory]] = {
    "train": _train_memory,
    "rollout": _rollout_memory,
    "ref": _ref_memory,
    "reward": _reward_memory,
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
    """Elements of the keys and values, or of what they are made of, that a rank takes from the others
    of its CP group, in one layer."""
    return (span.cp - 1) * tokens * family_of(shape).gathered_elements(shape, span.tp)


def logits_bytes(shape: ModelConfig, tp: int, tokens: int) -> float:
    """Bytes of three chunks of fp32 logits: the logits, their exponentials, and the product of
    both."""
    return 3 * 4 * min(LOGIT_CHUNK_ELEMENTS, tokens * shape.vocab_size / tp)


def _bucket_bytes(cfg: Config) -> float:
    return BUCKETS_IN_FLIGHT * cfg.training.publish_bucket_megabytes * 2**20
