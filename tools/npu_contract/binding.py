"""Whether a call, as it stands in a source, fits a signature: an operator's, as PyTorch's schemas
write it, or a Python function's."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import torch

SIMPLE_TYPES = ("int", "float", "bool", "str")


@dataclass(frozen=True)
class Parameter:
    name: str
    default: str | None  # as written; None if an argument is needed
    type: str | None  # "int", "Optional[Tensor]", "List[int]"; None if any value may come


@dataclass(frozen=True)
class Signature:
    positional: tuple[Parameter, ...]  # may also be given by keyword
    keyword_only: tuple[Parameter, ...]
    any_keyword: bool = False  # **kwargs

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.positional + self.keyword_only


def of_operator(text: str) -> Signature:
    """Read "npu_swiglu(Tensor self, int dim=-1) -> Tensor"."""
    positional = []
    keyword_only = []
    schema = torch._C.parse_schema(f"npu::{text}")  # noqa: SLF001 - PyTorch's own parser
    for argument in schema.arguments:
        default = repr(argument.default_value) if argument.has_default_value() else None
        parameter = Parameter(argument.name, default, str(argument.type))
        if argument.kwarg_only:
            keyword_only.append(parameter)
        else:
            positional.append(parameter)
    return Signature(tuple(positional), tuple(keyword_only))


def of_python(text: str) -> Signature:
    """Read "device=None, *, enable_timing=False"."""
    function = ast.parse(f"def _({text}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    given = function.args
    positional = given.posonlyargs + given.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    defaults += given.defaults
    return Signature(
        _parameters(positional, defaults),
        _parameters(given.kwonlyargs, given.kw_defaults),
        given.kwarg is not None,
    )


def _parameters(arguments: list[ast.arg], defaults: list[ast.expr | None]) -> tuple[Parameter, ...]:
    parameters = []
    for argument, default in zip(arguments, defaults, strict=True):
        written = None if default is None else ast.unparse(default)
        parameters.append(Parameter(argument.arg, written, _python_type(argument, default)))
    return tuple(parameters)


def _python_type(argument: ast.arg, default: ast.expr | None) -> str | None:
    """The type of a parameter by its annotation or else its default, where that is a simple one."""
    if argument.annotation is not None:
        name = ast.unparse(argument.annotation)
    elif isinstance(default, ast.Constant):
        name = type(default.value).__name__
    else:
        return None
    return name if name in SIMPLE_TYPES else None


def faults_of_call(call: ast.Call, signature: Signature) -> list[str]:
    """What is wrong with a call; empty if it fits."""
    if _is_open(call):
        return ["passes * or ** arguments, which cannot be held to a signature: name them"]
    faults = []
    if len(call.args) > len(signature.positional):
        faults.append(
            f"passes {len(call.args)} positional arguments, and it takes {len(signature.positional)}"
        )
    known = {parameter.name: parameter for parameter in signature.parameters}
    given = arguments_of(call, signature)
    for name, value in given.items():
        if name not in known:
            if not signature.any_keyword:
                faults.append(f"has no argument {name}")
        elif not _fits(value, known[name].type):
            faults.append(f"{name}={ast.unparse(value)} is no {known[name].type}")
    for parameter in signature.parameters:
        if parameter.default is None and parameter.name not in given:
            faults.append(f"needs the argument {parameter.name}")
    for keyword in call.keywords:
        if keyword.arg in [parameter.name for parameter in signature.positional[: len(call.args)]]:
            faults.append(f"gets the argument {keyword.arg} twice")
    return faults


def arguments_of(call: ast.Call, signature: Signature) -> dict[str, ast.expr]:
    """The arguments of a call by the names of their parameters."""
    given = {}
    for parameter, value in zip(signature.positional, call.args, strict=False):
        given[parameter.name] = value
    for keyword in call.keywords:
        given[str(keyword.arg)] = keyword.value
    return given


def drifts_of_call(call: ast.Call, oldest: Signature, newest: Signature) -> list[str]:
    """What a call means differently in two releases that both take it: a default that changed and is
    not given, a position that another parameter has now."""
    if _is_open(call):
        return []
    faults = []
    before = list(arguments_of(call, oldest))
    after = list(arguments_of(call, newest))
    if before != after:
        faults.append("passes by position what has another position there: pass it by keyword")
    defaults = {parameter.name: parameter.default for parameter in newest.parameters}
    for parameter in oldest.parameters:
        now = defaults.get(parameter.name, parameter.default)
        if parameter.default != now and parameter.name not in before:
            faults.append(
                f"the default of {parameter.name} is {parameter.default} or {now}: pass it"
            )
    return faults


def _is_open(call: ast.Call) -> bool:
    """Whether a call passes arguments that do not stand there."""
    starred = any(isinstance(value, ast.Starred) for value in call.args)
    return starred or any(keyword.arg is None for keyword in call.keywords)


def _fits(node: ast.expr, kind: str | None) -> bool:
    """Whether a literal has the type of a parameter; other expressions are taken to."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return True
    return kind is None or _is_of(value, kind)


def _is_of(value: Any, kind: str) -> bool:
    """Whether PyTorch takes a value for a type that a schema has: an int is a float, too."""
    if kind.startswith("Optional["):
        return value is None or _is_of(value, kind.removeprefix("Optional[")[:-1])
    if kind.startswith("List["):
        element = kind.removeprefix("List[")[:-1]
        return isinstance(value, list | tuple) and all(_is_of(one, element) for one in value)
    if isinstance(value, bool):
        return kind == "bool"
    if isinstance(value, int):
        return kind in ("int", "SymInt", "float", "number")
    if isinstance(value, float):
        return kind in ("float", "number")
    return isinstance(value, str) and kind == "str"
