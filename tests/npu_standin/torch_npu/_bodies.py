"""How a body is given to an operator: computed on the host over device memory, with its gradient
if torch_npu has one, and the limits that the documentation names.

NPU_STANDIN_LIMITS=warn only warns of what the hardware would refuse.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_npu._device import host_view

_library = torch.library.Library("npu", "IMPL")
_only_warns = os.environ.get("NPU_STANDIN_LIMITS") == "warn"


class Refused(RuntimeError):
    """What the documentation says that the operator does not take."""


def limit(holds: bool, sentence: str) -> None:
    """Refuse a call that a documented limit forbids."""
    if holds:
        return
    if not _only_warns:
        raise Refused(f"npu_standin: {sentence}")
    warnings.warn(f"npu_standin: {sentence}", stacklevel=3)


def body(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of CPU tensors the body of the operator of its name, without a gradient."""

    def without_gradient(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(f"npu_standin: {function.__name__} has no gradient")
        return function(*map(_to_host, args), **_hosted(kwargs))

    _implement(function.__name__, without_gradient)
    _library.impl(function.__name__, torch.library.fallthrough_kernel, "AutogradPrivateUse1")
    return function


def differentiable(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A body with a gradient for these arguments: that of the body, computed once more."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(function).parameters)
        at = [parameters.index(name) for name in names]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return function(*map(_to_host, args), **_hosted(kwargs))

        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.inputs = inputs

        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            found = _gradients(function, ctx.inputs, at, grads)
            return tuple(found.get(number) for number in range(len(ctx.inputs)))

        name = function.__name__
        _implement(name, forward)
        torch.library.register_autograd(
            f"npu::{name}", backward, setup_context=setup_context, lib=_library
        )
        return function

    return register


def _implement(name: str, on_host: Callable[..., Any]) -> None:
    in_place = name.endswith("_")

    def on_device(*args: Any, **kwargs: Any) -> Any:
        result = on_host(*args, **kwargs)
        return args[0] if in_place else _to_device(result)

    _library.impl(name, on_device, "PrivateUse1")
    _library.impl(name, _refuse(name), "CPU")


def _gradients(
    function: Callable[..., Any], inputs: Sequence[Any], at: Sequence[int], grads: Sequence[Any]
) -> dict[int, torch.Tensor]:
    """Gradients of the inputs at these places, for the gradient of the first output."""
    hosted = [_to_host(value) for value in inputs]
    with torch.enable_grad():
        for number in at:
            hosted[number] = hosted[number].clone().requires_grad_()
        output = function(*hosted)
        if isinstance(output, tuple):
            output = output[0]
        wanted = [hosted[number] for number in at]
        found = torch.autograd.grad(output, wanted, host_view(grads[0].contiguous()))
    return {number: gradient.to("npu") for number, gradient in zip(at, found, strict=True)}


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but npu::{name} got one on cpu"
        )

    return refuse


def _to_host(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_host(part) for part in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type != "npu":
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but one is on {value.device}"
        )
    return host_view(value)


def _hosted(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _to_host(value) for name, value in values.items()}


def _to_device(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("npu")
    if isinstance(value, tuple | list):
        return type(value)(_to_device(part) for part in value)
    return value
