"""Standalone evaluation: a world of rollout replicas only, which tools/evaluate.py runs.

The ranks are rollout replicas; weights come from a model folder instead of train ranks.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from r1zero.data.ends import Ends, find_ends
from r1zero.data.layout import ColumnLayout
from r1zero.data.prompts import Prompts, load_tokenizer, vocabulary_of
from r1zero.data.sources import DataSource
from r1zero.data.template import Template
from r1zero.distributed.groups import World
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput
from r1zero.evaluation.config import EvalConfig
from r1zero.evaluation.evaluate import evaluate
from r1zero.evaluation.scores import table
from r1zero.models.dtype import Dtype
from r1zero.models.layout import WeightTarget
from r1zero.models.params import ShardIndex, Shards, param_table
from r1zero.preflight.datasets import look_at_prompts
from r1zero.preflight.run import ModelFiles
from r1zero.reward.config import RewardConfig
from r1zero.reward.manager import RewardManager
from r1zero.rollout.interface import EngineConfig, EngineListener, RolloutEngine
from r1zero.runtime import build_engine, build_reward_manager
from r1zero.types import Group
from r1zero.weights.open import open_weights
from r1zero.weights.source import Weights

ANY_LENGTH = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """What is to be evaluated. Lengths that depend on the prompts are settled when these are read."""

    model: ModelFiles
    tokenizer: str  # folder
    dtype: Dtype
    engine: str  # name
    max_cache_tokens: int  # in a replica's KV cache; more if the longest answer needs it
    stop: Sequence[str]  # more tokens that end an answer
    template: Template
    data: Mapping[str, ColumnLayout]  # the columns of each data set, by path
    problems: int | None  # of each data set the first so many; None: all
    samples_per_problem: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_new_tokens: int
    rewards: RewardConfig


@dataclass
class Evaluator:
    """What a rank answers a data set with; the fields of an EvalContext have its names."""

    config: EvalConfig
    model: str
    world: World
    move: RoleTransfer
    tokenizer: PreTrainedTokenizerBase
    ends: Ends
    prompts: Prompts | None  # controller
    engine: RolloutEngine
    reward_manager: RewardManager


def prepare(request: EvalRequest, world: World) -> list[Evaluator]:
    """Read the data sets and load the model; return what answers each. Collective.

    BadInput for bad data or models, or when a prompt and its answer would not fit into the model.
    """
    move = RoleTransfer(world)
    tokenizer = load_tokenizer(request.tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    ends = find_ends(request.model.folder, vocabulary, [request.template], request.stop)
    read: list[Prompts | None] = [None] * len(request.data)
    if world.is_controller:
        read = [_prompts(request, path, tokenizer) for path in request.data]
    longest = move.from_controller(_longest, read)
    reward_manager = build_reward_manager(request.rewards, request.max_new_tokens, world, tokenizer)
    engine = build_engine(
        _engine_config(request, longest),
        request.model,
        request.dtype,
        world,
        ends,
        vocabulary.unused(request.model.shape.vocab_size),
        reward_manager,
    )
    weights = open_weights(request.model.load, request.model.shape)
    _load(engine.weights(), weights, world, request.dtype.torch)
    return [
        Evaluator(
            config=_eval_config(request, path),
            model=request.model.load,
            world=world,
            move=move,
            tokenizer=tokenizer,
            ends=ends,
            prompts=prompts,
            engine=engine,
            reward_manager=reward_manager,
        )
        for path, prompts in zip(request.data, read, strict=True)
    ]


def _engine_config(request: EvalRequest, longest: int) -> EngineConfig:
    """The engine for prompts of `longest` tokens at most. BadInput when the model has too few
    positions."""
    length = longest + request.max_new_tokens
    positions = request.model.shape.max_positions
    if length > positions:
        raise BadInput(
            f"--max-new-tokens {request.max_new_tokens}: the longest prompt has {longest} tokens, "
            f"and the model {positions} positions; {positions - longest} is the most"
        )
    return EngineConfig(
        name=request.engine,
        max_length=length,
        max_response=request.max_new_tokens,
        max_cache_tokens=max(length, request.max_cache_tokens),
        max_running=None,
        graphs=None,
    )


def _eval_config(request: EvalRequest, path: str) -> EvalConfig:
    return EvalConfig(
        data=path,
        template=request.template,
        samples_per_problem=request.samples_per_problem,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        max_new_tokens=request.max_new_tokens,
        dtype=request.dtype,
        reward_functions=tuple(request.rewards.names),
    )


def _load(target: WeightTarget, weights: Weights, world: World, dtype: torch.dtype) -> None:
    """Fill a rank's target from a model folder; the version is 0."""
    grid = target.layout.grid(world.rollout.span)
    index = ShardIndex.of_rank(grid, world.rank)
    shards = Shards.of_grid(grid)
    for spec, part in weights.stream(param_table(weights.shape), index, shards, dtype):
        target.write(spec, part, shards, index)
    target.commit(0)


def run(evaluators: Sequence[Evaluator], output: Path, round_samples: int | None) -> None:
    """Answer each data set, print its report and write it into the folder `output`. Collective."""
    if evaluators[0].world.is_controller:
        output.mkdir(parents=True, exist_ok=True)
    try:
        for each in evaluators:
            began = time.monotonic()
            path = Path(each.config.data)
            with _progress(each):
                found = evaluate(
                    each,
                    each.config,
                    each.prompts,
                    each.engine.version,
                    each.model,
                    output / path.stem,
                    round_samples,
                )
            if found is not None:
                seconds = time.monotonic() - began
                print(
                    table(found),
                    f"    {'seconds':<20}{seconds:.1f} on {each.world.size} ranks",
                    sep="\n",
                )
    finally:
        evaluators[0].reward_manager.close()


def _prompts(request: EvalRequest, path: str, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read the problems that one data set holds, and say what is worth knowing about them."""
    name = request.template.name
    scorers = dict(zip(request.rewards.names, request.rewards.weights, strict=True))
    source = DataSource(
        key="--data", path=path, layout=request.data[path], prompt_type=name, scorers=scorers
    )
    templates = {name: request.template}
    prompts = Prompts([source], templates, tokenizer, ANY_LENGTH, request.seed)
    prompts.prompts = prompts.prompts[: request.problems]
    said = look_at_prompts([prompts], templates)
    for line in said:
        print(line, file=sys.stderr)
    return prompts


def _longest(read: Sequence[Prompts | None]) -> int:
    found = [prompts.prompts for prompts in read if prompts is not None]
    return max(len(prompt.tokens) for prompts in found for prompt in prompts)


@contextlib.contextmanager
def _progress(evaluator: Evaluator) -> Iterator[None]:
    """Count the answers of the controller's replica on its terminal."""
    silent = not evaluator.world.is_controller or not sys.stderr.isatty()
    with tqdm(unit="answer", disable=silent) as bar:

        def count(group: Group, member: int) -> None:
            bar.update()

        listener = EngineListener(on_sample=count)
        evaluator.engine.listeners.append(listener)
        try:
            yield
        finally:
            evaluator.engine.listeners.remove(listener)
