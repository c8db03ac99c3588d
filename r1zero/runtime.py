"""The runtime of a rank: its actor, reference, rollout engine, reward manager, built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from r1zero.algo.selection import AllGroups, GroupSelector
from r1zero.checkpoint.progress import TrainerState
from r1zero.config.schema import Config
from r1zero.data.ends import Ends, find_ends
from r1zero.data.layout import layout_of
from r1zero.data.prompts import Prompts, load_tokenizer, vocabulary_of
from r1zero.data.template import Template
from r1zero.data.vocabulary import Vocabulary
from r1zero.distributed.groups import World
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import param_table
from r1zero.observe.clock import Clock
from r1zero.observe.invariants import BF16, FP32, Invariants
from r1zero.policy.actor import Actor
from r1zero.policy.actor_config import actor_config
from r1zero.policy.idle import AnyActor, AnyReference, IdleActor, IdleReference
from r1zero.policy.megatron import RoleModel
from r1zero.policy.reference import Reference
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.manager import RewardManager
from r1zero.rollout.engines import choose_engine
from r1zero.rollout.interface import (
    EngineKind,
    EngineListener,
    EngineSetup,
    IdleEngine,
    RolloutEngine,
    Sampling,
)
from r1zero.run_folder.claim import Hold
from r1zero.types import Batch, RankRecord
from r1zero.weight_sync.broadcast import Publisher
from r1zero.weight_sync.plan import plan
from r1zero.weights.detect import model_folder


@dataclass
class Runtime:
    """Everything that a step works with on this rank; idle objects for roles that it does not
    have."""

    cfg: Config
    world: World
    move: RoleTransfer
    clock: Clock
    shape: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    ends: Ends  # of a response
    prompts: Prompts | None  # controller
    # controller, when the configuration names eval data
    eval_prompts: Prompts | None
    engine: RolloutEngine  # rollout
    sampling: Sampling  # of the samples to train on
    reward_manager: RewardManager  # rollout
    selector: GroupSelector  # which groups train
    reference: AnyReference  # ref
    policy: AnyActor  # train
    publisher: Publisher
    invariants: Invariants
    folder: Path  # the run folder, and that of its checkpoints: see Opening
    store: Path
    progress: TrainerState = field(default_factory=TrainerState)
    hold: Hold = field(default_factory=Hold)  # on the run's folders; empty but on the controller

    def draw(self, step: int) -> Batch:
        """Plan the global batch of step 1, 2, ...; the weights were published once before each
        step."""
        actor = self.cfg.actor_rollout
        done = self.progress
        assert self.prompts is not None, "the controller draws"
        prompts = self.prompts.draw(done.prompts_drawn, self.cfg.training.global_batch_size)
        return Batch(
            step,
            done.weights_version,
            prompts,
            actor.n_samples_per_prompt,
            actor.ppo_mini_batch_size,
        )

    def publish(self) -> None:
        """Bring the rollout ranks' weights up to date with what was learned: the next version,
        counted here."""
        self.progress.weights_version += 1
        self._bring()

    def start(self) -> None:
        """Publish the weights to begin with and prove that they arrived bit for bit. RuntimeError
        if not."""
        self.move.flush()
        self._bring()
        if fault := self._publish_fault():
            raise RuntimeError(fault)

    def prove_publish(self) -> str | None:
        """Compare the checksums of what was sent and received, if this version is one of every so
        many. Collective."""
        interval = self.cfg.training.publish_check_interval
        if interval and self.progress.weights_version % interval == 0:
            return self._publish_fault()
        return None

    def record(self, publish_fault: str | None) -> RankRecord:
        """What this rank tells about the step that ends."""
        rollout = self.world.rollout
        ref = self.world.ref
        tokens = {}
        if rollout.is_output_rank:
            tokens["rollout"] = self.engine.progress().tokens
        if ref.is_output_rank:
            tokens["ref"] = self.reference.take_tokens()
        return RankRecord(
            self.clock.take(),
            self.publisher.received_bytes,
            self.world.device.peak_gigabytes(),
            tokens,
            publish_fault,
        )

    def _bring(self) -> None:
        """Publish the weights of this version."""
        self.publisher.publish(self.progress.weights_version)

    def _publish_fault(self) -> str | None:
        """What the controller finds in the checksums of all ranks."""
        checksums = self.move.to_controller(self.publisher.checksums())
        return self.move.from_controller(self.publisher.difference, checksums)

    def close(self) -> None:
        """End the processes beside this rank."""
        self.reward_manager.close()


def build_runtime(cfg: Config, world: World) -> Runtime:
    """Build what this rank's roles need. Collective. BadInput for bad models, data or templates."""
    folder = model_folder(cfg, "actor_rollout")
    shape = ModelConfig.from_folder(folder)
    tokenizer = load_tokenizer(cfg.training.tokenizer_name_or_path)
    vocabulary = vocabulary_of(tokenizer)
    unused = vocabulary.unused(shape.vocab_size)
    ends = response_ends(cfg, vocabulary)
    dtype = torch.bfloat16 if cfg.training.bf16 else torch.float32
    prompts = eval_prompts = None
    if world.is_controller:
        prompts = _prompts(cfg, tokenizer, cfg.actor_rollout.data_path, held_out=False)
    if world.is_controller and cfg.training.eval_data_path is not None:
        eval_prompts = _prompts(cfg, tokenizer, cfg.training.eval_data_path, held_out=True)
    policy: AnyActor = IdleActor()
    if world.train.member:
        policy = _policy(cfg, world, shape, dtype, unused)
    reference: AnyReference = IdleReference()
    if world.ref.member:
        reference = _reference(cfg, world, dtype, unused)
    reward_manager = build_reward_manager(cfg, world, tokenizer)
    kind = choose_engine(cfg.actor_rollout.engine)
    engine: RolloutEngine = IdleEngine(kind.layout)
    if world.rollout.member:
        engine = build_engine(kind, cfg, world, shape, dtype, ends.ids, unused, reward_manager)
    reshard = plan(
        param_table(shape),
        shape.num_layers,
        world.train.span,
        kind.layout.grid(world.rollout.span),
        dtype.itemsize,
        cfg.training.publish_bucket_megabytes * 2**20,
    )
    publisher = Publisher(
        reshard,
        world.rank,
        partial(world.tensor_group, buffer_megabytes=cfg.training.publish_bucket_megabytes),
        policy.parameters(),
        engine.weights(),
        dtype,
        world.device.torch,
    )
    return Runtime(
        cfg,
        world,
        RoleTransfer(world),
        Clock(world.device.timer()),
        shape,
        tokenizer,
        ends,
        prompts,
        eval_prompts,
        engine,
        train_sampling(cfg),
        reward_manager,
        AllGroups(),
        reference,
        policy,
        publisher,
        Invariants(
            BF16 if cfg.training.bf16 else FP32, cfg.actor_rollout.load == cfg.ref.load, unused
        ),
        Path(cfg.output_dir),
        cfg.checkpoints,
    )


def response_ends(cfg: Config, vocabulary: Vocabulary) -> Ends:
    """What ends a response. BadInput when nothing does."""
    template = Template(cfg.training.prompt_type, cfg.training.prompt_type_path)
    return find_ends(
        model_folder(cfg, "actor_rollout"), vocabulary, template, cfg.actor_rollout.stop
    )


def _prompts(cfg: Config, tokenizer: PreTrainedTokenizerBase, path: str, held_out: bool) -> Prompts:
    training = cfg.training
    template = Template(training.prompt_type, training.prompt_type_path)
    return Prompts(
        path,
        layout_of(training, held_out),
        template,
        tokenizer,
        cfg.actor_rollout.max_prompt_length,
        training.seed,
        shuffle=not training.no_shuffle,
    )


def _policy(
    cfg: Config, world: World, shape: ModelConfig, dtype: torch.dtype, unused: Sequence[range]
) -> Actor:
    model = RoleModel(
        shape,
        world.train,
        world.device,
        dtype,
        cfg.training.seq_length,
        cfg.training.sequence_parallel,
        cfg.actor_rollout.recompute_granularity == "full",
        cfg.training.seed,
        unused,
    )
    model.load(cfg.actor_rollout.load)
    return Actor(model, actor_config(cfg, cfg.training.train_iters * cfg.updates_per_step))


def _reference(cfg: Config, world: World, dtype: torch.dtype, unused: Sequence[range]) -> Reference:
    shape = ModelConfig.from_folder(model_folder(cfg, "ref"))
    model = RoleModel(
        shape,
        world.ref,
        world.device,
        dtype,
        cfg.training.seq_length,
        sequence_parallel=False,
        recompute=False,
        seed=cfg.training.seed,
        unused=unused,
    )
    model.load(cfg.ref.load)
    model.module.requires_grad_(False)
    return Reference(
        model,
        cfg.actor_rollout.temperature,
        cfg.ref.micro_batch_size,
        cfg.ref.max_tokens_per_microbatch,
    )


def build_reward_manager(
    cfg: Config, world: World, tokenizer: PreTrainedTokenizerBase
) -> RewardManager:
    executor = None
    if world.rollout.is_output_rank:
        executor = RewardExecutor(
            cfg.algorithm.verifier_function, cfg.algorithm.verifier_weight, cfg.reward
        )
    return RewardManager(
        executor, partial(tokenizer.decode, skip_special_tokens=True), cfg.response_budget
    )


def train_sampling(cfg: Config) -> Sampling:
    """How the samples to train on are drawn."""
    actor = cfg.actor_rollout
    return Sampling(actor.temperature, actor.top_p, max(actor.top_k, 0), cfg.training.seed)


def build_engine(
    kind: EngineKind,
    cfg: Config,
    world: World,
    shape: ModelConfig,
    dtype: torch.dtype,
    end_ids: tuple[int, ...],
    unused: Sequence[range],
    reward_manager: RewardManager,
) -> RolloutEngine:
    """Build the engine of a rollout rank; samples are scored while others are generated."""
    actor = cfg.actor_rollout
    setup = EngineSetup(
        model_folder=Path(model_folder(cfg, "actor_rollout")),
        shape=shape,
        grid=world.rollout,
        dtype=dtype,
        device=world.device.torch,
        end_ids=end_ids,
        unused=unused,
        max_length=cfg.training.seq_length,
        max_response=cfg.response_budget,
        max_cache_tokens=actor.max_tokens_to_oom,
        max_running=actor.max_running_samples,
        graphs=actor.decode_graphs,
    )
    engine = kind.build(setup)
    target = engine.weights()
    problems = target.problems(param_table(shape), kind.layout.grid(world.rollout.span).tp)
    if problems:
        raise BadInput(
            f"actor_rollout.engine: {actor.engine} has no place for weights of this model: "
            f"{problems[0]}"
        )
    engine.listeners.append(EngineListener(reward_manager.submit, reward_manager.poll))
    return engine
