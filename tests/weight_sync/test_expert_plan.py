"""The reshard plan of models with experts, carried out on plain tensors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from support.publishing import expert_model, held_by, random_model

from r1zero.distributed.placement import RankGrid
from r1zero.errors import BadInput
from r1zero.models.params import Shards, Stages, local_view, param_table, stage_of
from r1zero.weight_sync import plan as plan_module
from r1zero.weight_sync.plan import Plan, plan

SHAPE = expert_model()  # four layers with eight experts each
TABLE = param_table(SHAPE)


@dataclass(frozen=True)
class Layout:
    """Train cut by these, the target by TP, PP and EP, in so many replicas."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    layers: tuple[int, ...] = ()
    to_tp: int = 1
    to_dp: int = 1
    to_pp: int = 1
    to_ep: int | None = None  # None: as an engine has it, experts whole on TP ranks
    colocated: bool = False

    @property
    def train(self) -> RankGrid:
        size = self.tp * self.cp * self.dp * self.pp
        return RankGrid.of("train", 0, size, self.tp, self.pp, self.cp, self.ep, self.layers)

    @property
    def target(self) -> RankGrid:
        first = 0 if self.colocated else self.train.size
        size = self.to_tp * self.to_dp * self.to_pp
        ep = self.to_tp if self.to_ep is None else self.to_ep
        return RankGrid.of("rollout", first, size, self.to_tp, self.to_pp, 1, ep)

    def plan(self, bucket_bytes: int = 10**6) -> Plan:
        return plan(TABLE, SHAPE.num_layers, self.train, self.target, 4, bucket_bytes)


LAYOUTS = {
    "EP over replicas, each holds them once": Layout(tp=2, dp=4, ep=8, to_tp=4, to_dp=2),
    "EP below rollout TP": Layout(dp=4, ep=2, to_tp=4),
    "EP without replicas, uneven stages": Layout(tp=2, pp=2, ep=2, layers=(1, 3), to_tp=2),
    "all at once": Layout(tp=2, cp=2, dp=2, pp=2, ep=4, layers=(3, 1), to_tp=4, to_dp=2),
    "no EP": Layout(tp=2, dp=2, to_tp=2, to_dp=2),
    "whole experts to whole engines": Layout(dp=4, ep=4, to_tp=1, to_dp=3),
    "context parallel": Layout(cp=4, dp=1, ep=4, to_tp=2),
    "to a reference": Layout(tp=2, dp=2, ep=4, to_tp=2, to_dp=2, to_pp=2, to_ep=4),
    "to a reference without TP": Layout(tp=2, dp=2, ep=2, to_dp=4, to_ep=4),
    "on the same ranks": Layout(tp=2, dp=4, ep=8, to_tp=4, to_dp=2, colocated=True),
    "on the same ranks, with stages": Layout(
        tp=2, dp=2, pp=2, ep=4, to_tp=2, to_dp=4, colocated=True
    ),
    "on the same ranks, all held": Layout(tp=2, dp=2, ep=2, to_tp=2, to_dp=2, colocated=True),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("bucket_bytes", [4 * 150, 4 * 4000])  # below and above an expert's size
def test_every_rank_receives_each_element_of_its_shard_once(
    layout: Layout, bucket_bytes: int
) -> None:
    full = random_model(SHAPE, torch.float32)
    laid = layout.plan(bucket_bytes)
    train, target = layout.train, layout.target
    sources = {rank: held_by(rank, train, SHAPE, full) for rank in train.ranks}
    expected = {rank: held_by(rank, target, SHAPE, full) for rank in target.ranks}
    got = {
        rank: {name: torch.full_like(part, -1) for name, part in parts.items()}
        for rank, parts in expected.items()
    }
    for bucket in laid.buckets():
        assert bucket.local or bucket.numel * 4 <= bucket_bytes
        assert {bucket.source, *bucket.receivers} <= set(bucket.ranks)
        for piece, rank in product(bucket.pieces, bucket.receivers):
            spec = TABLE[piece.tensor]
            held = local_view(spec, sources[bucket.source][spec.name], Shards.of_grid(train))
            place = local_view(spec, got[rank][spec.name], Shards.of_grid(target))[piece.target]
            assert place.max() == -1, "no element arrives twice"
            place.copy_(held[piece.source])
    for rank, parts in expected.items():
        assert laid.received(rank) == sum(part.numel() for part in parts.values())
        for name, part in parts.items():
            assert torch.equal(got[rank][name], part), (rank, name)


def sources_by_part(laid: Plan) -> dict[tuple, set[int]]:
    """Who sends experts, by stage and receivers and part of train that it holds."""
    found = defaultdict(set)
    stages = Stages.of(SHAPE.num_layers, laid.train)
    for route in laid.routes:
        for number in route.tensors:
            spec = laid.tensors[number]
            if spec.cut == "experts" and not route.local:
                part = laid.train.expert_index(route.source)
                found[stage_of(spec, stages), route.receivers, part].add(route.source)
    return found


@pytest.mark.parametrize(
    "layout, parts, groups",
    [
        # 30B scaled down: receiver 3 of TP 4 gets the parts 6 and 7 from replica 3, and its quarter of
        # what TP cuts from TP index 1 of that
        (Layout(tp=2, dp=4, pp=2, ep=8, to_tp=4, to_dp=2), 2 * 8, 4),
        # receiver 1 gets the parts 2 and 3 from ranks 2 and 3, and so the rest, which all have
        (Layout(dp=8, ep=8, to_tp=4, to_dp=2), 8, 2),
    ],
)
def test_a_part_of_the_experts_has_one_source_and_the_rest_rides_along(
    layout: Layout, parts: int, groups: int
) -> None:
    laid = layout.plan()
    by_part = sources_by_part(laid)
    assert len(by_part) == parts and all(len(sources) == 1 for sources in by_part.values())
    assert all(has_experts(laid, route) for route in laid.routes)
    assert {len(laid.part_of(rank).groups()) for rank in layout.target.ranks} == {groups}


def has_experts(laid: Plan, route: plan_module.Route) -> bool:
    return any(laid.tensors[number].cut == "experts" for number in route.tensors)


def test_copies_of_a_part_take_turns_in_sending_to_different_receivers() -> None:
    layout = Layout(dp=4, ep=2, to_tp=4)
    sources = sources_by_part(layout.plan())
    # Half of the experts lies on 0 and 2, which receivers 4 and 5 need halves of.
    assert sorted(
        (receivers, part, *source) for (_, receivers, part), source in sources.items()
    ) == [
        ((4,), 0, 0),
        ((5,), 0, 2),
        ((6,), 1, 1),
        ((7,), 1, 3),
    ]


MANY_SOURCES = Layout(tp=4, dp=2, pp=4, ep=8, to_tp=2, to_dp=3)  # 4 stages, 4 parts to a receiver


def test_receivers_with_many_sources_are_in_few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = MANY_SOURCES.plan(4 * 150)
    monkeypatch.setattr(plan_module, "GROUPS_OF_A_RECEIVER", 6)
    shared = MANY_SOURCES.plan(4 * 150)
    for rank in MANY_SOURCES.target.ranks:
        assert len(alone.part_of(rank).groups()) == 16
        assert len(shared.part_of(rank).groups()) == 6
        assert shared.received(rank) == alone.received(rank)
    for rank in MANY_SOURCES.train.ranks:
        assert len(shared.part_of(rank).groups()) == 1
        assert shared.sent(rank) == alone.sent(rank)
    assert not any(route.listeners for route in alone.routes)
    for route in shared.routes:
        assert all(rank in MANY_SOURCES.train.ranks for rank in route.listeners)


def test_a_rank_goes_through_what_it_listens_to_in_the_order_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "GROUPS_OF_A_RECEIVER", 6)
    laid = MANY_SOURCES.plan(4 * 150)
    whole = list(laid.buckets())
    heard = 0
    for rank in range(MANY_SOURCES.target.ranks[-1] + 1):
        part = laid.part_of(rank)
        assert list(part.buckets()) == [bucket for bucket in whole if rank in bucket.ranks]
        heard += sum(rank in route.listeners for route in part.routes)
    assert heard


@pytest.mark.parametrize(
    "layout, sentence",
    [
        (Layout(dp=3, ep=3, to_tp=1), "expert parallel size 3 does not divide"),
        (Layout(pp=3), "cannot be spread evenly over 3 pipeline stages"),
        (Layout(pp=2, layers=(1, 2)), "adds up to 3 layers"),
    ],
)
def test_what_cannot_be_cut_is_refused(layout: Layout, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        layout.plan()
