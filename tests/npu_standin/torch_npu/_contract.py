"""Operators defined in PyTorch's dispatcher with the signatures of torch_npu's wheels.

So PyTorch itself refuses a wrong name, keyword, type or a missing argument. NPU_STANDIN_RELEASE
says which end of the supported range is played, "oldest" (as if unset) or "newest".
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

TABLE = Path(__file__).resolve().parents[1] / "contract" / "operators.json"
_table = json.loads(TABLE.read_text())
END = os.environ.get("NPU_STANDIN_RELEASE", "oldest")
RELEASE: str = _table["releases"][END]

_library = torch.library.Library("npu", "DEF")


def define_operators() -> list[str]:
    """Define every operator of the table; returns their names. One without a body raises
    NotImplementedError when it is called."""
    names = []
    for name, signatures in _table["operators"].items():
        if signatures[END] is not None:
            _library.define(signatures[END])
            names.append(name)
    return names
