"""The configuration of a run: every key once, with its default and its meaning.

YAML section and key give the path in the tree: `training.train_iters`, `actor_rollout.lr` (in the
file under `actor_rollout_ref`), `algorithm.kl_ctrl.kl_coef`. A key without a default must be given.
`r1zero/config/load.py` reads it, `r1zero/preflight/checks.py` holds its rules. Keys are spelled
with dashes or underscores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1zero.distributed.placement import Placement, RoleSize, place
from r1zero.errors import BadInput
from r1zero.weights.detect import config_folder

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = "checkpoints"  # their folder in the run folder

MAP_KEYS = {"prompt": "question", "query": "", "response": "ground_truth_answer", "system": ""}

# What a model file under configs/model/ may say about the network. It is compared with the model
# folder's config.json, which rules; without the folder (a dry run elsewhere) it stands in for it.
SHAPE_KEYS: dict[str, type] = {
    "num_layers": int,
    "hidden_size": int,
    "ffn_hidden_size": int,
    "num_attention_heads": int,
    "num_query_groups": int,
    "kv_channels": int,
    "padded_vocab_size": int,
    "max_position_embeddings": int,
    "norm_epsilon": float,
    "rotary_base": float,
    "untie_embeddings_and_output_weights": bool,
    "add_qkv_bias": bool,
    "qk_layernorm": bool,
    "hf_model_type": str,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What holds for the whole run."""

    global_batch_size: int  # prompts between two publishes of the weights
    seq_length: int  # longest prompt plus longest response, in tokens
    train_iters: int  # steps: global batches drawn
    # bf16 weights with fp32 master weights and gradients; else all fp32. Default: true on NPUs,
    # whose attention for generation has no fp32, and false elsewhere.
    bf16: bool | None = None
    # cut activations along the sequence between TP ranks; off at TP 1
    sequence_parallel: bool = False
    seed: int = 1234  # of data order and sampling
    no_shuffle: bool = False  # take the prompts in file order
    # folder, with config.json if load has none; default load's
    tokenizer_name_or_path: str | None = None
    prompt_type: str = "qwen_r1"  # name of a prompt template
    prompt_type_path: str | None = None  # templates file; default configs/templates.json
    # Column of each part, "" = none; dots reach into structs: reward_model.ground_truth. The prompt
    # may be a list of chat messages (docs/data.md).
    map_keys: dict[str, str] = field(default_factory=lambda: dict(MAP_KEYS))
    eval_map_keys: dict[str, str] | None = None  # of eval_data_path, where they differ
    skip_bad_rows: bool = False  # leave rows out that have no question or answer; they are counted
    # steps between checkpoints, one at the end; default only on early leave
    save_interval: int | None = None
    keep_last: int | None = None  # newest checkpoints that are kept; default all
    keep_every: int | None = None  # and those of every so many steps
    # write checkpoints beside the next steps; takes host memory for a copy
    async_save: bool = False
    on_save_failure: str = "go_on"  # or stop
    # checkpoint, or folder of them, to go on from while this run has none
    resume: str | None = None
    # save and leave before: HH:MM:SS or minutes after the start, or a date
    exit_before: str | None = None
    deterministic: bool = False  # ask the device for bit-equal repeats, at some cost in speed
    # of tensors; default hccl, nccl or gloo, as the device is
    distributed_backend: str | None = None
    distributed_timeout_minutes: int = 45  # how long ranks wait for one another
    publish_bucket_megabytes: int = 64  # size of one broadcast of weights
    eval_data_path: str | None = None  # problems answered before the first step and after the last
    eval_interval: int | None = None  # also after every so many steps
    # responses for each of them: k of avg@k and of the largest pass@k
    eval_samples_per_prompt: int = 1
    # 0 = the most likely token; default actor_rollout's, as below
    eval_temperature: float | None = None
    eval_top_p: float | None = None
    eval_top_k: int | None = None
    # metrics also go to tensorboard, wandb, swanlab, trackio
    logger: list[str] = field(default_factory=list)
    # steps traced by the profiler into profile/
    profile_steps: list[int] = field(default_factory=list)
    # or warn: what must hold in every step (docs/observing.md) does not
    on_broken_invariant: str = "stop"
    # publishes between two compared by checksums; 0 = only the first
    publish_check_interval: int = 10
    # steps between writings of report.html (1% of the time at most); 0 = at the end
    report_interval: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorRollout:
    """The model that learns: how it is trained, and how it generates."""

    load: str  # start weights: Hugging Face folder or Megatron checkpoint (docs/checkpoints.md)
    # Prompts: a .parquet, .arrow, .jsonl, .json, .csv or .tsv file, a folder of such files, without
    # those of test or validation sets, the prefix of preprocessed .bin/.idx files, or a blend of
    # these by weights: 0.7,data/math,0.3,data/gsm8k.parquet
    data_path: str
    ppo_mini_batch_size: int  # responses between two optimizer steps
    n_samples_per_prompt: int  # responses of a prompt: a group
    model: str | None = None  # name of a model file listed in `defaults`
    # folder of checkpoints, of one run at a time; default checkpoints/ in the run folder
    save: str | None = None
    # Generation.
    num_samples_per_step: int = 1  # takes part in the divisibility rule of ppo_mini_batch_size only
    do_sample: bool = True  # must be on: greedy responses of a group are all equal
    temperature: float = 1.0
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 or -1 = off
    # More tokens that end a response, as texts or ids: ["</answer>", 151645]. Those that model,
    # tokenizer and prompt template name always do (docs/rollout.md); the run says at its start
    # which these are.
    stop: list[str] = field(default_factory=list)
    # longer prompts are dropped; the response gets the rest of seq_length
    max_prompt_length: int = 512
    max_tokens_to_oom: int = 12000  # tokens that a rollout replica may hold in its KV cache
    # decoded together in a replica; default all that fit there
    max_running_samples: int | None = None
    decode_graphs: bool = False  # NPUs: capture decoding steps as graphs (not yet run on hardware)
    # Learning.
    micro_batch_size: int = 1  # responses in one forward and backward pass of a replica
    max_tokens_per_microbatch: int | None = None  # if given, this many tokens at most instead
    # full: keep only each layer's input for the backward pass
    recompute_granularity: str | None = None
    ppo_epochs: int = 1  # passes over a global batch
    # must be off: minibatches are composed before generation starts
    shuffle_minibatch: bool = False
    clip_ratio: float = 0.2
    # ratio is clipped to [1 - low, 1 + high]; default clip_ratio
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    entropy_coeff: float = 0.0  # weight of the entropy bonus in the loss
    lr: float = 1e-6
    min_lr: float = 0.0
    lr_decay_style: str = "constant"
    lr_warmup_fraction: float | None = None  # of all updates of the run
    lr_warmup_iters: int = 0  # in updates; or this
    weight_decay: float = 0.01
    clip_grad: float = 1.0  # limit of the global gradient norm; 0 = off
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    # Layout.
    num_gpus_for_train: int = 1  # ranks; they come first
    num_gpus_for_infer: int = 1
    tensor_model_parallel_size: int = 1  # of train
    pipeline_model_parallel_size: int = 1  # of train
    infer_tensor_parallel_size: int | None = None  # default that of train


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """The frozen model that the KL term looks back to."""

    model: str | None = None  # default that of actor_rollout
    load: str | None = None  # default actor_rollout.load
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    micro_batch_size: int = 1  # responses in one forward pass
    max_tokens_per_microbatch: int | None = None  # if given, this many tokens at most instead


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What the scorer acc gives. MindSpeed-LLM's three levels are right 1, wrong -0.5, missing
    -1."""

    right: float = 1.0
    wrong: float = -1.0
    missing: float = -1.0  # a response without an answer
    copied_span: str = "wrong"  # or right: an answer that is but a piece of the question


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine:
    """What the scorer cosine gives at length 0 (short) and just below the limit (long), as in the
    paper."""

    right_short: float = 2.0
    right_long: float = 1.0
    wrong_short: float = -10.0
    wrong_long: float = 0.0
    exceeded: float = -10.0  # at the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """Rules score the responses; there is no reward model. `docs/rewards.md` describes the
    scorers."""

    model: str | None = None
    verifier: bool = True  # must be on
    accuracy: Accuracy = field(default_factory=Accuracy)
    cosine: Cosine = field(default_factory=Cosine)
    # tokens before the limit that overlong punishes; default a fifth of it
    overlong_cache: int | None = None
    repetition_ngram: int = 40  # words that must repeat to count for the scorer repetition
    workers: int = 2  # processes that score, beside each rollout replica
    deadline_seconds: float = 10.0  # for one call of one scorer; then its worker is killed
    worker_memory_megabytes: int = 1024  # that a worker may grow by after its start
    # share of responses whose scoring may fail; beyond it the run stops
    max_failure_rate: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class KlCtrl:
    """The coefficient of the KL term."""

    type: str = "fixed"  # or adaptive: steered so that the KL stays near target_kl
    kl_coef: float = 0.05
    target_kl: float | None = None
    horizon: int | None = None  # responses within which an adaptive coefficient follows


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The objective: advantages, policy loss and its aggregation, KL in the loss; and the
    rewards."""

    gamma: float = 1.0  # discount of the score per token; must be 1
    lam: float = 0.95
    adv_estimator: str = "group_norm"  # older name of the next key
    # From the rewards of a group to the advantages of its responses; your own as module:function or
    # path.py:function.
    advantage: str | None = None
    loss: str = "grpo"  # policy loss: grpo, gspo, cispo or your own
    loss_settings: dict[str, Any] = field(default_factory=dict)  # of that loss: docs/extending.md
    # Weights of tokens and responses in the loss: token_mean, sequence_mean or your own. Default:
    # what goes with the loss, sequence_mean for gspo and else token_mean.
    aggregation: str | None = None
    advantage_whiten: bool = False  # whiten advantages once more over the tokens of a minibatch
    # What is told as the KL of a token: kl, abs, mse or low_var_kl. All are held by the same
    # gradient, that of the KL.
    kl_penalty: str = "low_var_kl"
    kl_ctrl: KlCtrl = field(default_factory=KlCtrl)
    missing_eos_penalty: float = 0.0
    # scorers; yours as module:function
    verifier_function: list[str] = field(default_factory=lambda: ["acc"])
    # the reward is their weighted sum
    verifier_weight: list[float] = field(default_factory=lambda: [1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcePool:
    """Ranks of each role. They fill the nodes in the launcher's order, so only sums of the lists
    count."""

    actor_rollout: list[int] = field(default_factory=list)  # default [train + infer ranks]
    ref: list[int] = field(default_factory=list)  # default one replica, or none more if colocated
    reward: list[int] = field(default_factory=list)  # must be empty: rules need no device
    colocate: bool = False  # every rank of the pool has every role; num_gpus_* then do not matter
    ranks_per_node: int | None = None  # where the nodes end, if the launcher does not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A run. Paths are relative to the current directory."""

    name: str
    output_dir: str  # the run folder: one run at a time writes into it (docs/checkpoints.md)
    training: Training
    actor_rollout: ActorRollout
    ref: Ref
    reward: Reward
    algorithm: Algorithm
    resource_pool: ResourcePool
    model: dict[str, dict[str, Any]]  # SHAPE_KEYS given by the model files, by model name
    source: str | None = field(default=None, compare=False)  # file that it was read from; no key

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
        return (
            self.num_samples
            // self.actor_rollout.ppo_mini_batch_size
            * self.actor_rollout.ppo_epochs
        )

    @property
    def world_size(self) -> int:
        """Ranks that the resource pool asks for."""
        return sum(self.resource_pool.actor_rollout) + sum(self.resource_pool.ref)

    def model_keys(self, role: str) -> dict[str, Any]:
        """What the model file says about the network of `role`; empty when it names none."""
        if role == "ref":
            name = self.ref.model
        else:
            name = self.actor_rollout.model
        if name:
            return self.model.get(name, {})
        return {}

    def model_folder(self, role: str) -> Path:
        """The folder whose config.json describes the model of `role`, actor_rollout or ref."""
        if role == "ref":
            load = self.ref.load
        else:
            load = self.actor_rollout.load
        return config_folder(load or "", self.training.tokenizer_name_or_path or "")


def placement(cfg: Config, world_size: int) -> Placement:
    """Lay the roles out in a world. BadInput when they do not fit it.

    A world of one rank holds all roles, whatever the counts.
    """
    colocate = cfg.resource_pool.colocate or world_size == 1
    if colocate:
        ranks = {role: world_size for role in ("train", "rollout", "ref")}
    else:
        ranks = _split_ranks(cfg)
    if not colocate and sum(ranks.values()) != world_size:
        needed = " + ".join(f"{count} {role}" for role, count in ranks.items())
        raise BadInput(
            f"the world has {world_size} ranks, but num_gpus_for_train, num_gpus_for_infer and "
            f"resource_pool.ref need {sum(ranks.values())} ({needed}): start that many processes, "
            "or 1 for a world that holds all roles"
        )
    actor = cfg.actor_rollout
    train_tp = actor.tensor_model_parallel_size
    sizes = {
        "train": RoleSize(ranks["train"], train_tp, actor.pipeline_model_parallel_size),
        "rollout": RoleSize(ranks["rollout"], actor.infer_tensor_parallel_size or train_tp),
        "ref": RoleSize(
            ranks["ref"], cfg.ref.tensor_model_parallel_size, cfg.ref.pipeline_model_parallel_size
        ),
    }
    return place(sizes, colocate)


def _split_ranks(cfg: Config) -> dict[str, int]:
    """How many ranks each role gets where every role has ranks of its own."""
    return {
        "train": cfg.actor_rollout.num_gpus_for_train,
        "rollout": cfg.actor_rollout.num_gpus_for_infer,
        "ref": sum(cfg.resource_pool.ref),
    }


def nodes(cfg: Config, world_size: int) -> list[int]:
    """Node of each rank when no launcher tells: from ranks_per_node, else from the resource pool.

    Several entries under resource_pool.actor_rollout mean several nodes; the largest fills one.
    """
    per_node = cfg.resource_pool.ranks_per_node
    if per_node is None:
        entries = cfg.resource_pool.actor_rollout
        if len(entries) > 1:
            per_node = max(entries + cfg.resource_pool.ref)
        else:
            per_node = world_size
    return [rank // per_node for rank in range(world_size)]
