"""Where the project uses torch_npu: found in the syntax trees (AST) of its sources.

torch_npu is followed from where it comes (torch_npu_module(), device_module(kind), torch.npu,
torch.ops.npu, an import) through local names, private attributes of self, dicts and lists that
are one of these, `with ... as` and the results of private functions of the same file. Names are written as they are reached, "()" for a call:
`graph = torch_npu_module().npu.NPUGraph(); graph.replay()` uses `torch_npu.npu.NPUGraph().replay`.
What leaves that view, as an argument of a function of ours does, is reported as passed on.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = "torch_npu"
# Functions of ours that return a module (r1zero/distributed/torch_modules.py), whose own file is
# not read: all that is there is how they do it.
SOURCES = {"torch_npu_module": "torch_npu", "device_module": "torch_npu.npu"}
SOURCES_FILE = "torch_modules.py"
# What torch_npu puts into torch.
SAME = {"torch.npu": "torch_npu.npu", "torch.ops.npu": "torch_npu"}
IMPORTERS = ("import_module", "__import__", "getattr", "hasattr")

Scope = ast.AST
Binding = tuple[Scope | None, str]


@dataclass(frozen=True)
class Use:
    """One place where a name of torch_npu is called, read or passed on."""

    name: str  # "torch_npu.npu.graph", "torch_npu.npu.NPUGraph().replay"
    where: str  # "r1zero/ops/npu_graph.py:16"
    call: ast.Call | None = None  # the call, if it is one
    key: str | None = None  # of a dict that is given to this name, as options of a group are
    passed_on: bool = False  # to where it is not followed


@dataclass
class Found:
    """What a search has found. `faults` are sentences about what cannot be followed at all."""

    uses: list[Use] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    # uses of a dict that a function of ours makes, and that function's name
    made_elsewhere: list[tuple[Use, str]] = field(default_factory=list)


def find_uses(root: Path, folders: tuple[str, ...] = ("r1zero", "tools")) -> Found:
    """Search all Python files below these folders of the project at `root`."""
    found = Found()
    sources = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if path.name != SOURCES_FILE:
                sources[str(path.relative_to(root))] = path.read_text()
    for file, source in sources.items():
        search(source, file, found)
    for use, function in found.made_elsewhere:
        for file, source in sources.items():
            if f"def {function}(" in source:
                found.uses += _keys_of_function(use, function, file, ast.parse(source))
    return found


def _keys_of_function(use: Use, function: str, file: str, tree: ast.Module) -> Iterator[Use]:
    """The keys of the dict that a function makes: in `{"key": ...}` and in `made["key"] = ...`."""
    for outer in ast.walk(tree):
        if not isinstance(outer, ast.FunctionDef) or outer.name != function:
            continue
        for node in ast.walk(outer):
            keys: list[ast.expr | None] = []
            if isinstance(node, ast.Dict):
                keys = list(node.keys)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                keys = [node.slice]
            for key in keys:
                if isinstance(key, ast.Constant):
                    yield Use(use.name, f"{file}:{key.lineno}", key=str(key.value))


def search(source: str, file: str, found: Found) -> None:
    """Add what one file uses; `file` is its name in the report."""
    if not any(word in source for word in (ROOT, *SOURCES, *SAME)):
        return
    tree = ast.parse(source)
    names = _Names()
    while _Binder(names).grew(tree):  # a name may be bound after it is used, as in a class
        pass
    reporter = _Reporter(names, tree, file)
    reporter.visit(tree)
    found.uses += reporter.uses
    found.faults += reporter.faults
    found.made_elsewhere += reporter.made_elsewhere


class _Names:
    """What names of a file stand for parts of torch_npu."""

    def __init__(self) -> None:
        self.bound: dict[Binding, str] = {}

    def bind(self, scope: Scope | None, name: str, meaning: str | None) -> None:
        if meaning is not None and meaning.startswith("torch"):
            self.bound.setdefault((scope, name), meaning)

    def meaning(self, node: ast.AST, scopes: list[Scope]) -> str | None:
        """What an expression stands for: "torch_npu.npu.graph", or None if that is not known."""
        if isinstance(node, ast.Name):
            return self._of_name(node.id, scopes)
        if isinstance(node, ast.Attribute):
            return self._of_attribute(node, scopes)
        if isinstance(node, ast.Call):
            return self._of_call(node, scopes)
        if isinstance(node, ast.Subscript):
            return self.of_element(node.value, scopes)
        if isinstance(node, ast.IfExp):
            return self.meaning(node.body, scopes) or self.meaning(node.orelse, scopes)
        if isinstance(node, ast.NamedExpr):
            return self.meaning(node.value, scopes)
        return None

    def _of_name(self, name: str, scopes: list[Scope]) -> str | None:
        for scope in reversed(scopes):
            if (scope, name) in self.bound:
                return self.bound[scope, name]
            if name in _parameters(scope):
                return None
        return None

    def _of_attribute(self, node: ast.Attribute, scopes: list[Scope]) -> str | None:
        if _is_self(node.value):
            return self.bound.get((_class_of(scopes), f"self.{node.attr}"))
        owner = self.meaning(node.value, scopes)
        if owner is None:
            return None
        name = f"{owner}.{node.attr}"
        return SAME.get(name, name)

    def of_element(self, container: ast.AST, scopes: list[Scope]) -> str | None:
        """What is kept in a dict or list of this scope or of self."""
        if isinstance(container, ast.Name):
            return self._of_name(f"{container.id}[]", scopes)
        if isinstance(container, ast.Attribute) and _is_self(container.value):
            return self.bound.get((_class_of(scopes), f"self.{container.attr}[]"))
        return None

    def _of_call(self, node: ast.Call, scopes: list[Scope]) -> str | None:
        called = _last_name(node.func)
        if called in SOURCES:
            return SOURCES[called]
        if isinstance(node.func, ast.Name):
            result = self._of_name(f"{called}()", scopes)
        elif isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
            result = self.bound.get((_class_of(scopes), f"self.{called}()"))
        else:
            result = None
        if result is not None:
            return result
        function = self.meaning(node.func, scopes)
        if function is None or not function.startswith(ROOT):
            return None
        return f"{function}()"


class _Scoped(ast.NodeVisitor):
    """Visits a tree and knows the functions and classes around each node."""

    def __init__(self, names: _Names) -> None:
        self.names = names
        self.scopes: list[Scope] = []

    def visit(self, node: ast.AST) -> None:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        if isinstance(node, kinds):
            self.scopes.append(node)
            super().visit(node)
            self.scopes.pop()
        else:
            super().visit(node)

    def meaning(self, node: ast.AST) -> str | None:
        return self.names.meaning(node, self.scopes)


class _Binder(_Scoped):
    """Learns what names are bound to."""

    def grew(self, tree: ast.AST) -> bool:
        """Visit the tree; whether anything new was learnt."""
        before = len(self.names.bound)
        self.visit(tree)
        return len(self.names.bound) > before

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.asname is not None:
                self.names.bind(self.scopes[-1], alias.asname, alias.name)
            else:
                top = alias.name.partition(".")[0]
                self.names.bind(self.scopes[-1], top, top)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if name.startswith((f"{ROOT}.", "torch.")):
                name = SAME.get(name, name)
                self.names.bind(self.scopes[-1], alias.asname or alias.name, name)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, node.value)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target, node.value)
        self.generic_visit(node)

    def visit_withitem(self, node: ast.withitem) -> None:
        if node.optional_vars is not None:
            self._bind(node.optional_vars, node.context_expr)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        function = self.scopes[-1]
        if node.value is not None and isinstance(function, ast.FunctionDef):
            meaning = self.meaning(node.value)
            outside = self.scopes[-2]
            own = "self." if isinstance(outside, ast.ClassDef) else ""
            if _is_private(function.name):
                self.names.bind(outside, f"{own}{function.name}()", meaning)
        self.generic_visit(node)

    def _bind(self, target: ast.AST, value: ast.AST) -> None:
        element = ""
        if isinstance(target, ast.Subscript):
            target = target.value
            element = "[]"
        if isinstance(target, ast.Name):
            self.names.bind(self.scopes[-1], target.id + element, self.meaning(value))
        elif isinstance(target, ast.Attribute) and _is_self(target.value):
            name = f"self.{target.attr}{element}"
            self.names.bind(_class_of(self.scopes), name, self.meaning(value))


class _Reporter(_Scoped):
    """Lists the uses, once it is known what names stand for."""

    def __init__(self, names: _Names, tree: ast.AST, file: str) -> None:
        super().__init__(names)
        self.file = file
        self.uses: list[Use] = []
        self.faults: list[str] = []
        self.made_elsewhere: list[tuple[Use, str]] = []
        self.parents = {
            child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)
        }

    def generic_visit(self, node: ast.AST) -> None:
        meaning = self.meaning(node)
        if meaning is not None and meaning.startswith(ROOT):
            self._report(node, meaning)
        kept = self.names.of_element(node, self.scopes)
        if kept is not None and not self._is_container_seen(node):
            self.uses.append(Use(kept, self._where(node), passed_on=True))
        super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _last_name(node.func) in IMPORTERS and self._touches_torch_npu(node):
            self.faults.append(
                f"{self._where(node)}: {ast.unparse(node)}: write the name itself, so that it can "
                "be held to torch_npu's wheels"
            )
        else:
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """The keys of a dict that is given to an attribute: `options.hccl_config = {...}`."""
        for target in node.targets:
            name = self.meaning(target)
            if name is not None and name.startswith(ROOT) and not self._is_binding(target):
                self._report_dict(name, node.value)
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").partition(".")[0] == ROOT:
            for alias in node.names:
                self.uses.append(Use(f"{node.module}.{alias.name}", self._where(node)))

    def _report(self, node: ast.AST, name: str) -> None:
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute | ast.IfExp | ast.NamedExpr):
            return  # part of a longer expression, which is reported
        where = self._where(node)
        if isinstance(parent, ast.Call) and parent.func is node:
            self.uses.append(Use(name, where, call=parent))
            self._report_keys_of_call(name, parent)
            return
        if isinstance(node, ast.Attribute) and name != ROOT:
            self.uses.append(Use(name, where))
        if isinstance(node, ast.expr) and not self._is_followed(node):
            self.uses.append(Use(name, where, passed_on=True))

    def _report_keys_of_call(self, name: str, call: ast.Call) -> None:
        """The keys of dicts in a list: `graph.update(cpu_update_input=[{...}])`."""
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        for value in values:
            if isinstance(value, ast.List):
                for element in value.elts:
                    self._report_keys(name, element)

    def _report_dict(self, name: str, value: ast.expr) -> None:
        """What is given to an attribute: a dict, a function's result, or a plain value."""
        function = _last_name(value.func) if isinstance(value, ast.Call) else ""
        if function:
            self.made_elsewhere.append((Use(name, self._where(value)), function))
        elif isinstance(value, ast.Dict | ast.Constant):
            self._report_keys(name, value)
        else:
            self.faults.append(
                f"{self._where(value)}: {ast.unparse(value)}: write the dict here or in a function, "
                "so that its keys can be held to torch_npu's wheels"
            )

    def _report_keys(self, name: str, value: ast.AST) -> None:
        if isinstance(value, ast.Dict):
            for key in value.keys:
                if isinstance(key, ast.Constant):
                    self.uses.append(Use(name, self._where(key), key=str(key.value)))

    def _is_followed(self, node: ast.expr) -> bool:
        """Whether what becomes of a value is seen: it is bound to a name, used up at once, or goes to
        torch_npu."""
        if isinstance(getattr(node, "ctx", None), ast.Store):
            return True
        parent = self.parents[node]
        while isinstance(parent, ast.Tuple | ast.List | ast.Dict | ast.keyword | ast.Starred):
            parent = self.parents[parent]
        if isinstance(parent, ast.Call):
            called = self.meaning(parent.func)
            return called is not None and called.startswith(ROOT)
        if isinstance(parent, ast.Assign):
            return all(self._is_binding(target) for target in parent.targets)
        if isinstance(parent, ast.AnnAssign):
            return self._is_binding(parent.target)
        if isinstance(parent, ast.Return):
            return self._returns_within()
        return isinstance(parent, ast.withitem | ast.Expr | ast.Compare | ast.Subscript)

    def _is_container_seen(self, node: ast.AST) -> bool:
        """Whether a dict or list of objects is only asked for one of them, or made."""
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        return stored or isinstance(self.parents[node], ast.Subscript | ast.Compare)

    def _is_binding(self, target: ast.AST) -> bool:
        """Whether it is followed what a target is given. An attribute must be private: ruff sees to
        it that nobody else reads it."""
        if isinstance(target, ast.Subscript):
            target = target.value
        if isinstance(target, ast.Attribute):
            return _is_self(target.value) and _is_private(target.attr)
        # a tuple is what a call returns, taken apart: no object of torch_npu comes in one
        return isinstance(target, ast.Name | ast.Tuple)

    def _returns_within(self) -> bool:
        """Whether a `return` here is of a private function, whose results are followed."""
        function = self.scopes[-1]
        return isinstance(function, ast.FunctionDef) and _is_private(function.name)

    def _touches_torch_npu(self, call: ast.Call) -> bool:
        for argument in call.args[:1]:
            meaning = self.meaning(argument)
            if meaning is not None and meaning.startswith(ROOT):
                return True
            if isinstance(argument, ast.Constant):
                return str(argument.value).partition(".")[0] == ROOT
        return False

    def _where(self, node: ast.AST) -> str:
        return f"{self.file}:{getattr(node, 'lineno', 0)}"


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_private(name: str) -> bool:
    return name.startswith("_")


def _class_of(scopes: list[Scope]) -> Scope | None:
    """The innermost class around a place."""
    for scope in reversed(scopes):
        if isinstance(scope, ast.ClassDef):
            return scope
    return None


def _last_name(node: ast.AST) -> str:
    """`c` of a.b.c or of c; empty for other expressions."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return ""


def _parameters(scope: Scope) -> set[str]:
    """The names of a function's parameters, which hide those outside."""
    if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return set()
    return set(_names_of(scope.args))


def _names_of(arguments: ast.arguments) -> Iterator[str]:
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        yield argument.arg
    for rest in (arguments.vararg, arguments.kwarg):
        if rest is not None:
            yield rest.arg
