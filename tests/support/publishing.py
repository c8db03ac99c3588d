"""Models and layouts for publishing: whole tensors, what each rank holds of them, and who there
is."""

from __future__ import annotations

import torch
from support.shapes import small_shape

from r1zero.distributed.placement import RankGrid
from r1zero.models.config import Experts
from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.models.params import (
    WHOLE,
    ShardIndex,
    Shards,
    Stages,
    local_shape,
    param_table,
    shard,
    stage_of,
)


def model(tied=True, qk_norm=False, family="qwen2"):
    return small_shape(
        family=family,
        num_layers=4,
        hidden_size=16,
        ffn_hidden_size=24,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        vocab_size=32,
        max_positions=32,
        tie_word_embeddings=tied,
        qk_norm=qk_norm,
    )


def random_model(shape, dtype=torch.bfloat16, seed=0):
    """Whole tensors by name, all elements of all tensors distinct in float32."""
    made = {tensor.name: torch.empty(local_shape(tensor, WHOLE)) for tensor in param_table(shape)}
    sizes = [full.numel() for full in made.values()]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    for full, part in zip(made.values(), order.split(sizes), strict=True):
        full.copy_(part.view(full.shape))
    return {name: full.to(dtype) for name, full in made.items()}


def held_by(rank, span, shape, full):
    """A rank's parameters, cut out of the whole model."""
    index = ShardIndex.of_rank(span, rank)
    stages = Stages.of(shape.num_layers, span)
    found = {}
    for tensor in param_table(shape):
        if stage_of(tensor, stages) == span.index_of(rank)["pp"]:
            part = shard(tensor, full[tensor.name], index, Shards.of_grid(span))
            found[tensor.name] = part.clone()
    return found


def target_of(tensors):
    """A target in Megatron's layout, as the native engine has it."""
    return WeightTarget(WeightLayout("megatron", cut=True), tensors, lambda version: None)


def spans(train_tp, pp, dp, rollout_tp, rollout_dp, colocated):
    train = RankGrid.of("train", 0, train_tp * pp * dp, train_tp, pp)
    return train, RankGrid.of(
        "rollout", 0 if colocated else train.size, rollout_tp * rollout_dp, rollout_tp, 1
    )


def expert_model(layers=4, experts=8):
    """A small Qwen3-MoE, all of whose layers have experts."""
    return small_shape(
        family="qwen3_moe",
        num_layers=layers,
        hidden_size=16,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        vocab_size=32,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        experts=Experts(count=experts, top_k=2, ffn_hidden_size=12, layers=tuple(range(layers))),
    )
