"""Routes go from the rollout ranks to the replica that replays them, once, and nowhere else."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import numpy as np
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG

from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.distributed.transfer import RoleTransfer
from r1zero.policy.handover import Giver, Taker
from r1zero.policy.route_handover import RouteGiver
from r1zero.types import Batch, Group, Prompt, Sample

# 4 train ranks (TP2, two replicas), 2 rollout ranks, 1 ref rank.
TRAIN, ROLLOUT, REF = range(4), range(4, 6), 6
PROMPTS = [Prompt(p, "", np.arange(p + 1, dtype=np.int32), "") for p in range(6)]
LENGTHS = {number: 3 + number * 7 % 5 for number in range(12)}  # of responses, two for each prompt
LAYERS, TOP_K = 3, 2
WITHOUT = 8  # this sample was drawn before routes were recorded
IDLE = 3  # at this position nothing trains


def ids(seed: int, tokens: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (tokens, LAYERS, TOP_K), dtype=np.uint8)


def prompt_ids(position: int) -> np.ndarray:
    return ids(100 + position, position + 1)


def sample_ids(number: int) -> np.ndarray:
    return ids(number, LENGTHS[number] - 1)


def drawn(positions: list[int], version: int) -> list[Group]:
    """The groups at these positions, as a rollout replica draws them."""
    groups = []
    for position in positions:
        samples = []
        for number in (2 * position, 2 * position + 1):
            length = LENGTHS[number]
            sample = Sample(np.full(length, number), np.zeros(length), False, version, reward=1.0)
            sample.routes = None if number == WITHOUT else sample_ids(number)
            samples.append(sample)
        group = Group(position, PROMPTS[position], samples, trains=position != IDLE)
        group.prompt_routes = prompt_ids(position)
        groups.append(group)
    return groups


def step(world: World, move: RoleTransfer, batch: Batch) -> tuple:
    """Move the groups of a batch through the roles. Returns the deliveries of this rank, and what it
    still holds of routes as a rollout rank."""
    mine = list(world.rollout.share(6)) if world.rollout.member else []
    of_rollout = drawn(mine, batch.version)
    groups = move.send_to_replicas(batch, of_rollout, range(6), world.rollout, world.ref)
    RouteGiver(move, batch, world.rollout, world.train).give(of_rollout)
    Giver(move, batch, world.ref, world.train).give(groups)
    deliveries = Taker(move, batch, world.ref, world.train, world.rollout).take()
    move.flush(batch.step)
    kept = [sample.routes is not None for group in of_rollout for sample in group.samples]
    return deliveries, sum(kept)


def handover_body(rank: int, size: int, store: object) -> dict:
    """The same batch without and with routes, and with routes that must be kept."""
    sizes = {"train": RoleSize(4, 2), "rollout": RoleSize(2), "ref": RoleSize(1)}
    launch = Launch("single", rank, size, 0, (0,) * size, "", 0)
    placement = place(sizes, colocate=False)
    world = World(launch, placement, DEVICE, timedelta(seconds=LONG), store)
    move = RoleTransfer(world)
    told: dict = {"bytes": []}
    for number, (replays, staleness) in enumerate([(False, 0), (True, 0), (True, 1)]):
        batch = Batch(number + 1, 0, PROMPTS, 2, 6, staleness=staleness, keeps_routes=replays)
        before = (move.traffic.sent, move.traffic.received)
        deliveries, kept = step(world, move, batch)
        told["bytes"].append((move.traffic.sent - before[0], move.traffic.received - before[1]))
        told["kept", number] = kept
        told["routes", number] = [
            (
                {n: sample.routes for n, sample in delivery.samples.items()},
                dict(delivery.prompt_routes),
            )
            for delivery in deliveries
        ]
        for delivery in deliveries:
            delivery.forget_routes()
            assert not delivery.prompt_routes
            assert all(sample.routes is None for sample in delivery.samples.values())
    return told


def test_routes_go_to_the_replica_that_replays_them_and_nowhere_else():
    results = run_ranks(handover_body, 7)
    for told in results:
        for samples, prompts in told["routes", 0]:
            assert prompts == {} and set(samples.values()) <= {None}
    for rank in TRAIN:
        for samples, prompts in results[rank]["routes", 1]:
            check_share(samples, prompts)
    for replicas in ((0, 2), (1, 3)):  # the same TP index of both replicas
        learnt = Counter(
            number
            for rank in replicas
            for samples, _ in results[rank]["routes", 1]
            for number in samples
        )
        assert learnt == Counter(n for n in range(12) if n // 2 != IDLE), "each sample once"

    # What went with routes went without them, too; so the difference is that of the routes.
    more = [
        (after[0] - before[0], after[1] - before[1])
        for before, after, _ in (told["bytes"] for told in results)
    ]
    expected = [sum(map(route_bytes, results[rank]["routes", 1])) for rank in TRAIN]
    heads = [messages(results[rank]["routes", 1]) * 4 * 8 for rank in TRAIN]
    for rank in TRAIN:
        assert more[rank] == (0, expected[rank] + heads[rank])
    assert more[REF] == (0, 0), "the reference has nothing to do with them"
    # Rank 0 and 2 take from rollout ranks; 1 and 3 hear from them. Rollout ranks tell each other
    # tables, which are no samples.
    assert sum(more[rank][0] for rank in ROLLOUT) == more[0][1] + more[2][1]

    # Memory: the step is over and nobody saves it; or it may have to be saved on its way, and go on
    # with samples that do not train so far.
    assert [results[rank]["kept", 1] for rank in ROLLOUT] == [0, 0]
    assert [results[rank]["kept", 2] for rank in ROLLOUT] == [5, 6]


def check_share(samples: dict, prompts: dict) -> None:
    """What a replica has of a deal are the routes of its samples and of their prompts."""
    for number, routes in samples.items():
        if number == WITHOUT:
            assert routes is None
        else:
            assert np.array_equal(routes, sample_ids(number))
    known = {number // 2 for number in samples if number != WITHOUT}
    assert set(prompts) == known
    for position, routes in prompts.items():
        assert np.array_equal(routes, prompt_ids(position))


def route_bytes(delivery: tuple[dict, dict]) -> int:
    """Bytes of the routes of a share: a row of 16 for each prompt and sample, and their ids."""
    samples, prompts = delivery
    tokens = sum(position + 1 for position in prompts)
    known = [number for number in samples if number != WITHOUT]
    tokens += sum(LENGTHS[number] - 1 for number in known)
    return 16 * (len(prompts) + len(known)) + tokens * LAYERS * TOP_K


def messages(deliveries: list[tuple[dict, dict]]) -> int:
    """A share comes in a message from each rollout rank that drew some of it: even positions are
    those of one, odd ones of the other."""
    return sum(len({number // 2 % 2 for number in samples}) for samples, _ in deliveries)
