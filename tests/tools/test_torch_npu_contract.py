"""The tool that takes signatures from wheels of torch_npu, on a small wheel that is made here."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from support.npu_contract import ROOT, wheel
from support.tool import functions, run_here

FILES = {
    wheel.FUNCTIONS: """
custom:
- func: npu_swiglu(Tensor self, int dim=-1) -> Tensor
- func: npu_swiglu.out(Tensor self, int dim=-1, *, Tensor(a!) out) -> Tensor(a!)
supported:
- add.Tensor
- func: mm(Tensor self, Tensor mat2) -> Tensor
symint: [new_empty]
autograd: []
quant: []
""",
    "torch_npu/__init__.py": "from torch_npu.version import __version__ as __version__\n",
    "torch_npu/version.py": "__version__ = '9.9'\n",
    "torch_npu/npu/__init__.py": (
        "from .streams import Stream\nfrom .memory import *\n"
        "def current_stream(device=None):\n    return torch_npu.npu.Stream(device)\n"
    ),
    "torch_npu/npu/streams.py": (
        "class Stream(Base):\n"
        "    def __new__(cls, device=None, priority=0): ...\n"
        "class Base:\n"
        "    def wait(self, event, *, late=False): ...\n"
        "    @property\n"
        "    def number(self): ...\n"
    ),
    "torch_npu/npu/memory.py": "if True:\n    def mem_get_info(device=None): ...\n",
    "torch_npu/groups.py": "options = torch_npu._C.Group.Options()\n",
    "torch_npu/_C.py": "",
    wheel.LIBRARY: "\0hccl_config\0Value type of hccl_size should be int.\0CUDA\0",
}


@pytest.fixture
def small(tmp_path: Path) -> wheel.Wheel:
    return wheel.Wheel(write_wheel(tmp_path / "torch_npu-9.9-cp311-any.whl"))


def write_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return path


def test_operators_and_kernels_are_those_of_the_wheels_list(small):
    assert small.version == "9.9"
    assert small.operators["npu_swiglu"] == "npu_swiglu(Tensor self, int dim=-1) -> Tensor"
    assert {"add.Tensor", "mm", "new_empty"} <= small.kernels
    assert "npu_swiglu" not in small.kernels


@pytest.mark.parametrize(
    ("name", "kind", "signature"),
    [
        ("npu", "module", None),
        ("npu.Stream", "class", "device=None, priority=0"),
        ("npu.Stream.wait", "function", "event, *, late=False"),  # of its base
        ("npu.Stream.number", "value", None),
        ("npu.mem_get_info", "function", "device=None"),  # by import *, under an if
        ("__version__", "value", None),
        ("_C.Group.Options", "binding", None),  # the wheel itself calls it
        ("_C.Group.Options.hccl_config", "binding", None),  # a text in the library
    ],
)
def test_a_name_is_found_where_it_is_defined(small, name, kind, signature):
    found = small.python_name(f"torch_npu.{name}")
    assert (found.kind, found.signature) == (kind, signature)


@pytest.mark.parametrize("name", ["npu.nothing", "npu.Stream.nothing", "_C.Group.CUDA", "nothing"])
def test_a_name_that_is_nowhere_is_not_found(small, name):
    assert small.python_name(f"torch_npu.{name}") is None


def test_a_function_tells_the_class_that_it_returns(small):
    assert small.python_name("torch_npu.npu.current_stream").returns == "torch_npu.npu.Stream"


def test_keys_of_options_have_the_type_that_the_library_asks_for(small):
    assert small.key("options[hccl_size]", "hccl_size").signature == "int"
    assert small.key("options[size]", "size") is None


def test_the_table_is_written_and_compared(tmp_path, monkeypatch, capsys):
    path = str(write_wheel(tmp_path / "torch_npu-9.9-cp311-any.whl"))
    main = functions("torch_npu_contract.py")["main"]
    monkeypatch.setitem(main.__globals__, "FOLDER", tmp_path / "contract")
    monkeypatch.setattr(sys, "argv", ["torch_npu_contract.py", path, path])
    assert main() == 0
    assert "npu_swiglu" in (tmp_path / "contract" / "operators.json").read_text()
    monkeypatch.setattr(sys, "argv", ["torch_npu_contract.py", path, path, "--check"])
    assert main() == 0
    (tmp_path / "contract" / "kernels.txt").write_text("")
    assert main() == 1
    assert "kernels.txt differs from the wheels" in capsys.readouterr().out


def test_what_is_no_wheel_of_torch_npu_is_refused(capsys):
    path = str(ROOT / "setup.cfg")
    assert run_here("torch_npu_contract.py", path, path) == 2
    assert f"{path} is no wheel of torch_npu" in capsys.readouterr().err
