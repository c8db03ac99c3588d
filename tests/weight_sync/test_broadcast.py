"""Publishing in gloo worlds, against cutting the model directly."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.multiproc import run_ranks
from support.patience import LONG
from support.publishing import expert_model, held_by, model, random_model, spans, target_of

from r1zero.distributed.collectives import first_finding
from r1zero.distributed.placement import RankGrid
from r1zero.models.params import param_table
from r1zero.weight_sync import broadcast
from r1zero.weight_sync import plan as plan_module
from r1zero.weight_sync.broadcast import Publisher
from r1zero.weight_sync.plan import plan


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
    groups = {ranks: dist.new_group(list(ranks)) for ranks in laid.groups()}
    maker = Publisher(
        laid,
        rank,
        groups.__getitem__,
        source,
        target_of(target),
        dtype,
        "cpu",
        in_flight=3,
    )
    return maker, source, target, expected


def verdict(maker):
    """What every rank is told."""
    return first_finding(maker.difference(), dist.group.WORLD)


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
        assert verdict(maker) is None
    last = rollout.ranks[-1]
    tensor = param_table(shape)[5]
    if rank == last:
        target[tensor.name].data.view(-1)[-1].neg_()
    told = verdict(maker)
    assert told.startswith(f"after publishing, {tensor.name} on rollout rank {last} differs from")


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


def publish_experts(rank, shape, train, rollout, most_groups):
    """With so many groups a receiver, in which train ranks listen to one another."""
    plan_module.GROUPS_OF_A_RECEIVER = most_groups
    laid = plan(param_table(shape), shape.num_layers, train, rollout, 2, 700)
    listening = {rank for route in laid.routes for rank in route.listeners}
    assert listening == (set(train.ranks) if most_groups == 1 else set())
    publish_twice(rank, shape, train, rollout, 700, torch.bfloat16)


@pytest.mark.parametrize("most_groups", [16, 1], ids=["a group a source", "one group"])
def test_experts_are_published_bit_for_bit(most_groups):
    """EP 4 over two replicas of TP 2, to TP 2, of which each rank holds half of the experts."""
    train = RankGrid.of("train", 0, 4, tp=2, ep=4)
    rollout = RankGrid.of("rollout", 4, 2, tp=2, ep=2)
    run_ranks(in_world, 6, publish_experts, expert_model(), train, rollout, most_groups)


def damage(rank, shape, train, rollout):
    maker, source, target, _ = publisher_of(
        rank, shape, train, rollout, 700, torch.bfloat16, random_model(shape)
    )
    early = "decoder.layers.2.mlp.linear_fc1.weight"
    late = "decoder.layers.3.self_attention.linear_qkv.weight"

    def publish():
        maker.publish(0)
        assert verdict(maker) is None

    def rows(name):
        return target[name].data

    publish()
    if rank == 3:
        rows(early).view(torch.int16)[-1, 5] ^= 1  # one bit
    assert f"{early} on rollout rank 3 differs from train rank 1" in verdict(maker)
    publish()
    if rank == 3:
        rows(early)[:2] = rows(early)[:2].flip(0)  # the same values in another order
    assert f"{early} on rollout rank 3 differs from train rank 1" in verdict(maker)
    publish()
    if rank == 2:
        rows(late).zero_()
    assert f"{late} on rollout rank 2 differs from train rank 1" in verdict(maker)
    if rank == 3:
        rows(early).zero_()
    assert early in verdict(maker), "of several tensors the first"
    if rank == 2:
        rows(early).zero_()
    assert f"{early} on rollout rank 2" in verdict(maker), "of several ranks the first"
    publish()
    if rank == 2:
        one, other = (rows(f"decoder.layers.{layer}.mlp.linear_fc2.weight") for layer in (2, 3))
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
    assert "layers.2.mlp.linear_fc2.weight on rollout rank 2" in verdict(maker)
    publish()
    if rank == 1:
        source[late][0, 0].neg_()  # an optimizer that steps too early
    assert f"{late} on rollout rank 2 differs from train rank 1" in verdict(maker)


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


def test_checksums_name_what_differs_wherever_it_came_about():
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
