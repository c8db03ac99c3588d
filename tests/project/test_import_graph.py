"""The floors of the house: what may import what. A room is a folder of r1zero/ or a file beside them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "r1zero"
# From the ground up. A room imports rooms of lower floors only, and none of its own floor.
FLOORS = (
    ("errors", "scores"),
    ("types",),
    ("distributed",),
    ("ops", "run_folder"),
    ("config",),
    ("models",),
    ("algo", "reward", "weights"),
    ("data",),
    ("policy", "report", "rollout", "weight_sync"),
    ("checkpoint", "observe"),
    ("reward_model",),
    ("preflight",),
    ("runtime",),
    ("step",),
    ("evaluation",),
    ("trainer",),
    ("main",),
    ("node",),
)
TOP_FILES = {"__init__", "errors", "main", "node", "runtime", "scores", "step", "trainer", "types"}
HEAVY = ("torch", "megatron", "transformers")


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a syntax tree imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def for_types_only(tree: ast.AST) -> set[str]:
    """What is imported under `if TYPE_CHECKING`, for annotations."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            found.update(imported(node))
    return found


def arrows(of_types: bool) -> dict[str, set[str]]:
    """Modules of the package, and those of the package that each imports.

    With `of_types` also what annotations alone need.
    """
    found = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        targets = set(imported(tree))
        if not of_types:
            targets -= for_types_only(tree)
        found[name] = (targets & MODULES.keys()) - {name}
    return found


def room_of(module: str) -> str:
    """The folder or file of the package that a module belongs to; the package itself is none."""
    return module.split(".")[1] if "." in module else ""


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The names on some circle of the graph; empty when it has none."""
    left = {name: set(targets) for name, targets in graph.items()}
    while True:
        free = {name for name, targets in left.items() if not targets & left.keys()}
        if not free:
            return sorted(left)
        for name in free:
            del left[name]


def test_no_module_imports_itself_by_a_detour() -> None:
    assert circle(arrows(of_types=False)) == []


def test_rooms_import_only_what_lies_below_them() -> None:
    level = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    upward = [
        f"{module} imports {target}"
        for module, targets in arrows(of_types=True).items()
        for target in sorted(targets)
        if room_of(module) != room_of(target)
        if level[room_of(target)] >= level[room_of(module)]
    ]
    assert upward == []


def test_few_files_stand_at_the_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP_FILES


def at_import(module: str) -> set[str]:
    """What is imported when a module is, which leaves out imports inside functions."""
    tree = ast.parse(MODULES[module].read_text())
    plain = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {target for node in plain for target in imported(node)}


def test_records_of_a_step_and_the_configuration_need_no_framework() -> None:
    for module in ("r1zero.types", "r1zero.config.load", "r1zero.observe.metrics"):
        seen: set[str] = set()
        waiting = {module}
        while waiting:
            name = waiting.pop()
            seen.add(name)
            targets = at_import(name)
            heavy = {target for target in targets if target.split(".")[0] in HEAVY}
            assert not heavy, f"{module} imports {name}, which imports {heavy}"
            waiting |= (targets & MODULES.keys()) - seen


# Who may import what is not ours, and what drives a device: rooms or modules.
OWNERS = {
    "megatron": {"models", "policy", "weights", "checkpoint", "distributed.megatron_on_cpu"},
    "mindspeed": {"distributed.megatron_on_npu"},
    "torch_npu": {"distributed.torch_modules"},
    "r1zero.distributed.torch_modules": {"distributed", "ops"},
}


def lies_in(module: str, place: str) -> bool:
    """Whether a module is this package or module, or within it."""
    return module == place or module.startswith(place + ".")


def test_only_their_owners_import_megatron_and_the_packages_of_the_npu() -> None:
    found = [
        f"{name} imports {target}"
        for name, path in MODULES.items()
        for target in imported(ast.parse(path.read_text()))
        for owned, owners in OWNERS.items()
        if lies_in(target, owned)
        if not any(lies_in(name, f"r1zero.{owner}") for owner in owners)
    ]
    assert found == []


def test_only_the_folder_of_ranks_reads_the_environment() -> None:
    """But for the variables in paths, which are the user's own."""
    found = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "environ"
        if room_of(name) != "distributed" and name != "r1zero.config.paths"
    ]
    assert found == []


def test_only_the_folder_of_ranks_compares_ranks_with_numbers() -> None:
    """A rank's number means something in distributed/ alone; elsewhere it is asked by name."""
    found = []
    for name, path in MODULES.items():
        if room_of(name) == "distributed":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Compare) or not _is_rank(node.left):
                continue
            if any(isinstance(other, ast.Constant) for other in node.comparators):
                found.append(f"{name}:{node.lineno}")
    assert found == []


def _is_rank(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name == "rank" or name.endswith("_rank")


MATH = "r1zero.reward.math"
MATH_DOORS = {
    f"{MATH}.grade": {"same", "is_copied"},
    f"{MATH}.gold": {"NO_ANSWERS", "are_hopeless", "read_gold", "survey_golds", "the_one_of"},
}


def past_the_doors(tree: ast.AST) -> Iterator[str]:
    """What a file imports from within the folder that compares answers, other than by its doors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if lies_in(alias.name, MATH))
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inside = lies_in(f"{node.module}.{alias.name}", MATH)
                if inside and alias.name not in MATH_DOORS.get(node.module, set()):
                    yield f"{node.module}.{alias.name}"


def test_answers_are_compared_through_two_doors() -> None:
    root = PACKAGE.parent
    files = [path for name, path in MODULES.items() if not lies_in(name, MATH)]
    for folder in ("tools", "examples"):
        files += sorted((root / folder).rglob("*.py"))
    found = [
        f"{path.relative_to(root)} imports {target}"
        for path in files
        for target in past_the_doors(ast.parse(path.read_text()))
    ]
    assert found == []


def test_every_way_past_the_doors_is_seen() -> None:
    ways = (
        "import r1zero.reward.math.units",
        "from r1zero.reward import math",
        "from r1zero.reward.math import grade",
        "from r1zero.reward.math.grade import _same",
        "from r1zero.reward.math.values import evaluate",
    )
    for way in ways:
        assert len(list(past_the_doors(ast.parse(way)))) == 1, way
    assert not list(past_the_doors(ast.parse("from r1zero.reward.math.grade import same")))
