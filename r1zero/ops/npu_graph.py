"""NPU graph capture and replay (torch.npu.NPUGraph). Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from r1zero.distributed.torch_modules import torch_npu_module


def capture_graph(run: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Capture what `run` launches as an NPU graph. Returns the graph and the tensor it will
    write."""
    npu = torch_npu_module().npu
    graph = npu.NPUGraph()
    # keeps the attention's host arguments replaceable
    with npu.graph(graph, auto_dispatch_capture=True):
        output = run()
    return graph, output


def replay_graph(graph: Any, lengths: list[int]) -> None:
    """Run a captured decoding step again, for rows of these lengths."""
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
    graph.replay()
