"""The backend "hccl": each collective is carried by gloo over copies on the host. It refuses what
HCCL refuses: CPU tensors, strides, types that it does not add, options that it does not know."""

from __future__ import annotations

import functools
import inspect

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.futures import Future

from torch_npu.npu.graphs import as_one_launch

# What HCCL adds up, and what it moves.
ADDED = {
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
}
MOVED = ADDED | {torch.uint8, torch.bool, torch.float64}
OPERATIONS = (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT)
OPTION_KEYS = {
    "group_name",
    "hccl_algo",
    "hccl_buffer_name",
    "hccl_buffer_size",
    "hccl_exec_timeout",
    "hccl_job_id",
    "hccl_op_expansion_mode",
    "hccl_retry_enable",
    "hccl_retry_params",
    "hccl_sdma_qos",
    "hccl_world_rank_id",
    "qos_service_level",
    "qos_traffic_class",
}


class ProcessGroupHCCL:
    """Holds the options' class, where torch_npu has it."""

    class Options:
        """Options of a group; `hccl_config` is a dict, assigned as a whole."""

        def __init__(self):
            self.hccl_config = {}
            self.is_high_priority_stream = False
            self.op_timeout = None
            self.global_ranks_in_group = []
            self.group_id = ""


def _check_options(options):
    unknown = set(options.hccl_config) - OPTION_KEYS
    if unknown:
        raise RuntimeError(f"npu_standin: HCCL knows no option {sorted(unknown)}")
    size = options.hccl_config.get("hccl_buffer_size", 200)
    if not isinstance(size, int) or size < 1:
        raise RuntimeError(f"npu_standin: hccl_buffer_size {size!r} is no number from 1 on")
    mode = options.hccl_config.get("hccl_op_expansion_mode", 0)
    if mode not in (0, 1, 2, 3):
        raise RuntimeError(f"npu_standin: hccl_op_expansion_mode {mode!r} is none of 0 to 3")


class _Work(dist._Work):
    """A collective under way: waits for gloo, then lays the result where it belongs."""

    def __init__(self, result, works=(), finish=None):
        super().__init__()
        self._result = result
        self._works = list(works)
        self._finish = finish

    def wait(self, timeout=None):
        for work in self._works:
            work.wait()
        self._works = []
        if self._finish is not None:
            self._finish()
            self._finish = None
        return True

    def is_completed(self):
        return not self._works and self._finish is None

    def is_success(self):
        return True

    def result(self):
        self.wait()
        return self._result

    def get_future(self):
        self.wait()
        future = Future()
        future.set_result(self._result)
        return future


def _check(tensor, types=MOVED):
    if tensor.device.type != "npu":
        raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
    if not tensor.is_contiguous():
        raise RuntimeError("Tensors must be contiguous")
    if tensor.dtype not in types:
        raise RuntimeError(f"npu_standin: HCCL does not take {tensor.dtype} here")


def _on_host(tensor):
    return tensor.detach().cpu()


class Group(dist.ProcessGroup):
    """A group of ranks, each with a device."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._number = rank
        self._count = size

    def getBackendName(self):
        return "hccl"

    # -- reductions --------------------------------------------------------------------------

    def _reduced(self, tensor, operation):
        """The reduction over all ranks, on the host. An average is a sum that is divided."""
        _check(tensor, ADDED)
        average = operation == dist.ReduceOp.AVG
        if average:
            operation = dist.ReduceOp.SUM
        # a ReduceOp has no hash, and knows only from its own side what it equals
        if not any(operation == known for known in OPERATIONS):
            raise RuntimeError(f"npu_standin: HCCL has no {operation}")
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        host = _on_host(tensor)
        self._gloo.allreduce([host], options).wait()
        return host / self._count if average else host

    @as_one_launch
    def allreduce(self, tensors, options=None):
        [tensor] = tensors
        operation = (options or dist.AllreduceOptions()).reduceOp
        tensor.detach().copy_(self._reduced(tensor, operation))
        return _Work(tensors)

    def allreduce_coalesced(self, tensors, options=None):
        for tensor in tensors:
            self.allreduce([tensor], options)
        return _Work(tensors)

    def reduce(self, tensors, options):
        [tensor] = tensors
        reduced = self._reduced(tensor, options.reduceOp)
        if options.rootRank == self._number:
            tensor.detach().copy_(reduced)
        return _Work(tensors)

    @as_one_launch
    def _reduce_scatter_base(self, output, tensor, options):
        _check(output, ADDED)
        host = self._reduced(tensor, options.reduceOp)
        mine = host.reshape(self._count, -1)[self._number]
        output.copy_(mine.view(output.shape))
        return _Work(output)

    def reduce_scatter_tensor_coalesced(self, outputs, inputs, options):
        for output, tensor in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, tensor, options)
        return _Work(outputs)

    # -- moves -------------------------------------------------------------------------------

    @as_one_launch
    def broadcast(self, tensors, options):
        [tensor] = tensors
        _check(tensor)
        host = _on_host(tensor)
        work = self._gloo.broadcast([host], options)
        return _Work(tensors, [work], lambda: tensor.detach().copy_(host))

    def _gathered(self, tensor):
        _check(tensor)
        host = _on_host(tensor).reshape(-1)
        hosts = [torch.empty_like(host) for _ in range(self._count)]
        self._gloo.allgather([hosts], [host]).wait()
        return hosts

    @as_one_launch
    def allgather(self, outputs, inputs, options=None):
        for output in outputs[0]:
            _check(output)
        for output, host in zip(outputs[0], self._gathered(inputs[0]), strict=True):
            output.copy_(host.view(output.shape))
        return _Work(outputs)

    @as_one_launch
    def _allgather_base(self, output, tensor, options=None):
        _check(output)
        output.copy_(torch.cat(self._gathered(tensor)).view(output.shape))
        return _Work(output)

    def allgather_into_tensor_coalesced(self, outputs, inputs, options=None):
        for output, tensor in zip(outputs, inputs, strict=True):
            self._allgather_base(output, tensor)
        return _Work(outputs)

    @as_one_launch
    def alltoall_base(self, output, tensor, output_splits, input_splits, options=None):
        _check(output)
        _check(tensor)
        host = _on_host(output)
        options = options or dist.AllToAllOptions()
        self._gloo.alltoall_base(
            host, _on_host(tensor), list(output_splits), list(input_splits), options
        ).wait()
        output.detach().copy_(host)
        return _Work(output)

    def barrier(self, opts=None):
        self._gloo.barrier().wait()
        return _Work(None)

    def send(self, tensors, to, tag):
        [tensor] = tensors
        _check(tensor)
        host = _on_host(tensor)
        work = self._gloo.send([host], to, tag)
        return _Work(tensors, [work], host.numel)  # which keeps the copy until it is sent

    def recv(self, tensors, source, tag):
        [tensor] = tensors
        _check(tensor)
        host = torch.empty_like(tensor, device="cpu")
        work = self._gloo.recv([host], source, tag)
        return _Work(tensors, [work], lambda: tensor.detach().copy_(host))

    # Names that torch 2.13 gave some of them.
    all_gather_single = _allgather_base
    allgather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_to_all_single = alltoall_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    allgather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced


def _tensors(arguments):
    """The tensors in a collective's arguments, which are tensors or lists of lists of them."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from _tensors(argument)


def _by_device(name):
    """A collective that gloo carries itself where its tensors are on the CPU."""

    def collective(self, *arguments):
        if next(_tensors(arguments)).device.type == "cpu":
            return getattr(self._gloo, name)(*arguments)
        return getattr(Group, name)(self, *arguments)

    return collective


class MixedGroup(Group):
    """A group of "cpu:gloo,npu:hccl". With torch's own backends, too, the tensor's device decides."""


for _name in (
    "allreduce",
    "reduce",
    "broadcast",
    "allgather",
    "_allgather_base",
    "gather",
    "scatter",
    "send",
    "recv",
):
    setattr(MixedGroup, _name, _by_device(_name))

_backends = [""]  # of the group that is being made


def _make(options, hccl_options):
    if hccl_options is not None:
        _check_options(hccl_options)
    kind = MixedGroup if "gloo" in _backends[0] else Group
    return kind(options.store, options.group_rank, options.group_size, options.timeout)


def _remember_backend(make_group):
    """torch does not tell a group made in Python which other backends its group has."""
    signature = inspect.signature(make_group)

    @functools.wraps(make_group)
    def make(*args, **kwargs):
        _backends[0] = str(signature.bind(*args, **kwargs).arguments["backend"])
        return make_group(*args, **kwargs)

    return make


def register():
    """Make the backend known to torch.distributed."""
    dist.Backend.register_backend("hccl", _make, extended_api=True, devices=["npu"])
    dist.is_hccl_available = lambda: True
    c10d._new_process_group_helper = _remember_backend(c10d._new_process_group_helper)
