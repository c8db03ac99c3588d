"""NPU graph capture and replay (torch.npu.NPUGraph). Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from r1zero.distributed.torch_modules import torch_npu_module

Output = TypeVar("Output")


class GraphPool:
    """Graphs that share one pool of memory and are replayed one after the other.

    What a graph writes is good until the next replay of any of them.
    """

    def __init__(self) -> None:
        self._memory = torch_npu_module().npu.graph_pool_handle()
        self._replayed = torch_npu_module().npu.Event()  # recorded behind every replay
        self._graphs: dict[int, Any] = {}

    def capture(self, size: int, run: Callable[[], Output]) -> Output:
        """Capture what `run` launches as the graph of this size. Returns the tensors that it will
        write."""
        npu = torch_npu_module().npu
        graph = npu.NPUGraph()
        # auto_dispatch_capture keeps the attention's host arguments replaceable
        with npu.graph(graph, pool=self._memory, auto_dispatch_capture=True):
            output = run()
        self._graphs[size] = graph
        return output

    def replay(self, size: int, lengths: list[int]) -> None:
        """Run the decoding step of this size again, for rows of these lengths.

        `update` hands the lengths over on a stream of its own, and nothing but this wait puts it
        behind the replay before: an attention that has not run yet would take the lengths of the
        next step. Each captured attention waits for its own part of the update, so that the replay
        behind it needs no wait.

        They go by the names that `paged_attention` and `paged_latent_attention` have for them: each
        captured call takes its own, and torch_npu passes over the other one.
        """
        self._replayed.synchronize()
        graph = self._graphs[size]
        graph.update(
            cpu_update_input=[{"actual_seq_lengths_kv": lengths, "actual_seq_kvlen": lengths}]
        )
        graph.replay()
        self._replayed.record()
