"""torch_npu.utils.collect_env: the version of CANN that the stand-in plays."""

from __future__ import annotations


def get_cann_version():
    """As the wheel's function of this name."""
    return "9.0.0"
