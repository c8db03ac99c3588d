"""Advice from a run's own metrics, and rates that are measured or guessed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from r1zero.config.schema import Config, placement
from r1zero.distributed.placement import RoleSize, place
from r1zero.preflight.advice import faster_split, look_ahead
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config
from r1zero.preflight.step_model import LogNormal, Rates, plan, play, predict
from r1zero.preflight.step_rates import (
    guessed_lengths,
    guessed_rates,
    job_of,
    measured_job,
    measured_lengths,
    measured_rates,
)

ONE_OF_EACH = place({role: RoleSize(1) for role in ("train", "rollout", "ref")}, colocate=False)
TRUE = Rates(
    decode_step=0.02,
    decode_row=0.001,
    prefill=0.0,
    ref=0.0002,
    learn=0.0004,
    look=0.0001,
    optimizer=0.0,
    publish=0.7,
    source="made up",
)


def on_eight_ranks(*overrides: str) -> Config:
    return load_config(
        "tiny",
        [
            "training.seq_length=2048",
            "actor_rollout.max_tokens_to_oom=1000000",
            "training.global_batch_size=48",
            "actor_rollout.ppo_mini_batch_size=96",
            "actor_rollout.micro_batch_size=1",
            "actor_rollout.num_gpus_for_train=4",
            "actor_rollout.num_gpus_for_infer=2",
            "resource_pool.actor_rollout=[6]",
            "resource_pool.ref=[2]",
            "ref.micro_batch_size=1",
            *overrides,
        ],
    )[0]


def steps_of(cfg: Config, lengths: LogNormal, count: int = 5) -> list[dict[str, float]]:
    """Metrics of steps as the model itself plays them, with one replica of each role."""
    job = job_of(cfg, prompt_tokens=20.0)
    rng = np.random.default_rng(5)
    steps = []
    for _ in range(count):
        drawn = lengths.draw(job.prompts, job.group_size, rng)
        step = play(ONE_OF_EACH, job, TRUE, drawn, plan(job, 1, drawn)[1])
        steps.append(
            {
                "time/step": step.seconds,
                "time/rollout": step.busy["rollout"] - TRUE.publish,
                "time/ref": step.busy["ref"],
                "time/update": step.busy["train"] - TRUE.publish,
                "time/publish": TRUE.publish,
                "tokens/prompt": job.prompt_tokens * drawn.size,
                "tokens/response": float(drawn.sum()),
                "response_length/mean": float(drawn.mean()),
                "response_length/max": float(drawn.max()),
                "response_truncated": float((drawn == lengths.cap).mean()),
            }
        )
    return steps


def test_rates_that_a_run_measures_are_those_it_had() -> None:
    cfg = on_eight_ranks()
    steps = steps_of(cfg, LogNormal(300, 0.8, cfg.response_budget))
    job = measured_job(steps, cfg)
    lengths = measured_lengths(steps, cfg)
    assert job.prompt_tokens == pytest.approx(20)
    assert lengths.mean == pytest.approx(300, rel=0.1)
    assert lengths.sigma == pytest.approx(0.8, abs=0.1)
    found = measured_rates(steps, ONE_OF_EACH, job, lengths)
    for rate in ("decode_step", "decode_row", "ref", "learn", "look", "publish"):
        assert getattr(found, rate) == pytest.approx(getattr(TRUE, rate), rel=0.25), rate
    took = np.mean([step["time/step"] for step in steps])
    assert predict(ONE_OF_EACH, job, found, lengths).seconds == pytest.approx(took, rel=0.1)


def test_lengths_that_were_cut_tell_their_spread_by_the_share() -> None:
    cfg = on_eight_ranks("training.seq_length=532")  # responses of at most 500
    steps = steps_of(cfg, LogNormal(300, 0.6, cfg.response_budget))
    assert steps[0]["response_truncated"] > 0.02
    assert measured_lengths(steps, cfg).sigma == pytest.approx(
        0.6, abs=0.15
    )  # the mean is cut, too


def test_steps_whose_lengths_say_nothing_of_a_rate_give_no_negative_one() -> None:
    cfg = on_eight_ranks()
    steps = steps_of(cfg, LogNormal(300, 0.8, cfg.response_budget))
    for step in steps:  # the longer the rows, the shorter it took
        step["time/rollout"] = 1e6 / step["tokens/response"]
    job = measured_job(steps, cfg)
    found = measured_rates(steps, ONE_OF_EACH, job, measured_lengths(steps, cfg))
    assert min(found.decode_step, found.decode_row) >= 0
    assert max(found.decode_step, found.decode_row) > 0


def test_ranks_go_to_the_busy_role() -> None:
    cfg = on_eight_ranks()
    steps = steps_of(cfg, LogNormal(300, 0.8, cfg.response_budget))
    idle = [{**step, "time/rollout": 100.0, "time/ref": 1.0, "time/update": 1.0} for step in steps]
    said = faster_split(cfg, placement(cfg, 8), idle)
    assert said is not None
    # Two ranks generate, for 100 s of a step: all that the others can spare go there.
    assert "num_gpus_for_train 1, num_gpus_for_infer 6 and resource_pool.ref [1]" in said
    assert "on the same 8 ranks would take about" in said


def test_nothing_is_said_where_nothing_saves_a_tenth() -> None:
    """All that takes long is publishing."""
    cfg = on_eight_ranks()
    steps = steps_of(cfg, LogNormal(300, 0.8, cfg.response_budget))
    slow = [{**step, "time/publish": 1e4} for step in steps]
    assert faster_split(cfg, placement(cfg, 8), slow) is None


def test_roles_on_the_same_ranks_have_no_split() -> None:
    cfg = on_eight_ranks("resource_pool.colocate=true", "resource_pool.actor_rollout=[8]")
    assert faster_split(cfg, placement(cfg, 8), []) is None


def test_the_guess_scales_with_the_model_and_its_cut() -> None:
    cfg, _ = load_config("qwen25_7b")
    found = look(cfg)
    shape, placed = found.actor.shape, found.placement
    assert shape is not None and placed is not None
    rates = guessed_rates(cfg, placed, shape)
    # 2 FLOP a parameter on the 2 ranks of a ref replica, 8 on the 8 of train, which recomputes.
    assert rates.ref == pytest.approx(2 * shape.num_parameters / (376e12 * 0.35) / 2)
    assert rates.learn == pytest.approx(8 * shape.num_parameters / (376e12 * 0.30) / 8)
    assert rates.publish == pytest.approx(shape.num_parameters * 2 / 2 / 16e9, rel=1e-4)
    assert "guess" in rates.source
    deeper = replace(shape, num_layers=56)
    assert 1.8 < guessed_rates(cfg, placed, deeper).decode_step / rates.decode_step < 2
    eager, _ = load_config("qwen25_7b", ["actor_rollout.decode_graphs=false"])
    assert guessed_rates(eager, placed, shape).decode_step - rates.decode_step == pytest.approx(
        0.030 - 0.0108
    )


def test_the_guess_knows_that_replicas_share_experts() -> None:
    cfg, _ = load_config("deepseek_v3_671b")
    found = look(cfg)
    assert found.actor.shape is not None and found.placement is not None
    rates = guessed_rates(cfg, found.placement, found.actor.shape)
    held = 30.5e9  # bytes on a rank: docs/moe.md
    assert rates.publish == pytest.approx(held / 16e9, rel=0.01)
    floor = 0.030 * 61 / 28  # without graphs
    assert rates.decode_step == pytest.approx(floor + held / (0.6 * 1.6e12), rel=0.01)


def test_options_that_are_set_or_change_nothing_are_not_offered() -> None:
    cfg, _ = load_config("qwen25_7b")
    found = look(cfg)
    assert found.actor.shape is not None and found.placement is not None
    rates = guessed_rates(cfg, found.placement, found.actor.shape)
    lengths = guessed_lengths(cfg)

    def offered(**changes: object) -> list[str]:
        job = replace(job_of(cfg), **changes)
        return list(look_ahead(cfg, found.placement, job, rates, lengths).options)

    assert offered() == [
        "training.minibatch_order: expected_length",
        "algorithm.old_logprobs: rollout",
        "training.updates: accumulate (one update)",
        "all of these",
        "training.staleness: 1 (off-policy)",
    ]
    assert offered(updates="accumulate") == ["training.staleness: 1 (off-policy)"]
    assert offered(staleness=1, minibatch_order="expected_length") == [
        "algorithm.old_logprobs: rollout",
        "training.updates: accumulate (one update)",
    ]
    cfg = replace(cfg, algorithm=replace(cfg.algorithm, loss="gspo"))
    assert "algorithm.old_logprobs: rollout" not in offered(), "its ratio is that of a response"
