"""The configuration of a run: every key once, with its type, bounds, default and meaning.

YAML section and key give the path in the tree: `training.train_iters`, `actor_rollout.lr` (in the
file under `actor_rollout_ref`), `algorithm.kl_ctrl.kl_coef`. A key without a default must be given.
Keys are spelled with dashes or underscores. `r1zero/config/load.py` reads them; rules among several
keys are in `r1zero/config/rules.py`. A comment stands above its key, or behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import ConfigDict, Tag, with_config

from r1zero.config.keys import (
    BELOW_1,
    BY_NAME,
    MAP_KEYS,
    NOT_NEGATIVE,
    ONE,
    ROOT,
    Categories,
    Category,
    Choice,
    Columns,
    Count,
    FilePath,
    Flag,
    LayerFreq,
    LayerList,
    Listed,
    Named,
    Number,
    OneOf,
    OrNull,
    Section,
    Settings,
    Text,
    Whole,
    always,
    between,
    embedded,
    one_or_named,
    readable_as,
    rule,
    text_for,
)
from r1zero.distributed.placement import Placement, RoleSize, place
from r1zero.distributed.shutdown import parse_moment
from r1zero.errors import BadInput

CONFIGS = ROOT / "configs"
CHECKPOINTS = "checkpoints"  # their folder in the run folder
ADVANTAGE = "group_norm"  # default of algorithm.advantage
DEFAULT_PARTS = 8  # of training.parts
MOST_RANKS = 2**16  # that an entry of the pool may have
# Linear layers of a decoder layer: queries, keys and values as one; attention's output; gate and up
# as one; down.
Linear = Literal["qkv", "proj", "fc1", "fc2"]
LINEARS: tuple[Linear, ...] = get_args(Linear)

# Types that several keys share.
ModelPath = Annotated[FilePath, embedded("model")]
TrainData = Annotated[FilePath, embedded("train")]
EvalData = Annotated[FilePath, embedded("eval")]
Moment = Annotated[Text, readable_as(lambda text: parse_moment(text, 0.0))]
FromZero = Annotated[Whole, NOT_NEGATIVE]
Decay = Annotated[Number, BELOW_1]
TopP = Annotated[
    Number,
    rule(lambda value: 1e-6 <= value <= 1, "must be at least 1e-06, at most 1; 1.0 turns it off"),
]
TopK = Annotated[
    Whole, rule(lambda value: value >= -1, "must be at least 1, or 0 or -1 to turn it off")
]
# What lies far outside leaves no digits of the other scores.
ScoreWeights = Annotated[
    Listed[Number],
    rule(
        lambda weights: all(-(10**6) <= weight <= 10**6 for weight in weights),
        "must be from -1000000 to 1000000, such as 1, each of them",
    ),
]
Shares = Annotated[
    Listed[Number],
    rule(
        lambda bounds: len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 1,
        "must be two shares from 0 to 1, the smaller first, such as [0.2, 0.8]",
    ),
]
Ranks = Annotated[
    Listed[Whole],
    rule(
        lambda entries: all(1 <= entry <= MOST_RANKS for entry in entries),
        "must list numbers of ranks, such as [8, 6]",
    ),
]


def _is_temperature(value: float) -> bool:
    """Logits divided by it stay finite."""
    return 0.01 <= value <= 100


EvalSamples = Annotated[Whole, between(1, 10**6, 4)]
EvalTemperature = Annotated[
    Number,
    rule(
        lambda value: value == 0 or _is_temperature(value),
        "must be from 0.01 to 100, such as 1.0, or 0 for the most likely token",
    ),
]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """A data set of a blend, and how its prompts are made and scored. A key that is left out is that
    of the run."""

    path: TrainData  # a file, a folder or the prefix of preprocessed files
    # Its share of the prompts, against the weights of the others.
    weight: Annotated[
        Number, rule(lambda value: 0 < value <= 10**6, "must be above 0, at most 1000000")
    ] = 1.0
    map_keys: OrNull[Columns] = None  # columns that differ from training.map_keys
    prompt_type: OrNull[Text] = None  # name of its prompt template; default training.prompt_type
    # Reward functions for its responses alone; default algorithm.verifier_function.
    verifier_function: OrNull[Listed[FilePath]] = None
    # Default algorithm.verifier_weight; with functions of its own equal shares of 1.
    verifier_weight: OrNull[ScoreWeights] = None
    # Of its responses, default training.dataset_category.
    category: OrNull[Category] = None


SeveralSets = Annotated[
    Named[Annotated[Section[TrainingSet], text_for("path")]],
    rule(bool, "must name a data set, such as {math: data/math}"),
]
TrainingSets = Annotated[
    Annotated[TrainData, Tag(ONE)] | Annotated[SeveralSets, Tag(BY_NAME)], one_or_named()
]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """A data set that the run evaluates on, and how. A key that is left out is that of
    eval_data_path."""

    path: EvalData  # a file, a folder or the prefix of preprocessed files
    samples_per_prompt: OrNull[EvalSamples] = None  # default eval_samples_per_prompt
    temperature: OrNull[EvalTemperature] = None  # default eval_temperature
    top_p: OrNull[TopP] = None  # default eval_top_p
    top_k: OrNull[TopK] = None  # default eval_top_k
    # Columns that differ from eval_map_keys, and those from map_keys.
    map_keys: OrNull[Columns] = None
    prompt_type: OrNull[Text] = None  # name of its prompt template; default training.prompt_type
    # Reward functions for its responses alone; default algorithm.verifier_function.
    verifier_function: OrNull[Listed[FilePath]] = None
    # Default algorithm.verifier_weight; with functions of its own equal shares of 1.
    verifier_weight: OrNull[ScoreWeights] = None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What holds for the whole run."""

    # Prompts between two publishes of the weights.
    global_batch_size: Annotated[Whole, between(1, 10**6, 120)]
    seq_length: Count  # longest prompt plus longest response, in tokens
    train_iters: Count  # steps: global batches drawn
    # bf16 weights with fp32 master weights and gradients; else all fp32. Default: true on NPUs,
    # whose attention for generation has no fp32, and false elsewhere.
    bf16: OrNull[Flag] = None
    # Cut activations along the sequence between TP ranks; off at TP 1.
    sequence_parallel: Flag = False
    # Ranks of train, and of ref, that share the tokens of each microbatch: for long responses
    # (docs/context_parallel.md). Bounds of a microbatch are those of all its tokens.
    context_parallel_size: Count = 1
    # Keep Adam's moments and the fp32 master weights in host memory, pinned, between updates: 12 bytes
    # less of device memory for each parameter of a train rank's share, and as many over the bus each
    # way in an update. The numbers stay the same.
    optimizer_offload: Flag = False
    seed: FromZero = 1234  # of data order and sampling
    no_shuffle: Flag = False  # take the prompts in file order
    # How the prompts of a global batch are dealt to its minibatches: drawn, in the order of the
    # draw; expected_length, the shortest answers first, as long as those that a prompt got last
    # time, or by the length of the prompt. Then the first minibatches are learnt from while long
    # answers are still generated (docs/algorithm.md).
    minibatch_order: OneOf[Literal["drawn", "expected_length"]] = "drawn"
    # Folder, with config.json if load has none; default load's.
    tokenizer_name_or_path: OrNull[ModelPath] = None
    # Model families of your own, as module:class or path.py:class (docs/extending.md).
    model_families: Listed[FilePath] = field(default_factory=list)
    prompt_type: Text = "qwen_r1"  # name of a prompt template
    prompt_type_path: OrNull[FilePath] = None  # templates file; default configs/templates.json
    # Column of each part, "" = none; dots reach into structs: reward_model.ground_truth. The prompt
    # may be a list of chat messages (docs/data.md).
    map_keys: Columns = field(default_factory=lambda: dict(MAP_KEYS))
    eval_map_keys: OrNull[Columns] = None  # of eval_data_path, where they differ
    # Which problems a reward model scores (docs/reward_models.md): 1 the reward functions alone, 0 the
    # model alone, one number for each data set of a blend, or one for all; default both. A column,
    # map_keys.category, can say it of each row.
    dataset_category: OrNull[Categories] = None
    skip_bad_rows: Flag = False  # leave rows out that have no question or answer; they are counted
    # Steps between checkpoints, one at the end; default only on early leave.
    save_interval: OrNull[Count] = None
    keep_last: OrNull[Count] = None  # newest checkpoints that are kept; default all
    keep_every: OrNull[Count] = None  # and those of every so many steps
    # And those with the best scores, this many: an evaluation that is due then waits for the next
    # step that saves.
    keep_best: OrNull[Count] = None
    # Which score of evaluation.jsonl says which is best: the highest. Default pass@1, of the first
    # evaluation set.
    best_score: OrNull[Text] = None
    # Write checkpoints beside the next steps; takes host memory for a copy.
    async_save: Flag = False
    on_save_failure: OneOf[Literal["go_on", "stop"]] = "go_on"
    # Checkpoint, or folder of them, to go on from while this run has none.
    resume: OrNull[FilePath] = None
    # Save and leave before: HH:MM:SS or minutes after the start, or a date.
    exit_before: OrNull[Moment] = None
    # End as after train_iters when an evaluation reaches these scores, all of them:
    # {pass@1: 0.9, math500/pass@1: 0.6}
    stop_at: Section[dict[str, Number]] = field(default_factory=dict)
    # Steps between Hugging Face folders of the model, exports/step_000100; kept as checkpoints are.
    export_interval: OrNull[Count] = None
    deterministic: Flag = False  # ask the device for bit-equal repeats, at some cost in speed
    # Tail batching: in most steps responses stop at the length that this share of the groups stays
    # below, such as 0.8. Groups with a longer one are put off and answered together, in steps with
    # the full length of responses (docs/algorithm.md). Such steps draw more or fewer prompts than
    # global_batch_size. null = off.
    tail_batching: OrNull[
        Annotated[
            Number,
            rule(
                lambda share: 0.5 <= share <= 0.99,
                "must be from 0.5 to 0.99, such as 0.8, or null to turn it off",
            ),
        ]
    ] = None
    # How a global batch is learnt from: by an optimizer step for each minibatch of
    # ppo_mini_batch_size responses, or by one step with all of them, whose gradients are accumulated
    # as groups end (ppo_mini_batch_size then has no effect).
    updates: OneOf[Literal["per_minibatch", "accumulate"]] = "per_minibatch"
    # Steps that rollout runs ahead: with 1, the next global batch is drawn while this one is learnt
    # from, by weights that miss one publication (docs/algorithm.md).
    staleness: Annotated[Whole, between(0, 1, 0)] = 0
    # In how many parts a global batch travels from rollout over ref to train: groups of like length,
    # as they end. More let the roles wait less, fewer make larger forward passes. Default: 1 if
    # roles are colocated, else 8.
    parts: OrNull[Annotated[Whole, between(1, 1024, 8)]] = None
    # Of tensors; default hccl, nccl or gloo, as the device is.
    distributed_backend: OrNull[OneOf[Literal["hccl", "nccl", "gloo"]]] = None
    # How long ranks wait for one another.
    distributed_timeout_minutes: Annotated[Whole, between(1, 10**5, 45)] = 45
    # Size of one broadcast of weights.
    publish_bucket_megabytes: Annotated[Whole, between(1, 4096, 64)] = 64
    # Problems answered before the first step and after the last.
    eval_data_path: OrNull[EvalData] = None
    eval_interval: OrNull[Count] = None  # also after every so many steps
    # Responses for each of them: k of avg@k and of the largest pass@k.
    eval_samples_per_prompt: EvalSamples = 1
    # 0 = the most likely token; default actor_rollout's, as for the two below.
    eval_temperature: OrNull[EvalTemperature] = None
    eval_top_p: OrNull[TopP] = None
    eval_top_k: OrNull[TopK] = None
    # More data sets to evaluate on, by names, which stand in front of their scores: math500/pass@1.
    # {math500: data/math500.parquet, aime: {path: data/aime.parquet, samples_per_prompt: 16}}
    # (docs/evaluation.md).
    evaluation: Named[Annotated[Section[EvaluationSet], text_for("path")]] = field(
        default_factory=dict
    )
    # Metrics also go to tensorboard, wandb, swanlab, trackio.
    logger: Listed[Text] = field(default_factory=list)
    # Steps traced by the profiler into profile/.
    profile_steps: Annotated[
        Listed[Whole],
        rule(lambda steps: all(step >= 1 for step in steps), "must list steps from 1 on"),
    ] = field(default_factory=list)
    # What happens when something is not so that must hold in every step (docs/observing.md).
    on_broken_invariant: OneOf[Literal["stop", "warn"]] = "stop"
    # Publishes between two compared by checksums; 0 = only the first.
    publish_check_interval: FromZero = 10
    # Steps between those whose samples are kept in samples/, and the last; 0 = none.
    samples_interval: FromZero = 1
    # Steps between writings of report.html (1% of the time at most); 0 = at the end.
    report_interval: FromZero = 5

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out problems to answer."""
        return self.eval_data_path is not None or bool(self.evaluation)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a layer computes
    (W + alpha / rank * B A) x, and only A and B learn."""

    rank: OrNull[Count] = None  # default off: all weights learn
    alpha: OrNull[
        Annotated[Number, rule(lambda value: 0 < value <= 10**6, "must be above 0, such as 16")]
    ] = None  # default twice the rank
    # Linear layers with adapters: those of all decoder layers of these names. qkv has one A for
    # queries, keys and values, fc1 one for gate and up.
    targets: Annotated[
        Listed[OneOf[Linear]],
        rule(
            lambda names: 0 < len(names) == len(set(names)),
            "must name some layers once each, such as [qkv, proj, fc1, fc2]",
        ),
    ] = field(default_factory=lambda: list(LINEARS))


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class ActorRollout:
    """The model that learns: how it is trained, and how it generates."""

    # Start weights: Hugging Face folder or Megatron checkpoint (docs/checkpoints.md).
    load: ModelPath
    # Prompts: a .parquet, .arrow, .jsonl, .json, .csv or .tsv file, a folder of such files, without
    # those of test or validation sets, the prefix of preprocessed .bin/.idx files, or a blend of
    # these by weights: 0.7,data/math,0.3,data/gsm8k.parquet. Or names of data sets, each with path,
    # weight, map_keys, prompt_type, verifier_function and verifier_weight of its own (docs/data.md):
    # {math: {path: data/math, weight: 2}, code: {path: data/code, verifier_function: [mine.py:runs]}}
    data_path: TrainingSets
    ppo_mini_batch_size: Count  # responses between two optimizer steps
    # Responses of a prompt: a group.
    n_samples_per_prompt: Annotated[
        Whole,
        rule(
            lambda value: 2 <= value <= 10**6,
            "must be at least 2, at most 1000000: group_norm compares the responses of a prompt",
        ),
    ]
    model: OrNull[Text] = None  # name of a model file listed in `defaults`
    # Folder of checkpoints, of one run at a time; default checkpoints/ in the run folder.
    save: OrNull[FilePath] = None
    # Generation.
    # Rollout engine: native, vllm (docs/rollout.md) or your own as module:class or path.py:class
    # (docs/extending.md).
    engine: Text = "native"
    # No effect: responses are generated by continuous batching.
    num_samples_per_step: Count = 1
    do_sample: Annotated[Flag, always(True, "greedy responses of a group are all equal")] = True
    temperature: Annotated[
        Number, rule(_is_temperature, "must be from 0.01 to 100, such as 1.0")
    ] = 1.0
    top_p: TopP = 1.0  # 1 = off
    top_k: TopK = 0  # 0 or -1 = off
    # More tokens that end a response, as texts or ids: ["</answer>", 151645]. Those that model,
    # tokenizer and prompt template name always do (docs/rollout.md); the run says at its start
    # which these are.
    stop: Listed[Text] = field(default_factory=list)
    # Longer prompts are dropped; the response gets the rest of seq_length.
    max_prompt_length: Count = 512
    # Tokens that a rollout replica may hold in its KV cache.
    max_tokens_to_oom: Whole = 12000
    # Decoded together in a replica; default all that fit there.
    max_running_samples: OrNull[Count] = None
    # Capture decoding steps as graphs, which only NPUs can (not yet run on hardware there). Default:
    # true on NPUs, false elsewhere.
    decode_graphs: OrNull[Flag] = None
    # Of a model with experts: the trainer's routers repeat which experts the rollout engine sent each
    # token to (docs/moe.md). Default: true where the engine tells them, which the native one does.
    routing_replay: OrNull[Flag] = None
    # Learning.
    micro_batch_size: Count = 1  # responses in one forward and backward pass of a replica
    # If given, this many tokens at most instead.
    max_tokens_per_microbatch: OrNull[Whole] = None
    # full: keep only each layer's input for the backward pass.
    recompute_granularity: OrNull[OneOf[Literal["full"]]] = None
    ppo_epochs: Count = 1  # passes over a global batch
    # Adapters learn in place of the weights: far less memory on train ranks. Needs an lr about 10
    # times that of full training. They are merged for generation and in model/, and lie by
    # themselves in adapter/, which peft loads.
    lora: Section[Lora] = field(default_factory=Lora)
    shuffle_minibatch: Annotated[
        Flag,
        always(
            False,
            "minibatches are composed before generation starts, and prompts are shuffled anyway "
            "unless training.no_shuffle is set",
        ),
    ] = False
    # Where the loss takes its bounds from here, as grpo does; default 0.2.
    clip_ratio: OrNull[
        Annotated[Number, rule(lambda value: 0 < value < 1, "must be between 0 and 1, such as 0.2")]
    ] = None
    # The ratio is clipped to [1 - low, 1 + high]; default of both clip_ratio.
    clip_ratio_low: OrNull[
        Annotated[
            Number, rule(lambda value: 0 < value <= 1, "must be above 0, at most 1, such as 0.2")
        ]
    ] = None
    clip_ratio_high: OrNull[
        Annotated[
            Number,
            rule(lambda value: 0 < value <= 100, "must be above 0, at most 100, such as 0.28"),
        ]
    ] = None
    # Weight of the entropy bonus in the loss; with entropy_ctrl.type adaptive that of the first step.
    entropy_coeff: Annotated[Number, between(0, 1, 0.001)] = 0.0
    lr: Annotated[Number, between(0, 1, 1e-6)] = 1e-6
    min_lr: Annotated[Number, between(0, 1, 0)] = 0.0
    lr_decay_style: OneOf[Literal["constant", "linear", "cosine", "inverse-square-root"]] = (
        "constant"
    )
    lr_warmup_fraction: OrNull[Decay] = None  # of all updates of the run
    lr_warmup_iters: FromZero = 0  # in updates; or this
    weight_decay: Annotated[Number, between(0, 1, 0.01)] = 0.01
    # Limit of the global gradient norm; 0 = off.
    clip_grad: Annotated[Number, NOT_NEGATIVE] = 1.0
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    # 0 in fp32 would divide 0 by 0 where no gradient was.
    adam_eps: Annotated[Number, between(1e-20, 1, 1e-8)] = 1e-8
    # Layout.
    num_gpus_for_train: Count = 1  # ranks; they come first
    num_gpus_for_infer: Count = 1
    tensor_model_parallel_size: Count = 1  # of train
    pipeline_model_parallel_size: Count = 1  # of train
    # Of train: ranks of a pipeline stage that share the experts of each layer, across replicas.
    expert_model_parallel_size: Count = 1
    # Of train: layers of each pipeline stage, as [7, 8, 7] or "7,8,7". Default: evenly.
    num_layer_list: OrNull[LayerList] = None
    infer_tensor_parallel_size: OrNull[Count] = None  # default that of train
    # Of rollout: ranks that share the experts of each layer, a multiple of its TP. Default: the TP ranks
    # of a replica. More: several replicas, which then run in step.
    infer_expert_parallel_size: OrNull[Count] = None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """The reference model of the KL term, which does not learn.

    There is none where nothing asks for it: see resource_pool.ref.
    """

    model: OrNull[Text] = None  # default that of actor_rollout
    load: OrNull[ModelPath] = None  # default actor_rollout.load
    # Steps between two resets, in which the reference takes the policy's weights, as DeepSeek-R1-Zero's
    # does every 400 updates; the checkpoints hold it from then on. Default: it stays what it was
    # loaded with.
    reset_interval: OrNull[Count] = None
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    expert_model_parallel_size: Count = 1
    num_layer_list: OrNull[LayerList] = None  # layers of each pipeline stage; default: evenly
    micro_batch_size: Count = 1  # responses in one forward pass
    # If given, this many tokens at most instead.
    max_tokens_per_microbatch: OrNull[Whole] = None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """Reward functions score the responses (docs/rewards.md); a reward model, too, where
    resource_pool.reward names ranks for it (docs/reward_models.md)."""

    model: OrNull[Text] = None  # model file of the reward model; default none
    # Its weights: a Hugging Face folder or a Megatron checkpoint, with the value head.
    load: OrNull[ModelPath] = None
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    micro_batch_size: Count = 1  # responses in one forward pass
    # If given, this many tokens at most instead.
    max_tokens_per_microbatch: OrNull[Whole] = None
    # What it reads: by default the tokens of prompt and response as they were sampled. Else their text,
    # as this template renders it; tokenizer_template: that of the reward model's own tokenizer.
    prompt_type: OrNull[Text] = None
    # Folder of its tokenizer, with config.json if load has none; default load's.
    tokenizer_name_or_path: OrNull[ModelPath] = None
    # What becomes of its value. group: less the mean of the group, by its standard deviation. fixed:
    # less mean, by std. none: as it is. Then no further than clip from 0.
    normalize: OneOf[Literal["group", "fixed", "none"]] = "group"
    mean: OrNull[Number] = None  # default that of its config.json
    std: OrNull[Number] = None
    clip: OrNull[Number] = None
    # Of a process reward model: which of the values of a response's steps is that of the response.
    of_steps: OneOf[Literal["min", "mean", "last"]] = "min"
    # That the result is multiplied with, before it is added to the sum of the reward functions.
    weight: Annotated[Number, between(-(10**6), 10**6, 1)] = 1.0
    # false: the reward is that of the reward model alone; the reward functions still tell what is right.
    # With a reward model, and neither this nor algorithm.verifier_function in the configuration: false.
    verifier: Flag = True
    # Of the reward functions, by name: {cosine: {exceeded: -5}, my_function: {bonus: 0.5}}. Keys,
    # bounds, defaults and meanings stand at each function, those built in in
    # r1zero/reward/functions/. Older keys: accuracy, cosine, overlong_cache, repetition_ngram.
    settings: Settings = field(default_factory=dict)
    # Processes that score, beside each rollout replica.
    workers: Annotated[Whole, between(1, 1024, 2)] = 2
    # For one call of one reward function; then its worker is killed.
    deadline_seconds: Annotated[Number, between(0.01, 86400, 10)] = 10.0
    # That a worker may grow by after its start.
    worker_memory_megabytes: Annotated[
        Whole, rule(lambda value: value >= 64, "must be at least 64, such as 1024")
    ] = 1024
    # Share of responses whose scoring may fail; beyond it the run stops.
    max_failure_rate: Annotated[
        Number,
        rule(lambda value: 0 <= value <= 1, "must be from 0 to 1, such as 0.05; 1 never stops"),
    ] = 0.05


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class KlCtrl:
    """The coefficient of the KL term."""

    # adaptive: steered so that the KL stays near target_kl.
    type: OneOf[Literal["fixed", "adaptive"]] = "fixed"
    # 0: no KL term, and no reference unless resource_pool.ref names ranks.
    kl_coef: Annotated[Number, between(0, 100, 0.05)] = 0.05
    target_kl: OrNull[Number] = None
    horizon: OrNull[Whole] = None  # responses within which an adaptive coefficient follows


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyCtrl:
    """The coefficient of the entropy bonus."""

    # adaptive: after each step entropy_coeff grows by `step` if the entropy was at most `target`,
    # and shrinks by it if not; while the entropy is above the target there is no bonus.
    type: OneOf[Literal["fixed", "adaptive"]] = "fixed"
    target: OrNull[Number] = None  # nats a token, such as 0.2
    step: Annotated[Number, between(1e-6, 1, 0.005)] = 0.005
    max: Annotated[Number, between(0, 1, 0.1)] = 0.1  # of the coefficient; 0 is the least


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Of the mismatch between rollout engine and trainer.

    A token has w = p_old / p_rollout: how much more likely the trainer holds it than the engine that
    drew it. Weights are of the policy loss alone, not of KL and entropy, and have no gradient.
    """

    # clip: min(w, cap) (TIS, truncated importance sampling); mask: w from low to high, 0 outside
    # (IcePop); none: 1. auto: clip where training.staleness is 1 and old_logprobs recompute, so that
    # other weights drew than learn first; else none.
    weights: OneOf[Literal["auto", "none", "clip", "mask"]] = "auto"
    cap: Annotated[Number, between(1, 1000, 2)] = 2.0
    low: Annotated[Number, between(0, 1, 0.5)] = 0.5
    high: Annotated[Number, between(1, 1000, 5)] = 5.0
    # Responses without policy loss: sequence, those whose geometric mean of w is below reject_low or
    # above reject_high; token, those with any w below veto. They stay in the denominators.
    reject: OneOf[Literal["none", "sequence", "token"]] = "none"
    # A geometric mean is the nearer to 1 the longer the response: for thousands of tokens 0.999 and
    # 1.002 are in use.
    reject_low: Annotated[Number, between(0, 1, 0.99)] = 0.99
    reject_high: Annotated[Number, between(1, 1000, 1.01)] = 1.01
    veto: Annotated[Number, between(0, 1, 1e-4)] = 1e-4

    def weights_for(self, stale: bool) -> str:
        """What auto stands for. `stale`: other weights drew than learn first, by recomputed log-probs."""
        if self.weights != "auto":
            return self.weights
        return "clip" if stale else "none"


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The objective: advantages, policy loss and its aggregation, KL in the loss; and the
    rewards."""

    # Discount of the score per token.
    gamma: Annotated[
        Number, always(1.0, "group_norm gives all tokens of a response one advantage")
    ] = 1.0
    lam: Number = 0.95
    adv_estimator: OrNull[Text] = None  # older name of the next key
    # From the rewards of groups to the advantages of their responses (docs/algorithm.md): group_norm,
    # group_mean, leave_one_out, lite_ppo, reinforce_pp, reinforce_pp_baseline, max_rl, opo, gdpo,
    # pass_at_k; your own as module:function or path.py:function. Default group_norm.
    advantage: OrNull[Text] = None
    advantage_settings: Settings = field(default_factory=dict)  # of that estimator: {k: 4}
    # Policy loss: grpo, dual_clip, cispo, sapo, reinforce, gspo, gmpo or your own.
    loss: Text = "grpo"
    loss_settings: Settings = field(default_factory=dict)  # of that loss: docs/extending.md
    # What a response weighs in the loss of an update: token_mean, sequence_mean, sequence_sum,
    # constant, group_token_mean or your own (docs/algorithm.md). Default: what goes with the loss,
    # sequence_mean for gspo and gmpo, else token_mean.
    aggregation: OrNull[Text] = None
    # Log-probs that the ratio of the loss is taken to: those of the trainer under the weights at the
    # start of the step, or those that the rollout engine noted, which saves a forward pass and a
    # copy of the weights; not for reinforce, which has no ratio, and gspo, whose bounds are too narrow.
    old_logprobs: OneOf[Literal["recompute", "rollout"]] = "recompute"
    correction: Section[Correction] = field(default_factory=Correction)
    # Whiten advantages once more over the tokens of a minibatch.
    advantage_whiten: Flag = False
    # What is told as the KL of a token: k1, k2, k3, which older configurations call kl, mse and
    # low_var_kl, or abs. All are held by the same gradient, that of the KL.
    kl_penalty: Annotated[
        Literal["kl", "abs", "mse", "low_var_kl", "k1", "k2", "k3"],
        Choice(full="it needs all logits of both models, which are never held"),
    ] = "low_var_kl"
    # Where the KL term stands: in the loss, or in the reward of each token, whose advantage is then
    # less by kl_coef times the log-ratio to the reference. Both have the same gradient until the
    # weights move; then the ratio, bounds and weights of the policy loss hold for the KL, too.
    kl_in: OneOf[Literal["loss", "reward"]] = "loss"
    kl_ctrl: Section[KlCtrl] = field(default_factory=KlCtrl)
    entropy_ctrl: Section[EntropyCtrl] = field(default_factory=EntropyCtrl)
    missing_eos_penalty: Number = 0.0
    # Groups whose answers are all right or all wrong, by the verdicts of acc and the like (without
    # one: whose rewards are all equal), teach nothing. keep: they train like the others. skip: those
    # whose rewards are equal, too, have no advantage, so ref and train pass over them; without KL and
    # entropy bonus the gradient is the same. A minibatch of such groups alone takes no step, where
    # keep takes one with momentum and weight decay. A group with a failed score is kept.
    # replace: they are dropped by the verdicts alone, whatever the rewards, and more prompts are drawn
    # until global_batch_size groups are kept, the first ones in the order of the data (DAPO's dynamic
    # sampling). A minibatch is then whole groups of those.
    equal_groups: OneOf[Literal["keep", "skip", "replace"]] = "keep"
    # Rounds in which prompts are drawn with equal_groups replace, at most. Then the step learns from what
    # there is.
    max_rounds: Annotated[Whole, between(1, 100, 3)] = 3
    # Groups train whose share of right answers is between these two, ends included: [0.2, 0.8]. The
    # others are passed over, or with equal_groups replace replaced. Default: any share.
    keep_accuracy: OrNull[Shares] = None
    # Leave responses that were cut at their longest out of the loss. Their rewards still count in the
    # advantages of the others, their tokens in what the loss is divided by.
    mask_truncated: Flag = False
    # Reward functions (docs/rewards.md); your own as module:function or path.py:function.
    verifier_function: Listed[FilePath] = field(default_factory=lambda: ["acc"])
    # The reward is their weighted sum.
    verifier_weight: ScoreWeights = field(default_factory=lambda: [1.0])

    @property
    def accuracy_bounds(self) -> tuple[float, float] | None:
        """Least and largest share of right answers of a group that trains."""
        if self.keep_accuracy is None:
            return None
        low, high = self.keep_accuracy
        return low, high


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcePool:
    """Ranks of each role.

    They fill the nodes in the launcher's order, so only sums of the lists count.
    """

    actor_rollout: Ranks = field(default_factory=list)  # default [train + infer ranks]
    # Default one replica, or none more if colocated. With kl_coef 0 and type fixed the default is no
    # reference at all, and rollout hands over to train; ranks that are named all the same hold one,
    # whose KL is told and does nothing. With actor_rollout.lora the default is none either: train
    # ranks look back with the adapters switched off.
    ref: Ranks = field(default_factory=list)
    # Of the reward model; default, as [0]: there is none.
    reward: Annotated[
        Listed[Whole],
        rule(
            lambda entries: all(0 <= entry <= MOST_RANKS for entry in entries),
            "must list numbers of ranks, such as [2]",
        ),
    ] = field(default_factory=list)
    # Every rank of the pool has every role; num_gpus_* then do not matter.
    colocate: Flag = False
    ranks_per_node: OrNull[Count] = None  # where the nodes end, if the launcher does not tell


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What a model file under configs/model/ may say about the network.

    It is compared with the model folder's config.json, which rules; without the folder (a dry run
    elsewhere) it stands in for it.
    """

    num_layers: OrNull[Whole] = None
    hidden_size: OrNull[Whole] = None
    ffn_hidden_size: OrNull[Whole] = None
    num_attention_heads: OrNull[Whole] = None
    num_query_groups: OrNull[Whole] = None
    kv_channels: OrNull[Whole] = None
    padded_vocab_size: OrNull[Whole] = None
    max_position_embeddings: OrNull[Whole] = None
    norm_epsilon: OrNull[Number] = None
    rotary_base: OrNull[Number] = None
    untie_embeddings_and_output_weights: OrNull[Flag] = None
    add_qkv_bias: OrNull[Flag] = None
    qk_layernorm: OrNull[Flag] = None
    num_experts: OrNull[Whole] = None
    moe_router_topk: OrNull[Whole] = None
    moe_ffn_hidden_size: OrNull[Whole] = None  # of an expert
    moe_layer_freq: OrNull[LayerFreq] = None  # default: all layers have experts
    moe_router_pre_softmax: OrNull[Flag] = None  # softmax over all experts, not over the chosen
    norm_topk_prob: OrNull[Flag] = None  # weights of the chosen add up to 1
    moe_router_score_function: OrNull[Text] = None  # softmax or sigmoid; default: softmax
    moe_router_enable_expert_bias: OrNull[Flag] = None  # which counts in the choice only
    moe_router_num_groups: OrNull[Whole] = None  # of experts; null: one
    moe_router_group_topk: OrNull[Whole] = None  # of which a token takes its experts
    moe_router_topk_scaling_factor: OrNull[Number] = None  # of the sum of a token's experts
    moe_shared_expert_intermediate_size: OrNull[Whole] = None  # of all shared experts together
    multi_latent_attention: OrNull[Flag] = None
    q_lora_rank: OrNull[Whole] = None  # of the latent of queries; null: there is none
    kv_lora_rank: OrNull[Whole] = None  # of the latent of keys and values
    qk_head_dim: OrNull[Whole] = None  # columns of a head without a position
    qk_pos_emb_head_dim: OrNull[Whole] = None  # and those with one
    v_head_dim: OrNull[Whole] = None
    rope_type: OrNull[Text] = None  # rope or yarn; default: rope
    rotary_scaling_factor: OrNull[Number] = None  # of yarn, as the five below
    beta_fast: OrNull[Number] = None
    beta_slow: OrNull[Number] = None
    mscale: OrNull[Number] = None
    mscale_all_dim: OrNull[Number] = None
    original_max_position_embeddings: OrNull[Whole] = None
    hf_model_type: OrNull[Text] = None  # where the other keys do not tell the family


T = TypeVar("T")


def filled(value: T | None) -> T:
    """A key that stands open until loading or resolving fills in its default."""
    assert value is not None, "the default is filled in by config/load.py or preflight/resolve.py"
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A run. Paths are relative to the current directory."""

    name: Text
    output_dir: FilePath  # the run folder: one run at a time writes into it (docs/checkpoints.md)
    training: Training
    actor_rollout: ActorRollout
    ref: Ref
    reward: Reward
    algorithm: Algorithm
    resource_pool: ResourcePool
    model: dict[str, dict[str, Any]]  # keys of Network that the model files give, by model name
    source: str | None = field(default=None, compare=False)  # file that it was read from; no key
    preset: str | None = field(default=None, compare=False)  # what a preset set, in words; no key

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return Path(self.actor_rollout.save or Path(self.output_dir) / CHECKPOINTS)

    @property
    def response_budget(self) -> int:
        """Longest response in tokens."""
        return self.training.seq_length - self.actor_rollout.max_prompt_length

    @property
    def num_samples(self) -> int:
        """Responses in a global batch."""
        return self.training.global_batch_size * self.actor_rollout.n_samples_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in a global batch."""
        return self.num_samples // self.minibatch_size * self.actor_rollout.ppo_epochs

    @property
    def minibatch_size(self) -> int:
        """Responses that an optimizer step learns from."""
        if self.training.updates == "accumulate":
            return self.num_samples
        return self.actor_rollout.ppo_mini_batch_size

    @property
    def keeps_start_weights(self) -> bool:
        """Train ranks hold the weights at the start of a step until its last update, for old
        log-probs of what comes after the first."""
        if self.algorithm.old_logprobs == "rollout":
            return False
        # a short step of tail batching may end with more groups than others draw
        is_uneven = self.training.tail_batching and self.training.updates == "per_minibatch"
        return bool(is_uneven) or self.minibatch_size < self.num_samples

    @property
    def parts(self) -> int:
        """Parts in which a global batch travels, at most. Colocated roles do not work side by side."""
        if self.training.parts is not None:
            return self.training.parts
        if self.resource_pool.colocate:
            return 1
        return DEFAULT_PARTS

    @property
    def has_kl_term(self) -> bool:
        """The KL to a reference is in the objective."""
        return self.algorithm.kl_ctrl.kl_coef > 0  # steered or not: 0 stays 0

    @property
    def has_reference(self) -> bool:
        """A reference model is loaded: a KL term needs it, or ranks are named that tell its KL."""
        needs_one = self.has_kl_term and not self.actor_rollout.lora.rank
        return needs_one or bool(self.resource_pool.ref)

    @property
    def base_is_reference(self) -> bool:
        """The KL term's reference is the model below the adapters, on the train ranks."""
        return self.has_kl_term and not self.has_reference

    @property
    def has_reward_model(self) -> bool:
        """A reward model scores responses, beside the reward functions or alone."""
        return any(self.resource_pool.reward)

    @property
    def score_weights(self) -> list[float]:
        """Weights of the run's reward functions in the reward, and behind them that of a reward model."""
        weights = self.algorithm.verifier_weight
        if not self.has_reward_model:
            return weights
        return [*weights, self.reward.weight]

    @property
    def world_size(self) -> int:
        """Ranks that the resource pool asks for."""
        pool = self.resource_pool
        return sum(pool.actor_rollout) + sum(pool.ref) + sum(pool.reward)

    def model_keys(self, role: str) -> dict[str, Any]:
        """What the model file says about the network of `role`; empty when it names none."""
        names = {"ref": self.ref.model, "reward": self.reward.model}
        name = names.get(role, self.actor_rollout.model)
        return self.model.get(name, {}) if name else {}


def placement(cfg: Config, world_size: int) -> Placement:
    """Lay the roles out in a world. BadInput when they do not fit it.

    A world of one rank holds all roles, whatever the counts.
    """
    sizes = role_sizes(cfg)
    if cfg.resource_pool.colocate or world_size == 1:
        everywhere = {role: replace(size, ranks=world_size) for role, size in sizes.items()}
        return place(everywhere, colocate=True)
    total = sum(size.ranks for size in sizes.values())
    if total != world_size:
        needed = " + ".join(f"{size.ranks} {role}" for role, size in sizes.items())
        raise BadInput(
            f"the world has {world_size} ranks, but num_gpus_for_train, num_gpus_for_infer and the "
            f"other roles of resource_pool need {total} ({needed}): start that many processes, or 1 "
            "for a world that holds all roles"
        )
    return place(sizes, colocate=False)


def role_sizes(cfg: Config) -> dict[str, RoleSize]:
    """The roles in the order of their ranks, with ranks of their own; see `with_ranks`. A run
    without a reference has no ref, one without a reward model no reward."""
    actor = cfg.actor_rollout
    ref = cfg.ref
    context_parallel = cfg.training.context_parallel_size
    rollout_tp = actor.infer_tensor_parallel_size or actor.tensor_model_parallel_size
    sizes = {
        "train": RoleSize(
            actor.num_gpus_for_train,
            tp=actor.tensor_model_parallel_size,
            pp=actor.pipeline_model_parallel_size,
            cp=context_parallel,
            ep=actor.expert_model_parallel_size,
            num_layer_list=tuple(actor.num_layer_list or ()),
        ),
        "rollout": RoleSize(
            actor.num_gpus_for_infer, tp=rollout_tp, ep=actor.infer_expert_parallel_size or 1
        ),
    }
    if cfg.has_reference:
        sizes["ref"] = RoleSize(
            sum(cfg.resource_pool.ref),
            tp=ref.tensor_model_parallel_size,
            pp=ref.pipeline_model_parallel_size,
            cp=context_parallel,
            ep=ref.expert_model_parallel_size,
            num_layer_list=tuple(ref.num_layer_list or ()),
        )
    if cfg.has_reward_model:
        sizes["reward"] = RoleSize(
            sum(cfg.resource_pool.reward),
            tp=cfg.reward.tensor_model_parallel_size,
            pp=cfg.reward.pipeline_model_parallel_size,
        )
    return sizes


def with_ranks(cfg: Config, ranks: Mapping[str, int]) -> tuple[Config, str]:
    """Give each role of `role_sizes` so many ranks; the configuration, and its keys in words."""
    train = ranks["train"]
    rollout = ranks["rollout"]
    actor = replace(cfg.actor_rollout, num_gpus_for_train=train, num_gpus_for_infer=rollout)
    pool = replace(cfg.resource_pool, actor_rollout=[train + rollout], ranks_per_node=None)
    told = f"num_gpus_for_train {train} and num_gpus_for_infer {rollout}"
    if "ref" in ranks:
        ref = ranks["ref"]
        pool = replace(pool, ref=[ref])
        told = f"num_gpus_for_train {train}, num_gpus_for_infer {rollout} and resource_pool.ref [{ref}]"
    if "reward" in ranks:
        pool = replace(pool, reward=[ranks["reward"]])
        told += f", resource_pool.reward [{ranks['reward']}]"
    return replace(cfg, actor_rollout=actor, resource_pool=pool), told


def nodes(cfg: Config, world_size: int) -> list[int]:
    """Node of each rank when no launcher tells: from ranks_per_node, else from the resource pool.

    Several entries under resource_pool.actor_rollout mean several nodes; the largest fills one.
    """
    per_node = cfg.resource_pool.ranks_per_node
    if per_node is None:
        entries = cfg.resource_pool.actor_rollout
        if len(entries) > 1:
            per_node = max(entries + cfg.resource_pool.ref + cfg.resource_pool.reward)
        else:
            per_node = world_size
    return [rank // per_node for rank in range(world_size)]
