"""Standalone evaluation: a world of rollout replicas only, which tools/evaluate.py runs.

The ranks are rollout replicas; weights come from a model folder instead of train ranks.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from r1zero.config.schema import Config, Training
from r1zero.data.ends import Ends
from r1zero.data.layout import layout_of
from r1zero.data.prompts import Prompts, load_tokenizer, vocabulary_of
from r1zero.data.template import Template
from r1zero.distributed.groups import World
from r1zero.distributed.transfer import RoleTransfer
from r1zero.errors import BadInput
from r1zero.evaluation.evaluate import evaluate
from r1zero.evaluation.scores import table
from r1zero.models.config import ModelConfig
from r1zero.models.layout import WeightTarget
from r1zero.models.params import param_table
from r1zero.preflight.datasets import look_at_prompts
from r1zero.reward.manager import RewardManager
from r1zero.rollout.engines import choose_engine
from r1zero.rollout.interface import EngineListener, RolloutEngine
from r1zero.runtime import build_engine, build_reward_manager, response_ends
from r1zero.types import Group
from r1zero.weights.detect import model_folder
from r1zero.weights.open import open_weights
from r1zero.weights.source import Weights

ANY_LENGTH = 2**31


@dataclass
class Evaluator:
    """What a rank works with; the fields that evaluate() uses have the names of a Runtime's."""

    cfg: Config
    world: World
    move: RoleTransfer
    tokenizer: PreTrainedTokenizerBase
    ends: Ends
    eval_prompts: Prompts | None  # controller
    engine: RolloutEngine
    reward_manager: RewardManager


def prepare(
    cfg: Config,
    world: World,
    data: Mapping[str, dict[str, str]],
    first: int | None,
    max_new_tokens: int,
) -> list[Evaluator]:
    """Read data sets, or their `first` problems, and load the model; return what answers each.
    Collective.

    `data` maps their paths to the columns of each, see config.MAP_KEYS.

    BadInput for bad data or models, or when a prompt and its answer would not fit into the model.
    """
    move = RoleTransfer(world)
    load = cfg.actor_rollout.load
    folder = model_folder(cfg, "actor_rollout")
    shape = ModelConfig.from_folder(folder)
    tokenizer = load_tokenizer(cfg.training.tokenizer_name_or_path)
    trainings = [
        replace(cfg.training, eval_data_path=path, eval_map_keys=keys)
        for path, keys in data.items()
    ]
    read: list[Prompts | None] = [None] * len(trainings)
    if world.is_controller:
        read = [_prompts(cfg, training, tokenizer, first) for training in trainings]
    longest = move.from_controller(_longest, read)
    length = longest + max_new_tokens
    if length > shape.max_positions:
        raise BadInput(
            f"--max-new-tokens {max_new_tokens}: the longest prompt has {longest} tokens, and the "
            f"model {shape.max_positions} positions; {shape.max_positions - longest} is the most"
        )
    actor = replace(
        cfg.actor_rollout,
        max_prompt_length=longest,
        max_tokens_to_oom=max(length, cfg.actor_rollout.max_tokens_to_oom),
    )
    cfg = replace(cfg, training=replace(cfg.training, seq_length=length), actor_rollout=actor)
    dtype = torch.bfloat16 if cfg.training.bf16 else torch.float32
    reward_manager = build_reward_manager(cfg, world, tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    ends = response_ends(cfg, vocabulary)
    unused = vocabulary.unused(shape.vocab_size)
    kind = choose_engine(cfg.actor_rollout.engine)
    engine = build_engine(kind, cfg, world, shape, dtype, ends.ids, unused, reward_manager)
    _load(engine.weights(), open_weights(load, shape), world, dtype)
    configs = [
        replace(cfg, training=replace(training, seq_length=length)) for training in trainings
    ]
    return [
        Evaluator(own, world, move, tokenizer, ends, prompts, engine, reward_manager)
        for own, prompts in zip(configs, read, strict=True)
    ]


def _load(target: WeightTarget, weights: Weights, world: World, dtype: torch.dtype) -> None:
    """Fill a rank's target from a model folder; the version is 0."""
    grid = target.layout.grid(world.rollout.span)
    tp_index = grid.index_of(world.rank)["tp"]
    for spec, part in weights.stream(param_table(weights.shape), tp_index, grid.tp, dtype):
        target.write(spec, part, grid.tp)
    target.commit(0)


def run(evaluators: Sequence[Evaluator], output: Path, round_samples: int | None) -> None:
    """Answer each data set, print its report and write it into the folder `output`. Collective."""
    if evaluators[0].world.is_controller:
        output.mkdir(parents=True, exist_ok=True)
    try:
        for each in evaluators:
            began = time.monotonic()
            path = Path(each.cfg.training.eval_data_path)
            with _progress(each):
                found = evaluate(
                    each,
                    each.engine.version,
                    each.cfg.actor_rollout.load,
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


def _prompts(
    cfg: Config, training: Training, tokenizer: PreTrainedTokenizerBase, first: int | None
) -> Prompts:
    """Read the problems that one data set holds, and say what is worth knowing about them."""
    template = Template(training.prompt_type, training.prompt_type_path)
    prompts = Prompts(
        training.eval_data_path,
        layout_of(training, held_out=True),
        template,
        tokenizer,
        ANY_LENGTH,
        training.seed,
    )
    prompts.prompts = prompts.prompts[:first]
    for line in look_at_prompts(cfg, None, prompts, "--data"):
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
