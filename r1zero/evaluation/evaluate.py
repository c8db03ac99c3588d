"""Evaluation on held-out problems (pass@k, accuracy), in training and by tools/evaluate.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from r1zero.config.schema import Config
from r1zero.data.ends import Ends
from r1zero.data.files import data_files
from r1zero.data.indexed import index_path, values_path
from r1zero.data.preprocessed import is_preprocessed, stem
from r1zero.data.problems import read_tags
from r1zero.data.prompts import Prompts
from r1zero.data.template import Template
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RankGrid
from r1zero.distributed.transfer import RoleTransfer
from r1zero.evaluation.scores import EvalProtocol, extractor_version, report, write_report
from r1zero.reward.manager import RewardManager
from r1zero.rollout.interface import RolloutEngine, Sampling
from r1zero.types import Batch, Group

# In place of the step in the key of the sampler: evaluation draws other numbers than training, and
# always the same ones, so that a difference between two evaluations comes from the weights.
EVALUATION = 2**32
TAGS = ("level", "subject")  # columns by which scores are also told, when the data has them


class EvalContext(Protocol):
    """What answers: the runtime of a run, or that of tools/evaluate.py."""

    cfg: Config
    world: World
    move: RoleTransfer
    tokenizer: PreTrainedTokenizerBase
    ends: Ends
    eval_prompts: Prompts | None
    engine: RolloutEngine
    reward_manager: RewardManager


def evaluate(
    context: EvalContext, version: int, model: str, place: Path, round_samples: int | None = None
) -> dict[str, Any] | None:
    """Answer all problems of `eval_data_path`; write `place`.json and `place`.parquet. Collective.

    `version` is that of the engine's weights, `model` their name. With `round_samples`, about that
    many answers at a time are decoded together, always the same ones, so that not even rounding
    depends on the number of ranks; without it each replica decodes its whole share at once. Returns
    the report on the controller.
    """
    batch = context.move.from_controller(_plan, context, version)
    shares = context.move.to_controller(_answer(context, batch, round_samples))
    return context.move.at_controller(_conclude, context, batch, shares, model, place)


def _plan(context: EvalContext, version: int) -> Batch:
    prompts = context.eval_prompts.prompts
    samples = context.cfg.training.eval_samples_per_prompt
    return Batch(EVALUATION, version, prompts, samples, len(prompts) * samples)


def _answer(context: EvalContext, batch: Batch, round_samples: int | None) -> list[Group]:
    """Answer and score this replica's share; empty but on its output rank."""
    grid = context.world.rollout
    if not grid.member:
        return []
    groups = []
    sampling = eval_sampling(context.cfg)
    for positions in shares(batch, round_samples, grid.span, grid.replica):
        context.engine.submit(batch, positions, sampling)
        groups += context.engine.collect(0)
    groups = context.reward_manager.score(groups)
    if grid.is_output_rank:
        return groups
    return []


def shares(batch: Batch, round_samples: int | None, span: RankGrid, replica: int) -> list[range]:
    """Return the positions of the problems that a replica answers, round by round.

    Ten problems in four rounds are 0 1 | 2 3 4 | 5 6 | 7 8 9; of two replicas the first answers the
    first and the third, the second the others.
    """
    size = len(batch.prompts)
    if round_samples is None:
        rounds = [span.share(replica, range(size))]
    else:
        count = -(-batch.num_samples // round_samples)
        rounds = [
            range(size * i // count, size * (i + 1) // count)
            for i in span.share(replica, range(count))
        ]
    return [positions for positions in rounds if positions]


def eval_sampling(cfg: Config) -> Sampling:
    """How answers are drawn; temperature 0 takes the most likely token."""
    training = cfg.training
    if training.eval_temperature == 0:
        return Sampling(1.0, 1.0, 1, training.seed)
    top_k = max(training.eval_top_k, 0)
    return Sampling(training.eval_temperature, training.eval_top_p, top_k, training.seed)


def _conclude(
    context: EvalContext, batch: Batch, found: Sequence[list[Group]], model: str, place: Path
) -> dict[str, Any]:
    """Score all answers, and write them and the report."""
    groups = sorted((group for share in found for group in share), key=lambda group: group.position)
    versions = {sample.version for group in groups for sample in group.samples}
    assert versions == {batch.version}, (
        f"version {batch.version} was to be evaluated, but {versions} answered"
    )
    data = context.cfg.training.eval_data_path
    if is_preprocessed(data):
        tags = {}
    else:
        tags = read_tags(data, TAGS)
    content = report(
        groups, tags, eval_protocol(context.cfg, model, context.eval_prompts, context.ends)
    )
    write_report(
        place, content, groups, tags, partial(context.tokenizer.decode, skip_special_tokens=False)
    )
    return content


def eval_protocol(cfg: Config, model: str, prompts: Prompts, ends: Ends) -> EvalProtocol:
    """Name all that the scores depend on."""
    training = cfg.training
    template = Template(training.prompt_type, training.prompt_type_path)
    text = json.dumps([template.text, template.default_system])
    sampling = eval_sampling(cfg)
    return EvalProtocol(
        model=model,
        data=training.eval_data_path,
        data_sha256=data_sha256(training.eval_data_path),
        rows=prompts.num_rows,
        problems=len(prompts),
        dropped=prompts.num_dropped,
        template=training.prompt_type,
        template_sha256=hashlib.sha256(text.encode()).hexdigest(),
        samples_per_problem=training.eval_samples_per_prompt,
        temperature=training.eval_temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=cfg.response_budget,
        ends=[f"{ends.texts[number]} ({number})" for number in ends.ids],
        seed=training.seed,
        dtype="bf16" if training.bf16 else "fp32",
        rules=list(cfg.algorithm.verifier_function),
        extractor=extractor_version(),
    )


def data_sha256(path: str) -> str:
    """Hash the files of a data set, one after the other."""
    if is_preprocessed(path):
        stems = [stem(path, field) for field in ("input_ids", "labels")]
        files = [of(each) for each in stems for of in (index_path, values_path)]
    else:
        files = data_files(path, held_out=True).files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
