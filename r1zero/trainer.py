"""The loop around the step: evaluate, train, keep the run folder, save the model."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from r1zero.checkpoint.manager import Keeper
from r1zero.checkpoint.restore import restore, verify
from r1zero.run_folder.claim import Hold, check_ways
from r1zero.config.schema import Config
from r1zero.runtime import Crew, build_crew
from r1zero.data.ends import split_marks
from r1zero.data.prompts import vocabulary_of
from r1zero.data.template import Template
from r1zero.preflight.datasets import look_at_prompts
from r1zero.preflight.dry_run import banner
from r1zero.evaluation.evaluate import evaluate
from r1zero.checkpoint.export import export
from r1zero.distributed.log import start_logging
from r1zero.evaluation.scores import table
from r1zero.observe.observer import Observer
from r1zero.observe.live import Poster
from r1zero.distributed.board import Board
from r1zero.preflight.advice import faster_split
from r1zero.preflight.opening import Opening, open_run
from r1zero.run_folder.exported import MODEL
from r1zero.step import train_step
from r1zero.weights.detect import find
from r1zero.distributed.groups import World
from r1zero.distributed.shutdown import Leave
from r1zero.distributed.transfer import Absent

log = logging.getLogger("r1zero")


def prepare(cfg: Config, world: World, warnings: Sequence[str] = ()) -> Crew | None:
    """Take the run's folders, start or continue them, and build the crew. Collective.

    None when nothing is left to do. BadInput for input that turns out to be bad.
    """
    hold, opening = open_run(cfg, world, warnings)
    with contextlib.ExitStack() as unless_it_trains:
        unless_it_trains.callback(hold.release)

        @unless_it_trains.push
        def tell_of_a_move(_kind: object, error: BaseException | None, _trace: object) -> None:
            if error is not None:
                _check_folders(cfg, hold, opening, error)

        start_logging(opening.folder / "logs", world.rank, to_console=world.is_controller)
        for line in opening.said:
            log.info(line)
        if opening.is_done:
            return None
        crew = _build(cfg, world, opening, hold)
        unless_it_trains.pop_all()
    return crew


def _build(cfg: Config, world: World, opening: Opening, hold: Hold) -> Crew:
    """Build the crew, and bring it to where the checkpoint was."""
    checkpoint = opening.checkpoint
    if checkpoint is not None:
        verify(world, checkpoint)
    crew = build_crew(cfg, world)
    crew.hold = hold
    crew.folder, crew.shelf = opening.folder, opening.shelf
    _announce(crew)
    if checkpoint is not None:
        restore(crew, checkpoint)
    return crew


def train(crew: Crew | None, leave: Leave | None = None) -> str | None:
    """Train to `train_iters`, from the start weights or where a checkpoint was. Collective.

    Returns why it left before the end, with everything saved; None at the end. Without a crew
    there is nothing to do.
    """
    if crew is None:
        return None
    done, last = crew.progress, crew.cfg.training.train_iters
    leave = leave or Leave()
    leave.begin()
    keeper = Keeper(crew, leave)
    observer = _build_observer(crew)
    try:
        crew.start()
        after = None
        if done.step == 0:
            done.evaluation = after = _evaluate(crew, observer, 0)
        while done.step < last:
            with _traced(crew, done.step + 1):
                outcome = train_step(done.step + 1, crew)
            crew.move.at_controller(observer.after_step, outcome)
            done.advance(crew.cfg.training.global_batch_size)
            after = _evaluate(crew, observer, done.step)
            if reason := keeper.after_step():
                log.info("left after step %d of %d: %s; the same command goes on", done.step, last, reason)
                return reason
        export(crew, keeper)
        crew.move.at_controller(_conclude, crew, done.evaluation, after)
        crew.move.at_controller(observer.finish)
        return None
    except Exception as error:
        _check_folders(crew.cfg, crew.hold, crew, error)
        raise
    finally:
        crew.move.at_controller(observer.close)
        crew.close()
        crew.hold.release()


def _build_observer(crew: Crew) -> Observer | Absent:
    """The controller's observer. Collective.

    If it has a terminal, rollout replicas post their progress from now on.
    """
    live = crew.move.from_controller(sys.stderr.isatty)
    rollout = crew.world.rollout
    if live and rollout.leads:
        Poster(crew.engine, partial(Board(crew.world.store).post, f"rollout/{rollout.replica}"))
    if not crew.world.is_controller:
        return Absent("controller")
    return Observer(crew.cfg, crew.world, crew.tokenizer, crew.hold,
                    folder=crew.folder, steps_done=crew.progress.step,
                    mismatch_limit=crew.invariants.limits.mismatch,
                    faster_split=partial(faster_split, crew.cfg, crew.world.placement), live=live)


def _check_folders(cfg: Config, hold: Hold, places: Opening | Crew, error: BaseException) -> None:
    """BadInput when the run's folders are not its own any more: then that is why something failed."""
    hold.check()
    if isinstance(error, OSError):  # what fails everywhere may have made the controller give them back
        check_ways({Path(cfg.output_dir): places.folder, cfg.checkpoints: places.shelf.parent})


def _traced(crew: Crew, step: int) -> contextlib.AbstractContextManager:
    """Trace this step if that is asked for, on the first rank of each role."""
    firsts = [grid.span.role for grid in crew.world.roles.values() if grid.leads and grid.replica == 0]
    if step not in crew.cfg.training.profile_steps or not firsts:
        return contextlib.nullcontext()
    folder = crew.folder / "profile" / f"step_{step:06d}"
    return crew.world.device.trace(folder, f"{'_'.join(firsts)}_rank_{crew.world.rank:04d}")


def _announce(crew: Crew) -> None:
    world = crew.world
    log.info("%s (%s) on %s", f"rank {world.rank} of {world.size}", world.role_names, world.device.torch)
    if world.is_controller:
        log.info(banner(crew.cfg, world.placement, world.launch.node_of_rank))
        dropped, kept = crew.prompts.num_dropped, len(crew.prompts)
        for path in dict.fromkeys((crew.cfg.actor_rollout.load, crew.cfg.ref.load)):
            log.info("start weights: %s", find(path))
        log.info("%d prompts; %d dropped, longer than max_prompt_length=%d tokens",
                 kept, dropped, crew.cfg.actor_rollout.max_prompt_length)
        for line in look_at_prompts(crew.cfg, crew.prompts, crew.eval_prompts):
            log.info(line)
        _announce_tokens(crew)


def _announce_tokens(crew: Crew) -> None:
    """Say what ends a response, which rows of the model are no tokens, and which marks are read as text."""
    training, vocabulary = crew.cfg.training, vocabulary_of(crew.tokenizer)
    log.info("a response ends with %s", crew.ends)
    unused = sum(map(len, vocabulary.unused(crew.shape.vocab_size)))
    if unused:
        log.info("%d of the %d rows of the vocabulary are no tokens of the tokenizer and have no probability",
                 unused, crew.shape.vocab_size)
    for mark in split_marks(Template(training.prompt_type, training.prompt_type_path), vocabulary):
        log.warning("warning: template %s marks turns with %s, which this tokenizer reads as ordinary text: %s",
                    training.prompt_type, mark, " ".join(vocabulary.split(mark)))


def _evaluate(crew: Crew, observer: Observer | Absent, step: int) -> dict[str, float] | None:
    """Evaluate before the first step, after the last, and when it is due. Returns the controller's scores."""
    training = crew.cfg.training
    due = step in (0, training.train_iters) or (training.eval_interval and step % training.eval_interval == 0)
    if training.eval_data_path is None or not due:
        return None
    model = f"{crew.cfg.actor_rollout.load} after {step} steps"
    crew.hold.check()
    place = crew.folder / "evaluation" / f"step_{step:06d}"
    found = evaluate(crew, crew.progress.weights_version, model, place)
    if found is None:
        return None
    observer.after_evaluation(step, found["scores"])
    log.info("\nafter %d steps, %s\n", step, table(found))
    return found["scores"]


def _conclude(crew: Crew, before: dict[str, float] | None, after: dict[str, float] | None) -> None:
    """Show what training did, and where everything is."""
    if before is not None and after is not None:
        training = crew.cfg.training
        log.info("\nheld-out problems: %s, %d problems x %d, temperature %g", training.eval_data_path,
                 len(crew.eval_prompts), training.eval_samples_per_prompt, training.eval_temperature)
        log.info("%-24s %8s %8s", "", "before", "after")
        for key, label in _rows([key for key in before if key in after]):
            log.info("%-24s %8s %8s", label, _shown(key, before[key]), _shown(key, after[key]))
    folder = Path(crew.cfg.output_dir)
    log.info("\nrun folder: %s\nmodel:      %s\nreport:     %s",
             folder, folder / MODEL, folder / "report.html")


def _rows(keys: list[str]) -> list[tuple[str, str]]:
    names = {"acc": "accuracy", "base_acc": "accuracy"}
    rules = [(key, names.get(key.split("/")[1], key.split("/")[1])) for key in keys if key.endswith("/right")]
    return rules + [("reward/mean", "reward"), ("response_length/mean", "response length")]


def _shown(key: str, value: float) -> str:
    return f"{value:.1%}" if key.endswith("/right") else f"{value:.2f}"
