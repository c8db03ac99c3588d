"""Ranks on the CPU: what to import before anything imports Megatron, and what they need later, so
that not each of them imports it again."""

from __future__ import annotations

import gc
import importlib

from support.forked import run_ranks  # noqa: F401 - tests take both from here

from r1zero.config.load import read_config
from r1zero.distributed.device import prepare

# Before anything imports Megatron: on a CPU its stray CUDA calls must already answer.
DEVICE = prepare("cpu", 0)

for name in (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.moe_module_specs",
    "numpy.ma",
    "numpy.random",
    "pyarrow.dataset",
    "r1zero.algo.advantages.group_norm",
    "r1zero.algo.losses.grpo",
    "r1zero.models.megatron_modules",
    "r1zero.models.stacked_experts",
    "r1zero.rollout.engine",
    "torch.profiler._cupti_monitor",
):
    importlib.import_module(name)
read_config("tiny", [])  # what checks the keys of a configuration is made once
gc.collect()
gc.freeze()  # a rank's garbage collector leaves these pages shared
