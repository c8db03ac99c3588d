"""Calls of torch_npu against the signatures of the oldest and the newest supported wheel.

The signatures are a table that tools/torch_npu_contract.py takes from wheels; no NPU and no
torch_npu is here. It shows names, arguments and types, not what kernels do.
"""

from __future__ import annotations

import textwrap

import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from support.npu_contract import ROOT, SAMPLE, TABLE, calls, check, table, table_of

from r1zero.preflight.versions import TESTED

IMPORT = "from r1zero.distributed.torch_modules import device_module, torch_npu_module\n"


def faults_of(source: str, held_to=SAMPLE) -> list[str]:
    """The faults of a file with this text, without the file's name."""
    found = calls.Found()
    calls.search(IMPORT + textwrap.dedent(source), "a.py", found)
    return [fault.partition(": ")[2] for fault in check.faults(found, held_to)]


@pytest.fixture(scope="module")
def uses() -> calls.Found:
    return calls.find_uses(ROOT)


def test_every_call_of_torch_npu_fits_the_oldest_and_the_newest_release(uses):
    assert check.faults(uses, TABLE) == []


def test_the_search_finds_the_calls_that_are_there(uses):
    """Else the test above could not fail."""
    found = {use.name for use in uses.uses}
    assert {
        "torch_npu.npu_fusion_attention",
        "torch_npu.npu_fused_infer_attention_score",
        "torch_npu.npu_fused_infer_attention_score_v2",
        "torch_npu.npu.NPUGraph",
        "torch_npu.npu.Event().elapsed_time",
        "torch_npu.npu.max_memory_allocated",
        "torch_npu.profiler.profile",
        "torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options().hccl_config",
    } <= found


def test_the_table_holds_nothing_that_is_not_used(uses):
    names = {table.table_name(use, TABLE.oldest) for use in uses.uses}
    assert set(TABLE.oldest.python) <= names
    operators = {name.removeprefix("torch_npu.") for name in names if name is not None}
    assert set(TABLE.oldest.operators) <= operators | set(table.EXTRA)


@pytest.mark.parametrize("release", [TABLE.oldest, TABLE.newest], ids=["oldest", "newest"])
def test_every_signature_of_the_table_is_one_that_pytorch_reads(release):
    for name, signature in release.operators.items():
        assert torch._C.parse_schema(f"npu::{signature}").name == f"npu::{name}"


def test_the_table_is_of_the_ends_of_the_supported_range():
    supported = SpecifierSet(TESTED["npu"]["torch-npu"])
    assert f">={TABLE.oldest.version}" in map(str, supported)
    assert TABLE.newest.version in supported
    major, minor, *_ = Version(TABLE.newest.version).release
    assert f"{major}.{minor + 1}" not in supported


NORM = "torch_npu_module().npu_rms_norm"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (f"{NORM}(x, weight, eps=1e-6)", "has no argument eps"),
        (f"{NORM}(x, epsilon=1e-6)", "needs the argument gamma"),
        (f"{NORM}(x, weight, epsilon='small')", "epsilon='small' is no float"),
        (f"{NORM}(x, weight, epsilon=True)", "epsilon=True is no float"),
        (f"{NORM}(x, None)", "gamma=None is no Tensor"),
        (f"{NORM}(x, weight, 1e-6, 0)", "passes 4 positional arguments, and it takes 3"),
        (f"{NORM}(x, weight, gamma=weight)", "gets the argument gamma twice"),
        (f"{NORM}(*both)", "cannot be held to a signature"),
        (f"{NORM}(x, **options)", "cannot be held to a signature"),
        ("torch_npu_module().npu_rms_normal(x)", "npu_rms_normal is not in the table"),
        ("import torch\ntorch.ops.npu.npu_swiglu(x, axis=1)", "has no argument axis"),
        ("import torch\ntorch.npu.synchronise()", "npu.synchronise is not in the table"),
        ("device_module(kind).synchronize(0, 1)", "passes 2 positional arguments"),
        ("device_module(kind).set_device()", "needs the argument device"),
        ("device_module(kind).Event(timing=True)", "has no argument timing"),
        ("device_module(kind).Event(enable_timing='yes')", "enable_timing='yes' is no bool"),
        ("from torch_npu.npu import Graph", "torch_npu.npu.Graph is not in the table"),
    ],
)
def test_a_call_that_does_not_fit_is_named(source, fault):
    [found, *others] = faults_of(source)
    assert fault in found
    assert all(fault in other for other in others), "the same in the other release"


@pytest.mark.parametrize(
    "source",
    [
        f"{NORM}(x, weight)",
        f"{NORM}(x, gamma=weight, epsilon=1)[0]",
        f"{NORM}(x, weight, epsilon=config.eps)",
        "torch_npu_module().npu_attention(q, 4, 'TND', lengths=[1, 2])",
        "device_module(kind).device_count() / 2",
        "with device_module(kind).graph(graph, pool=None):\n    pass",
    ],
)
def test_a_call_that_fits_is_not(source):
    assert faults_of(source) == []


@pytest.mark.parametrize(
    "source",
    [
        """
        npu = torch_npu_module().npu
        def synchronize():
            npu.synchronize(wrong=1)
        """,
        """
        class Graph:
            def replay(self):
                self._graph.replay(wrong=1)
            def __init__(self):
                self._graph = device_module("npu").NPUGraph()
        """,
        """
        class Timer:
            def _event(self):
                event = device_module("npu").Event(enable_timing=True)
                return event
            def mark(self):
                self._event().record(wrong=1)
        """,
        """
        class Graphs:
            def capture(self, size):
                self._graphs[size] = device_module("npu").NPUGraph()
            def replay(self, size):
                graph = self._graphs[size]
                graph.replay(wrong=1)
        """,
        """
        def trace():
            with (torch_npu_module().npu if on_npu else other).graph(graph) as captured:
                device_module("npu").synchronize(wrong=1)
        """,
        """
        if (count := torch_npu_module().npu).device_count(wrong=1):
            pass
        """,
        "import torch_npu as module\nmodule.npu.synchronize(wrong=1)",
        "from torch_npu import npu as device\ndevice.synchronize(wrong=1)",
        "from torch_npu.npu import synchronize\nsynchronize(wrong=1)",
        "import torch\nrun = torch.npu.synchronize\nrun(wrong=1)",
    ],
)
def test_a_call_is_found_through_the_names_that_it_goes_by(source):
    assert [fault for fault in faults_of(source) if "has no argument wrong" in fault]


@pytest.mark.parametrize(
    "source",
    [
        "use(torch_npu_module())",
        "use(module=device_module(kind))",
        "streams.append(device_module(kind).Stream())",
        "streams = {}\nstreams[3] = device_module(kind).Stream()\nuse(*streams.values())",
        "class Clock:\n    def f(self):\n        self.module = device_module(kind)",
        "run = partial(torch_npu_module().npu_swiglu, dim=-1)",
        "def module():\n    return torch_npu_module()",
        "def graph():\n    made = device_module(kind).Stream()\n    return made, 1",
        "graph = lambda: device_module(kind).Stream()",
        "class Clock:\n    def f(self, other):\n        other.module = device_module(kind)",
    ],
)
def test_what_leaves_the_view_of_the_search_is_a_fault(source):
    [fault] = faults_of(source)
    assert fault.startswith("passes torch_npu") and "call torch_npu_module()" in fault


@pytest.mark.parametrize(
    "source",
    [
        'importlib.import_module("torch_npu.npu")',
        '__import__("torch_npu")',
        'getattr(torch_npu_module(), "npu_swiglu")(x)',
    ],
)
def test_a_name_that_does_not_stand_there_is_a_fault(source):
    [fault] = faults_of(source)
    assert "write the name itself" in fault


OPTIONS = "made = torch_npu_module()._C.Options()\n"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("made.hccl_config = {'hccl_buffer_size': 1}", None),
        ("made.hccl_config = {'buffer_size': 1}", "hccl_config[buffer_size] is not in the table"),
        ("made.hccl_config = config", "config: write the dict here or in a function"),
        ("made.config = {}", "Options.config is not in the table"),
        ("torch_npu_module()._C.Options(True)", "not known: call it without arguments"),
    ],
)
def test_options_of_groups_have_known_keys(source, fault):
    found = faults_of(OPTIONS + source)
    assert [fault in sentence for sentence in found] == [True] * (fault is not None)


def test_keys_are_found_in_the_function_that_makes_the_dict(tmp_path):
    (tmp_path / "r1zero").mkdir()
    (tmp_path / "r1zero" / "a.py").write_text(
        IMPORT + OPTIONS + "made.hccl_config = config_of(3)\n"
    )
    (tmp_path / "r1zero" / "b.py").write_text(
        "def config_of(size):\n"
        "    made = {'hccl_buffer_size': size}\n"
        "    made['expansion'] = 3\n"
        "    return made\n"
    )
    [fault] = check.faults(calls.find_uses(tmp_path), SAMPLE)
    assert fault.startswith("r1zero/b.py:3: ") and "hccl_config[expansion]" in fault


def test_updates_of_graphs_have_known_keys():
    update = (
        "graph = device_module('npu').NPUGraph()\ngraph.update(cpu_update_input=[{%s: lengths}])"
    )
    assert faults_of(update % "'lengths_kv'") == []
    [fault] = faults_of(update % "'lengths'")
    assert "NPUGraph.update[lengths] is not in the table" in fault


def test_the_object_that_a_function_returns_is_followed():
    """current_stream() gives a Stream; what operators give is no object of torch_npu's."""
    current = "device_module(kind).current_stream()"
    assert faults_of(f"{current}.wait_event(event)\ntorch_npu_module().npu_swiglu(x).view(3)") == []
    [fault] = faults_of(f"{current}.wait_stream(other)")
    assert "torch_npu.npu.Stream.wait_stream is not in the table" in fault


def test_a_default_that_changed_must_be_passed():
    turned = "npu_rope(Tensor query, *, str layout='%s') -> Tensor"
    changed = table_of(turned % "BSH", turned % "BSND")
    assert faults_of("torch_npu_module().npu_rope(q, layout='BSND')", changed) == []
    [fault] = faults_of("torch_npu_module().npu_rope(q)", changed)
    assert "the default of layout is 'BSH' or 'BSND': pass it" in fault


def test_releases_that_differ_are_both_held_to():
    """An argument that only the newer release has, one that only the older has, one that moved."""
    moved = table_of(
        "npu_x(Tensor a, Tensor b, *, int c=0) -> Tensor",
        "npu_x(Tensor b, Tensor a, *, int d=0) -> Tensor",
    )
    call = "torch_npu_module().npu_x(%s)"
    assert faults_of(call % "a=a, b=b", moved) == []
    [fault] = faults_of(call % "a=a, b=b, c=1", moved)
    assert fault == "torch_npu.npu_x of torch_npu newest has no argument c"
    [fault] = faults_of(call % "a=a, b=b, d=1", moved)
    assert fault == "torch_npu.npu_x of torch_npu oldest has no argument d"
    [fault] = faults_of(call % "a, b", moved)
    assert "pass it by keyword" in fault
