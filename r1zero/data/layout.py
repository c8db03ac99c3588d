"""How a data set is to be read: its columns, and what is done with what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from r1zero.config.schema import Training
from r1zero.data.template import Template
from r1zero.errors import BadInput

PARTS = ("prompt", "query", "response", "system", "category")


@dataclass(frozen=True, slots=True)
class ColumnLayout:
    """Columns by part, "" for none; dots reach into structs: reward_model.ground_truth."""

    columns: dict[str, str] = field(default_factory=dict)
    held_out: bool = False  # for evaluation: of a folder, files of other splits than train are read
    skip_bad_rows: bool = False  # count them and leave them out
    system_optional: bool = False  # a column of system texts that the data lacks is no fault
    keep_chat_system: bool = True  # of a question that is a list of messages
    columns_key: str = "training.map_keys"  # what the user sets the columns with
    skip_key: str = "training.skip_bad_rows=true"  # how bad rows are skipped; "" = not at all
    # More columns, which a problem keeps as they are, each with the reward function that sees it.
    kept: Mapping[str, str] = field(default_factory=dict)

    def fitting(self, template: Template) -> ColumnLayout:
        """Return the layout for a template, which may have no place for a message's system text."""
        return replace(self, keep_chat_system=self.keep_chat_system and template.takes_system)

    def refuse_tokens(self, path: str) -> None:
        """BadInput if a column is to be kept, since what is preprocessed has tokens only."""
        if category := self.columns.get("category"):
            raise BadInput(
                f"{path} is preprocessed and has no column {category!r}, which {self.columns_key}.category "
                "names; name the data that it was made of, or say dataset_category"
            )
        for column, function in self.kept.items():
            raise BadInput(
                f"{path} is preprocessed and has no column {column!r}, which the reward function "
                f"{function} sees; name the data that it was made of"
            )


def layout_of(training: Training, held_out: bool, kept: Mapping[str, str]) -> ColumnLayout:
    """Return how the configuration reads the data of training, or the held-out data.

    `kept` are the columns that reward functions see, as in ColumnLayout.
    """
    if not held_out:
        return ColumnLayout(training.map_keys, skip_bad_rows=training.skip_bad_rows, kept=kept)
    own = training.eval_map_keys or {}
    return ColumnLayout(
        training.map_keys | own | {"category": ""},  # reward functions alone score them
        held_out=True,
        skip_bad_rows=training.skip_bad_rows,
        system_optional="system" not in own,
        columns_key="training.eval_map_keys",
        kept=kept,
    )
