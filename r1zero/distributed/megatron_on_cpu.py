"""Megatron-core on CPUs (gloo): the torch.cuda calls that it makes unasked answer for the CPU.

megatron-core 0.16.1 has no CPU platform of its own. This is the measured minimum for dense models
and mixtures of experts with TP, PP, DP, EP and sequence parallelism.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._device

Factory = Callable[..., torch.Tensor]


class _NoEvent:
    """Stands for torch.cuda.Event: a CPU runs in order, so what it waits for has happened."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _NoStream:
    """Stands for torch.cuda.Stream, which must stay a class: libraries annotate with it."""

    def wait_stream(self, stream: object) -> None:
        """A CPU runs in order."""

    def record_event(self) -> _NoEvent:
        """What the token dispatcher of a MoE layer waits for."""
        return _NoEvent()


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


# What stands for the functions of torch.cuda of these names.
CUDA_ON_CPU: Mapping[str, object] = {
    "current_device": _cpu_device,
    "synchronize": lambda *_: None,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "manual_seed": _seed,
    "Stream": _NoStream,
    "current_stream": lambda *_: _NoStream(),
    "stream": lambda _: contextlib.nullcontext(),
}


def answer_cuda_with_cpu() -> None:
    """Patch torch and Megatron for the CPU, before Megatron is imported. A second call does
    nothing."""
    if torch.cuda.current_device is CUDA_ON_CPU["current_device"]:
        return
    _replace(torch.cuda, CUDA_ON_CPU)
    # remembers the true factories: `with torch.device("meta")` needs them
    torch.utils._device._device_constructors()
    _replace(torch, {"tensor": _on_cpu(torch.tensor), "zeros": _on_cpu(torch.zeros)})
    _replace(torch.Tensor, {"cuda": _stay, "type": _type_as_on_cuda(torch.Tensor.type)})
    _replace(torch.optim.Optimizer, _own_methods(torch.optim.Optimizer))
    _import_megatron()
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    for module in (moe_utils, token_dispatcher):  # the second has it by its name
        _replace(module, {"maybe_move_tensor_to_cpu": _on_host})


def _import_megatron() -> None:
    """Import Megatron without what no run on CPUs uses.

    Its decorators compile functions that a CPU never calls, which imports PyTorch's compiler;
    MindSpeed does without, too. And it imports wandb for an inference engine of its own.
    """
    with _compiler_that_does_nothing(), _as_if_not_installed("wandb"):
        from megatron.core import jit
    jit.disable_jit_fuser()  # nor do the decorators of what is imported later


@contextlib.contextmanager
def _compiler_that_does_nothing() -> Iterator[None]:
    compiler = torch.compile
    _replace(torch, {"compile": lambda function: function})
    try:
        yield
    finally:
        _replace(torch, {"compile": compiler})


@contextlib.contextmanager
def _as_if_not_installed(name: str) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # `import` takes it for a missing module
    try:
        yield
    finally:
        del sys.modules[name]


def _own_methods(kind: type) -> dict[str, object]:
    """The methods of a class without what decorates them.

    torch keeps its optimizers from its compiler by a decorator, and that imports the compiler, which
    takes 2.4 s of every train rank's start and is used by none.
    """
    return {
        name: inspect.unwrap(method)
        for name, method in vars(kind).items()
        if inspect.isfunction(method)
    }


def _replace(owner: object, replacements: Mapping[str, object]) -> None:
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


def _stay(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Stands for torch.Tensor.cuda."""
    return tensor


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What a MoE layer reads on the host, such as the counts of an all-to-all, which takes no tensors.
    megatron-core leaves a tensor of the CPU as it is, whatever is asked for."""
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return tensor


def _on_cpu(factory: Factory) -> Factory:
    """The same factory; what it is told to make on CUDA it makes on the CPU."""

    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    return make


def _type_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's distributed optimizer sorts parameters by the string `tensor.type()`."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.")

    return type_
