"""Item `publish`: weights reach the rollout ranks bit for bit, and how fast for each bucket size."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from npu_checks import models
from npu_checks.check import Check, CheckFailed, Figures
from npu_checks.world import in_world
from r1zero.distributed.collectives import first_finding
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RankGrid, RoleSize
from r1zero.models.config import ModelConfig
from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.models.params import WHOLE, local_shape, param_table
from r1zero.weight_sync.broadcast import Publisher
from r1zero.weight_sync.plan import plan

BUCKETS = (64, 128, 256, 512, 1024)  # megabytes
SMALL_BUCKETS = (1,)
DTYPE = torch.bfloat16
ADVICE = (
    "a broadcast of this size loses data: set training.publish_bucket_megabytes to a size that "
    "passed, keep training.publish_check_interval=1, and send us the JSON"
)


def run(check: Check) -> Figures:
    """Publish from one rank to the others and from half of them to the other half."""
    size = check.launch.world_size

    def work(world: World) -> Figures:
        shape = models.shape(check.small)
        values = {}
        for name, train, rollout in layouts(size):
            for megabytes in SMALL_BUCKETS if check.small else BUCKETS:
                rate = publish(world, shape, train, rollout, megabytes)
                values[f"{name}, {megabytes} MB"] = rate
        return figures(values)

    return in_world(check, {"all": RoleSize(size)}, work)


def layouts(size: int) -> Iterator[tuple[str, RankGrid, RankGrid]]:
    """(name, ranks that train, ranks that roll out)."""
    yield (
        f"1 to {size - 1}",
        RankGrid.of("train", 0, 1),
        RankGrid.of("rollout", 1, size - 1),
    )
    half = size // 2
    if half > 1:
        yield (
            f"{half} to {half}",
            RankGrid.of("train", 0, half),
            RankGrid.of("rollout", half, half),
        )


def publish(
    world: World, shape: ModelConfig, train: RankGrid, rollout: RankGrid, megabytes: int
) -> float:
    """Gigabytes a second of the second of two publications, all of whose bits were compared."""
    specs = param_table(shape)
    reshard = plan(specs, shape.num_layers, train, rollout, DTYPE.itemsize, megabytes * 2**20)
    device = world.device.torch
    held = {spec.name: local_shape(spec, WHOLE) for spec in specs}
    source = {}
    received: dict[str, torch.Tensor] = {}
    if world.rank in train.ranks:
        source = weights(held, device)
    if world.rank in rollout.ranks:
        for name, size in held.items():
            received[name] = torch.zeros(size, dtype=DTYPE, device=device)
    target = WeightTarget(WeightLayout(names="megatron", cut=True), received, lambda _: None)
    publisher = Publisher(
        reshard,
        world.rank,
        partial(world.tensor_group, buffer_megabytes=megabytes),
        source,
        target,
        DTYPE,
        device,
    )
    seconds = 0.0
    for version in (1, 2):
        world.barrier()
        began = time.perf_counter()
        publisher.publish(version)
        world.device.synchronize()
        world.barrier()
        seconds = time.perf_counter() - began
    if fault := first_finding(publisher.difference(), world.control):
        raise CheckFailed(f"buckets of {megabytes} MB: {fault}", ADVICE)
    return reshard.received(rollout.first) * DTYPE.itemsize / 1e9 / seconds


def weights(shapes: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, torch.Tensor]:
    """Random weights, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, size in shapes.items():
        found[name] = torch.randn(size, generator=generator).to(device, DTYPE)
    return found


def figures(rates: dict[str, float]) -> Figures:
    """Rates of all layouts and bucket sizes."""
    fastest = max(rates, key=lambda name: rates[name])
    said = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
    return Figures(
        f"every bit arrived; GB/s into each rollout rank: {said}; fastest {fastest}", rates
    )
