"""Where published experts lie in an engine that has a Hugging Face tensor for each."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.publishing import expert_model

from r1zero.models.layout import WeightLayout, WeightTarget, hf_names
from r1zero.models.params import ParamSpec, ShardIndex, Shards, local_shape, local_view, param_table

FFN, HIDDEN = 12, 16
HALVES = Shards(tp=2, ep=2)
SECOND = ShardIndex(tp=1, ep=1)  # has the experts 4 to 7
FC1, FC2 = [spec for spec in param_table(expert_model(layers=1)) if spec.cut == "experts"]


def target_of(tensors: dict[str, torch.Tensor]) -> WeightTarget:
    return WeightTarget(WeightLayout("hf", cut=True), tensors, lambda version: None)


def name(expert: int, part: str) -> str:
    return f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"


def empty(spec: ParamSpec) -> dict[str, torch.Tensor]:
    sizes = dict(zip(spec.hf, spec.hf_shape, strict=True))
    return {name: torch.full(sizes[name], -1.0) for name in hf_names(spec, HALVES, SECOND)}


def numbered(spec: ParamSpec) -> torch.Tensor:
    """A rank's parameter, all of whose elements differ."""
    shape = local_shape(spec, HALVES)
    return torch.arange(torch.Size(shape).numel()).float().view(shape)


def test_a_rank_writes_its_experts_to_their_tensors() -> None:
    gate_up, down = numbered(FC1), numbered(FC2)
    tensors = empty(FC1) | empty(FC2)
    target = target_of(tensors)
    assert target.problems([FC1, FC2], HALVES, SECOND) == []
    target.write(FC1, gate_up, HALVES, SECOND)
    target.write(FC2, down, HALVES, SECOND)
    for own, expert in enumerate(range(4, 8)):
        assert torch.equal(tensors[name(expert, "gate")], gate_up[own, :FFN])
        assert torch.equal(tensors[name(expert, "up")], gate_up[own, FFN:])
        assert torch.equal(tensors[name(expert, "down")], down[own])


@pytest.mark.parametrize("spec", [FC1, FC2], ids=["fc1", "fc2"])
def test_a_box_is_cut_at_every_tensor(spec: ParamSpec) -> None:
    """Boxes of two experts and three rows together write all, each element once."""
    tensors = empty(spec)
    values = local_view(spec, numbered(spec), HALVES)
    leading = [range(0, size, 2) for size in values.shape[:-2]]
    rows = range(0, values.shape[-2], 3)
    for *place, row in product(*leading, rows):
        box = (
            *(slice(at, at + 2) for at in place),
            slice(row, min(row + 3, values.shape[-2])),
            slice(0, HIDDEN),
        )
        box = tuple(
            slice(side.start, min(side.stop, size))
            for side, size in zip(box, values.shape, strict=True)
        )
        for index, view in target_of(tensors).regions(spec, box, HALVES, SECOND):
            assert (view == -1).all(), "no element arrives twice"
            view.copy_(values[box][index])
    whole = {key: value.clone() for key, value in tensors.items()}
    target_of(tensors).write(spec, numbered(spec), HALVES, SECOND)
    assert all(torch.equal(tensors[key], whole[key]) for key in whole)


def test_an_engine_with_other_experts_is_told() -> None:
    assert target_of(empty(FC2)).problems([FC2], HALVES, ShardIndex()) == [
        f"{name(0, 'down')} is missing"
    ]
