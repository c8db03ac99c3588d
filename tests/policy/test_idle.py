"""Idle role objects take the calls of the real ones, and have nothing."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from r1zero.algo.dealing import Dealer, SampleTable
from r1zero.models.layout import WeightLayout
from r1zero.observe.observer import IdleObserver, Observer
from r1zero.policy.actor import Actor
from r1zero.policy.handover import Delivery
from r1zero.policy.idle import IdleActor, IdleReference
from r1zero.policy.reference import Reference
from r1zero.rollout.engine import NativeEngine
from r1zero.rollout.interface import IdleEngine, RolloutProgress, Sampling
from r1zero.types import Batch, Group, Prompt, Sample

SAMPLING = Sampling(1.0, 1.0, 0, 0)


def calls(kind: type) -> dict[str, list[inspect.Parameter]]:
    """The public methods of a class with their parameters."""
    found = {}
    for name, function in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_"):
            found[name] = list(inspect.signature(function).parameters.values())
    return found


@pytest.mark.parametrize(
    ("idle", "real"),
    [
        (IdleActor, Actor),
        (IdleReference, Reference),
        (IdleEngine, NativeEngine),
        (IdleObserver, Observer),
    ],
)
def test_an_idle_object_takes_the_calls_of_the_real_one(idle: type, real: type) -> None:
    assert calls(idle), "an idle object has methods"
    expected = calls(real)
    for name, parameters in calls(idle).items():
        assert parameters == expected[name], name


def test_idle_roles_have_no_groups_no_tokens_and_no_update() -> None:
    batch = Batch(1, 0, [Prompt(0, "", np.zeros(1, np.int32), "")], 2, 2)
    engine = IdleEngine(WeightLayout("megatron", cut=True))
    engine.submit(batch, range(0), SAMPLING)
    assert engine.collect(batch.everything) == []
    assert engine.progress() == RolloutProgress(0, 0, 0, 0)
    assert engine.weights().tensors == {}
    sample = Sample(np.zeros(1, np.int32), np.zeros(1), False, 0, reward=1.0)
    table = SampleTable.of([Group(0, batch.prompts[0], [sample, sample])], 2)
    [deal] = Dealer(batch, 1).add(table)
    actor = IdleActor()
    actor.begin(batch)
    assert actor.learn(Delivery(deal, {})) == []
    assert actor.learn_again(1) == []
    actor.finish([], batch)
    assert actor.parameters() == {}
    reference = IdleReference()
    assert reference.add_logprobs([]) == []
    assert reference.take_tokens() == 0


def test_work_that_reaches_an_idle_engine_is_a_fault() -> None:
    batch = Batch(1, 0, [Prompt(0, "", np.zeros(1, np.int32), "")], 2, 2)
    engine = IdleEngine(WeightLayout("megatron", cut=True))
    with pytest.raises(AssertionError, match="has no share"):
        engine.submit(batch, [0], SAMPLING)
    with pytest.raises(AssertionError, match="no weights are published"):
        engine.weights().commit(1)
