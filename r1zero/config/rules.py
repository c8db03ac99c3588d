"""Rules among the keys of a configuration, with a sentence for each that is broken.

They look at nothing but the keys: what concerns files, models or the world of ranks is checked
before a run starts.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from r1zero.config.schema import Config
from r1zero.errors import multiple, shown

SCORE_KEYS = ("reward", "response_length")  # what scores of an evaluation begin with


def check_keys(cfg: Config, world_size: int | None = None) -> list[str]:
    """Return a sentence for every rule among keys that is broken, in a world of so many ranks if
    that is known."""
    problems = [sentence for rule in RULES for sentence in rule(cfg)]
    return problems + check_pool(cfg, world_size)


def check_sound_keys(cfg: Config) -> list[str]:
    """The same for a configuration without its wrong keys; rules that need one are left out."""
    problems = []
    for rule in (*RULES, check_total, check_nodes, check_grids, check_stages):
        try:
            problems += rule(cfg)
        except AttributeError:  # of a key that is not there, and that enough was said about
            continue
    return problems


# -- rewards, KL and schedule ---------------------------------------------------------------------


def check_weights(cfg: Config) -> list[str]:
    """One weight for each reward function, of the run and of each data set."""
    sections: dict[str, Any] = {"algorithm": cfg.algorithm}
    sections |= {
        f"training.evaluation.{name}": each for name, each in cfg.training.evaluation.items()
    }
    if isinstance(cfg.actor_rollout.data_path, dict):
        for name, entry in cfg.actor_rollout.data_path.items():
            sections[f"actor_rollout.data_path.{name}"] = entry
    problems = []
    for key, section in sections.items():
        names = section.verifier_function
        weights = section.verifier_weight
        if not names or not weights or len(names) == len(weights):  # none is told by itself
            continue
        even = [round(1 / len(names), 2)] * len(names)
        problems.append(
            f"{key}.verifier_weight: {weights} has {len(weights)} weights for the {len(names)} "
            f"reward functions of verifier_function {names}; give as many, such as {even}"
        )
    return problems


def check_kl(cfg: Config) -> list[str]:
    """An adaptive coefficient needs to know where to, and how fast."""
    control = cfg.algorithm.kl_ctrl
    if control.type != "adaptive":
        return []
    needed = (("target_kl", control.target_kl, 0.1), ("horizon", control.horizon, 10000))
    return [
        f"algorithm.kl_ctrl.{key}: {shown(value)} must be above 0 with type adaptive, "
        f"such as {example}"
        for key, value, example in needed
        if value is None or value <= 0
    ]


def check_entropy(cfg: Config) -> list[str]:
    """An adaptive coefficient needs to know where to, and starts within its bounds."""
    control = cfg.algorithm.entropy_ctrl
    start = cfg.actor_rollout.entropy_coeff
    if control.type != "adaptive":
        return []
    problems = []
    if control.target is None or control.target <= 0:
        problems.append(
            f"algorithm.entropy_ctrl.target: {shown(control.target)} must be above 0 with type "
            "adaptive, such as 0.2"
        )
    if start > control.max:
        problems.append(
            f"actor_rollout.entropy_coeff: {start:g} is above algorithm.entropy_ctrl.max "
            f"{control.max:g}, which type adaptive keeps to; {control.max:g} is the most"
        )
    return problems


def check_correction(cfg: Config) -> list[str]:
    """Where old log-probs are the rollout engine's there is nothing to compare them with."""
    algorithm = cfg.algorithm
    if algorithm.old_logprobs != "rollout":
        return []
    wanted = (
        ("weights", algorithm.correction.weights, ("auto", "none")),
        ("reject", algorithm.correction.reject, ("none",)),
    )
    return [
        f"algorithm.correction.{key}: {value} compares old log-probs of the trainer with the rollout "
        "engine's, and with algorithm.old_logprobs: rollout there are only the engine's; "
        f"set {key} to none, or old_logprobs to recompute"
        for key, value, idle in wanted
        if value not in idle
    ]


def check_min_lr(cfg: Config) -> list[str]:
    actor = cfg.actor_rollout
    if actor.min_lr <= actor.lr:
        return []
    return [
        f"actor_rollout.min_lr: {actor.min_lr} must not be above lr {actor.lr}; 0.0 works",
    ]


def check_warmup(cfg: Config) -> list[str]:
    """The warm-up is given once, and ends before the run does."""
    actor = cfg.actor_rollout
    problems = []
    if actor.lr_warmup_iters and actor.lr_warmup_fraction:
        problems.append(
            f"actor_rollout.lr_warmup_iters: {actor.lr_warmup_iters} and lr_warmup_fraction "
            f"{actor.lr_warmup_fraction} exclude each other; set one of them to 0"
        )
    updates = cfg.training.train_iters * cfg.updates_per_step
    if actor.lr_warmup_iters >= max(1, updates):
        problems.append(
            f"actor_rollout.lr_warmup_iters: {actor.lr_warmup_iters} must be below the {updates} "
            f"updates of the run; {max(0, updates - 1)} is the most"
        )
    return problems


# -- evaluation -----------------------------------------------------------------------------------


def check_evaluation_names(cfg: Config) -> list[str]:
    """A name stands in front of scores, whose own keys must not begin so."""
    return [
        f"training.evaluation.{name} cannot be told from scores of its name; call it {name}_set"
        for name in cfg.training.evaluation
        if name in SCORE_KEYS
    ]


def check_scores(cfg: Config) -> list[str]:
    """What waits for scores of evaluations needs them, and at some steps before the last."""
    training = cfg.training
    asked: dict[str, object] = {}
    if training.keep_best is not None:
        asked["keep_best"] = training.keep_best
    if training.stop_at:
        asked["stop_at"] = training.stop_at
    problems = []
    for key, value in asked.items():
        missing = []
        if not training.evaluates:
            missing.append("eval_data_path or evaluation")
        if training.eval_interval is None:
            missing.append("eval_interval")
        if key == "keep_best" and training.save_interval is None:
            missing.append("save_interval")
        if missing:
            problems.append(
                f"training.{key}: {value} waits for scores of evaluations on the way; set "
                f"{' and '.join(missing)}, too"
            )
    return problems or check_score_sets(cfg)


def check_score_sets(cfg: Config) -> list[str]:
    """A pass@k belongs to an evaluation set that there is. Whether there are all other scores, the
    evaluation before the first step shows."""
    training = cfg.training
    named = [("training.stop_at", score) for score in training.stop_at]
    if training.keep_best is not None and training.best_score is not None:
        named.append(("training.best_score", training.best_score))
    sets = [f"{name}/" for name in training.evaluation]
    if training.eval_data_path is not None:
        sets.insert(0, "")
    known = [f"{name}pass@1" for name in sets]
    problems = []
    for key, score in named:
        prefix, is_pass, _ = score.rpartition("pass@")
        if is_pass and prefix not in sets:
            problems.append(f"{key}: {score} is of no evaluation set; there are {', '.join(known)}")
    return problems


def check_base(cfg: Config) -> list[str]:
    """The model below the adapters is a reference only of what was loaded there."""
    load = cfg.ref.load
    if not cfg.base_is_reference or load in (None, cfg.actor_rollout.load):
        return []
    return [
        f"ref.load: {load} is another model than actor_rollout.load {cfg.actor_rollout.load}, and "
        "with actor_rollout.lora the reference is the model below the adapters; leave ref.load out, "
        "or name ranks for it, such as resource_pool.ref: [1]"
    ]


def check_reset(cfg: Config) -> list[str]:
    """A reset needs a reference, and that the next batch has not been looked at before."""
    interval = cfg.ref.reset_interval
    if interval is None:
        return []
    if cfg.base_is_reference:
        return [
            f"ref.reset_interval: {interval} needs a reference of its own, but with "
            "actor_rollout.lora it is the model below the adapters; leave reset_interval out, or name "
            "ranks for it, such as resource_pool.ref: [1]"
        ]
    if not cfg.has_reference:
        return [
            f"ref.reset_interval: {interval} resets a reference, but there is none: "
            "algorithm.kl_ctrl.kl_coef is 0 and resource_pool.ref names no ranks; leave "
            "reset_interval out, or give a kl_coef such as 0.001"
        ]
    if cfg.training.staleness:
        return [
            f"ref.reset_interval: {interval} needs training.staleness 0, not "
            f"{cfg.training.staleness}: a batch that is drawn ahead has log-probs of the reference "
            "before its reset; set staleness to 0, or leave reset_interval out"
        ]
    return []


# -- updates ----------------------------------------------------------------------------------------


def check_accumulation(cfg: Config) -> list[str]:
    """What needs all samples of an update before the first of them is learnt from."""
    if cfg.training.updates != "accumulate" or not cfg.algorithm.advantage_whiten:
        return []
    return [
        "algorithm.advantage_whiten: true needs all samples before the first is learnt from, which "
        "training.updates: accumulate does not wait for; set it to false, or updates to per_minibatch"
    ]


def check_skipping(cfg: Config) -> list[str]:
    """Groups that are skipped would have no advantage, which whitening would give them."""
    if cfg.algorithm.equal_groups != "skip" or not cfg.algorithm.advantage_whiten:
        return []
    return [
        "algorithm.equal_groups: skip leaves groups out whose advantages are 0, and "
        "algorithm.advantage_whiten: true moves these away from 0; set it to false, or equal_groups to "
        "keep"
    ]


def check_replacing(cfg: Config) -> list[str]:
    """What does not go with groups that are drawn until enough are kept."""
    if cfg.algorithm.equal_groups != "replace":
        return []
    problems = []
    if cfg.training.staleness:
        problems.append(
            f"training.staleness: {cfg.training.staleness} draws the next batch before it is known what "
            "this one drops, which algorithm.equal_groups: replace must know; set staleness to 0, or "
            "equal_groups to skip"
        )
    if cfg.training.minibatch_order == "expected_length":
        problems.append(
            "training.minibatch_order: expected_length puts long answers last, and algorithm.equal_groups: "
            "replace leaves out what comes last when there are enough: training would prefer short "
            "answers; set minibatch_order to drawn"
        )
    size = cfg.minibatch_size
    group = cfg.actor_rollout.n_samples_per_prompt
    if size % group:
        problems.append(
            f"actor_rollout.ppo_mini_batch_size: {size} must be whole groups of n_samples_per_prompt "
            f"{group} with algorithm.equal_groups: replace, such as {-(-size // group) * group}"
        )
    return problems


def check_tail_batching(cfg: Config) -> list[str]:
    """What does not go with steps that put groups off."""
    if cfg.training.tail_batching is None:
        return []
    problems = []
    if cfg.algorithm.equal_groups == "replace":
        problems.append(
            f"training.tail_batching: {cfg.training.tail_batching} draws as many prompts as lengths "
            "ask for, and algorithm.equal_groups: replace as many as verdicts do; set equal_groups to "
            "skip or keep, or tail_batching to null"
        )
    size = cfg.minibatch_size
    group = cfg.actor_rollout.n_samples_per_prompt
    if size % group:
        problems.append(
            f"actor_rollout.ppo_mini_batch_size: {size} must be whole groups of n_samples_per_prompt "
            f"{group} with training.tail_batching, such as {-(-size // group) * group}"
        )
    return problems


# -- ranks ----------------------------------------------------------------------------------------


def check_pool(cfg: Config, world_size: int | None = None) -> list[str]:
    """The counts of ranks against each other and against the grids. Colocated roles need no counts.

    A world of one rank holds all roles, whatever the counts: what it cannot cut is told where roles
    are placed in it.
    """
    problems = check_total(cfg) + check_nodes(cfg)
    if world_size == 1:
        return problems
    return problems + check_grids(cfg) + check_stages(cfg)


def check_total(cfg: Config) -> list[str]:
    """The pool of the actor holds its ranks for training and for generation."""
    if cfg.resource_pool.colocate:
        return []
    actor = cfg.actor_rollout
    entries = cfg.resource_pool.actor_rollout
    total = actor.num_gpus_for_train + actor.num_gpus_for_infer
    if sum(entries) in (total, 0):  # an empty list has its default, the total
        return []
    return [
        f"resource_pool.actor_rollout: {entries} adds up to {sum(entries)}, but num_gpus_for_train "
        f"{actor.num_gpus_for_train} + num_gpus_for_infer {actor.num_gpus_for_infer} = {total}; "
        f"[{total}] would work"
    ]


def check_grids(cfg: Config) -> list[str]:
    """Each role has whole replicas."""
    if cfg.resource_pool.colocate:
        return []
    actor = cfg.actor_rollout
    ref = cfg.ref
    tp = actor.tensor_model_parallel_size
    train = [
        ("tensor_model_parallel_size", tp),
        ("pipeline_model_parallel_size", actor.pipeline_model_parallel_size),
        ("training.context_parallel_size", cfg.training.context_parallel_size),
    ]
    infer = [("infer_tensor_parallel_size", actor.infer_tensor_parallel_size or tp)]
    reference = [
        ("ref.tensor_model_parallel_size", ref.tensor_model_parallel_size),
        ("ref.pipeline_model_parallel_size", ref.pipeline_model_parallel_size),
        ("training.context_parallel_size", cfg.training.context_parallel_size),
    ]
    reward = [
        ("reward.tensor_model_parallel_size", cfg.reward.tensor_model_parallel_size),
        ("reward.pipeline_model_parallel_size", cfg.reward.pipeline_model_parallel_size),
    ]
    return [
        *multiple("actor_rollout.num_gpus_for_train", actor.num_gpus_for_train, train),
        *multiple("actor_rollout.num_gpus_for_infer", actor.num_gpus_for_infer, infer),
        *multiple("resource_pool.ref", sum(cfg.resource_pool.ref), reference),
        *multiple("resource_pool.reward", sum(cfg.resource_pool.reward), reward),
    ]


def check_stages(cfg: Config) -> list[str]:
    """A list of layers has a number for each pipeline stage."""
    problems = []
    for role in ("actor_rollout", "ref") if cfg.has_reference else ("actor_rollout",):
        section = attrgetter(role)(cfg)
        listed = section.num_layer_list
        stages = section.pipeline_model_parallel_size
        if listed is not None and len(listed) != stages:
            problems.append(
                f"{role}.num_layer_list: {listed} must have a number for each pipeline stage, of which "
                f"{role}.pipeline_model_parallel_size makes {stages}; give as many, or leave it out"
            )
    return problems


def check_nodes(cfg: Config) -> list[str]:
    """An entry of the pool lies on one node."""
    if cfg.resource_pool.colocate:
        return []
    pool = cfg.resource_pool
    largest = max(pool.actor_rollout + pool.ref + pool.reward, default=0)
    if pool.ranks_per_node is None or largest <= pool.ranks_per_node:
        return []
    return [
        f"resource_pool.ranks_per_node: {pool.ranks_per_node} is less than the {largest} "
        f"ranks that an entry of the pool puts on one node; {largest} would work"
    ]


# -- the reward model -----------------------------------------------------------------------------


def check_reward_model(cfg: Config) -> list[str]:
    """Keys of a reward model need one, and one needs its weights."""
    reward = cfg.reward
    if not cfg.has_reward_model:
        return _without_reward_model(cfg)
    problems = []
    if reward.load is None:
        problems.append(
            f"resource_pool.reward: {cfg.resource_pool.reward} names ranks of a reward model, and "
            "reward.load names no weights; name a model folder there, or leave resource_pool.reward out"
        )
    for key in ("std", "clip"):
        value = getattr(reward, key)
        if value is not None and value <= 0:
            problems.append(f"reward.{key}: {shown(value)} must be above 0, such as 1")
    return problems


def _without_reward_model(cfg: Config) -> list[str]:
    """What asks for the values of a reward model that is not there."""
    way_out = "name ranks for it, such as resource_pool.reward: [1], and its weights in reward.load"
    problems = []
    if not cfg.reward.verifier:
        problems.append(
            f"reward.verifier: false leaves the reward to a reward model, and there is none; {way_out}, "
            "or set it to true"
        )
    if 0 in (cfg.training.dataset_category or ()):
        problems.append(
            f"training.dataset_category: {cfg.training.dataset_category} leaves problems to a reward "
            f"model, and there is none; {way_out}, or leave it out"
        )
    if column := cfg.training.map_keys.get("category"):
        problems.append(
            f"training.map_keys.category: {column} says which problems a reward model scores, and there "
            f"is none; {way_out}, or leave it out"
        )
    if isinstance(cfg.actor_rollout.data_path, dict):
        for name, entry in cfg.actor_rollout.data_path.items():
            if entry.category == 0:
                problems.append(
                    f"actor_rollout.data_path.{name}.category: 0 leaves problems to a reward model, and "
                    f"there is none; {way_out}, or leave it out"
                )
    return problems


# -- lengths --------------------------------------------------------------------------------------


def check_prompt_length(cfg: Config) -> list[str]:
    """A response has room behind the longest prompt."""
    length = cfg.training.seq_length
    longest = cfg.actor_rollout.max_prompt_length
    if longest < length:
        return []
    return [
        f"actor_rollout.max_prompt_length: {longest} leaves no room for a response in seq_length "
        f"{length}; {length - 1} is the most"
    ]


def check_token_limits(cfg: Config) -> list[str]:
    """What is counted in tokens must hold one sequence."""
    length = cfg.training.seq_length
    keys = (
        "actor_rollout.max_tokens_to_oom",
        "actor_rollout.max_tokens_per_microbatch",
        "ref.max_tokens_per_microbatch",
        "reward.max_tokens_per_microbatch",
    )
    values = {key: attrgetter(key)(cfg) for key in keys}
    return [
        f"{key}: {value} is less than one sequence of seq_length {length} tokens; "
        f"{length} is the least"
        for key, value in values.items()
        if value is not None and value < length
    ]


RULES = (
    check_weights,
    check_kl,
    check_entropy,
    check_correction,
    check_reset,
    check_min_lr,
    check_warmup,
    check_base,
    check_evaluation_names,
    check_scores,
    check_accumulation,
    check_skipping,
    check_replacing,
    check_tail_batching,
    check_reward_model,
    check_prompt_length,
    check_token_limits,
)
