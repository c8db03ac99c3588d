"""Routes of an engine of one's own: what cannot be replayed is refused where it comes in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r1zero.errors import BadInput
from r1zero.models.config import Experts
from r1zero.rollout.route_check import check_routes
from r1zero.runtime import Runtime
from r1zero.types import ANY_LENGTH, Batch, Group, Part, Prompt, Sample

EXPERTS = Experts(count=8, top_k=2, ffn_hidden_size=16, layers=(0, 1, 2))
OWN = "mine.py:Engine"


def routes(tokens: int) -> np.ndarray:
    ids = np.random.default_rng(tokens).permuted(np.tile(np.arange(8), (tokens, 3, 1)), axis=-1)
    return ids[..., :2].astype(np.uint8)


def drawn() -> Group:
    """A prompt of four tokens, with responses of one and of five."""
    samples = []
    for length in (1, 5):
        sample = Sample(np.zeros(length, np.int32), np.zeros(length, np.float32), False, 0)
        sample.routes = routes(length - 1)
        samples.append(sample)
    prompt = Prompt(0, "", np.arange(4, dtype=np.int32), "")
    return Group(7, prompt, samples, prompt_routes=routes(4))


def with_id(ids: np.ndarray, value: int) -> np.ndarray:
    ids = ids.copy()
    ids[2, 1, 0] = value
    return ids


WRONG = {
    "no routes": lambda ids: None,
    "routes that are a list": lambda ids: ids.tolist(),
    "routes of int64": lambda ids: ids.astype(np.int64),
    "routes of uint8 [5, 3, 2]": lambda ids: np.concatenate([ids, ids])[:5],
    "routes of uint8 [4, 2, 2]": lambda ids: ids[:, :2],
    "routes of uint8 [4, 3, 1]": lambda ids: ids[..., :1],
    "routes with the id 8": lambda ids: with_id(ids, 8),
    "routes with an expert twice": lambda ids: with_id(ids, ids[2, 1, 1]),
}


def test_good_ones_pass():
    check_routes(OWN, [drawn()], EXPERTS)


@pytest.mark.parametrize("told", WRONG)
def test_wrong_ones_of_a_sample_are_refused(told):
    group = drawn()
    group.samples[1].routes = WRONG[told](group.samples[1].routes)
    with pytest.raises(BadInput) as caught:
        check_routes(OWN, [group], EXPERTS)
    said = str(caught.value)
    assert said.startswith(
        f"actor_rollout.engine: {OWN}: sample 1 of the prompt at position 7 has {told}"
    )
    assert "wanted uint8 [4, 3, 2]" in said and "routing_replay=false" in said


@pytest.mark.parametrize("told", WRONG)
def test_wrong_ones_of_a_prompt_are_refused(told):
    group = drawn()
    group.prompt_routes = WRONG[told](group.prompt_routes)
    with pytest.raises(BadInput, match="the prompt at position 7 has routes|has no routes"):
        check_routes(OWN, [group], EXPERTS)


@pytest.mark.parametrize(
    ("engine", "keeps", "output_rank", "stored", "refused"),
    [
        (OWN, True, True, False, True),
        (OWN, True, True, True, False),  # what a checkpoint held may be older than routes
        (OWN, True, False, False, False),
        (OWN, False, True, False, False),
        ("native", True, True, False, False),  # ours is tested
    ],
)
def test_what_comes_of_an_own_engine_is_looked_at(engine, keeps, output_rank, stored, refused):
    group = drawn()
    group.prompt_routes = None
    source = SimpleNamespace(collect=lambda part: [group])
    runtime: Any = SimpleNamespace(
        engine=None if stored else source,
        shape=SimpleNamespace(experts=EXPERTS),
        world=SimpleNamespace(rollout=SimpleNamespace(is_output_rank=output_rank)),
        run=SimpleNamespace(config=SimpleNamespace(actor_rollout=SimpleNamespace(engine=engine))),
    )
    batch = Batch(1, 0, [group.prompt], 2, 2, keeps_routes=keeps)
    part = Part(range(8), range(ANY_LENGTH))
    if refused:
        with pytest.raises(BadInput, match="has no routes"):
            Runtime.collect(runtime, batch, part, source)
    else:
        assert Runtime.collect(runtime, batch, part, source) == [group]
