"""A dry run of custom reward functions: they are loaded and score two responses to real data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1zero.config.own_code import is_own
from r1zero.config.schema import Config, filled
from r1zero.data.preprocessed import is_preprocessed, read_preprocessed
from r1zero.data.problems import read_problems
from r1zero.data.sources import DataSource, train_sources
from r1zero.data.template import Template
from r1zero.preflight.datasets import keeping
from r1zero.reward.choose import settings_of
from r1zero.reward.config import RewardConfig
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.math.gold import read_gold
from r1zero.reward.own import IMPORT_SECONDS
from r1zero.reward.types import RewardInput


def check_custom(cfg: Config) -> list[str]:
    """Return a sentence for every reward function, one's own among them, that fails on the first
    problem of a data set that it scores."""
    problems = []
    for source in train_sources(cfg, keeping(cfg)):
        if any(map(is_own, source.scorers)):
            problems += _check_source(cfg, source.parts()[0])
    return problems


def _check_source(cfg: Config, source: DataSource) -> list[str]:
    """The same of one data set."""
    key = source.scorers_key
    prompt, answer, row = _first_problem(cfg, source)
    responses = [f"<think>I know it.</think><answer>\\boxed{{{answer}}}</answer>", "I do not know."]
    names = list(source.scorers)
    config = RewardConfig(
        names=names,
        weights=list(source.scorers.values()),
        settings=settings_of(names, cfg.reward.settings),
        workers=1,
        deadline_seconds=cfg.reward.deadline_seconds,
        worker_memory_megabytes=cfg.reward.worker_memory_megabytes,
    )
    try:
        with RewardExecutor(config, IMPORT_SECONDS) as executor:
            for member, text in enumerate(responses):
                case = RewardInput(
                    prompt,
                    text,
                    answer,
                    len(text.split()),
                    cfg.response_budget,
                    truncated=False,
                    row=row or {},
                    source=source.label,
                )
                executor.submit("trial", member, len(responses), case)
            scores = executor.collect(["trial"])["trial"][0]
    except RuntimeError as error:
        return [f"{key}: {error}"]
    return [
        f"{key}: {name} fails on the first problem of {source.path}: {score.why}"
        for name, score in scores.items()
        if score.outcome.failed
    ]


def _first_problem(cfg: Config, source: DataSource) -> tuple[str, str, Mapping[str, Any] | None]:
    """Return prompt, right answer and kept columns of the first problem of the data."""
    path = source.path
    if is_preprocessed(path):
        # Heavy, and needed only here: a check takes a moment otherwise.
        from r1zero.data.prompts import detokenize, load_tokenizer, vocabulary_of

        tokenizer = load_tokenizer(filled(cfg.training.tokenizer_name_or_path))
        row = next(read_preprocessed(path, vocabulary_of(tokenizer).size))
        [prompt] = detokenize(tokenizer, [row.prompt], special=True)
        [answer] = detokenize(tokenizer, [row.answer], special=False)
        return prompt, read_gold(answer), None
    template = Template(source.prompt_type, filled(cfg.training.prompt_type_path))
    problem = read_problems(path, source.layout.fitting(template)).problems[0]
    return template.render(problem.question, problem.system), problem.answer, problem.row
