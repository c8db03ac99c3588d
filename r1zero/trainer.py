"""The training loop around the step: evaluate, train, checkpoint, export the model."""

from __future__ import annotations

import contextlib
import logging
import sys
from functools import partial

from r1zero.checkpoint import store
from r1zero.checkpoint.export import export, export_on_the_way
from r1zero.checkpoint.manager import CheckpointManager
from r1zero.checkpoint.restore import restore, verify
from r1zero.config.load import dump
from r1zero.data.ends import split_marks
from r1zero.data.prompts import vocabulary_of
from r1zero.distributed.board import Board
from r1zero.distributed.device import multiplies
from r1zero.distributed.groups import World
from r1zero.distributed.log import start_logging
from r1zero.distributed.shutdown import PreemptionNotice
from r1zero.evaluation.config import EvalConfig, by_set, check_waited_for, eval_configs
from r1zero.evaluation.evaluate import evaluate
from r1zero.evaluation.scores import table
from r1zero.observe.live import Poster
from r1zero.observe.observer import IdleObserver, Observer, ObserverConfig
from r1zero.preflight.advice import faster_split
from r1zero.preflight.datasets import look_at_prompts
from r1zero.preflight.dry_run import banner
from r1zero.preflight.opening import Opening, open_run
from r1zero.preflight.run import Run
from r1zero.run_folder.claim import Hold, check_ways
from r1zero.run_folder.exported import MODEL
from r1zero.run_folder.owner import plain
from r1zero.runtime import Runtime, build_runtime
from r1zero.step import take_up, train_step
from r1zero.weights.detect import detect

log = logging.getLogger("r1zero")


def prepare(run: Run, world: World) -> Runtime | None:
    """Take the run's folders, start or continue them, and build the runtime. Collective.

    None when nothing is left to do. BadInput for input that turns out to be bad.
    """
    hold, opening = open_run(run, world)
    with contextlib.ExitStack() as unless_it_trains:
        unless_it_trains.callback(hold.release)

        @unless_it_trains.push
        def tell_of_a_move(_kind: object, error: BaseException | None, _trace: object) -> None:
            if error is not None:
                _check_folders(run, hold, opening, error)

        start_logging(
            opening.folder / "logs", world.rank, world.size, to_console=world.is_controller
        )
        for line in opening.said:
            log.info(line)
        if opening.is_done:
            world.barrier()  # the folder is given back when all have opened their logs in it
            return None
        runtime = _build(run, world, opening, hold)
        unless_it_trains.pop_all()
    return runtime


def _build(run: Run, world: World, opening: Opening, hold: Hold) -> Runtime:
    """Build the runtime, and bring it to where the checkpoint was."""
    checkpoint = opening.checkpoint
    if checkpoint is not None:
        verify(world, checkpoint)
    runtime = build_runtime(run, world)
    runtime.hold = hold
    runtime.folder = opening.folder
    runtime.checkpoints = opening.checkpoints
    _announce(runtime)
    if checkpoint is not None:
        restore(runtime, checkpoint)
    return runtime


def train(runtime: Runtime | None, notice: PreemptionNotice | None = None) -> str | None:
    """Train to `train_iters` or `stop_at`, from the start weights or where a checkpoint was.
    Collective.

    Returns why it left before that, with everything saved; None at the end. Without a runtime
    there is nothing to do.
    """
    if runtime is None:
        return None
    done = runtime.progress
    training = runtime.run.config.training
    last = training.train_iters
    notice = notice or PreemptionNotice()
    notice.begin()
    manager = CheckpointManager(runtime, notice)
    observer = _build_observer(runtime)
    try:
        runtime.start()
        take_up(runtime)
        if done.step == 0:
            done.evaluation = _evaluate(runtime, observer, 0)
        while not runtime.checkpoint_config.is_trained(done):
            with _traced(runtime, done.step + 1):
                outcome = train_step(done.step + 1, runtime)
            if outcome is not None:
                observer.after_step(outcome)
            done.advance(runtime.drawn)
            done.scores = _evaluate(runtime, observer, done.step)
            export_on_the_way(runtime)
            if reason := manager.after_step():
                log.info(
                    "left after step %d of %d: %s; the same command goes on",
                    done.step,
                    last,
                    reason,
                )
                return reason
        if done.step < last:
            log.info("stopped after step %d of %d: training.stop_at is reached", done.step, last)
        export(runtime, manager)
        runtime.move.at_controller(_conclude, runtime)
        observer.finish()
        return None
    except Exception as error:
        # whatever fails may come of a folder that was taken away; if so that is told, else `error`
        _check_folders(runtime.run, runtime.hold, runtime, error)
        raise
    finally:
        observer.close()
        runtime.close()
        runtime.hold.release()


def _build_observer(runtime: Runtime) -> Observer | IdleObserver:
    """The controller's observer, an idle one elsewhere. Collective.

    If it has a terminal, rollout replicas post their progress from now on.
    """
    live = runtime.move.from_controller(sys.stderr.isatty)
    rollout = runtime.world.rollout
    if live and rollout.is_input_rank:
        Poster(
            runtime.engine, partial(Board(runtime.world.store).post, f"rollout/{rollout.replica}")
        )
    if not runtime.world.is_controller:
        return IdleObserver()
    return Observer(
        _observer_config(runtime.run),
        runtime.world,
        runtime.hold,
        folder=runtime.folder,
        samples=runtime.sample_files,
        steps_done=runtime.progress.step,
        mismatch_limit=runtime.invariants.limits.mismatch,
        faster_split=partial(faster_split, runtime.run.config, runtime.world.placement),
        live=live,
    )


def _observer_config(run: Run) -> ObserverConfig:
    training = run.config.training
    return ObserverConfig(
        run_name=run.config.name,
        total_steps=training.train_iters,
        report_interval=training.report_interval,
        trackers=training.logger,
        max_failure_rate=run.config.reward.max_failure_rate,
        stop_on_broken_invariant=training.on_broken_invariant == "stop",
        config_text=dump(run.config),
    )


def _check_folders(run: Run, hold: Hold, places: Opening | Runtime, error: BaseException) -> None:
    """BadInput when the run's folders are not its own any more: then that is why something
    failed."""
    hold.check()
    # what fails everywhere may have made the controller give them back
    if isinstance(error, OSError):
        check_ways({run.output_dir: places.folder, run.checkpoints: places.checkpoints.parent})


def _traced(runtime: Runtime, step: int) -> contextlib.AbstractContextManager:
    """Trace this step if that is asked for, on the first rank of each role."""
    firsts = [
        grid.span.role
        for grid in runtime.world.roles.values()
        if grid.is_input_rank and grid.replica == 0
    ]
    if step not in runtime.run.config.training.profile_steps or not firsts:
        return contextlib.nullcontext()
    folder = runtime.folder / "profile" / f"step_{step:06d}"
    return runtime.world.device.trace(folder, f"{'_'.join(firsts)}_rank_{runtime.world.rank:04d}")


def _announce(runtime: Runtime) -> None:
    world = runtime.world
    log.info(
        "%s (%s) on %s", f"rank {world.rank} of {world.size}", world.role_names, world.device.torch
    )
    if world.is_controller:
        run = runtime.run
        log.info(banner(run, world.launch.node_of_rank))
        assert runtime.prompts is not None, "the controller draws"
        dropped = runtime.prompts.num_dropped
        kept = len(runtime.prompts)
        loaded = [model.load for model in (run.actor, run.reference) if model is not None]
        for path in dict.fromkeys(loaded):
            log.info("start weights: %s", detect(path))
        log.info(
            "%d prompts; %d dropped, longer than max_prompt_length=%d tokens",
            kept,
            dropped,
            run.config.actor_rollout.max_prompt_length,
        )
        read = [runtime.prompts, *runtime.eval_prompts.values()]
        for line in look_at_prompts(read, run.templates):
            log.info(line)
        _announce_tokens(runtime)
        if not multiplies(world.device, run.dtype.torch):
            log.warning(
                "warning: training.bf16: this processor has no products in bf16, so that a step takes "
                "many times as long as in fp32; set it to false"
            )


def _announce_tokens(runtime: Runtime) -> None:
    """Say what ends a response, which rows of the model are no tokens, and which marks are read as
    text."""
    vocabulary = vocabulary_of(runtime.tokenizer)
    log.info("a response ends with %s", runtime.ends)
    unused = sum(map(len, vocabulary.unused(runtime.shape.vocab_size)))
    if unused:
        log.info(
            (
                "%d of the %d rows of the vocabulary are no tokens of the tokenizer and have no "
                "probability"
            ),
            unused,
            runtime.shape.vocab_size,
        )
    for template in runtime.run.templates.values():
        for mark in split_marks(template, vocabulary):
            log.warning(
                (
                    "warning: template %s marks turns with %s, which this tokenizer reads as "
                    "ordinary text: %s"
                ),
                template.name,
                mark,
                " ".join(vocabulary.split(mark)),
            )


def _evaluate(
    runtime: Runtime, observer: Observer | IdleObserver, step: int
) -> dict[str, float] | None:
    """Evaluate before the first step, after the last, and when it is due. Returns the scores, on
    all ranks. Collective. BadInput when one that the configuration waits for is not among them."""
    training = runtime.run.config.training
    due = step in (0, training.train_iters) or (
        training.eval_interval and step % training.eval_interval == 0
    )
    configs = eval_configs(runtime.run)
    if not due or not configs:
        return None
    model = f"{runtime.run.actor.load} after {step} steps"
    scores: dict[str, float] = {}
    folder = runtime.folder / "evaluation"
    for config in configs:
        runtime.hold.check()
        runtime.move.at_controller(
            folder.mkdir, exist_ok=True
        )  # what lies in it makes none around it
        place = folder / config.name / f"step_{step:06d}"
        prompts = runtime.eval_prompts.get(config.name)
        version = runtime.progress.weights_version
        found = evaluate(runtime, config, prompts, version, model, place)
        if found is not None:
            scores |= config.told(found["scores"])
            log.info("\nafter %d steps, %s\n", step, table(found))
    scores = runtime.move.from_controller(lambda: scores)
    check_waited_for(training, scores)
    observer.after_evaluation(step, scores)
    return scores


def _conclude(runtime: Runtime) -> None:
    """Show what training did, and where everything is."""
    names = runtime.run.config.training.evaluation
    first = by_set(runtime.progress.evaluation or {}, names)
    last = by_set(runtime.progress.scores or {}, names)
    for config in eval_configs(runtime.run):
        if config.name in first and config.name in last:
            problems = len(runtime.eval_prompts[config.name])
            _compare(config, problems, first[config.name], last[config.name])
    retention = runtime.checkpoint_config.retention
    if retention.keep_best and (best := store.best(runtime.checkpoints, retention)):
        log.info("\nbest checkpoint: %s, %s %.4g", plain(best[0]), retention.best_score, best[1])
    folder = runtime.run.output_dir
    log.info(
        "\nrun folder: %s\nmodel:      %s\nreport:     %s",
        folder,
        folder / MODEL,
        folder / "report.html",
    )


def _compare(
    config: EvalConfig, problems: int, before: dict[str, float], after: dict[str, float]
) -> None:
    """Show the scores of an evaluation set before and after training."""
    log.info(
        "\nheld-out problems: %s, %d problems x %d, temperature %g",
        config.data,
        problems,
        config.samples_per_problem,
        config.temperature,
    )
    log.info("%-24s %8s %8s", "", "before", "after")
    for key, label in _rows([key for key in before if key in after]):
        log.info("%-24s %8s %8s", label, _shown(key, before[key]), _shown(key, after[key]))


def _rows(keys: list[str]) -> list[tuple[str, str]]:
    names = {"acc": "accuracy", "base_acc": "accuracy"}
    rights = [
        (key, names.get(key.split("/")[1], key.split("/")[1]))
        for key in keys
        if key.endswith("/right")
    ]
    return rights + [("reward/mean", "reward"), ("response_length/mean", "response length")]


def _shown(key: str, value: float) -> str:
    if key.endswith("/right"):
        return f"{value:.1%}"
    return f"{value:.2f}"
