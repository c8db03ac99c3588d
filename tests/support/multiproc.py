"""Ranks on the CPU: what to import before anything imports Megatron."""

from __future__ import annotations

from support.forked import run_ranks  # noqa: F401 - tests take both from here

from r1zero.distributed.device import prepare

# Before anything imports Megatron: on a CPU its stray CUDA calls must already answer.
DEVICE = prepare("cpu", 0)
