"""The prompts of data without a configuration."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from r1zero.data.layout import ColumnLayout
from r1zero.data.prompts import Prompts
from r1zero.data.sources import TRAIN_DATA, DataSource
from r1zero.data.template import Template


def prompts_of(
    path: str | Path,
    layout: ColumnLayout,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    seed: int,
    shuffle: bool = True,
    key: str = TRAIN_DATA,
) -> Prompts:
    """A stream of the prompts of one data set, or of a blend by weights and paths, scored by acc."""
    source = DataSource(
        key=key, path=str(path), layout=layout, prompt_type=template.name, scorers={"acc": 1.0}
    )
    templates = {template.name: template}
    return Prompts([source], templates, tokenizer, max_prompt_length, seed, shuffle)
