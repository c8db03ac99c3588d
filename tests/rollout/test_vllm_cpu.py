"""vLLM as an engine, on the real one for CPUs: where there is an environment with it.

`bash tools/setup_vllm_env.sh` makes one; R1ZERO_VLLM_PYTHON names the Python of another.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.patience import LONG
from support.wide_model import widen

ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = Path(os.environ.get("R1ZERO_VLLM_PYTHON", ROOT / ".cache/vllm/bin/python"))
STEPS = 4


@pytest.mark.slow
@pytest.mark.skipif(
    not VLLM_PYTHON.exists(),
    reason=f"there is no {VLLM_PYTHON}: bash tools/setup_vllm_env.sh makes it, with vLLM (3 GB)",
)
def test_real_vllm_draws_and_learns_the_same(tiny: Path, tmp_path: Path) -> None:
    """Samples and log-probs after three publications, TP 1 and 2; then a whole run on 4 processes
    with evaluation before and after."""
    model = widen(tiny / "model", tmp_path / "model")
    program = ROOT / "tests" / "support" / "vllm_real.py"
    done = subprocess.run(
        [VLLM_PYTHON, program, tmp_path / "runs", model, str(STEPS)],
        text=True,
        timeout=3 * LONG,  # imports vLLM, and starts five worlds one after the other
        capture_output=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    native, vllm = json.loads(done.stdout.splitlines()[-1])
    assert len(native) == len(vllm) == STEPS
    assert all(row["grad_norm"] > 0 for row in vllm), "a run that learns"
