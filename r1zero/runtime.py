"""The runtime of a rank: its actor, reference, rollout engine, reward manager, built once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from r1zero.algo.dealing import SampleTable
from r1zero.algo.selection import AllGroups, GroupSelector, TeachingGroups
from r1zero.checkpoint.config import CheckpointConfig
from r1zero.checkpoint.progress import TrainerState
from r1zero.config.own_code import is_own
from r1zero.data.batches import BatchPlanner, Standing
from r1zero.data.ends import Ends, find_ends
from r1zero.data.prompts import Prompts, decode, load_tokenizer, vocabulary_of
from r1zero.data.sources import DataSource
from r1zero.distributed.collectives import first_finding
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RankGrid
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.dtype import Dtype
from r1zero.models.layout import WeightTarget
from r1zero.models.params import ShardIndex, Shards, param_table
from r1zero.observe.clock import Clock, seconds_by_name
from r1zero.observe.invariants import BF16, FP32, Invariants
from r1zero.observe.sample_log import AnySampleLog, IdleSampleLog, SampleLog
from r1zero.observe.spans import span_ranks
from r1zero.policy.actor import Actor
from r1zero.policy.handover import Giver
from r1zero.policy.idle import AnyActor, AnyReference, IdleActor, IdleReference
from r1zero.policy.lora import Adapters
from r1zero.policy.megatron import RoleModel
from r1zero.policy.reference import Reference
from r1zero.policy.route_handover import RouteGiver
from r1zero.preflight.run import ModelFiles, Run
from r1zero.reward.config import RewardConfig
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.manager import RewardManager
from r1zero.reward_model.build import JudgeSetup, build_judge
from r1zero.reward_model.judge import AnyJudge, NoJudge
from r1zero.rollout.engines import choose_engine
from r1zero.rollout.interface import (
    EngineConfig,
    EngineListener,
    EngineSetup,
    IdleEngine,
    RolloutEngine,
    Sampling,
)
from r1zero.rollout.route_check import check_routes
from r1zero.rollout.stored import GroupSource
from r1zero.run_folder.claim import Hold
from r1zero.run_folder.samples import SampleFiles
from r1zero.scores import MODEL
from r1zero.types import Batch, Drawn, Group, Part, RankRecord
from r1zero.weight_sync.bits import table_in_bits
from r1zero.weight_sync.broadcast import Publisher
from r1zero.weight_sync.plan import plan


@dataclass
class Runtime:
    """Everything that a step works with on this rank; idle objects for roles that it does not
    have."""

    run: Run
    world: World
    move: RoleTransfer
    clock: Clock
    shape: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    ends: Ends  # of a response
    prompts: Prompts | None  # controller
    planner: BatchPlanner | None  # controller
    # controller, empty elsewhere: the problems of each evaluation set, by its name
    eval_prompts: dict[str, Prompts]
    engine: RolloutEngine  # rollout
    sampling: Sampling  # of the samples to train on
    reward_manager: RewardManager  # rollout
    judge: AnyJudge  # rollout and reward
    selector: GroupSelector  # which groups train
    sample_files: SampleFiles
    sample_log: AnySampleLog  # rollout
    reference: AnyReference  # ref
    policy: AnyActor  # train
    publisher: Publisher  # of the policy's weights to the engines
    reference_publisher: Publisher | None  # and to the reference, where it is ever reset
    invariants: Invariants
    keeps_spans: bool  # this rank's spans are among those of logs/spans.jsonl
    folder: Path  # the run folder, and that of its checkpoints: see Opening
    checkpoints: Path
    checkpoint_config: CheckpointConfig
    progress: TrainerState = field(default_factory=TrainerState)
    # drawn and not yet learnt from, by the step that does
    batches: dict[int, Batch] = field(default_factory=dict)
    # those of a checkpoint, with the groups of this rank's rollout replica
    restored: list[tuple[Batch, list[Group]]] = field(default_factory=list)
    drawn: Drawn = field(default_factory=lambda: Drawn(0, 0, 0))  # by the last step
    # of the batch that was generated last
    _giver: Giver | None = None
    _route_giver: RouteGiver | None = None
    # response tokens of a batch that this rank's roles saw, by its step
    tokens: dict[int, dict[str, int]] = field(default_factory=dict)
    hold: Hold = field(default_factory=Hold)  # on the run's folders; empty but on the controller

    def batches_to_draw(self, step: int) -> range:
        """The steps whose batches are drawn in this one: its own, or with staleness a later one.

        With staleness 1, of three steps: the first draws 1 and 2, the second 3, the third none.
        """
        training = self.run.config.training
        last = min(step + training.staleness, training.train_iters)
        drawn = max(self.batches, default=step - 1)
        return range(drawn + 1, last + 1)

    @property
    def has_reference(self) -> bool:
        """There are reference log-probs, of ref ranks or of the model below the adapters."""
        return self.world.ref is not None or self.run.config.base_is_reference

    def draw(self, step: int) -> Batch:
        """Plan the global batch of step 1, 2, ...; the weights were published once before each
        step."""
        assert self.planner is not None, "the controller draws"
        done = self.progress
        ahead = list(self.batches.values())  # drawn and not yet learnt from
        start = done.prompts_drawn + sum(batch.fresh for batch in ahead)
        now = Standing(
            version=done.weights_version,
            reference_version=done.reference_version if self.has_reference else None,
            start=start,
            ahead=len(ahead),
            last=Drawn(0, done.groups_drawn, done.groups_kept),
        )
        return self.planner.draw(step, now)

    def draw_more(self, batch: Batch, known: SampleTable) -> Batch:
        """Plan another round of a batch of which these groups are known."""
        assert self.planner is not None, "the controller draws"
        return self.planner.draw_more(batch, known, self.progress.prompts_drawn)

    def submit(self, batch: Batch) -> None:
        """Ask this rank's engine for its share of a round."""
        mine = self.world.rollout.share(len(batch.prompts), batch.first)
        budgets = None
        if batch.response_limit is not None:
            shape = (len(batch.prompts), batch.samples_per_prompt)
            budgets = np.full(shape, batch.response_limit)
        self.engine.submit(batch, mine, self.sampling, budgets)

    def collect(self, batch: Batch, part: Part, source: GroupSource) -> list[Group]:
        """The groups of a part, from the engine or from what was stored. BadInput for routes of an
        engine of the user's that cannot be replayed."""
        groups = source.collect(part)
        name = self.run.config.actor_rollout.engine
        experts = self.shape.experts
        if experts is None or not batch.keeps_routes or not is_own(name):
            return groups
        # What is stored may be older than routes. Others than output ranks have the same, and forget it.
        if source is self.engine and self.world.rollout.is_output_rank:
            check_routes(name, groups, experts)
        return groups

    def giver(self, batch: Batch) -> Giver:
        """What gives the groups of a batch to train: one in all its rounds."""
        if self._giver is None or not batch.first:
            self._giver = Giver(self.move, batch, self.world.giver, self.world.train)
        self._giver.go_on(batch)
        return self._giver

    def route_giver(self, batch: Batch) -> RouteGiver:
        """What gives the routes of a batch to train: one in all its rounds."""
        if self._route_giver is None or not batch.first:
            self._route_giver = RouteGiver(self.move, batch, self.world.rollout, self.world.train)
        self._route_giver.go_on(batch)
        return self._route_giver

    def groups_in_flight(self) -> list[Group]:
        """Groups that this rank's rollout replica drew and nobody has learnt from, on its output
        rank."""
        return self.sample_log.waiting()

    def publish(self) -> None:
        """Bring the rollout ranks' weights up to date with what was learned: the next version,
        counted here."""
        self.progress.weights_version += 1
        self._bring()

    def reset_reference(self, step: int) -> None:
        """Give the reference the weights that were just published, every so many steps."""
        interval = self.run.config.ref.reset_interval
        if self.reference_publisher is None or interval is None or step % interval:
            return
        self.reference_publisher.publish(self.progress.weights_version)
        self.progress.reference_version = self.progress.weights_version

    def start(self) -> None:
        """Publish the weights to begin with and prove that they arrived bit for bit. RuntimeError
        if not."""
        self.move.flush(0)
        self._bring()
        if fault := self._publish_fault():
            raise RuntimeError(fault)

    def prove_publish(self) -> str | None:
        """Compare the checksums of what was sent and received, if this version is one of every so
        many; of a reference that was reset always. Collective."""
        interval = self.run.config.training.publish_check_interval
        fault = None
        if interval and self.progress.weights_version % interval == 0:
            fault = self._publish_fault()
        if fault is None and self._new_reference is not None:
            fault = first_finding(self._new_reference.difference(), self.world.control)
        return fault

    @property
    def _new_reference(self) -> Publisher | None:
        """What brought the reference the weights of this version; None if it has older ones."""
        if self.progress.reference_version == self.progress.weights_version > 0:
            return self.reference_publisher
        return None

    def count_tokens(self, batch: Batch, engine: GroupSource) -> None:
        """Note how many response tokens of a batch this rank's roles saw, where results appear."""
        counted = Counter(self.tokens.get(batch.step, {}))
        if self.world.rollout.is_output_rank:
            counted["rollout"] += engine.progress().tokens
        ref = self.world.ref
        if ref is not None and ref.is_output_rank:
            counted["ref"] += self.reference.take_tokens()
        if self.world.reward is not None:
            counted["reward"] += self.judge.take_tokens()
        self.tokens[batch.step] = dict(counted)

    def record(self, batch: Batch, publish_fault: str | None) -> RankRecord:
        """What this rank tells about the step that ends, which learned from this batch."""
        spans = self.clock.take()
        published = self.publisher.received_bytes
        if self._new_reference is not None:
            published += self._new_reference.received_bytes
        return RankRecord(
            began=spans[0].start,
            ended=max(span.end for span in spans),
            seconds=seconds_by_name(spans),
            published_bytes=published,
            peak_gigabytes=self.world.device.peak_gigabytes(),
            tokens=self.tokens.pop(batch.step),
            publish_fault=publish_fault,
            spans=spans if self.keeps_spans else [],
            samples=self.sample_log.take(batch),
            unwritten=self.sample_log.unwritten,
        )

    def _bring(self) -> None:
        """Publish the weights of this version."""
        self.publisher.publish(self.progress.weights_version)

    def _publish_fault(self) -> str | None:
        """What the receivers find in the checksums; the same on all ranks."""
        return first_finding(self.publisher.difference(), self.world.control)

    def close(self) -> None:
        """End the processes beside this rank."""
        self.reward_manager.close()


def build_runtime(run: Run, world: World) -> Runtime:
    """Build what this rank's roles need. Collective. BadInput for bad models, data or templates."""
    tokens = read_tokens(run)
    prompts = None
    planner = None
    eval_prompts = {}
    if world.is_controller:
        prompts = _prompts(run, run.train_data, tokens.tokenizer)
        planner = BatchPlanner(run.config, prompts, world.rollout.span.dp, run.replays_routes)
        for source in run.eval_data:
            eval_prompts[source.name] = _prompts(run, [source], tokens.tokenizer)
    policy = _policy(run, world, tokens.unused)
    reference = _reference(run, world, tokens.unused)
    reward_manager = build_reward_manager(
        run.reward_config,
        run.config.response_budget,
        world,
        tokens.tokenizer,
        notes_values="scores" in run.actor_config.objective.advantage.needs,
    )
    engine = build_engine(
        run.engine_config, run.actor, run.dtype, world, tokens.ends, tokens.unused, reward_manager
    )
    files = SampleFiles(
        world.rollout.span.dp,
        run.config.training.samples_interval,
        run.config.training.train_iters,
    )
    move = RoleTransfer(world)
    clock = Clock(world.device.timer())
    return Runtime(
        run=run,
        world=world,
        move=move,
        clock=clock,
        shape=run.actor.shape,
        tokenizer=tokens.tokenizer,
        ends=tokens.ends,
        prompts=prompts,
        planner=planner,
        eval_prompts=eval_prompts,
        engine=engine,
        sampling=run.sampling,
        reward_manager=reward_manager,
        judge=_judge(run, world, move, clock, tokens),
        selector=_selector(run, world, reward_manager),
        sample_files=files,
        sample_log=_sample_log(files, world, tokens, reward_manager),
        reference=reference,
        policy=policy,
        publisher=_publisher(run, world, policy, engine),
        reference_publisher=_reference_publisher(run, world, policy, reference),
        invariants=Invariants(
            BF16 if run.dtype is Dtype.BF16 else FP32,
            run.actor.load == run.config.ref.load,
            run.config.algorithm.kl_penalty,
        ),
        keeps_spans=world.rank in span_ranks(world.placement),
        folder=run.output_dir,
        checkpoints=run.checkpoints,
        checkpoint_config=run.checkpoint_config,
    )


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is to be known of a model's tokens."""

    tokenizer: PreTrainedTokenizerBase
    ends: Ends  # of a response
    unused: Sequence[range]  # rows of the model's vocabulary that are no tokens


def read_tokens(run: Run) -> Tokens:
    """Load the tokenizer. BadInput when nothing ends a response."""
    stop = run.config.actor_rollout.stop
    tokenizer = load_tokenizer(run.tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    ends = find_ends(run.actor.folder, vocabulary, run.templates.values(), stop)
    return Tokens(tokenizer, ends, vocabulary.unused(run.actor.shape.vocab_size))


def _selector(run: Run, world: World, reward_manager: RewardManager) -> GroupSelector:
    """What decides which groups train, on the rank that scores them."""
    algorithm = run.config.algorithm
    if not world.rollout.is_output_rank:
        return AllGroups()
    return TeachingGroups(
        verdict_functions=reward_manager.verdict_functions,
        with_rules=run.config.reward.verifier,
        equal_groups=algorithm.equal_groups,
        accuracy=algorithm.accuracy_bounds,
        mask_truncated=algorithm.mask_truncated,
    )


def _sample_log(
    files: SampleFiles, world: World, tokens: Tokens, reward_manager: RewardManager
) -> AnySampleLog:
    """What keeps the samples of a rollout replica, on the rank that scores them."""
    if not world.rollout.is_output_rank:
        return IdleSampleLog()
    text_of = partial(decode, tokens.tokenizer, special=True)
    functions = list(reward_manager.functions)
    if world.reward is not None:
        functions.append(MODEL)
    return SampleLog(
        files,
        world.rollout.replica,
        text_of,
        tokens.unused,
        functions,
        reward_manager.verdict_functions,
    )


def _prompts(
    run: Run, sources: Sequence[DataSource], tokenizer: PreTrainedTokenizerBase
) -> Prompts:
    training = run.config.training
    return Prompts(
        sources,
        run.templates,
        tokenizer,
        run.config.actor_rollout.max_prompt_length,
        training.seed,
        shuffle=not training.no_shuffle,
    )


def _policy(run: Run, world: World, unused: Sequence[range]) -> AnyActor:
    if not world.train.member:
        return IdleActor()
    training = run.config.training
    model = RoleModel(
        run.actor.shape,
        world.train,
        world.device,
        run.dtype.torch,
        training.seq_length,
        training.sequence_parallel,
        run.config.actor_rollout.recompute_granularity == "full",
        training.seed,
        unused,
    )
    model.load(run.actor.load)
    adapters = None
    if run.lora is not None:
        adapters = Adapters(model, run.lora, training.seed)
    return Actor(model, run.actor_config, adapters)


def _reference(run: Run, world: World, unused: Sequence[range]) -> AnyReference:
    files = run.reference
    grid = world.ref
    if files is None or grid is None or not grid.member:
        return IdleReference()
    training = run.config.training
    model = RoleModel(
        files.shape,
        grid,
        world.device,
        run.dtype.torch,
        training.seq_length,
        # Without it every TP rank would send all tokens to the experts. The key is that of train,
        # and off where train has no TP.
        sequence_parallel=files.shape.experts is not None,
        recompute=False,
        seed=training.seed,
        unused=unused,
    )
    model.load(files.load)
    model.module.requires_grad_(False)
    ref = run.config.ref
    return Reference(
        model, run.sampling.temperature, ref.micro_batch_size, ref.max_tokens_per_microbatch
    )


def _judge(run: Run, world: World, move: RoleTransfer, clock: Clock, tokens: Tokens) -> AnyJudge:
    """The reward model's part, on every rank of a run that has one."""
    files = run.reward_model
    if files is None:
        return NoJudge()
    setup = JudgeSetup(
        config=run.config,
        load=files.load,
        folder=files.folder,
        shape=files.shape,
        dtype=run.dtype.torch,
        tokenizer=tokens.tokenizer,
    )
    return build_judge(setup, world, move, clock)


def _publisher(run: Run, world: World, policy: AnyActor, engine: RolloutEngine) -> Publisher:
    """What brings the weights of the train ranks to the engines."""
    target = engine.weights()
    return _publisher_to(target, target.layout.grid(world.rollout.span), run, world, policy)


def _reference_publisher(
    run: Run, world: World, policy: AnyActor, reference: AnyReference
) -> Publisher | None:
    """What brings them to the reference; None where it is never reset."""
    if world.ref is None or run.config.ref.reset_interval is None:
        return None
    return _publisher_to(reference.weights(), world.ref.span, run, world, policy)


def _publisher_to(
    target: WeightTarget, grid: RankGrid, run: Run, world: World, policy: AnyActor
) -> Publisher:
    """What brings the weights of the train ranks to those of `grid`, which hold them in `target`."""
    megabytes = run.config.training.publish_bucket_megabytes
    reshard = plan(
        table_in_bits(param_table(run.actor.shape), run.dtype.torch),
        run.actor.shape.num_layers,
        world.train.span,
        grid,
        run.dtype.itemsize,
        megabytes * 2**20,
    )
    return Publisher(
        reshard,
        world.rank,
        partial(world.tensor_group, buffer_megabytes=megabytes),
        policy.parameters(),
        target,
        run.dtype.torch,
        world.device.torch,
    )


def build_reward_manager(
    config: RewardConfig,
    limit: int,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    notes_values: bool = False,
) -> RewardManager:
    """Build what scores the samples of a replica, of at most `limit` tokens, on the rank that hands
    them on; it does nothing elsewhere."""
    executor = None
    if world.rollout.is_output_rank:
        executor = RewardExecutor(config)
    text_of = partial(decode, tokenizer, special=False)
    return RewardManager(executor, text_of, limit, notes_values)


def build_engine(
    config: EngineConfig,
    model: ModelFiles,
    dtype: Dtype,
    world: World,
    ends: Ends,
    unused: Sequence[range],
    reward_manager: RewardManager,
) -> RolloutEngine:
    """Build the engine of a rollout rank; samples are scored while others are generated."""
    kind = choose_engine(config.name)
    if not world.rollout.member:
        return IdleEngine(kind.layout)
    setup = EngineSetup(
        model_folder=model.folder,
        shape=model.shape,
        grid=world.rollout,
        dtype=dtype.torch,
        device=world.device.torch,
        end_ids=ends.ids,
        unused=unused,
        config=config,
    )
    engine = kind.build(setup)
    target = engine.weights()
    grid = kind.layout.grid(world.rollout.span)
    index = ShardIndex.of_rank(grid, world.rank)
    problems = target.problems(param_table(model.shape), Shards.of_grid(grid), index)
    if problems:
        raise BadInput(
            f"actor_rollout.engine: {config.name} has no place for weights of this model: "
            f"{problems[0]}"
        )
    engine.listeners.append(EngineListener(reward_manager.submit, reward_manager.poll))
    return engine
