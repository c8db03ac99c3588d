"""Large models and layouts to plan publishing for, by name; nothing is loaded, no device asked.

The lists of Qwen2.5 and Qwen3-MoE are the program's own. The last is like DeepSeek-V3's, with 64 layers, so that 16
stages share them evenly, and every expert a matrix pair of its own that TP cuts: a list that the
program cannot train, to see what a plan costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from known_models import (
    LAYERS,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    QWEN25_7B,
    QWEN25_32B,
    QWEN25_72B,
    deepseek_v3,
    tensors_of,
)

from r1zero.distributed.placement import Placement, RankGrid, RoleSize, place
from r1zero.models.params import ParamSpec


@dataclass(frozen=True, slots=True)
class PlanCase:
    """A model, and the ranks that publish it: train TP, PP, and rollout TP; train EP, and the layers
    of its stages where they are not even."""

    tensors: Callable[[], list[ParamSpec]]
    num_layers: int
    train_ranks: int
    train_tp: int
    train_pp: int
    rollout_ranks: int
    rollout_tp: int
    train_ep: int = 1
    num_layer_list: tuple[int, ...] = ()

    @property
    def train(self) -> RankGrid:
        return self._placed.train

    @property
    def rollout(self) -> RankGrid:
        return self._placed.rollout

    @property
    def _placed(self) -> Placement:
        sizes = {
            "train": RoleSize(
                self.train_ranks,
                tp=self.train_tp,
                pp=self.train_pp,
                ep=self.train_ep,
                num_layer_list=self.num_layer_list,
            ),
            "rollout": RoleSize(self.rollout_ranks, tp=self.rollout_tp),
        }
        return place(sizes, colocate=False)


def with_experts(experts: int = 256) -> list[ParamSpec]:
    """A list like DeepSeek-V3's, with so many experts in each layer."""
    return deepseek_v3(experts, dense_layers=0)


CASES = {
    "7B, 8 TP2PP4 -> 6 TP2": PlanCase(lambda: tensors_of(QWEN25_7B), 28, 8, 2, 4, 6, 2),
    "7B, 256 TP2PP4 -> 128 TP2": PlanCase(lambda: tensors_of(QWEN25_7B), 28, 256, 2, 4, 128, 2),
    "7B, 256 TP4PP2 -> 1024 TP2": PlanCase(lambda: tensors_of(QWEN25_7B), 28, 256, 4, 2, 1024, 2),
    "32B, 256 TP8PP4 -> 256 TP4": PlanCase(lambda: tensors_of(QWEN25_32B), 64, 256, 8, 4, 256, 4),
    "32B, 1024 TP8PP4 -> 1024 TP4": PlanCase(
        lambda: tensors_of(QWEN25_32B), 64, 1024, 8, 4, 1024, 4
    ),
    "72B, 256 TP8PP8 -> 512 TP8": PlanCase(lambda: tensors_of(QWEN25_72B), 80, 256, 8, 8, 512, 8),
    "72B, 2048 TP8PP8 -> 4096 TP8": PlanCase(
        lambda: tensors_of(QWEN25_72B), 80, 2048, 8, 8, 4096, 8
    ),
    "30B-A3B, 16 TP2PP2EP8 -> 8 TP4": PlanCase(
        lambda: tensors_of(QWEN3_30B_A3B), 48, 16, 2, 2, 8, 4, train_ep=8
    ),
    "235B-A22B, 128 TP4PP8EP16 -> 32 TP4": PlanCase(
        lambda: tensors_of(QWEN3_235B_A22B), 94, 128, 4, 8, 32, 4, 16, (11, *(12,) * 6, 11)
    ),
    "16 experts, 256 TP8PP16 -> 512 TP32": PlanCase(
        lambda: with_experts(16), LAYERS, 256, 8, 16, 512, 32
    ),
    "256 experts, 256 TP8PP16 -> 512 TP32": PlanCase(with_experts, LAYERS, 256, 8, 16, 512, 32),
}
