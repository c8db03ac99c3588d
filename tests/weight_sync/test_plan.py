"""The reshard plan, carried out on plain tensors and by gloo worlds, against cutting the model
directly."""

import math
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from support.multiproc import run_ranks
from support.patience import LONG
from support.shapes import small_shape

from r1zero.distributed.placement import RankGrid
from r1zero.errors import BadInput
from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.models.params import local_shape, local_view, merge, param_table, shard, stage_of
from r1zero.weight_sync import broadcast
from r1zero.weight_sync.broadcast import Publisher
from r1zero.weight_sync.plan import plan


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
    made = {tensor.name: torch.empty(local_shape(tensor, 1)) for tensor in param_table(shape)}
    sizes = [full.numel() for full in made.values()]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    for full, part in zip(made.values(), order.split(sizes), strict=True):
        full.copy_(part.view(full.shape))
    return {name: full.to(dtype) for name, full in made.items()}


def held_by(rank, span, shape, full):
    """A rank's parameters, cut out of the whole model."""
    tp_index, _, stage = span.index_of(rank).values()
    return {
        tensor.name: shard(tensor, full[tensor.name], tp_index, span.tp).clone()
        for tensor in param_table(shape)
        if stage_of(tensor, shape.num_layers, span.pp) == stage
    }


def target_of(tensors):
    """A target in Megatron's layout, as the native engine has it."""
    return WeightTarget(WeightLayout("megatron", cut=True), tensors, lambda version: None)


def spans(train_tp, pp, dp, rollout_tp, rollout_dp, colocated):
    train = RankGrid.of("train", 0, train_tp * pp * dp, train_tp, pp)
    return train, RankGrid.of(
        "rollout", 0 if colocated else train.size, rollout_tp * rollout_dp, rollout_tp, 1
    )


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
        for bucket in laid.buckets:
            assert bucket.local or bucket.numel * 4 <= bucket_bytes
            assert bucket.local or bucket.source not in bucket.receivers
            flat = torch.full((bucket.numel,), -2.0)
            for piece in bucket.pieces:
                tensor = table[piece.tensor]
                values = local_view(tensor, sources[bucket.source][tensor.name], train.tp)[
                    piece.source
                ]
                flat[piece.offset : piece.offset + piece.numel] = values.flatten()
            assert flat.min() >= 0, "pieces leave no gap"
            for rank, piece in product(bucket.receivers, bucket.pieces):
                tensor = table[piece.tensor]
                region = local_view(tensor, targets[rank][tensor.name], rollout.tp)[piece.target]
                assert region.max() == -1, "no element arrives twice"
                region.copy_(flat[piece.offset : piece.offset + piece.numel].view(region.shape))
        for rank in rollout.ranks:
            assert laid.received(rank) == sum(part.numel() for part in expected[rank].values())
            for name, part in expected[rank].items():
                assert torch.equal(targets[rank][name], part), (layout, rank, name)


def test_rank_that_holds_what_it_needs_copies_it():
    shape = model()
    same, _ = spans(2, 1, 2, 2, 2, True)
    laid = plan(
        param_table(shape), shape.num_layers, same, RankGrid.of("rollout", 0, 4, 2, 1), 2, 1000
    )
    assert all(bucket.local for bucket in laid.buckets) and not laid.groups()
    train, rollout = spans(1, 2, 1, 1, 2, True)  # each rank holds two of four layers
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 10**6)
    assert {(bucket.source, bucket.receivers) for bucket in laid.buckets} == {
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
    assert len(laid.buckets) == 8


def test_uncut_tensors_need_no_groups_beyond_those_of_the_cut_ones():
    shape = model(qk_norm=True)
    train, rollout = spans(2, 1, 1, 4, 1, False)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 500)
    assert sorted(laid.groups()) == [(0, 2), (0, 3), (1, 4), (1, 5)]


def test_replicas_share_the_sending_evenly():
    shape = model(tied=False)
    train, rollout = spans(2, 1, 4, 2, 2, False)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 200)
    sent = [
        sum(bucket.numel for bucket in laid.buckets if bucket.source == rank)
        for rank in train.ranks
    ]
    assert min(sent) > 0.95 * max(sent)
    assert len({bucket.source for bucket in laid.buckets[:8]}) == 8, "all of them begin at once"


def test_tensor_larger_than_a_bucket_is_split_and_small_ones_share():
    shape = model()
    train, rollout = spans(1, 1, 1, 1, 1, False)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 300)
    pieces = [sum(piece.tensor == 0 for piece in bucket.pieces) for bucket in laid.buckets]
    assert sum(pieces) == math.ceil(32 / (150 // 16)), "embedding rows fill the buckets"
    assert max(len(bucket.pieces) for bucket in laid.buckets) > 1
    single = plan(param_table(shape), shape.num_layers, train, rollout, 2, 2)
    assert {bucket.numel for bucket in single.buckets} == {1}, "down to buckets of one element"


def test_tp_that_does_not_divide_is_refused():
    shape = model()
    for train_tp, rollout_tp in (3, 1), (1, 3):
        with pytest.raises(BadInput, match="tensor parallel size 3"):
            plan(param_table(shape), 4, *spans(train_tp, 1, 1, rollout_tp, 1, False), 2, 1000)


# Real worlds.


def in_world(rank, world_size, store, body, *args):
    """Run body(rank, *args) in a gloo world that all ranks leave together: the last may still be
    reading."""
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=LONG)
    )
    body(rank, *args)
    dist.barrier()


def publisher_of(rank, shape, train, rollout, bucket_bytes, dtype, full):
    """This rank's publisher, its rollout weights full of NaN, and what they should become."""
    source = held_by(rank, train, shape, full) if rank in train.ranks else {}
    expected = held_by(rank, rollout, shape, full) if rank in rollout.ranks else {}
    target = {
        name: torch.nn.Parameter(torch.full_like(part, math.nan)) for name, part in expected.items()
    }
    laid = plan(param_table(shape), shape.num_layers, train, rollout, dtype.itemsize, bucket_bytes)
    maker = Publisher(
        laid,
        rank,
        lambda ranks: dist.new_group(list(ranks)),
        source,
        target_of(target),
        dtype,
        "cpu",
        in_flight=3,
    )
    return maker, source, target, expected


def gather(value):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def publish_twice(rank, shape, train, rollout, bucket_bytes, dtype):
    maker, source, target, expected = publisher_of(
        rank, shape, train, rollout, bucket_bytes, dtype, random_model(shape, dtype)
    )
    homes = {name: param.data_ptr() for name, param in target.items()}
    shard_bytes = sum(part.nbytes for part in expected.values())
    for seed in (0, 1):
        full = random_model(shape, dtype, seed)
        for name, param in held_by(rank, train, shape, full).items() if source else ():
            source[name].copy_(param)
        version = 7 + seed
        # receivers hear of it from the sources alone
        arrived = maker.publish(version if source else -1)
        assert arrived == (version if target else None) and maker.received_bytes == shard_bytes
        for name, part in (held_by(rank, rollout, shape, full) if target else {}).items():
            assert torch.equal(target[name].data, part), name
            assert target[name].data_ptr() == homes[name] and target[name].requires_grad
        assert maker.difference(gather(maker.checksums())) is None


@pytest.mark.parametrize(
    "layout, bystanders, bucket_bytes, dtype",
    [
        ((2, 2, 1, 2, 1, False), 1, 700, torch.bfloat16),  # many buckets; rank 6 has no part
        # two sources a shard, two replicas on each side
        ((2, 1, 2, 1, 2, False), 0, 3000, torch.float32),
        ((1, 2, 1, 4, 1, False), 0, 10**6, torch.bfloat16),  # one bucket a route
        ((2, 2, 1, 1, 4, True), 0, 700, torch.bfloat16),  # every rank gives, takes and copies
        ((1, 1, 1, 1, 1, True), 0, 700, torch.bfloat16),  # a world of one
    ],
)
def test_publishing_brings_every_rollout_rank_its_shard(layout, bystanders, bucket_bytes, dtype):
    train, rollout = spans(*layout)
    world_size = max(train.ranks + rollout.ranks) + 1 + bystanders
    run_ranks(
        in_world, world_size, publish_twice, model(tied=False), train, rollout, bucket_bytes, dtype
    )


def test_norms_that_tp_cuts_are_published_bit_for_bit():
    shape = model(tied=False, qk_norm=True, family="olmo2")
    cut = {
        spec.name
        for spec in param_table(shape)
        if "layernorm" in spec.name and spec.axis is not None
    }
    assert len(cut) == 2 * shape.num_layers
    for layout in ((2, 2, 1, 1, 1, False), (1, 1, 1, 2, 1, False), (2, 1, 1, 2, 1, True)):
        train, rollout = spans(*layout)
        world_size = max(*train.ranks, *rollout.ranks) + 1
        run_ranks(in_world, world_size, publish_twice, shape, train, rollout, 700, torch.bfloat16)


def damage(rank, shape, train, rollout):
    maker, _, target, _ = publisher_of(
        rank, shape, train, rollout, 700, torch.bfloat16, random_model(shape)
    )
    name = "decoder.layers.2.mlp.linear_fc1.weight"

    def verdict():
        everyone = gather(maker.checksums())
        assert f"{name} on rollout rank 3 differs from train rank 1" in maker.difference(everyone)

    maker.publish(0)
    assert maker.difference(gather(maker.checksums())) is None
    if rank == 3:
        bits = target[name].data.view(torch.int16)
        bits[-1, 5] ^= 1  # one bit
    verdict()
    maker.publish(0)
    assert maker.difference(gather(maker.checksums())) is None
    if rank == 3:
        rows = target[name].data
        rows[:2] = rows[:2].flip(0)  # the same values in another order
    verdict()


def publish_two_versions(rank, shape, train, rollout):
    maker, *_ = publisher_of(
        rank, shape, train, rollout, 700, torch.float32, random_model(shape, torch.float32)
    )
    if rank in rollout.ranks:
        with pytest.raises(AssertionError, match=r"weights of several versions: \[3, 4\]"):
            maker.publish(0)
    else:
        assert maker.publish(3 + rank) is None


def test_weights_of_two_versions_are_no_publication():
    train, rollout = spans(1, 2, 1, 1, 1, False)
    run_ranks(in_world, 3, publish_two_versions, model(), train, rollout)


def test_checksums_name_a_tensor_with_a_flipped_bit_or_exchanged_rows():
    train, rollout = spans(1, 2, 1, 1, 2, False)
    run_ranks(in_world, 4, damage, model(), train, rollout)


def test_weights_of_another_dtype_are_refused():
    shape = model()
    train, rollout = spans(1, 1, 1, 1, 1, True)
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 1000)
    weights = random_model(shape, torch.float32)
    with pytest.raises(AssertionError, match="float32.*published as torch.bfloat16"):
        Publisher(laid, 0, lambda ranks: None, weights, target_of(weights), torch.bfloat16, "cpu")


def test_checksum_of_many_elements_does_not_depend_on_the_chunks(monkeypatch):
    values = torch.randn(1000, 3).bfloat16()
    at_once = broadcast._checksum(values)
    monkeypatch.setattr(broadcast, "CHUNK", 7)
    bits = values.view(torch.int16).flatten().tolist()
    by_hand = sum(element * (2 * place + 1) for place, element in enumerate(bits))
    assert broadcast._checksum(values).item() == at_once.item() == by_hand


def test_merge_undoes_shard():
    shape = model(tied=False)
    full = random_model(shape)
    for tensor in param_table(shape):
        assert torch.equal(
            merge(tensor, [shard(tensor, full[tensor.name], rank, 4) for rank in range(4)]),
            full[tensor.name],
        )
