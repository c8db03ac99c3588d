"""The reshard plan, carried out on plain tensors, and against one made in the plainest way."""

import math
from itertools import islice, product

import pytest
import torch
from support.publishing import held_by, model, random_model, spans

from r1zero.distributed.placement import RankGrid
from r1zero.errors import BadInput
from r1zero.models.params import (
    ShardIndex,
    Shards,
    Stages,
    local_view,
    merge,
    num_elements,
    param_table,
    shard,
    stage_of,
)
from r1zero.weight_sync.plan import plan

LAYOUTS = [(*sizes, False) for sizes in product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4), (1, 3))]
LAYOUTS += [
    (tp, pp, dp, rollout_tp, tp * pp * dp // rollout_tp, True)
    for tp, pp, dp, rollout_tp in product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4))
    if tp * pp * dp % rollout_tp == 0
]


@pytest.mark.slow
# smaller than a matrix; several layers
@pytest.mark.parametrize("bucket_bytes", [4 * 37, 4 * 5000])
def test_every_layout_receives_each_element_of_its_shard_once(bucket_bytes):
    shape = model(tied=False)
    table, full = param_table(shape), random_model(shape, torch.float32)
    for layout in LAYOUTS:
        train, rollout = spans(*layout)
        laid = plan(table, shape.num_layers, train, rollout, 4, bucket_bytes)
        sources = {rank: held_by(rank, train, shape, full) for rank in train.ranks}
        expected = {rank: held_by(rank, rollout, shape, full) for rank in rollout.ranks}
        targets = {
            rank: {name: torch.full_like(part, -1) for name, part in parts.items()}
            for rank, parts in expected.items()
        }
        for bucket in laid.buckets():
            assert bucket.local or bucket.numel * 4 <= bucket_bytes
            assert bucket.local or bucket.source not in bucket.receivers
            flat = torch.full((bucket.numel,), -2.0)
            for piece in bucket.pieces:
                tensor = table[piece.tensor]
                values = local_view(
                    tensor, sources[bucket.source][tensor.name], Shards.of_grid(train)
                )[piece.source]
                flat[piece.offset : piece.offset + piece.numel] = values.flatten()
            assert flat.min() >= 0, "pieces leave no gap"
            for rank, piece in product(bucket.receivers, bucket.pieces):
                tensor = table[piece.tensor]
                region = local_view(tensor, targets[rank][tensor.name], Shards.of_grid(rollout))[
                    piece.target
                ]
                assert region.max() == -1, "no element arrives twice"
                region.copy_(flat[piece.offset : piece.offset + piece.numel].view(region.shape))
        for rank in rollout.ranks:
            assert laid.received(rank) == sum(part.numel() for part in expected[rank].values())
            for name, part in expected[rank].items():
                assert torch.equal(targets[rank][name], part), (layout, rank, name)


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("target", [(1, 2, 1), (1, 4, 2), (2, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("train", [(1, 1, 1), (2, 2, 2), (4, 1, 2), (1, 4, 1)])
def test_receivers_with_pipeline_stages_get_what_their_stage_holds(train, target, colocated):
    """As ref ranks do when the reference is reset: TP, PP and DP of either side."""
    shape = model(tied=False)
    table = param_table(shape)
    full = random_model(shape, torch.float32)
    source = RankGrid.of("train", 0, math.prod(train), train[0], train[1])
    first = 0 if colocated else source.size
    ref = RankGrid.of("ref", first, math.prod(target), target[0], target[1])
    laid = plan(table, shape.num_layers, source, ref, 4, 600)
    held = {rank: held_by(rank, source, shape, full) for rank in source.ranks}
    for rank in ref.ranks:
        expected = held_by(rank, ref, shape, full)
        got = {name: torch.full_like(part, -1) for name, part in expected.items()}
        for bucket in laid.part_of(rank).buckets():
            if rank not in bucket.receivers:
                continue
            for piece in bucket.pieces:
                tensor = table[piece.tensor]
                values = local_view(
                    tensor, held[bucket.source][tensor.name], Shards.of_grid(source)
                )
                place = local_view(tensor, got[tensor.name], Shards.of_grid(ref))[piece.target]
                assert place.max() == -1, "no element arrives twice"
                place.copy_(values[piece.source])
        assert all(torch.equal(got[name], part) for name, part in expected.items())


def test_rank_that_holds_what_it_needs_copies_it():
    shape = model()
    same, _ = spans(2, 1, 2, 2, 2, True)
    laid = plan(
        param_table(shape), shape.num_layers, same, RankGrid.of("rollout", 0, 4, 2, 1), 2, 1000
    )
    assert all(bucket.local for bucket in laid.buckets()) and not laid.groups()
    train, rollout = spans(1, 2, 1, 1, 2, True)  # each rank holds two of four layers
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 10**6)
    assert {(bucket.source, bucket.receivers) for bucket in laid.buckets()} == {
        (0, (0,)),
        (0, (1,)),
        (1, (0,)),
        (1, (1,)),
    }


def test_seven_billion_layout_uses_one_group_for_each_train_rank():
    """8 train ranks (TP 2, PP 4), 6 rollout ranks (TP 2): each of the 8 feeds its TP index's
    replicas."""
    shape = model()
    train, rollout = spans(2, 4, 1, 2, 3, False)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 10**6)
    assert sorted(laid.groups()) == [
        (rank, *(8 + rank % 2 + 2 * replica for replica in range(3))) for rank in range(8)
    ]
    assert len(list(laid.buckets())) == 8


def test_uncut_tensors_need_no_groups_beyond_those_of_the_cut_ones():
    shape = model(qk_norm=True)
    train, rollout = spans(2, 1, 1, 4, 1, False)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 500)
    assert sorted(laid.groups()) == [(0, 2), (0, 3), (1, 4), (1, 5)]


def test_sending_replicas_share_the_work_evenly():
    shape = model(tied=False)
    train, rollout = spans(2, 1, 4, 2, 2, False)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 200, senders=4)
    sent = [laid.sent(rank) for rank in train.ranks]
    assert min(sent) > 0.95 * max(sent)
    first = list(islice(laid.buckets(), 8))
    assert len({bucket.source for bucket in first}) == 8, "all of them begin at once"


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_two_replicas_send_however_many_there_are(replicas):
    """So a rollout rank is in as many groups in a large world as in a small one."""
    shape = model(tied=False)
    train, rollout = spans(2, 4, replicas, 2, 3, False)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 200)
    sending = [rank for rank in train.ranks if laid.sent(rank)]
    expected = {1: {0}, 2: {0, 1}, 3: {0, 1}, 8: {0, 4}}[replicas]
    assert {train.index_of(rank)["dp"] for rank in sending} == expected
    assert len(sending) == len(laid.groups()) == 2 * 4 * len(expected)
    for rank in rollout.ranks:
        assert len(laid.part_of(rank).groups()) == 4 * len(expected)


def test_colocated_replicas_that_do_not_send_still_copy():
    shape = model(tied=False)
    train, rollout = spans(2, 2, 4, 2, 8, True)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 500)
    for rank in train.ranks:
        copied = sum(bucket.numel for bucket in laid.part_of(rank).buckets() if bucket.local)
        stage = train.index_of(rank)["pp"]
        held = [
            spec
            for spec in param_table(shape)
            if stage_of(spec, Stages.even(shape.num_layers, 2)) == stage
        ]
        assert copied == sum(num_elements(spec, Shards(2)) for spec in held), "all that it holds"


# -- against a plan that asks every rank about every region ----------------------------------------


def plain_plan(table, num_layers, train, rollout, limit, sending):
    """The buckets as (source, receivers, [(tensor, source box, target box, offset)])."""
    routes = {}
    for source, receivers, tensor, part in plain_moves(
        table, num_layers, train, rollout, limit, sending
    ):
        buckets = routes.setdefault((source, receivers), [[]])
        filled = sum(elements_of(taken) for _, taken, *_ in buckets[-1])
        if filled + elements_of(part[0]) > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append((tensor, *part, filled))
    ordered = []
    for turn in range(max(map(len, routes.values()))):
        for route, buckets in routes.items():
            ordered += [(*route, bucket) for bucket in buckets[turn : turn + 1]]
    return ordered


def plain_moves(table, num_layers, train, rollout, limit, sending):
    """Every (source, receivers, tensor, (source box, target box)), in order."""
    sent = dict.fromkeys(train.ranks, 0)
    for number, spec in enumerate(table):
        stage = stage_of(spec, Stages.of(num_layers, train))
        for needy, holder, part in plain_parts_of(spec, train.tp, rollout.tp, limit):
            held = []
            able = []
            for rank in train.ranks:
                index = train.index_of(rank)
                if index["pp"] == stage and (spec.axis is None or index["tp"] in holder):
                    held.append(rank)
                if index["pp"] == stage and index["tp"] in holder and index["dp"] in sending:
                    able.append(rank)
            needing = [rank for rank in rollout.ranks if rollout.index_of(rank)["tp"] == needy]
            for rank in needing:
                if rank in held:
                    yield rank, (rank,), number, part
            lacking = tuple(rank for rank in needing if rank not in held)
            if lacking:
                least = min(sent[rank] for rank in able)
                giver = min(rank for rank in able if sent[rank] == least)
                sent[giver] += elements_of(part[0])
                yield giver, lacking, number, part


def plain_parts_of(spec, train_tp, rollout_tp, limit):
    """(rollout TP index, train TP indices that send, (source box, target box)) of every region,
    found place by place."""
    size = math.lcm(train_tp, rollout_tp) if spec.axis is None else spec.view[spec.axis]
    for needy in range(rollout_tp):
        needed = [place for place in range(size) if place * rollout_tp // size == needy]
        holders = sorted({place * train_tp // size for place in needed})
        whole = tuple(slice(0, length) for length in spec.view)
        if spec.axis is None:
            for part in plain_parts(whole, whole, limit):
                yield needy, holders, part
            continue
        for holder in holders:
            shared = [place for place in needed if place * train_tp // size == holder]
            source = list(whole)
            target = list(whole)
            for box, first in (
                (source, holder * size // train_tp),
                (target, needy * size // rollout_tp),
            ):
                box[spec.axis] = slice(shared[0] - first, shared[-1] + 1 - first)
            for part in plain_parts(tuple(source), tuple(target), limit):
                yield needy, [holder], part


def plain_parts(source, target, limit):
    """As many slices of the first axis longer than 1 as fit; down to single elements."""
    if elements_of(source) <= limit:
        yield source, target
        return
    axis = next(axis for axis, side in enumerate(source) if side.stop - side.start > 1)
    step = max(1, limit // elements_of(source[axis + 1 :]))
    for start in range(0, source[axis].stop - source[axis].start, step):
        narrow = []
        for box in (source, target):
            begin = box[axis].start + start
            side = slice(begin, min(begin + step, box[axis].stop))
            narrow.append((*box[:axis], side, *box[axis + 1 :]))
        yield from plain_parts(*narrow, limit)


def elements_of(box):
    """Elements of a box."""
    return math.prod(side.stop - side.start for side in box)


def spelled(bucket):
    pieces = [(piece.tensor, piece.source, piece.target, piece.offset) for piece in bucket.pieces]
    return bucket.source, bucket.receivers, pieces


@pytest.mark.parametrize("elements", [37, 5000])
@pytest.mark.parametrize("senders", [1, 2, 4])
def test_it_is_the_plan_that_asks_every_rank_about_every_region(elements, senders):
    shape = model(tied=False, qk_norm=True)
    table = param_table(shape)
    for layout in [
        (1, 1, 4, 2, 3, False),
        (2, 2, 4, 4, 2, False),
        (4, 2, 2, 2, 2, False),
        (4, 1, 1, 1, 1, False),
        (2, 2, 4, 4, 4, True),
        (4, 2, 2, 2, 8, True),
        (1, 4, 2, 1, 8, True),
    ]:
        train, rollout = spans(*layout)
        sending = [number * train.dp // senders for number in range(senders)]
        if train.dp < senders:
            sending = range(train.dp)
        laid = plan(table, shape.num_layers, train, rollout, 4, 4 * elements, senders)
        expected = plain_plan(table, shape.num_layers, train, rollout, elements, sending)
        assert [spelled(bucket) for bucket in laid.buckets()] == expected, layout


def test_parts_of_ranks_make_up_the_plan_in_its_order():
    shape = model(tied=False)
    for layout in ((2, 2, 3, 4, 2, False), (2, 2, 2, 4, 2, True)):
        train, rollout = spans(*layout)
        laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 500)
        whole = list(laid.buckets())
        for rank in range(max(train.ranks + rollout.ranks) + 2):  # the last has no part
            part = laid.part_of(rank)
            mine = [bucket for bucket in whole if rank in bucket.ranks]
            assert list(part.buckets()) == mine
            assert part.groups() == [ranks for ranks in laid.groups() if rank in ranks]
            assert (part.received(rank), part.sent(rank)) == (laid.received(rank), laid.sent(rank))
            used = {piece.tensor for bucket in mine for piece in bucket.pieces}
            assert part.tensors == {number: laid.tensors[number] for number in used}
        given = sum(laid.sent(rank) for rank in train.ranks)
        assert given == sum(bucket.numel for bucket in whole if not bucket.local)


def test_tensor_larger_than_a_bucket_is_split_and_small_ones_share():
    shape = model()
    train, rollout = spans(1, 1, 1, 1, 1, False)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 300)
    buckets = list(laid.buckets())
    pieces = [sum(piece.tensor == 0 for piece in bucket.pieces) for bucket in buckets]
    assert sum(pieces) == math.ceil(32 / (150 // 16)), "embedding rows fill the buckets"
    assert max(len(bucket.pieces) for bucket in buckets) > 1
    single = plan(param_table(shape), shape.num_layers, train, rollout, 2, 2)
    assert {bucket.numel for bucket in single.buckets()} == {1}, "down to buckets of one element"


def test_tp_that_does_not_divide_is_refused():
    shape = model()
    for train_tp, rollout_tp in (3, 1), (1, 3):
        with pytest.raises(BadInput, match="tensor parallel size 3"):
            plan(param_table(shape), 4, *spans(train_tp, 1, 1, rollout_tp, 1, False), 2, 1000)


def test_merge_undoes_shard():
    shape = model(tied=False)
    full = random_model(shape)
    for tensor in param_table(shape):
        assert torch.equal(
            merge(
                tensor,
                [
                    shard(tensor, full[tensor.name], ShardIndex(rank), Shards(4))
                    for rank in range(4)
                ],
            ),
            full[tensor.name],
        )
