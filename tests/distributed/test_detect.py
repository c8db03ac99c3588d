"""What follows from the device before a run starts: the type of the weights, and what it cannot do.
NPUs are mocked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.patience import LONG
from support.tool import functions

from r1zero.config.load import dump
from r1zero.distributed import device
from r1zero.distributed.detect import uses_npu
from r1zero.errors import BadInput
from r1zero.models.dtype import Dtype
from r1zero.preflight import dry_run
from r1zero.preflight.checks import check
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config

ROOT = Path(__file__).resolve().parents[2]
HAS_NPUS = "class npu:\n    is_available = staticmethod(lambda: True)\n"
HAS_NONE = HAS_NPUS.replace("True", "False")
BROKEN = "raise ImportError('libascend_hal.so: cannot open shared object file')\n"
NO_FP32 = (
    "cannot run on NPUs: their fused attention for generation has no fp32; ask for bf16, or leave "
    "it out"
)


def package(folder: Path, text: str) -> Path:
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(text)
    return folder


@pytest.fixture
def torch_npu(tmp_path, monkeypatch):
    """Install a torch_npu that is this text."""

    def install(text):
        monkeypatch.syspath_prepend(package(tmp_path, text))

    yield install
    sys.modules.pop("torch_npu", None)


@pytest.mark.parametrize(
    ("text", "overrides", "bf16"),
    [
        (HAS_NPUS, [], True),
        (HAS_NPUS, ["training.distributed_backend=gloo"], False),
        (HAS_NPUS, ["training.bf16=false"], False),
        (HAS_NONE, [], False),
        (HAS_NONE, ["training.bf16=true"], True),
        (None, [], False),
        (None, ["training.bf16=null"], False),
    ],
)
def test_weights_are_bf16_on_npus_unless_told_and_the_resolved_configuration_says_so(
    torch_npu, text, overrides, bf16
):
    if text:
        torch_npu(text)
    cfg, _ = load_config("tiny", overrides)
    assert cfg.training.bf16 is bf16
    assert yaml.safe_load(dump(cfg))["training"]["bf16"] is bf16


def test_fp32_is_refused_on_npus_with_one_sentence(tiny, torch_npu):
    torch_npu(HAS_NPUS)
    cfg, _ = load_config("tiny", ["training.bf16=false"])
    assert (
        check(cfg)
        == check(cfg, absent_ok=True)
        == [f"training.bf16: false {NO_FP32}, which means bf16 there"]
    )
    for fine in (
        [],
        ["training.bf16=true"],
        ["training.bf16=false", "training.distributed_backend=gloo"],
    ):
        assert check(load_config("tiny", fine)[0]) == []


def test_graphs_are_refused_where_no_npu_is_before_anything_starts(tiny, torch_npu):
    [problem] = check(load_config("tiny", ["actor_rollout.decode_graphs=true"])[0])
    assert problem == (
        "actor_rollout.decode_graphs: true needs NPUs, and this run would be on none; set it to "
        "false"
    )
    assert (
        check(load_config("tiny", ["actor_rollout.decode_graphs=true"])[0], absent_ok=True) == []
    ), "a dry run"
    torch_npu(HAS_NPUS)
    assert check(load_config("tiny", ["actor_rollout.decode_graphs=true"])[0]) == []


def test_graphs_that_torch_npu_would_refuse_to_capture_are_refused_at_the_start(
    tiny, torch_npu, monkeypatch
):
    torch_npu(HAS_NPUS)
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    graphs = load_config("tiny", ["actor_rollout.decode_graphs=true"])[0]
    [problem] = check(graphs)
    assert problem.startswith("TASK_QUEUE_ENABLE=2 makes torch_npu refuse to capture")
    assert check(graphs, absent_ok=True) == [], "a dry run, as for another machine"
    plain = load_config("tiny", ["actor_rollout.decode_graphs=false"])[0]
    assert check(plain) == []


@pytest.mark.parametrize("graphs", ["null", "true"])
def test_a_queue_that_refuses_graphs_is_told_where_graphs_are_on(
    tiny, torch_npu, monkeypatch, graphs
):
    """They are on by default, on NPUs alone."""
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    if graphs == "null":
        assert check(load_config("tiny", [])[0]) == []
    torch_npu(HAS_NPUS)
    [problem] = check(load_config("tiny", [f"actor_rollout.decode_graphs={graphs}"])[0])
    assert problem.startswith("TASK_QUEUE_ENABLE=2 ")
    assert check(load_config("tiny", ["actor_rollout.decode_graphs=false"])[0]) == []


def test_a_torch_npu_that_cannot_be_imported_is_told_in_one_sentence(torch_npu):
    torch_npu(BROKEN)
    with pytest.raises(
        BadInput, match="cannot be imported .libascend_hal.so.*source CANN's set_env.sh.*=gloo"
    ):
        load_config("tiny", [])
    assert not load_config("tiny", ["training.distributed_backend=gloo"])[0].training.bf16
    assert load_config("tiny", ["training.bf16=true"])[0].training.bf16


def test_evaluation_takes_bf16_on_npus_and_refuses_fp32(tiny, torch_npu, monkeypatch):
    torch_npu(HAS_NPUS)
    tool = functions("evaluate.py")
    words = ["--model", str(tiny / "model"), "--data", str(tiny / "eval.parquet")]
    assert tool["dtype_of"](tool["parse"](words)) is Dtype.BF16, "though the model is in fp32"
    args = tool["parse"]([*words, "--dtype", "fp32"])
    problems = tool["check"](args, tool["read_launch"]())
    assert problems == [f"--dtype: fp32 {NO_FP32}, which means bf16 there"]


@pytest.mark.parametrize("flag", [[], ["--check"], ["--dry-run"]])
def test_the_program_says_so_before_it_starts_anything(tiny, tmp_path, flag):
    """A rank that is started by hand, too: exit code 2, one line, and no run folder."""
    path = os.pathsep.join([str(package(tmp_path, HAS_NPUS)), str(ROOT)])
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "r1zero" / "main.py"),
            *flag,
            "training.bf16=false",
            f"output_dir={tmp_path}/run",
        ],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr == f"r1zero: training.bf16: false {NO_FP32}, which means bf16 there\n"


def test_no_npu_can_be_asked_for_without_importing_torch():
    code = (
        "import sys; from r1zero.preflight.resolve import load_config; load_config('tiny'); assert "
        "'torch' not in sys.modules"
    )
    assert not uses_npu(None)
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=LONG,
    )


def test_a_rank_on_a_cpu_imports_neither_the_compiler_nor_wandb():
    """Megatron would, for functions that no run on a CPU calls: half of the seconds of a start."""
    code = (
        "import sys; from r1zero.distributed.device import prepare; prepare('cpu', 0); import "
        "r1zero.trainer; assert not {'torch._inductor', 'torch._dynamo', 'wandb'} & set(sys.modules); "
        "import torch; from r1zero.policy.optimizer import GroupStepAdamW; "
        "weight = torch.ones(2, requires_grad=True); weight.sum().backward(); "
        "optimizer = GroupStepAdamW([weight], 0.1, 0.0, (0.9, 0.99), 1e-8); optimizer.step(); "
        "assert 'torch._dynamo' not in sys.modules; "
        "import wandb; assert torch.compile.__module__ == 'torch'"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=LONG,
    )


def test_the_dry_run_counts_with_the_type_that_the_device_takes(tiny, torch_npu):
    def weights():
        cfg, _ = load_config("tiny", [])
        return next(
            line for line in dry_run.report(look(cfg)).splitlines() if "bf16" in line
        ).strip()

    assert weights() == "bf16: false"
    torch_npu(HAS_NPUS)
    assert weights() == "bf16: true"


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_processor_tells_which_types_it_multiplies(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    cpu = device.open_device("cpu", 0)
    assert device.multiplies(cpu, torch.float32)
    assert device.multiplies(cpu, torch.bfloat16) == has_bf16
