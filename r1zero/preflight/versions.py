"""The versions that are here against those that were tested. setup.cfg installs the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

if sys.version_info >= (3, 11):
    TRANSFORMERS = "==5.23.0"
else:
    TRANSFORMERS = "==5.20.2"
MEGATRON = "==0.16.1"
# By kind of device. On NPUs nothing has run yet: the ranges are those whose interfaces were
# compared (docs/ascend.md).
TESTED: dict[str, dict[str, str]] = {
    "cpu": {"torch": "==2.13.0", "megatron-core": MEGATRON, "transformers": TRANSFORMERS},
    "cuda": {"torch": "==2.13.0", "megatron-core": MEGATRON, "transformers": TRANSFORMERS},
    "npu": {
        "torch": ">=2.7.1,<2.11",
        # Those for CANN 8 have no `cache_mode` of npu_scatter_pa_kv_cache.
        "torch-npu": ">=2.7.1.post4,!=2.8.0,!=2.8.0.post2,!=2.9.0,<2.11",
        "megatron-core": MEGATRON,
        # Images bring one of their own. tests/run_with_transformers.sh runs the ends.
        "transformers": ">=4.56,<5.24",
        "mindspeed": "",
        "CANN": ">=9.0",
    },
}
FIXES = {
    "mindspeed": "clone MindSpeed's branch core_r0.16.0 and `pip install -e` the clone",
    "CANN": "install CANN 9.0 or newer and `source /usr/local/Ascend/ascend-toolkit/set_env.sh`",
}


def installed(kind: str, cann: str | None) -> dict[str, str | None]:
    """The version of everything that the table names for this kind of device; None for what is
    missing."""
    return {name: cann if name == "CANN" else _version(name) for name in TESTED[kind]}


def check_versions(kind: str, found: Mapping[str, str | None]) -> list[str]:
    """Return a sentence, with the command that helps, for each that is missing or outside of what
    was tested."""
    problems = []
    for name, tested in TESTED[kind].items():
        have = found[name]
        fix = FIXES.get(name, f"`pip install '{name}{tested}'`")
        if have is None:
            problems.append(f"{name} is not installed; {fix}")
        elif not _inside(have, tested):
            problems.append(
                f"{name} {have} is not what was tested on this device ({tested}); {fix}"
            )
    if kind == "npu" and found["torch"] and found["torch-npu"]:
        pair = [_release(found["torch"]), _release(found["torch-npu"])]
        if pair[0] != pair[1]:
            problems.append(
                f"torch {found['torch']} and torch-npu {found['torch-npu']} must be of one "
                f"version; `pip install 'torch-npu=={pair[0]}.*'`"
            )
    return problems


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _inside(have: str, tested: str) -> bool:
    try:
        return SpecifierSet(tested, prereleases=True).contains(Version(have).public)
    except InvalidVersion:
        return not tested


def _release(version: str | None) -> str:
    """A version without what a build adds: 2.7.1 of 2.7.1+cpu and 2.7.1.post2."""
    return re.sub(r"(\+|\.post).*", "", version or "")
