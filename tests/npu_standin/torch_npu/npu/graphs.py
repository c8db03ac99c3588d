"""NPUGraph: remembers the operators that were launched and runs them again on the same memory.

Read in torch_npu's npu/graphs.py: only with auto_dispatch_capture can host arguments of the fused
attention be updated; one dict is for all of them; it finds query and value by position; after it
was captured so, every replay waits for an update of its own.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

UPDATABLE = ("npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2")
# Not to be captured: they wait for the device, or take their lengths from the host for good.
FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "npu_fusion_attention")

_pools = iter(range(1, 1 << 30))
_recording = []  # the launches of the graph that is being captured
_graphs_of = defaultdict(list)  # by the pool of memory that they share


def graph_pool_handle():
    """A token for a pool of memory that graphs may share."""
    return (0, next(_pools))


def is_current_stream_capturing():
    return bool(_recording)


def refuse_to_wait():
    """Fail where something waits for the device while a graph is captured."""
    if _recording:
        raise RuntimeError("npu_standin: waiting for the device cannot be captured in a graph")


class _Launch:
    """An operator with its arguments and the tensors that it wrote."""

    def __init__(self, function, args, kwargs, result):
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.result = result

    @property
    def updatable(self):
        return self.function.overloadpacket.__name__ in UPDATABLE

    def run(self):
        again = self.function(*self.args, **self.kwargs)
        for old, new in zip(_tensors(self.result), _tensors(again), strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, launches):
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        if name in FORBIDDEN:
            raise RuntimeError(f"npu_standin: {name} cannot be captured in a graph")
        result = function(*args, **kwargs)
        if _is_on_host(result) and any(x.device.type == "npu" for x in _tensors(args)):
            raise RuntimeError("npu_standin: a copy to the host cannot be captured in a graph")
        launch = _Launch(function, args, kwargs, result)
        if launch.updatable and len(args) < 3:
            raise RuntimeError(
                f"npu_standin: {name} in a graph takes query, key, value by position"
            )
        self._launches.append(launch)
        return result


class _Collective:
    """A collective that was launched, on the same tensors."""

    updatable = False
    result = ()

    def __init__(self, args, run):
        self.args = args
        self.run = run


def as_one_launch(collective):
    """A method of a process group, of which a graph remembers the call and not the copies that it
    is played with."""

    @functools.wraps(collective)
    def call(self, *arguments):
        if not _recording:
            return collective(self, *arguments)

        def run():
            collective(self, *arguments).wait()

        with _disable_current_modes():
            work = collective(self, *arguments)
            work.wait()
        _recording[-1].append(_Collective(arguments, run))
        return work

    return call


class NPUGraph:
    """A captured sequence of operators."""

    def __init__(self):
        self._launches = []
        self._updates = 0
        self._pool = None
        self.auto_dispatch_capture = False

    def pool(self):
        """The pool of memory that this graph's tensors lie in."""
        return self._pool

    def update(self, cpu_update_input):
        """Hand over new host arguments for the attentions of the next replay."""
        if not self.auto_dispatch_capture:
            raise RuntimeError("capture with auto_dispatch_capture=True to update")
        launches = [launch for launch in self._launches if launch.updatable]
        inputs = list(cpu_update_input)
        if len(inputs) == 1:
            inputs = inputs * len(launches)
        if len(inputs) != len(launches):
            raise RuntimeError(f"{len(launches)} operators to update, and {len(inputs)} inputs")
        for launch, new in zip(launches, inputs, strict=True):
            for name, value in new.items():
                if name in launch.kwargs:
                    launch.kwargs[name] = value
        self._updates += 1

    def replay(self):
        """Run everything again."""
        if self.auto_dispatch_capture and any(launch.updatable for launch in self._launches):
            if self._updates == 0:
                raise RuntimeError("npu_standin: this replay would wait for an update for ever")
            self._updates = 0
        for other in _graphs_of[self._pool]:
            if other is not self:
                other.spoil()
        for launch in self._launches:
            launch.run()

    def spoil(self):
        """Make what this graph wrote unreadable: its memory belongs to whoever runs next."""
        outside = set()
        made = set()
        for launch in self._launches:
            outside |= {_storage(x) for x in _tensors(launch.args)} - made
            made |= {_storage(x) for x in _tensors(launch.result)} - outside
        for launch in self._launches:
            for tensor in _tensors(launch.result):
                if _storage(tensor) in made and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def reset(self):
        """Forget what was captured."""
        self._launches = []


def _tensors(values):
    """The tensors among arguments or results, lists of them included."""
    if isinstance(values, torch.Tensor):
        return [values]
    if not isinstance(values, tuple | list):
        return []
    found = []
    for value in values:
        found += _tensors(value)
    return found


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


def _is_on_host(result):
    return any(x.device.type == "cpu" for x in _tensors(result))


class graph:
    """Captures what is launched within. It computes meanwhile, which hardware does not: so what was
    computed is made unreadable in the end."""

    def __init__(
        self,
        npu_graph,
        pool=None,
        stream=None,
        auto_dispatch_capture=False,
        capture_error_mode="global",
    ):
        if os.environ.get("TASK_QUEUE_ENABLE") == "2":
            raise RuntimeError("npu_standin: TASK_QUEUE_ENABLE=2 excludes the capture of graphs")
        npu_graph.auto_dispatch_capture = auto_dispatch_capture
        npu_graph._pool = pool or graph_pool_handle()
        _graphs_of[npu_graph._pool].append(npu_graph)
        self._graph = npu_graph
        self._launches = npu_graph._launches
        self._mode = _Recorder(self._launches)

    def __enter__(self):
        _recording.append(self._launches)
        self._mode.__enter__()

    def __exit__(self, *error):
        self._mode.__exit__(*error)
        _recording.pop()
        self._graph.spoil()
