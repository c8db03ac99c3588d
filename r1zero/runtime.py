"""The crew of a rank: the objects its roles need, built once. What lives elsewhere is Absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from r1zero.types import Batch, RankRecord
from r1zero.checkpoint.progress import Progress
from r1zero.run_folder.claim import Hold
from r1zero.config.schema import Config
from r1zero.data.ends import Ends, find_ends
from r1zero.data.layout import layout_of
from r1zero.data.prompts import Prompts, load_tokenizer, vocabulary_of
from r1zero.data.template import Template
from r1zero.data.vocabulary import Vocabulary
from r1zero.models.config import ModelConfig
from r1zero.observe.clock import Clock
from r1zero.observe.invariants import BF16, FP32, Invariants
from r1zero.policy.megatron import RoleModel
from r1zero.policy.actor import Policy
from r1zero.policy.reference import Reference
from r1zero.reward.executor import Judge
from r1zero.reward.manager import SampleScorer
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import Engine, Limits
from r1zero.rollout.sampler import Sampling
from r1zero.models.params import param_table
from r1zero.weight_sync.broadcast import Publisher
from r1zero.weight_sync.plan import plan
from r1zero.distributed.groups import World
from r1zero.distributed.transfer import Absent, Mover


@dataclass
class Crew:
    """Everything that a step works with on this rank."""

    cfg: Config
    world: World
    move: Mover
    clock: Clock
    shape: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    ends: Ends  # of a response
    prompts: Prompts | Absent  # controller
    eval_prompts: Prompts | Absent | None  # controller, when the configuration names eval data
    engine: Engine | Absent  # rollout
    scorer: SampleScorer | Absent  # rollout
    reference: Reference | Absent  # ref
    policy: Policy | Absent  # train
    publisher: Publisher
    invariants: Invariants
    folder: Path  # the run folder, and that of its checkpoints: see Opening
    shelf: Path
    progress: Progress = field(default_factory=Progress)
    hold: Hold = field(default_factory=Hold)  # on the run's folders; empty but on the controller

    def draw(self, step: int) -> Batch:
        """Plan the global batch of step 1, 2, ...; the weights were published once before each step."""
        actor, done = self.cfg.actor_rollout, self.progress
        prompts = self.prompts.draw(done.prompts_drawn, self.cfg.training.global_batch_size)
        return Batch(step, done.weights_version, prompts, actor.n_samples_per_prompt, actor.ppo_mini_batch_size)

    def publish(self) -> None:
        """Bring the rollout ranks' weights up to date with what was learned: the next version, counted here."""
        self.progress.weights_version += 1
        self._bring()

    def start(self) -> None:
        """Publish the weights to begin with and prove that they arrived bit for bit. RuntimeError if not."""
        self.move.settle()
        self._bring()
        if fault := self._publish_fault():
            raise RuntimeError(fault)

    def prove_publish(self) -> str | None:
        """Compare the checksums of what was sent and received, if this version is one of every so many. Collective."""
        interval = self.cfg.training.publish_check_interval
        return self._publish_fault() if interval and self.progress.weights_version % interval == 0 else None

    def record(self, publish_fault: str | None) -> RankRecord:
        """What this rank tells about the step that ends."""
        rollout, ref, tokens = self.world.rollout, self.world.ref, {}
        if rollout.speaks:
            tokens["rollout"] = self.engine.decoded_tokens
        if ref.speaks:
            tokens["ref"] = self.reference.take_tokens()
        return RankRecord(self.clock.take(), self.publisher.received_bytes, self.world.device.peak_gigabytes(),
                          tokens, publish_fault)

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
            self.scorer.close()


def build_crew(cfg: Config, world: World) -> Crew:
    """Build what this rank's roles need. Collective. BadInput for bad models, data or templates."""
    folder = cfg.model_folder("actor_rollout")
    shape = ModelConfig.from_folder(folder)
    tokenizer = load_tokenizer(cfg.training.tokenizer_name_or_path)
    vocabulary = vocabulary_of(tokenizer)
    unused, ends = vocabulary.unused(shape.vocab_size), response_ends(cfg, vocabulary)
    dtype = torch.bfloat16 if cfg.training.bf16 else torch.float32
    prompts = eval_prompts = Absent("controller")
    if world.is_controller:
        prompts = _prompts(cfg, tokenizer, cfg.actor_rollout.data_path, held_out=False)
    if cfg.training.eval_data_path is None:
        eval_prompts = None
    elif world.is_controller:
        eval_prompts = _prompts(cfg, tokenizer, cfg.training.eval_data_path, held_out=True)
    policy = _policy(cfg, world, shape, dtype, unused) if world.train.member else Absent("train")
    reference = _reference(cfg, world, dtype, unused) if world.ref.member else Absent("ref")
    engine = scorer = Absent("rollout")
    if world.rollout.member:
        scorer = build_scorer(cfg, world, tokenizer)
        engine = build_engine(cfg, world, shape, dtype, ends.ids, unused, scorer)
    reshard = plan(param_table(shape), shape.num_layers, world.train.span, world.rollout.span, dtype.itemsize,
                   cfg.training.publish_bucket_megabytes * 2**20)
    publisher = Publisher(
        reshard, world.rank, partial(world.tensor_group, buffer_megabytes=cfg.training.publish_bucket_megabytes),
        policy.model.parameters() if world.train.member else None,
        engine.decoder.weights if world.rollout.member else None, dtype, world.device.torch)
    return Crew(cfg, world, Mover(world), Clock(world.device.timer()), shape, tokenizer, ends, prompts,
                eval_prompts, engine, scorer, reference, policy, publisher,
                Invariants(BF16 if cfg.training.bf16 else FP32, cfg.actor_rollout.load == cfg.ref.load, unused),
                Path(cfg.output_dir), cfg.checkpoints)


def response_ends(cfg: Config, vocabulary: Vocabulary) -> Ends:
    """What ends a response. BadInput when nothing does."""
    template = Template(cfg.training.prompt_type, cfg.training.prompt_type_path)
    return find_ends(cfg.model_folder("actor_rollout"), vocabulary, template, cfg.actor_rollout.stop)


def _prompts(cfg: Config, tokenizer: PreTrainedTokenizerBase, path: str, held_out: bool) -> Prompts:
    training = cfg.training
    template = Template(training.prompt_type, training.prompt_type_path)
    return Prompts(path, layout_of(training, held_out), template, tokenizer,
                   cfg.actor_rollout.max_prompt_length, training.seed, shuffle=not training.no_shuffle)


def _policy(cfg: Config, world: World, shape: ModelConfig, dtype: torch.dtype, unused: Sequence[range]) -> Policy:
    model = RoleModel(shape, world.train, world.device, dtype, cfg.training.seq_length,
                      cfg.training.sequence_parallel, cfg.actor_rollout.recompute_granularity == "full",
                      cfg.training.seed, unused)
    model.load(cfg.actor_rollout.load)
    return Policy(model, cfg, cfg.training.train_iters * cfg.updates_per_step)


def _reference(cfg: Config, world: World, dtype: torch.dtype, unused: Sequence[range]) -> Reference:
    shape = ModelConfig.from_folder(cfg.model_folder("ref"))
    model = RoleModel(shape, world.ref, world.device, dtype,
                      cfg.training.seq_length, sequence_parallel=False, recompute=False, seed=cfg.training.seed,
                      unused=unused)
    model.load(cfg.ref.load)
    model.module.requires_grad_(False)
    return Reference(model, cfg.actor_rollout.temperature, cfg.ref.micro_batch_size, cfg.ref.max_tokens_per_microbatch)


def build_scorer(cfg: Config, world: World, tokenizer: PreTrainedTokenizerBase) -> SampleScorer:
    judge = None
    if world.rollout.speaks:
        judge = Judge(cfg.algorithm.verifier_function, cfg.algorithm.verifier_weight, cfg.reward)
    return SampleScorer(judge, partial(tokenizer.decode, skip_special_tokens=True), cfg.response_budget)


def build_engine(cfg: Config, world: World, shape: ModelConfig, dtype: torch.dtype, end_ids: tuple[int, ...],
                 unused: Sequence[range], scorer: SampleScorer) -> Engine:
    actor, grid = cfg.actor_rollout, world.rollout
    decoder = Decoder(shape, grid.span.tp, grid.groups["tp"], dtype, world.device.torch, cfg.training.seq_length,
                      graphs=actor.decode_graphs, unused=unused)
    sampling = Sampling(actor.temperature, actor.top_p, max(actor.top_k, 0), cfg.training.seed)
    limits = Limits(cfg.response_budget, actor.max_tokens_to_oom, actor.max_running_samples)
    engine = Engine(decoder, sampling, end_ids, limits, grid.replica, grid.span.dp)
    engine.on_sample, engine.on_step = scorer.submit, scorer.poll
    return engine
