"""The table of what the project calls of torch_npu, as the oldest and the newest supported wheel
define it: tests/npu_standin/contract/.

| file | what |
| --- | --- |
| operators.json | operator -> its signature; the stand-in defines what stands here |
| python_api.json | Python name -> its kind, its parameters and where that was found |
| kernels.txt | PyTorch's operators that have a kernel for NPUs in both releases |

Each name has an entry "oldest" and one "newest", null where that release does not have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from npu_contract.calls import ROOT, Use
from npu_contract.wheel import Definition, Wheel

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "npu_standin" / "contract"
OPERATORS = "operators.json"
PYTHON_API = "python_api.json"
KERNELS = "kernels.txt"
ENDS = ("oldest", "newest")

# Operators that our sources do not name, and why the table has them all the same.
EXTRA = {
    "npu_scaled_masked_softmax": "MindSpeed's softmax, where attention is not fused",
    "npu_format_cast": "MindSpeed, when it takes a checkpoint's weights",
    "npu_grouped_matmul": "MindSpeed's grouped linear layers",
    "npu_fusion_attention": "MindSpeed's attention",
    "npu_rms_norm": "MindSpeed's RMSNorm",
    "npu_swiglu": "MindSpeed's SwiGLU",
    "npu_rotary_mul": "MindSpeed's rotary embedding",
    "npu_apply_rotary_pos_emb": "the stand-in has it",
    "npu_scatter_nd_update_": "the stand-in has it",
}


class Release(Protocol):
    """What a release defines: all of it, as a wheel says, or the part that the table has."""

    def python_name(self, name: str) -> Definition | None:
        """A dotted Python name; None if it is not there."""


@dataclass(frozen=True)
class TableRelease:
    """A release as the table has it."""

    version: str
    operators: dict[str, str]  # signatures by name
    python: dict[str, Definition]

    def python_name(self, name: str) -> Definition | None:
        return self.python.get(name)

    def definition(self, name: str) -> Definition | None:
        """An operator or Python name; None if the table lacks it."""
        operator = operator_of(name)
        if not operator:
            return self.python_name(name)
        signature = self.operators.get(operator)
        return None if signature is None else Definition("operator", OPERATORS, signature)


@dataclass(frozen=True)
class Table:
    oldest: TableRelease
    newest: TableRelease
    kernels: frozenset[str]  # in both


def operator_of(name: str) -> str:
    """The operator that a name stands for: "npu_swiglu" for "torch_npu.npu_swiglu"; empty for other
    names."""
    operator = name.removeprefix(f"{ROOT}.")
    if operator.startswith(("npu_", "_npu_")) and "()" not in operator:
        return operator
    return ""


def table_name(use: Use, release: Release) -> str | None:
    """The name that the table has for a use: "torch_npu.npu.NPUGraph.replay" for
    "torch_npu.npu.NPUGraph().replay", "torch_npu.f[key]" for a key of a dict that f is given. None
    for parts of what is no object of torch_npu's, such as the tensor that an operator returns."""
    full, *rest = use.name.split("()")
    for part in rest:
        owner = release.python_name(full)
        if owner is None:
            return None
        if owner.kind in ("class", "binding"):
            full += part
        elif owner.returns is not None:
            full = owner.returns + part
        else:
            return None
    return full if use.key is None else f"{full}[{use.key}]"


def make_table(oldest: Wheel, newest: Wheel, uses: list[Use]) -> Table:
    """Take from wheels what is used; what a wheel does not have is absent."""
    kernels = frozenset(oldest.kernels & newest.kernels)
    return Table(_part(oldest, uses), _part(newest, uses), kernels)


def _part(wheel: Wheel, uses: list[Use]) -> TableRelease:
    operators = set(EXTRA)
    python: dict[str, Definition] = {}
    for use in uses:
        name = table_name(use, wheel)
        if name is None:
            continue
        if operator_of(name):
            operators.add(operator_of(name))
            continue
        found = wheel.python_name(name) if use.key is None else wheel.key(name, use.key)
        if found is not None:
            python[name] = found
    signatures = {name: wheel.operators[name] for name in operators if name in wheel.operators}
    return TableRelease(wheel.version, signatures, python)


def texts(table: Table) -> dict[str, str]:
    """The files of a table by name."""
    releases = {"oldest": table.oldest.version, "newest": table.newest.version}
    operators = _side_by_side(table.oldest.operators, table.newest.operators)
    python = _side_by_side(
        {name: found.as_json() for name, found in table.oldest.python.items()},
        {name: found.as_json() for name, found in table.newest.python.items()},
    )
    first = f"# with a kernel in torch_npu {table.oldest.version} and {table.newest.version}"
    return {
        OPERATORS: _json({"releases": releases, "operators": operators}),
        PYTHON_API: _json({"releases": releases, "names": python}),
        KERNELS: "\n".join([first, *sorted(table.kernels)]) + "\n",
    }


def _side_by_side(oldest: Mapping[str, Any], newest: Mapping[str, Any]) -> dict[str, Any]:
    names = sorted(oldest.keys() | newest.keys())
    return {name: {"oldest": oldest.get(name), "newest": newest.get(name)} for name in names}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def read_table(folder: Path = FOLDER) -> Table:
    """Read the table that the repository has."""
    operators = json.loads((folder / OPERATORS).read_text())
    python = json.loads((folder / PYTHON_API).read_text())
    kernels = (folder / KERNELS).read_text().splitlines()[1:]
    releases = {}
    for end in ENDS:
        names = _of_end(python["names"], end)
        definitions = {name: Definition(**entry) for name, entry in names.items()}
        signatures = _of_end(operators["operators"], end)
        releases[end] = TableRelease(operators["releases"][end], signatures, definitions)
    return Table(releases["oldest"], releases["newest"], frozenset(kernels))


def _of_end(entries: dict[str, Any], end: str) -> dict[str, Any]:
    """The entries that one of the two releases has."""
    return {name: ends[end] for name, ends in entries.items() if ends[end] is not None}
