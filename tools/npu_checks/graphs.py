"""Item `graphs`: decoding by captured graphs draws the tokens of plain decoding, while rows leave.

Through the engine, as actor_rollout.decode_graphs has it; with two devices also over TP 2, whose
all-reduces are in the graph.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from npu_checks import models
from npu_checks.check import Check, CheckFailed, Figures
from npu_checks.world import in_world, set_variables
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RoleSize
from r1zero.ops.npu_graph import GraphPool
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import EngineListener, Sampling
from r1zero.types import Batch, Prompt

STEPS = 64
PROMPT_LENGTH = 20
# Tokens of the samples of each prompt: one leaves after 24 steps, one after 44.
BUDGETS = (24, 44, STEPS, STEPS)
# Rows that pad a graph may change how sums are rounded, and a sample goes another way some time after
# that; with a fault it does within the first tokens. So log-probs of the tokens before must be near
# each other, in nats, and these tokens must be at least so many of all.
CLOSE = 0.3
LEAST_AGREED = 0.25
ADVICE = "train with actor_rollout.decode_graphs=false, which decodes without graphs, and send us the JSON"


@dataclass(frozen=True, slots=True)
class Generated:
    """What an engine drew, in order of samples, and how fast."""

    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    steps_per_second: float
    replays: int


def run(check: Check) -> Figures:
    """Compare both ways of decoding, without and with tensor parallelism."""
    set_variables()  # those of ranks that generate: others get a queue that captures no graphs
    size = check.launch.world_size
    roles = {"alone": RoleSize(size), "together": RoleSize(size, size)}

    def work(world: World) -> Figures:
        found = {"TP 1": compare(world, None, check.small)}
        if size > 1:
            found[f"TP {size}"] = compare(world, world.roles["together"].groups["tp"], check.small)
        return figures(found)

    return in_world(check, roles, work)


def figures(found: dict[str, dict[str, float]]) -> Figures:
    """What both layouts have shown."""
    parts = []
    for layout, values in found.items():
        parts.append(
            f"{layout}: {values['parted']:.0f} of {values['samples']:.0f} samples parted, "
            f"{values['graph_steps_per_second']:.0f} steps a second with graphs, "
            f"{values['plain_steps_per_second']:.0f} without, {values['replays']:.0f} replays"
        )
    return Figures("; ".join(parts), found)


def compare(world: World, group: dist.ProcessGroup | None, small: bool) -> dict[str, float]:
    """Generate with and without graphs on this rank. CheckFailed where that is not the same."""
    tp = 1 if group is None else dist.get_world_size(group)
    plain = generate(world, group, tp, small, graphs=False)
    graphs = generate(world, group, tp, small, graphs=True)
    if graphs.replays == 0:
        raise CheckFailed(f"TP {tp}: no decoding step was captured as a graph", ADVICE)
    parted = 0
    agreed = 0
    furthest = 0.0
    for number, (mine, theirs) in enumerate(zip(graphs.tokens, plain.tokens, strict=True)):
        same = int((mine == theirs).cumprod().sum())  # tokens before they part
        parted += same < len(theirs)
        agreed += same
        off = np.abs(graphs.logprobs[number][:same] - plain.logprobs[number][:same])
        furthest = max(furthest, float(off.max(initial=0.0)))
    share = agreed / sum(len(tokens) for tokens in plain.tokens)
    if furthest > CLOSE or share < LEAST_AGREED:
        raise CheckFailed(
            f"TP {tp}: with and without graphs {parted} of {len(plain.tokens)} samples part, after "
            f"{share:.0%} of their tokens, whose log-probs differ by up to {furthest:.2g} nats",
            ADVICE,
        )
    return {
        "samples": len(plain.tokens),
        "parted": parted,
        "agreed_share": share,
        "largest_logprob_difference": furthest,
        "plain_steps_per_second": plain.steps_per_second,
        "graph_steps_per_second": graphs.steps_per_second,
        "replays": graphs.replays,
    }


def generate(
    world: World, group: dist.ProcessGroup | None, tp: int, small: bool, graphs: bool
) -> Generated:
    """Draw all samples with an engine of its own; the second of two times is measured."""
    shape = models.shape(small)
    decoder = Decoder(
        shape, tp, group, torch.bfloat16, world.device.torch, PROMPT_LENGTH + STEPS, graphs
    )
    models.fill(decoder.weights)
    engine = NativeEngine(decoder, (), EngineLimits(STEPS, 10**5))
    engine.weights().commit(0)
    counter = Counter()
    engine.listeners.append(EngineListener(on_step=counter.on_step))
    batch = request(shape.vocab_size, prompts=1 if small else 16)
    budgets = np.tile(BUDGETS, (len(batch.prompts), 1))
    sampling = Sampling(1.0, 1.0, 0, seed=0)
    with counter:
        for _ in range(1 if small else 2):  # graphs are captured the first time
            counter.start()
            engine.submit(batch, range(len(batch.prompts)), sampling, budgets)
            groups = engine.collect(batch.everything)
            world.device.synchronize()
            rate = counter.steps / (time.perf_counter() - counter.began)
    samples = [sample for found in groups for sample in found.samples]
    return Generated(
        [sample.tokens for sample in samples],
        [sample.logprobs for sample in samples],
        rate,
        counter.replays,
    )


def request(vocabulary: int, prompts: int) -> Batch:
    """Prompts of random tokens, each with a sample for every budget."""
    random = np.random.default_rng(0)
    given = []
    for number in range(prompts):
        tokens = random.integers(0, vocabulary, PROMPT_LENGTH, dtype=np.int32)
        given.append(Prompt(number, "", tokens, ""))
    return Batch(1, 0, given, len(BUDGETS), prompts * len(BUDGETS))


class Counter:
    """Counts decoding steps, and replays of graphs while it is entered."""

    def __init__(self) -> None:
        self.start()
        self._pool: Any = GraphPool
        self._replay = GraphPool.replay

    def start(self) -> None:
        """Begin to count."""
        self.began = time.perf_counter()
        self.steps = 0
        self.replays = 0

    def on_step(self) -> None:
        """The engine has made a step."""
        self.steps += 1

    def __enter__(self) -> None:
        def replay(pool: GraphPool, size: int, lengths: list[int]) -> None:
            self.replays += 1
            self._replay(pool, size, lengths)

        self._pool.replay = replay

    def __exit__(self, *_: object) -> None:
        self._pool.replay = self._replay
