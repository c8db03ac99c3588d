"""The data sets that a configuration names: those to train on, and those to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from r1zero.config.schema import Config, EvaluationSet, TrainingSet, filled
from r1zero.data.blend import split_blend
from r1zero.data.layout import ColumnLayout, layout_of
from r1zero.errors import BadInput

TRAIN_DATA = "actor_rollout.data_path"
EVAL_DATA = "training.eval_data_path"
EVAL_SETS = "training.evaluation"

# From the names of reward functions to the columns that they see: see ColumnLayout.kept.
Keep: TypeAlias = Callable[[Sequence[str]], Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A data set, and how its rows become prompts and its responses are scored."""

    key: str  # of the configuration, which names it
    name: str = ""  # of one beside others
    path: str  # a file, a folder, the prefix of preprocessed files, or a blend of these
    share: float = 1.0  # of the prompts of a blend
    layout: ColumnLayout
    prompt_type: str  # name of its template
    prompt_type_key: str = "training.prompt_type"
    scorers: Mapping[str, float] = field(default_factory=dict)  # reward functions, their weights
    # What scores responses beside or in place of them (scores.py): one for each data set of
    # a blend, or one for all; empty: both.
    categories: tuple[int, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether it is evaluated on, and not trained on."""
        return self.layout.held_out

    @property
    def label(self) -> str:
        """What its prompts say of where they are from; "" for the one that needs no name."""
        if self.held_out and self.name:
            return f"evaluation/{self.name}"
        return self.name

    @property
    def scorers_key(self) -> str:
        """What names its reward functions in the configuration."""
        if self.name:
            return self.key.removesuffix("path") + "verifier_function"
        return "algorithm.verifier_function"

    def parts(self) -> list[DataSource]:
        """The data sets of a blend one by one, with their shares. BadInput when it is malformed."""
        found = split_blend(self.path)
        categories = self.categories
        if len(categories) == 1:
            categories = categories * len(found)
        if len(categories) not in (0, len(found)):
            raise BadInput(
                f"training.dataset_category: {list(categories)} has {len(categories)} numbers for the "
                f"{len(found)} data sets of {self.key}; give one for each, or one for all"
            )
        parts = []
        for number, (share, path) in enumerate(found):
            own = categories[number : number + 1]
            parts.append(replace(self, path=path, share=share * self.share, categories=own))
        return parts

    @property
    def category(self) -> int | None:
        """That of a data set that is no blend, where its rows do not say theirs."""
        return self.categories[0] if self.categories else None


def no_columns(functions: Sequence[str]) -> Mapping[str, str]:
    """Keeps nothing: where rows are not read."""
    return {}


def train_sources(cfg: Config, keep: Keep = no_columns) -> list[DataSource]:
    """The problems to train on: those of data_path, which may be a blend, or its named sets."""
    data_path = cfg.actor_rollout.data_path
    if isinstance(data_path, dict):
        total = sum(entry.weight for entry in data_path.values())
        return [
            replace(
                _named(
                    f"{TRAIN_DATA}.{name}", name, entry, _source(cfg, False, "", "", keep), keep
                ),
                share=entry.weight / total,
            )
            for name, entry in data_path.items()
        ]
    return [_source(cfg, False, TRAIN_DATA, data_path, keep)]


def eval_sources(cfg: Config, keep: Keep = no_columns) -> list[DataSource]:
    """The held-out problems: those of eval_data_path, whose name is "", and the named sets."""
    training = cfg.training
    found = []
    if training.eval_data_path is not None:
        found.append(_source(cfg, True, EVAL_DATA, training.eval_data_path, keep))
    for name, entry in training.evaluation.items():
        usual = _source(cfg, True, "", "", keep)
        found.append(_named(f"{EVAL_SETS}.{name}", name, entry, usual, keep))
    return found


def _source(cfg: Config, held_out: bool, key: str, path: str, keep: Keep) -> DataSource:
    """A data set that has everything from the run."""
    functions = cfg.algorithm.verifier_function
    return DataSource(
        key=key,
        path=path,
        layout=layout_of(cfg.training, held_out, keep(functions)),
        prompt_type=cfg.training.prompt_type,
        scorers=dict(zip(functions, cfg.algorithm.verifier_weight, strict=False)),
        categories=() if held_out else tuple(cfg.training.dataset_category or ()),
    )


def _named(
    place: str, name: str, entry: TrainingSet | EvaluationSet, usual: DataSource, keep: Keep
) -> DataSource:
    """A data set with keys of its own, in place of those of the `usual` one."""
    functions = filled(entry.verifier_function)
    layout = replace(usual.layout, kept=keep(functions))
    if entry.map_keys is not None:
        layout = replace(
            layout,
            columns=layout.columns | entry.map_keys,
            system_optional=layout.system_optional and "system" not in entry.map_keys,
            columns_key=f"{place}.map_keys",
        )
    return DataSource(
        key=f"{place}.path",
        name=name,
        path=entry.path,
        layout=layout,
        prompt_type=filled(entry.prompt_type),
        prompt_type_key=f"{place}.prompt_type",
        scorers=dict(zip(functions, filled(entry.verifier_weight), strict=False)),
        categories=_categories(entry, usual),
    )


def _categories(entry: TrainingSet | EvaluationSet, usual: DataSource) -> tuple[int, ...]:
    """That of a named set, or that of the run. Evaluations are scored by reward functions alone."""
    if isinstance(entry, EvaluationSet) or entry.category is None:
        return usual.categories
    return (entry.category,)
