"""The table of what the project calls of torch_npu, and the code that reads it: tools/npu_contract."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))  # last: no tool hides a package

# ruff: noqa: E402
from npu_contract import calls, check, table, wheel
from npu_contract.table import Table, TableRelease, read_table
from npu_contract.wheel import Definition

__all__ = ["ROOT", "SAMPLE", "TABLE", "calls", "check", "table", "table_of", "wheel"]
TABLE = read_table()


# A small table for tests of the checker itself, with entries as wheels give them.
SAMPLE_OPERATORS = """
npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)
npu_swiglu(Tensor self, int dim=-1) -> Tensor
npu_attention(Tensor query, int heads, str layout, *, Tensor? mask=None, SymInt[]? lengths=None) -> Tensor
"""
SAMPLE_PYTHON = {
    "torch_npu.npu": Definition("module", ""),
    "torch_npu.npu.NPUGraph": Definition("class", "", ""),
    "torch_npu.npu.NPUGraph.replay": Definition("function", "", ""),
    "torch_npu.npu.NPUGraph.update": Definition("function", "", "cpu_update_input"),
    "torch_npu.npu.NPUGraph.update[lengths_kv]": Definition("key", ""),
    "torch_npu.npu.Event": Definition("class", "", "enable_timing=False, blocking=False"),
    "torch_npu.npu.Event.record": Definition("function", "", "stream=None"),
    "torch_npu.npu.Stream": Definition("class", "", "device=None, priority=0, **kwargs"),
    "torch_npu.npu.Stream.wait_event": Definition("function", "", "event"),
    "torch_npu.npu.current_stream": Definition(
        "function", "", "device=None", returns="torch_npu.npu.Stream"
    ),
    "torch_npu.npu.device_count": Definition("function", "", ""),
    "torch_npu.npu.graph": Definition("class", "", "npu_graph, pool=None, *, mode: str='global'"),
    "torch_npu.npu.set_device": Definition("function", "", "device"),
    "torch_npu.npu.synchronize": Definition("function", "", "device=None"),
    "torch_npu.profiler.Activity.NPU": Definition("binding", ""),
    "torch_npu._C.Options": Definition("binding", ""),
    "torch_npu._C.Options.hccl_config": Definition("binding", ""),
    "torch_npu._C.Options.hccl_config[hccl_buffer_size]": Definition("key", "", "int"),
}


def table_of(oldest: str, newest: str) -> Table:
    """A table of these operators, a line each, and of SAMPLE_PYTHON."""
    releases = []
    for version, signatures in (("oldest", oldest), ("newest", newest)):
        operators = {line.partition("(")[0]: line for line in signatures.split("\n") if line}
        releases.append(TableRelease(version, operators, SAMPLE_PYTHON))
    return Table(*releases, frozenset())


SAMPLE = table_of(SAMPLE_OPERATORS, SAMPLE_OPERATORS)
