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
from r1zero.distributed.transfer import RoleTransfer, not_on_this_rank
from r1zero.models.config import ModelConfig
from r1zero.models.params import param_table
from r1zero.observe.clock import Clock
from r1zero.observe.invariants import BF16, FP32, Invariants
from r1zero.policy.actor import Actor
from r1zero.policy.actor_config import actor_config
from r1zero.policy.megatron import RoleModel
from r1zero.policy.reference import Reference
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.manager import RewardManager
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import Engine, EngineLimits
from r1zero.rollout.sampler import Sampling
from r1zero.run_folder.claim import Hold
from r1zero.types import Batch, RankRecord
from r1zero.weight_sync.broadcast import Publisher
from r1zero.weight_sync.plan import plan
from r1zero.weights.detect import model_folder


@dataclass
class Runtime:
    """Everything that a step works with on this rank."""

    cfg: Config
    world: World
    move: RoleTransfer
    clock: Clock
    shape: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    ends: Ends  # of a response
    prompts: Prompts  # controller
    # controller, when the configuration names eval data
    eval_prompts: Prompts | None
    engine: Engine  # rollout
    reward_manager: RewardManager  # rollout
    selector: GroupSelector  # which groups train
    reference: Reference  # ref
    policy: Actor  # train
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
            tokens["rollout"] = self.engine.decoded_tokens
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
        """Publish the weights of this version; an engine takes note of what arrived."""
        arrived = self.publisher.publish(self.progress.weights_version)
        if arrived is not None:
            self.engine.accept(arrived)

    def _publish_fault(self) -> str | None:
        """What the controller finds in the checksums of all ranks."""
        checksums = self.move.to_controller(self.publisher.checksums())
        return self.move.from_controller(self.publisher.difference, checksums)

    def close(self) -> None:
        """End the processes beside this rank."""
        if self.world.rollout.member:
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
    prompts = eval_prompts = not_on_this_rank("controller")
    if world.is_controller:
        prompts = _prompts(cfg, tokenizer, cfg.actor_rollout.data_path, held_out=False)
    if cfg.training.eval_data_path is None:
        eval_prompts = None
    elif world.is_controller:
        eval_prompts = _prompts(cfg, tokenizer, cfg.training.eval_data_path, held_out=True)
    if world.train.member:
        policy = _policy(cfg, world, shape, dtype, unused)
    else:
        policy = not_on_this_rank("train")
    if world.ref.member:
        reference = _reference(cfg, world, dtype, unused)
    else:
        reference = not_on_this_rank("ref")
    engine = reward_manager = not_on_this_rank("rollout")
    if world.rollout.member:
        reward_manager = build_reward_manager(cfg, world, tokenizer)
        engine = build_engine(cfg, world, shape, dtype, ends.ids, unused, reward_manager)
    reshard = plan(
        param_table(shape),
        shape.num_layers,
        world.train.span,
        world.rollout.span,
        dtype.itemsize,
        cfg.training.publish_bucket_megabytes * 2**20,
    )
    publisher = Publisher(
        reshard,
        world.rank,
        partial(world.tensor_group, buffer_megabytes=cfg.training.publish_bucket_megabytes),
        policy.model.parameters() if world.train.member else None,
        engine.decoder.weights if world.rollout.member else None,
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


def build_engine(
    cfg: Config,
    world: World,
    shape: ModelConfig,
    dtype: torch.dtype,
    end_ids: tuple[int, ...],
    unused: Sequence[range],
    reward_manager: RewardManager,
) -> Engine:
    actor = cfg.actor_rollout
    grid = world.rollout
    decoder = Decoder(
        shape,
        grid.span.tp,
        grid.groups["tp"],
        dtype,
        world.device.torch,
        cfg.training.seq_length,
        graphs=actor.decode_graphs,
        unused=unused,
    )
    sampling = Sampling(actor.temperature, actor.top_p, max(actor.top_k, 0), cfg.training.seed)
    limits = EngineLimits(cfg.response_budget, actor.max_tokens_to_oom, actor.max_running_samples)
    engine = Engine(decoder, sampling, end_ids, limits, grid.replica, grid.span.dp)
    engine.on_sample = reward_manager.submit
    engine.on_step = reward_manager.poll
    return engine
