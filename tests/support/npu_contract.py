"""The table of what the project calls of torch_npu, and the code that reads it: tools/npu_contract."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))  # last: no tool hides a package

from npu_contract.table import Table, read_table  # noqa: E402 - behind the path

TABLE: Table = read_table()
