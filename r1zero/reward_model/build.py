"""Builds the reward model's part of a run: the judge on every rank, the model on the ranks of the role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from r1zero.config.schema import Config, filled
from r1zero.data.prompts import decode, load_tokenizer, vocabulary_of
from r1zero.data.template import Template
from r1zero.distributed.groups import Grid, World
from r1zero.distributed.transfer import RoleTransfer
from r1zero.models.config import ModelConfig, ValueHead
from r1zero.observe.clock import Clock
from r1zero.policy.megatron import RoleModel
from r1zero.policy.reward_model import RewardModel
from r1zero.reward_model.judge import Judge
from r1zero.reward_model.mixing import Mixing
from r1zero.reward_model.reader import Reader
from r1zero.reward_model.rendering import (
    AsSampled,
    AsText,
    ByTemplate,
    ByTokenizer,
    Rendering,
    by_prompt,
)
from r1zero.reward_model.tokenizer import OF_TOKENIZER, chat_template, tokenizer_folder
from r1zero.types import Prompt

# What a chat template is tried with.
TRIED = Prompt(0, "", np.zeros(0, np.int32), "", question="What is 1 + 1?")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSetup:
    """What a judge is built of, beside the world."""

    config: Config
    load: str  # weights of the reward model
    folder: Path  # that holds its config.json
    shape: ModelConfig
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase  # of the policy

    @property
    def head(self) -> ValueHead:
        head = self.shape.value_head
        assert head is not None, "a reward model has one"
        return head


def build_judge(setup: JudgeSetup, world: World, move: RoleTransfer, clock: Clock) -> Judge:
    """Build what this rank needs of the reward model. Collective over the ranks of the role. BadInput
    for weights or a tokenizer that cannot be read."""
    reader = None
    if world.reward is not None and world.reward.member:
        reader = _reader(setup, world.reward, world)
    limit = setup.shape.max_positions
    return Judge(world, move, clock, _mixing(setup.config, setup.head), reader, limit)


def _mixing(cfg: Config, head: ValueHead) -> Mixing:
    reward = cfg.reward
    mean = head.mean if reward.mean is None else reward.mean
    std = head.std if reward.std is None else reward.std
    return Mixing(
        normalize=reward.normalize,
        mean=0.0 if mean is None else mean,
        std=1.0 if std is None else std,
        clip=reward.clip,
        weight=reward.weight,
        with_rules=reward.verifier,
    )


def _reader(setup: JudgeSetup, grid: Grid, world: World) -> Reader:
    reward = setup.config.reward
    model = RoleModel(
        setup.shape,
        grid,
        world.device,
        setup.dtype,
        setup.shape.max_positions,
        sequence_parallel=setup.shape.experts is not None,  # as of a reference
        recompute=False,
        seed=setup.config.training.seed,
    )
    model.load(setup.load)
    return Reader(
        model=RewardModel(model, reward.micro_batch_size, reward.max_tokens_per_microbatch),
        rendering=_rendering(setup),
        limit=setup.shape.max_positions,
        step_token=setup.head.step_token,
        of_steps=reward.of_steps,
    )


def _rendering(setup: JudgeSetup) -> Rendering:
    """The tokens as sampled, if nothing asks for a text: no template, no marks, no tokenizer with other
    ids than the policy's."""
    reward = setup.config.reward
    asks_for_none = reward.prompt_type is None and setup.head.step_token is None
    if asks_for_none and reward.tokenizer_name_or_path is None:
        return AsSampled()
    folder = tokenizer_folder(setup.config, setup.folder)
    own = load_tokenizer(folder)
    if asks_for_none and vocabulary_of(setup.tokenizer).same_ids(vocabulary_of(own)):
        return AsSampled()
    return AsText(
        decode=partial(decode, setup.tokenizer, special=False),
        render=_render(setup.config, folder, own),
        tokenizer=own,
        step_mark=_step_mark(setup.head, own),
    )


def _step_mark(head: ValueHead, own: PreTrainedTokenizerBase) -> str | None:
    """The text of the token that ends a step, for a process reward model."""
    if head.step_token is None:
        return None
    mark = own.convert_ids_to_tokens(head.step_token)
    assert isinstance(mark, str), "one id is one token"
    return mark


def _render(
    cfg: Config, folder: Path, own: PreTrainedTokenizerBase
) -> Callable[[Prompt, str], str]:
    """What puts prompt and response into a text."""
    name = cfg.reward.prompt_type
    if name is None:
        return by_prompt
    if name == OF_TOKENIZER:
        own.chat_template = chat_template(folder)
        render = ByTokenizer(own)
        render(TRIED, "Two.")  # refuses now what it would refuse in the first step
        return render
    return ByTemplate(Template(name, filled(cfg.training.prompt_type_path)))
