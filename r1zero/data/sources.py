"""The data sets that a configuration names: those to train on, and those to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from r1zero.config.schema import ActorRollout, EvaluationSet, Training, filled
from r1zero.data.layout import ColumnLayout, layout_of

TRAIN_DATA = "actor_rollout.data_path"
EVAL_DATA = "training.eval_data_path"
EVAL_SETS = "training.evaluation"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A data set, or a blend of several, and how its rows become prompts."""

    key: str  # of the configuration, which names it
    name: str = ""  # of one beside others
    path: str  # a file, a folder, the prefix of preprocessed files, or a blend of these
    layout: ColumnLayout
    prompt_type: str  # name of its template
    prompt_type_key: str = "training.prompt_type"

    @property
    def held_out(self) -> bool:
        """Whether it is evaluated on, and not trained on."""
        return self.layout.held_out


def train_source(actor: ActorRollout, training: Training, kept: Mapping[str, str]) -> DataSource:
    """The problems to train on. `kept` as in ColumnLayout."""
    return DataSource(
        key=TRAIN_DATA,
        path=actor.data_path,
        layout=layout_of(training, False, kept),
        prompt_type=training.prompt_type,
    )


def eval_sources(training: Training, kept: Mapping[str, str]) -> list[DataSource]:
    """The held-out problems that the configuration names: those of eval_data_path, whose name is
    "", and the named sets. `kept` as in ColumnLayout."""
    found = []
    if training.eval_data_path is not None:
        found.append(
            DataSource(
                key=EVAL_DATA,
                path=training.eval_data_path,
                layout=layout_of(training, True, kept),
                prompt_type=training.prompt_type,
            )
        )
    found += [_named(name, entry, training, kept) for name, entry in training.evaluation.items()]
    return found


def _named(
    name: str, entry: EvaluationSet, training: Training, kept: Mapping[str, str]
) -> DataSource:
    layout = layout_of(training, True, kept)
    place = f"{EVAL_SETS}.{name}"
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
    )
