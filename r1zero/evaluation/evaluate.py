"""Evaluation on held-out problems (pass@k, accuracy), in training and by tools/evaluate.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from r1zero.data.ends import Ends
from r1zero.data.files import data_files
from r1zero.data.indexed import index_path, values_path
from r1zero.data.preprocessed import is_preprocessed, stem
from r1zero.data.problems import read_tags
from r1zero.data.prompts import Prompts, decode
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RankGrid
from r1zero.distributed.transfer import RoleTransfer
from r1zero.evaluation.config import EvalConfig
from r1zero.evaluation.scores import EvalProtocol, extractor_version, report, write_report
from r1zero.reward.manager import RewardManager
from r1zero.rollout.interface import RolloutEngine
from r1zero.types import Batch, Group

# In place of the step in the key of the sampler: evaluation draws other numbers than training, and
# always the same ones, so that a difference between two evaluations comes from the weights.
EVALUATION = 2**32
TAGS = ("level", "subject")  # columns by which scores are also told, when the data has them


class EvalContext(Protocol):
    """What answers: the runtime of a run, or that of tools/evaluate.py."""

    world: World
    move: RoleTransfer
    tokenizer: PreTrainedTokenizerBase
    ends: Ends
    engine: RolloutEngine
    reward_manager: RewardManager


def evaluate(
    context: EvalContext,
    config: EvalConfig,
    prompts: Prompts | None,
    version: int,
    model: str,
    place: Path,
    round_samples: int | None = None,
) -> dict[str, Any] | None:
    """Answer all problems of a data set; write `place`.json and `place`.parquet. Collective.

    `prompts` are the problems, which only the controller needs to have. `version` is that of the engine's weights, `model` their name. With `round_samples`, about that
    many answers at a time are decoded together, always the same ones, so that not even rounding
    depends on the number of ranks; without it each replica decodes its whole share at once. Returns
    the report on the controller.
    """
    move = context.move
    plan = move.at_controller(_plan, prompts, config, version)
    span = context.world.rollout.span

    def share(replica: int) -> Iterable[int]:
        assert plan is not None, "asked on the controller, which has the plan"
        return chain.from_iterable(shares(plan, round_samples, span, replica))

    batch = move.share_batch(plan, share)
    found = move.to_controller(_answer(context, config, batch, round_samples))
    return move.at_controller(_conclude, context, config, prompts, batch, found, model, place)


def _plan(prompts: Prompts | None, config: EvalConfig, version: int) -> Batch:
    assert prompts is not None, "the controller has the problems"
    samples = config.samples_per_problem
    return Batch(EVALUATION, version, prompts.prompts, samples, len(prompts) * samples)


def _answer(
    context: EvalContext, config: EvalConfig, batch: Batch, round_samples: int | None
) -> list[Group]:
    """Answer and score this replica's share; empty but on its output rank."""
    grid = context.world.rollout
    if not grid.member:
        return []
    groups = []
    for positions in shares(batch, round_samples, grid.span, grid.replica):
        context.engine.submit(batch, positions, config.sampling)
        groups += context.engine.collect(batch.everything)
    groups = context.reward_manager.score(groups)
    if grid.is_output_rank:
        return groups
    return []


def shares(batch: Batch, round_samples: int | None, span: RankGrid, replica: int) -> list[range]:
    """Return the positions of the problems that a replica answers, round by round.

    Ten problems in four rounds are 0 1 | 2 3 4 | 5 6 | 7 8 9; of two replicas the first answers the
    first and the third, the second the others. All replicas have equally many rounds, the last of which
    may be empty: those that share experts run in step, and none decodes while another is elsewhere.
    """
    size = len(batch.prompts)
    if round_samples is None:
        return [span.share(replica, range(size))]
    count = -(-batch.num_samples // round_samples)
    ends = [size * i // count for i in range(count + 1)]
    rounds = [range(first, end) for first, end in pairwise(ends)]
    rounds += [range(size, size)] * (-count % span.dp)
    return rounds[replica :: span.dp]


def _conclude(
    context: EvalContext,
    config: EvalConfig,
    prompts: Prompts | None,
    batch: Batch,
    found: Sequence[list[Group]],
    model: str,
    place: Path,
) -> dict[str, Any]:
    """Score all answers, and write them and the report."""
    groups = sorted((group for share in found for group in share), key=lambda group: group.position)
    versions = {sample.version for group in groups for sample in group.samples}
    assert versions == {batch.version}, (
        f"version {batch.version} was to be evaluated, but {versions} answered"
    )
    tags = {}
    if not is_preprocessed(config.data):
        tags = read_tags(config.data, TAGS)
    assert prompts is not None, "the controller has the problems"
    protocol = eval_protocol(config, model, prompts, context.ends)
    content = report(groups, tags, protocol)
    write_report(place, content, groups, tags, partial(decode, context.tokenizer, special=True))
    return content


def eval_protocol(config: EvalConfig, model: str, prompts: Prompts, ends: Ends) -> EvalProtocol:
    """Name all that the scores depend on."""
    template = config.template
    text = json.dumps([template.text, template.default_system])
    return EvalProtocol(
        model=model,
        data=config.data,
        data_sha256=data_sha256(config.data),
        rows=prompts.num_rows,
        problems=len(prompts),
        dropped=prompts.num_dropped,
        template=template.name,
        template_sha256=hashlib.sha256(text.encode()).hexdigest(),
        samples_per_problem=config.samples_per_problem,
        temperature=config.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
        max_new_tokens=config.max_new_tokens,
        ends=[f"{ends.texts[number]} ({number})" for number in ends.ids],
        seed=config.seed,
        dtype=config.dtype.value,
        rules=list(config.reward_functions),
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
