"""The data sets of a run, looked at before it starts: what is wrong, and what is worth knowing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r1zero.config.schema import Config, filled
from r1zero.data.blend import split_blend
from r1zero.data.layout import ColumnLayout, layout_of
from r1zero.data.preprocessed import is_preprocessed, read_preprocessed
from r1zero.data.problems import read_problems
from r1zero.data.survey import DataSet, question_in, survey
from r1zero.data.template import Template
from r1zero.errors import BadInput
from r1zero.reward.choose import compares_answers, kept_columns
from r1zero.reward.math.gold import are_hopeless, survey_golds

if TYPE_CHECKING:  # transformers is imported where tokens are needed
    from r1zero.data.prompts import Prompts

TRAIN_DATA = "actor_rollout.data_path"
EVAL_DATA = "training.eval_data_path"


def data_sets(cfg: Config) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (key, path) of each data set, and a sentence for each blend that is malformed."""
    found = []
    problems = []
    named = ((TRAIN_DATA, cfg.actor_rollout.data_path), (EVAL_DATA, cfg.training.eval_data_path))
    for key, text in named:
        try:
            found += [(key, path) for _, path in split_blend(text)] if text is not None else []
        except BadInput as error:
            problems.append(f"{key}: {error}")
    if sum(key == EVAL_DATA for key, _ in found) > 1:
        problems.append(
            f"{EVAL_DATA}: {cfg.training.eval_data_path} is a blend, but each of its "
            "problems is answered once: name one data set"
        )
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
    template = Template(cfg.training.prompt_type, cfg.training.prompt_type_path or "")
    has_tokenizer = Path(cfg.training.tokenizer_name_or_path or "").exists()
    found = []
    notes: list[str] = []
    for key, path in data_sets(cfg)[0]:
        if is_preprocessed(path):
            is_here = has_tokenizer
        else:
            is_here = Path(path).exists()
        if is_here:
            found.append(_read(cfg, key, path, template, notes))
    return notes + _survey(cfg.algorithm.verifier_function, found)


def look_at_prompts(
    template: Template,
    reward_functions: Sequence[str],
    prompts: Prompts | None,
    eval_prompts: Prompts | None,
    eval_key: str = EVAL_DATA,
) -> list[str]:
    """Return the same about data that has been read; `eval_key` is what names the held-out data."""
    found = []
    notes = []
    for key, read in ((TRAIN_DATA, prompts), (eval_key, eval_prompts)):
        if read is None:
            continue
        notes += [f"{key}: {note}" for note in read.notes]
        for path, places in read.sets:
            mine = read.prompts[places.start : places.stop]
            found.append(
                DataSet(
                    key,
                    path,
                    [question_in(template, prompt.text) for prompt in mine],
                    [prompt.answer for prompt in mine],
                )
            )
    return notes + _survey(reward_functions, found)


def _survey(reward_functions: Sequence[str], found: list[DataSet]) -> list[str]:
    train = [data for data in found if data.key == TRAIN_DATA]
    held_out = [data for data in found if data.key != TRAIN_DATA]
    return survey(train, held_out, compares(reward_functions))


def _read(cfg: Config, key: str, path: str, template: Template, notes: list[str]) -> DataSet:
    """Read a data set; `notes` hears what was chosen and left out."""
    layout = layout_of(cfg.training, key == EVAL_DATA, kept_columns(cfg.algorithm, cfg.reward))
    if is_preprocessed(path):
        # Heavy, and needed only here: other data is looked at in a moment.
        from r1zero.data.prompts import load_tokenizer, read_prompts

        tokenizer = load_tokenizer(filled(cfg.training.tokenizer_name_or_path))
        read = read_prompts(path, 0, layout, template, tokenizer)
        questions = [question_in(template, prompt.text) for prompt in read.prompts]
        answers = [prompt.answer for prompt in read.prompts]
        said = read.notes
    else:
        found = read_problems(path, layout.fitting(template))
        questions = [problem.question for problem in found.problems]
        answers = [problem.answer for problem in found.problems]
        said = found.notes
    notes += [f"{key}: {note}" for note in said]
    return DataSet(key, path, questions, answers)
