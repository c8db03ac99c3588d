"""What a wheel of torch_npu defines: operators, Python names, kernels. Read from its files, never
imported.

| question | file of the wheel |
| --- | --- |
| operators and their signatures, aten operators with a kernel | npu_native_functions_by_codegen.yaml |
| Python functions and classes | the sources, by their syntax trees |
| what lies in the C++ binding | how the wheel's own sources use it, or a text in its library |
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

from r1zero.errors import BadInput

PACKAGE = "torch_npu"
FUNCTIONS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
LIBRARY = "torch_npu/lib/libtorch_npu.so"
GRAPH_HANDLERS = "torch_npu/npu/_npugraph_handlers/"
# Sections of FUNCTIONS that list operators of torch_npu's own, and those of PyTorch's (aten).
OWN = ("custom", "symint")
ATEN = ("supported", "symint", "autograd", "quant")

Node = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Definition:
    """What a release says of a name."""

    kind: str  # "operator", "module", "class", "function", "value", "key"; "binding": seen to be there
    found: str  # where it stands, or what shows that it is there
    signature: str | None = None  # as written, without self; None where it is not known
    returns: str | None = None  # the class of torch_npu that a function returns

    def as_json(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if value is not None}


class Wheel:
    """A wheel of torch_npu."""

    def __init__(self, path: Path) -> None:
        """BadInput if there is no such wheel."""
        try:
            self._archive = zipfile.ZipFile(path)
            self._functions = yaml.load(self._archive.read(FUNCTIONS), yaml.CSafeLoader)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise BadInput(
                f"{path} is no wheel of torch_npu ({error}); get one by pip download --no-deps "
                "torch_npu==VERSION"
            ) from None
        self.version = path.name.split("-")[1]
        self._files = set(self._archive.namelist())

    @cached_property
    def operators(self) -> dict[str, str]:
        """Signatures of torch_npu's own operators by name and overload: "npu_format_cast.Tensor"."""
        signatures = [text for text in self._listed(OWN) if "(" in text]
        return {text.partition("(")[0]: text for text in signatures}

    @cached_property
    def kernels(self) -> set[str]:
        """Names of PyTorch's operators, with overload, that have a kernel for NPUs: "add.Tensor"."""
        return {text.partition("(")[0] for text in self._listed(ATEN)}

    def python_name(self, name: str) -> Definition | None:
        """Look up a dotted name: "torch_npu.npu.NPUGraph.update"; None if it is not there."""
        return self._look_up(tuple(name.split(".")))

    def key(self, name: str, key: str) -> Definition | None:
        """Look up a key of a dict that a name of torch_npu is given; `name` is written f[key]."""
        if name.startswith("torch_npu.npu.NPUGraph.update["):
            return self._updated(key)
        message = f"Value type of {key} should be ".encode()
        found = re.search(re.escape(message) + rb"(\w+)", self._library)
        if found is None:
            return None
        return Definition("key", f'{LIBRARY}: "{found[0].decode()}"', found[1].decode())

    def _listed(self, sections: tuple[str, ...]) -> Iterator[str]:
        for section in sections:
            for entry in self._functions[section]:
                text = entry["func"] if isinstance(entry, dict) else entry
                yield text.removeprefix("aten::").strip()

    @cached_property
    def _library(self) -> bytes:
        return self._archive.read(LIBRARY)

    def _updated(self, key: str) -> Definition | None:
        """A host argument that a graph takes anew: one of those that some handler of an operator
        names."""
        for file in sorted(self._files):
            if file.startswith(GRAPH_HANDLERS) and file.endswith(".py"):
                for node in ast.walk(self._parsed(file)):
                    if isinstance(node, ast.Constant) and node.value == key:
                        return Definition("key", file)
        return None

    def _look_up(self, parts: tuple[str, ...]) -> Definition | None:
        module = self._module_file(parts)
        if module is not None:
            return Definition("module", module)
        for length in range(len(parts) - 1, 0, -1):
            file = self._module_file(parts[:length])
            if file is not None:
                found = self._in_module(file, parts[length:])
                return found or self._in_binding(parts)
        return None

    def _module_file(self, parts: tuple[str, ...]) -> str | None:
        stem = "/".join(parts)
        for file in (f"{stem}/__init__.py", f"{stem}.py"):
            if file in self._files:
                return file
        return None

    def _in_module(self, file: str, parts: tuple[str, ...]) -> Definition | None:
        """Look a name up in a module: defined there, or imported from another module."""
        if parts == ("__file__",):
            return Definition("value", file)
        node = self._definition(file, parts[0])
        if node is not None:
            return self._defined(file, node, parts[1:])
        imported = self._imported(file, parts[0])
        if imported is not None:
            return self._look_up(imported + parts[1:])
        for module in self._star_imports(file):
            source = self._module_file(module)
            if source is not None:
                found = self._in_module(source, parts)
                if found is not None:
                    return found
        return None

    def _defined(self, file: str, node: Node, rest: tuple[str, ...]) -> Definition | None:
        """The name of this definition, or one within a class."""
        if isinstance(node, ast.ClassDef):
            if rest:
                return self._member(file, node, rest[0])
            return Definition("class", file, self._constructor(file, node))
        if rest:
            return None
        if isinstance(node, ast.FunctionDef):
            text = ast.unparse(node.args)
            return Definition("function", file, text, self._returned_class(node))
        return Definition("value", file)

    def _member(self, file: str, owner: ast.ClassDef, name: str) -> Definition | None:
        for node in _definitions(owner.body):
            if _name_of(node) != name:
                continue
            if not isinstance(node, ast.FunctionDef) or _is_property(node):
                return Definition("value", file)
            return Definition("function", file, _without_self(node))
        for base in self._bases(file, owner):
            found = self._member(*base, name)
            if found is not None:
                return found
        return None

    def _constructor(self, file: str, owner: ast.ClassDef) -> str | None:
        methods = {_name_of(node): node for node in owner.body if isinstance(node, ast.FunctionDef)}
        inits = [methods[name] for name in ("__init__", "__new__") if name in methods]
        for method in inits:
            if method.args.args[1:] or method.args.kwonlyargs or len(inits) == 1:
                return _without_self(method)
        if inits:
            return _without_self(inits[0])
        for base in self._bases(file, owner):
            return self._constructor(*base)
        return None

    def _bases(self, file: str, owner: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """Base classes that stand in the same file."""
        for base in owner.bases:
            node = self._definition(file, ast.unparse(base))
            if isinstance(node, ast.ClassDef):
                yield file, node

    def _returned_class(self, function: ast.FunctionDef) -> str | None:
        """The class whose object a function returns, where it says `return torch_npu.npu.Stream(...)`."""
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                name = ast.unparse(node.value.func)
                if name.startswith(f"{PACKAGE}.npu."):
                    found = self.python_name(name)
                    if found is not None and found.kind == "class":
                        return name
        return None

    def _in_binding(self, parts: tuple[str, ...]) -> Definition | None:
        """A name of the C++ binding: shown by a use in the wheel's own sources, or, for an attribute
        of such a class, by a text in the library. A word such as CUDA may stand there for another
        reason, so only names of several words count."""
        name = ".".join(parts)
        shortened = ".".join(parts[-2:])  # as in `from torch_npu._C import X`
        for file, text in self._sources:
            for form in (name, shortened):
                if re.search(rf"(?<![\w.]){re.escape(form)}\b", text):
                    return Definition("binding", f"{file}: {form}")
        owner = self._in_binding(parts[:-1]) if len(parts) > 2 else None
        whole = b"\0%b\0" % parts[-1].encode()
        if owner is not None and "_" in parts[-1] and whole in self._library:
            return Definition("binding", f'{LIBRARY}: "{parts[-1]}"')
        return None

    @cached_property
    def _sources(self) -> list[tuple[str, str]]:
        files = [file for file in sorted(self._files) if file.endswith(".py")]
        return [(file, self._archive.read(file).decode()) for file in files]

    @lru_cache  # noqa: B019 - a program reads two or three wheels
    def _parsed(self, file: str) -> ast.Module:
        return ast.parse(self._archive.read(file))

    def _definition(self, file: str, name: str) -> Node | None:
        found = None
        for node in _definitions(self._parsed(file).body):
            if _name_of(node) == name:
                found = node  # the last one counts
        return found

    def _imported(self, file: str, name: str) -> tuple[str, ...] | None:
        """What `from ... import name` in a module brings, as the parts of a full name."""
        for node in _imports(self._parsed(file)):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return (*_origin(file, node), alias.name)
        return None

    def _star_imports(self, file: str) -> Iterator[tuple[str, ...]]:
        for node in _imports(self._parsed(file)):
            if node.names[0].name == "*":
                yield _origin(file, node)


def _imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            yield node


def _origin(file: str, node: ast.ImportFrom) -> tuple[str, ...]:
    """The module that an import names: ("torch_npu", "npu", "streams") for `from .streams import`
    in torch_npu/npu/__init__.py."""
    named = tuple(node.module.split(".")) if node.module else ()
    if node.level == 0:
        return named
    folders = tuple(file.split("/")[:-1])
    return folders[: len(folders) - node.level + 1] + named


def _definitions(body: list[ast.stmt]) -> Iterator[Node]:
    """Definitions of a module or class, also those under if and try."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions(node.body)
            yield from _definitions(node.orelse)


def _name_of(node: Node) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return ast.unparse(target)


def _is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def _without_self(node: ast.FunctionDef) -> str:
    """The parameters of a method as its callers see them."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    text = ast.unparse(node.args)
    if "staticmethod" in decorators:
        return text
    return text.partition(", ")[2]
