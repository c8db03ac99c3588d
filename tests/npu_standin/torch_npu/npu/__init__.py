"""torch.npu: devices, memory, random state; streams and graphs are beside it."""

from __future__ import annotations

import contextlib
import sys
import types

import torch

from torch_npu import _device
from torch_npu.npu.graphs import (  # noqa: F401
    NPUGraph,
    graph,
    graph_pool_handle,
    is_current_stream_capturing,
    refuse_to_wait,
)
from torch_npu.npu.streams import (  # noqa: F401
    Event,
    Stream,
    StreamContext,
    current_stream,
    default_stream,
    set_stream,
    stream,
)

TOTAL_MEMORY = 64 << 30


def _index(given=None):
    """The number of a device that is named by number, string or torch.device."""
    if given is None:
        return _device.current
    if isinstance(given, int):
        return given
    number = torch.device(given).index
    return _device.current if number is None else number


# -- devices --------------------------------------------------------------------------------------


def is_available():
    return True


def is_initialized():
    return True


def init():
    pass


def _lazy_init():
    pass


def _lazy_call(call, **_):
    call()


def _is_in_bad_fork():
    return False


def device_count():
    return _device.count


def current_device():
    return _device.current  # an integer


def set_device(device):
    index = _index(device)
    if not 0 <= index < _device.count:
        raise RuntimeError(f"Invalid device ID {index}: there are {_device.count}")
    _device.current = index


class device(contextlib.ContextDecorator):
    """Makes a device the current one for a while."""

    def __init__(self, device):
        self._wanted = _index(device)

    def __enter__(self):
        self._before = _device.current
        set_device(self._wanted)

    def __exit__(self, *_):
        _device.current = self._before


def synchronize(device=None):
    """What was launched is done."""
    refuse_to_wait()


def get_device_name(device=None):
    return "npu_standin"


def get_device_capability(device=None):
    return None  # as in torch_npu, where nobody has set one


def get_device_properties(device=None):
    return types.SimpleNamespace(
        name="npu_standin", total_memory=TOTAL_MEMORY, multi_processor_count=20
    )


# -- memory: counted where tensors are allocated --------------------------------------------------


def memory_allocated(device=None):
    return _device.bytes(_index(device))


def max_memory_allocated(device=None):
    return _device.peak_bytes(_index(device))


def reset_peak_memory_stats(device=None):
    _device.reset_peak(_index(device))


memory_reserved = memory_allocated
max_memory_reserved = max_memory_allocated


def mem_get_info(device=None):
    return TOTAL_MEMORY - memory_allocated(device), TOTAL_MEMORY


def memory_stats(device=None):
    return {"allocated_bytes.all.current": memory_allocated(device)}


def empty_cache():
    pass


def ipc_collect():
    pass


# -- random state: one generator, that of the host ------------------------------------------------

default_generators = (torch.default_generator,) * _device.count


def manual_seed(seed):
    torch.default_generator.manual_seed(int(seed))  # torch.manual_seed calls this


manual_seed_all = manual_seed


def get_rng_state(device="npu"):
    return torch.get_rng_state()


def set_rng_state(state, device="npu"):
    torch.set_rng_state(state)


# -- what is asked for while modules are imported -------------------------------------------------


def is_bf16_supported():
    return True


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


def set_compile_mode(jit_compile=False):
    pass


def set_option(option):
    pass


for _name in ("Float", "Half", "BFloat16", "Int", "Long", "Double", "Byte", "Bool"):
    globals()[f"{_name}Tensor"] = getattr(torch, f"{_name}Tensor")


def _nothing(*_, **__):
    return 0


def _add_module(name, **content):
    made = types.ModuleType(f"{__name__}.{name}")
    vars(made).update(content)
    sys.modules[made.__name__] = made
    globals()[name] = made


_add_module("mstx", range_start=_nothing, range_end=_nothing, mark=_nothing)
_add_module("nvtx", range_push=_nothing, range_pop=_nothing)
_add_module("random", get_rng_state=get_rng_state, set_rng_state=set_rng_state)
_add_module("amp")
_add_module("memory")
_add_module("utils")
