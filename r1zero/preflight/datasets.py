"""The data sets of a run, looked at before it starts: what is wrong, and what is worth knowing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from r1zero.config.schema import Config, filled
from r1zero.data.layout import ColumnLayout
from r1zero.data.preprocessed import is_preprocessed, read_preprocessed
from r1zero.data.problems import read_problems
from r1zero.data.sources import (
    EVAL_SETS,
    DataSource,
    Keep,
    eval_sources,
    no_columns,
    train_sources,
)
from r1zero.data.survey import DataSet, question_in, survey
from r1zero.data.template import Template
from r1zero.errors import BadInput
from r1zero.reward.choose import compares_answers, kept_columns
from r1zero.reward.math.gold import are_hopeless, survey_golds

if TYPE_CHECKING:  # transformers is imported where tokens are needed
    from r1zero.data.prompts import Prompts


def data_sets(cfg: Config, keep: Keep = no_columns) -> tuple[list[DataSource], list[str]]:
    """Return each data set, those of a blend one by one, and a sentence for each blend that is
    malformed."""
    found = []
    problems = []
    for source in (*train_sources(cfg, keep), *eval_sources(cfg, keep)):
        try:
            parts = source.parts()
        except BadInput as error:
            problems.append(f"{source.key}: {error}")
            continue
        found += parts
        if source.held_out and len(parts) > 1:
            problems.append(
                f"{source.key}: {source.path} is a blend, but each of its problems is answered "
                f"once: name one data set here, and others in {EVAL_SETS}"
            )
    return found, problems


def keeping(cfg: Config) -> Keep:
    """What says which columns of the data reward functions see, with the settings of the run."""
    return partial(kept_columns, settings=cfg.reward.settings)


def templates_of(
    sources: Sequence[DataSource], templates_file: str
) -> tuple[dict[str, Template], list[str]]:
    """Return the prompt templates of these data sets by name, and a sentence for each that is
    unknown or malformed."""
    found: dict[str, Template] = {}
    problems = []
    keys = {source.prompt_type: source.prompt_type_key for source in reversed(sources)}
    for name, key in keys.items():
        try:
            found[name] = Template(name, templates_file)
        except BadInput as error:
            problems.append(f"{key}: {error}")
    return found, problems


def compares(reward_functions: Sequence[str]) -> bool:
    """Whether one of ours compares responses with the right answers."""
    return compares_answers(reward_functions)


def check_data(
    key: str,
    path: str,
    layout: ColumnLayout,
    template: Template | None,
    compared: bool,
    vocab_size: int,
) -> list[str]:
    """Rows of a raw file must have the columns of the layout; preprocessed files must be whole.

    If right answers are `compared` with responses, some must look like answers. The template, if
    there is one, must take the system texts of the data.
    """
    try:
        if is_preprocessed(path):
            layout.refuse_tokens(path)
            for _ in read_preprocessed(path, vocab_size):
                pass
            return []
        if template is not None:
            layout = layout.fitting(template)
        problems = read_problems(path, layout).problems
        with_system = next((problem for problem in problems if problem.system), None)
        if template is not None and with_system is not None:
            template.render(with_system.question, with_system.system)
    except BadInput as error:
        return [f"{key}: {error}"]
    golds = [problem.answer for problem in problems]
    if compared and are_hopeless(golds):
        return [
            f"{key}: none of the {len(golds)} right answers of {path} looks like an answer, "
            f"such as {', '.join(survey_golds(golds).examples)}; name the column with the answers in "
            f"{layout.columns_key}.response, or score with a function of your own"
        ]
    return []


def look_at_data(cfg: Config) -> list[str]:
    """Return what is worth knowing about the data that is on this machine, warnings named so.

    BadInput when something is wrong with it.
    """
    file = filled(cfg.training.prompt_type_path)
    has_tokenizer = Path(cfg.training.tokenizer_name_or_path or "").exists()
    found = []
    notes: list[str] = []
    for source in data_sets(cfg, keeping(cfg))[0]:
        if is_preprocessed(source.path):
            is_here = has_tokenizer
        else:
            is_here = Path(source.path).exists()
        if is_here:
            found.append(_read(cfg, source, Template(source.prompt_type, file), notes))
    return notes + _survey(found)


def look_at_prompts(read: Sequence[Prompts], templates: Mapping[str, Template]) -> list[str]:
    """Return the same about data that has been read."""
    found = []
    notes = []
    for prompts in read:
        notes += [f"{prompts.sets[0][0].key}: {note}" for note in prompts.notes]
        for source, places in prompts.sets:
            mine = prompts.prompts[places.start : places.stop]
            template = templates[source.prompt_type]
            questions = [question_in(template, prompt.text) for prompt in mine]
            answers = [prompt.answer for prompt in mine]
            found.append((source, DataSet(source.key, source.path, questions, answers)))
    return notes + _survey(found)


def _survey(found: Sequence[tuple[DataSource, DataSet]]) -> list[str]:
    train = [data for source, data in found if not source.held_out]
    held_out = [data for source, data in found if source.held_out]
    compared = any(compares(list(source.scorers)) for source, _ in found)
    return survey(train, held_out, compared)


def _read(
    cfg: Config, source: DataSource, template: Template, notes: list[str]
) -> tuple[DataSource, DataSet]:
    """Read a data set; `notes` hears what was chosen and left out."""
    key = source.key
    path = source.path
    if is_preprocessed(path):
        # Heavy, and needed only here: other data is looked at in a moment.
        from r1zero.data.prompts import load_tokenizer, read_prompts

        tokenizer = load_tokenizer(filled(cfg.training.tokenizer_name_or_path))
        read = read_prompts(source, 0, template, tokenizer)
        questions = [question_in(template, prompt.text) for prompt in read.prompts]
        answers = [prompt.answer for prompt in read.prompts]
        said = read.notes
    else:
        found = read_problems(path, source.layout.fitting(template))
        questions = [problem.question for problem in found.problems]
        answers = [problem.answer for problem in found.problems]
        said = found.notes
    notes += [f"{key}: {note}" for note in said]
    return source, DataSet(key, path, questions, answers)
