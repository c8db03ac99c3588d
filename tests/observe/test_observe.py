"""What watches a run: invariants that break, warnings, and lines of the console."""

from __future__ import annotations

import fcntl
import gzip
import json
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG
from support.worlds import make_runtime, metrics, samples

from r1zero.algo.stats import KL
from r1zero.distributed.board import Board
from r1zero.distributed.placement import RoleSize, place
from r1zero.observe import alarms, invariants, live
from r1zero.observe.alarms import Alarms
from r1zero.observe.console import step_line
from r1zero.observe.live import progress_text
from r1zero.observe.metrics import sample_metrics, step_metrics
from r1zero.observe.sample_summary import summarize
from r1zero.run_folder.folder import append_line
from r1zero.step import train_step
from r1zero.trainer import train
from r1zero.types import (
    Batch,
    Group,
    Outcome,
    Prompt,
    RankRecord,
    Reduce,
    Sample,
    Score,
    Tally,
    UpdateStats,
)

ROOT = Path(__file__).resolve().parents[2]

# -- the run folder -----------------------------------------------------------------------------


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with pytest.raises(OSError, match="File too large"):
        run_limited(path)
    append_line(path, {"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def run_limited(path):
    """Append a long line where files may have 100 bytes, as on a disk that is almost full."""
    import resource
    import signal

    before, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        append_line(path, {"step": 2, "text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# -- invariants ---------------------------------------------------------------------------------


def scale(parameters, factor):
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(factor)


def after(owner, name, change):
    """Let `change` spoil what the method of this object returns, until the returned function is
    called."""
    original = owner.__dict__.get(name, None)
    method = getattr(owner, name)

    def spoiled(*args):
        value = method(*args)
        change(value)
        return value

    setattr(owner, name, spoiled)
    return lambda: setattr(owner, name, original) if original else delattr(owner, name)


def break_body(rank, size, store, folder):
    """Break one thing after the other in a live runtime; returns what the step after each said, and
    the progress that was posted during the first step with its longest answer."""
    runtime, found, posted = make_runtime(store, folder), {}, []
    live.SECONDS = 0.0
    board = Board(runtime.world.store)
    live.Poster(
        runtime.engine,
        lambda text: (board.post("rollout/0", text), posted.append(board.read("rollout/0"))),
    )
    runtime.start()

    def step(name):
        outcome = train_step(runtime.progress.step + 1, runtime)
        found[name] = outcome.broken
        runtime.progress.advance(runtime.drawn)
        return outcome.samples.longest

    reference = list(runtime.reference.model.module.parameters())
    scale(reference, 1.02)
    longest = step("start_kl")
    runtime.engine.listeners.pop()  # the poster
    scale(reference, 1 / 1.02)
    step("nothing")

    # the engine gets nothing, whatever the others count
    runtime.publisher.publish = lambda *_: None
    step("not published")
    del runtime.publisher.publish
    step("version")  # drawn with the weights of the step before

    def lose_a_token(groups):
        if not groups:  # a part of the batch that holds none
            return
        sample = groups[0].samples[0]
        sample.tokens, sample.logprobs = sample.tokens[:-1], sample.logprobs[:-1]
        sample.loss_mask = sample.loss_mask[:-1]

    undo = after(runtime.engine, "collect", lose_a_token)
    step("tokens")
    undo()

    learn = runtime.policy.learn

    def stale(delivery):
        if delivery.deal.update == 0:
            runtime.policy._old_logprobs |= {
                number: sample.logprobs + 0.02 for number, sample in delivery.samples.items()
            }
        return learn(delivery)

    runtime.policy.learn = stale
    step("ratio")
    runtime.policy.learn = learn

    def spoil(version):
        scale(runtime.engine.weights().tensors.values(), 1.1)
        runtime.engine.weights().commit(version)

    undo = after(runtime.publisher, "publish", spoil)
    step("publish")
    undo()
    step("mismatch")  # drawn with the weights that arrived spoiled
    step("healed")

    def no_number(groups):
        if not groups:
            return
        groups[0].samples[0].ref_logprobs[0] = float("nan")

    after(runtime.reference, "add_logprobs", no_number)
    step("gradient")  # the last one: no weight survives it
    return found, posted, longest


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory):
    [result] = run_ranks(break_body, 1, str(tmp_path_factory.mktemp("broken")))
    return result


def test_each_broken_invariant_is_caught_with_its_sentence(broken):
    found = dict(broken[0])
    sentences = {
        "start_kl": "before the first update the KL to the reference is",
        "not published": "after publishing, ",
        "version": "128 of 128 samples were drawn with weights version 2, but version 3 was published",
        "tokens": "response tokens, but rollout ranks saw",
        "ratio": "the ratio of the first minibatch differs from 1 by 0.02",
        "publish": "after publishing, ",
        "mismatch": (
            "trainer and rollout engine give the tokens of the first minibatch log-probs that "
            "differ by"
        ),
        "gradient": "the gradient of update 1 of 2 has the norm nan",
    }
    assert found.pop("nothing") == [] and found.pop("healed") == []
    assert found.keys() == sentences.keys()
    for name, sentence in sentences.items():
        assert found[name] and sentence in found[name][0], (name, found)
        # Stale old log-probs or weights also show in the mismatch: one fault, seen twice.
        assert len(found[name]) == (2 if name in ("ratio", "version") else 1), (name, found[name])


def spoiled_body(rank, size, store, folder, *overrides):
    """Train with a reference that is not the start model; returns the error that ended it, if one
    did."""
    runtime = make_runtime(store, folder, *overrides, rank=rank, size=size)
    if runtime.world.ref.member:
        scale(runtime.reference.model.module.parameters(), 1.02)
    try:
        return train(runtime)
    except RuntimeError as error:
        return str(error)


def test_a_broken_invariant_stops_the_run(tiny, tmp_path):
    [stopped] = run_ranks(spoiled_body, 1, str(tmp_path), "training.train_iters=2")
    assert stopped.startswith("step 1: invariant broken: before the first update the KL")
    assert len(metrics(tmp_path)) == 1, "the step is kept"


def test_or_it_warns_as_configured_and_the_run_leaves_traces_and_events(tiny, tmp_path):
    errors = run_ranks(
        spoiled_body,
        4,
        str(tmp_path),
        "training.train_iters=2",
        "training.on_broken_invariant=warn",
        "training.profile_steps=[2]",
        "training.logger=[tensorboard]",
        "training.samples_interval=5",
    )
    assert errors == [None] * 4
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_000002.parquet"]
    assert len(samples(tmp_path, 2)) == 128, "of two replicas"
    log = (tmp_path / "logs" / "rank_0000.log").read_text()
    assert "warning: step 1: invariant broken: before the first update" in log
    assert [m["invariants/broken"] for m in metrics(tmp_path)] == [1, 0]
    traces = sorted((tmp_path / "profile").rglob("*.gz"))
    assert [path.relative_to(tmp_path / "profile").as_posix() for path in traces] == [
        f"step_000002/{name}.json.gz"
        for name in ("ref_rank_0003", "rollout_rank_0001", "train_rank_0000")
    ]
    names = {
        event.get("name", "")
        for event in json.loads(gzip.decompress(traces[2].read_bytes()))["traceEvents"]
    }
    assert any("backward" in name.lower() for name in names), (
        "the train rank's trace has its backward pass"
    )
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_trace_that_cannot_be_written_is_only_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("r1zero"), "propagate", True)
    (tmp_path / "profile").write_text("a file where the folder should be")
    with DEVICE.trace(tmp_path / "profile" / "step_000001", "train_rank_0000"):
        torch.ones(2).sum()
    [record] = caplog.records
    assert "train_rank_0000.json.gz could not be written" in record.getMessage()


def test_answers_that_are_pieces_of_the_question_are_counted():
    def sample(*outcomes):
        scores = {
            name: Score(0.0, outcome)
            for name, outcome in zip(("acc", "base_acc"), outcomes, strict=True)
        }
        return Sample(np.zeros(3, np.int32), np.zeros(3, np.float32), False, 0, scores, reward=0.0)

    samples = [
        sample(Outcome.COPIED, Outcome.COPIED),
        sample(Outcome.RIGHT, Outcome.RIGHT),
        sample(Outcome.WRONG, Outcome.COPIED),
    ]
    group = Group(0, Prompt(0, "1+1?", np.zeros(2, np.int32), "2"), samples)
    found = sample_metrics(summarize([group]))
    assert found["reward/copied"] == 2
    assert found["reward/acc/right"] == found["reward/base_acc/right"] == pytest.approx(1 / 3)


def record_of(tokens):
    """What a rank tells that rolled out for two seconds."""
    return RankRecord(0.0, 2.0, {"rollout": 2.0}, 0, 1.0, tokens)


def test_a_role_more_must_have_seen_the_tokens_of_what_trains():
    def group(position, tokens):
        drawn = Sample(np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), False, 0, reward=0)
        return Group(position, Prompt(position, "", np.zeros(1, np.int32), ""), [drawn])

    groups = [group(0, 3), group(1, 5)]
    groups[1].trains = False
    batch = Batch(1, 0, [each.prompt for each in groups], 1, 2)
    updates = [UpdateStats({}, 3, 0.0, 0.0)]

    def told(critic):
        records = [record_of({"rollout": 8, "ref": 3, "critic": critic})]
        return invariants._tokens(batch, summarize(groups), updates, records)

    assert told(3) == []
    assert "critic ranks saw 2" in told(2)[0]


@pytest.mark.parametrize("version", [0, 25], ids=["start", "reset"])
@pytest.mark.parametrize(
    ("limits", "estimator", "rounding", "fault"),
    [
        (invariants.BF16, "abs", 0.04, 0.2),
        (invariants.BF16, "k3", 0.001, 0.04),
        (invariants.FP32, "abs", 1e-6, 0.01),
    ],
)
def test_what_rounding_makes_of_a_kl_is_no_fault(version, limits, estimator, rounding, fault):
    """bf16 log-probs of the same weights differ by 0.02 to 0.04 nats, which |d| adds up."""
    batch = Batch(version + 1, version, [], 1, 1, reference_version=version)
    rules = invariants.Invariants(limits, same_start=True, kl_penalty=estimator)

    def told(kl):
        tally = Tally(Reduce.TOKEN_MEAN, kl, 1)
        return rules._start_kl(batch, UpdateStats({KL.key: tally}, 1, 0.0, 0.0))

    assert told(rounding) == []
    assert f"{fault:.2g}" in told(fault)[0]


# -- warnings -----------------------------------------------------------------------------------

FINE = {
    "reward/mean": 0.2,
    "reward/equal_groups": 0.3,
    "kl": 0.01,
    "entropy": 0.9,
    "response_truncated": 0.1,
    "mismatch/mean": 1e-7,
    "reward/failure_rate": 0.0,
    "time/step": 10.0,
    "time/wait/train": 1.0,
    "time/wait/rollout": 1.0,
    "time/wait/ref": 2.0,
}


def watch(rows, faster=lambda working: None):
    watcher = Alarms(1e-3, 0.05, faster)
    return [watcher.look(FINE | row | {"step": step}) for step, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"reward/equal_groups": 1.0},
            "in 100% of the groups all rewards are equal (+0.20 on average)",
        ),
        ({"kl": 1.5}, "the KL to the reference is 1.50 nats a token"),
        ({"kl": 0.2}, "the KL to the reference jumped from 0.010 to 0.200"),
        ({"entropy": 0.05}, "nats a token: responses of a group become copies"),
        ({"entropy": 2.8}, "entropy grew from 0.900 to 2.800 nats a token: responses dissolve"),
        ({"response_truncated": 0.6}, "60% of the responses were cut at the length limit"),
        ({"mismatch/mean": 0.01}, "log-probs of trainer and rollout engine differ by 0.01"),
        ({"reward/failure_rate": 0.02}, "scoring failed for 2.0% of the responses"),
    ],
)
def test_each_trouble_is_told_when_it_begins_and_not_in_every_step(row, sentence):
    said = watch([{}] * 6 + [row] * 3)
    assert said[:6] == [[]] * 6
    assert len(said[6]) == 1 and sentence in said[6][0]
    assert said[7:] == [[], []]


def test_equal_rewards_and_low_entropy_are_no_trouble_when_everything_is_right():
    learned = {
        "reward/equal_groups": 1.0,
        "entropy": 0.001,
        "reward/acc/right": 0.95,
        "reward/format/right": 0.97,
    }
    assert not any(watch([{}] * 5 + [learned] * 3))
    assert any(watch([{}] * 5 + [learned | {"reward/acc/right": 0.1}] * 3))


NEVER = {"reward/acc/right": 0.0, "reward/format/right": 0.4}


def test_accuracy_that_stays_at_0_is_told_after_some_steps():
    said = watch([NEVER] * 12)
    assert not any(said[:9]) and len(said[9]) == 1 and not any(said[10:])
    assert "no response was right in the last 10 steps" in said[9][0]
    assert "ground_truth" in said[9][0] and "map_keys.response" in said[9][0]


@pytest.mark.parametrize(
    "rows",
    [
        # one right response begins anew
        [NEVER] * 9 + [NEVER | {"reward/acc/right": 0.01}] + [NEVER] * 9,
        # a format that is never right is no riddle
        [{"reward/acc/right": 0.1, "reward/format/right": 0.0}] * 20,
        [{"reward/format/right": 0.0}] * 20,
    ],
)  # nothing compares answers
def test_accuracy_that_is_seldom_0_or_not_looked_at_is_no_trouble(rows):
    assert not any(watch(rows))


def test_the_other_scorer_of_answers_counts_too():
    assert len(watch([{"reward/base_acc/right": 0.0}] * 10)[-1]) == 1


def test_a_trouble_that_comes_back_or_stays_is_told_again():
    bad = {"response_truncated": 0.6}
    said = [len(found) for found in watch([bad, {}, bad] + [bad] * alarms.REPEAT)]
    assert said == [1, 0, 1] + [0] * (alarms.REPEAT - 1) + [1]


def test_a_waiting_role_is_told_with_the_split_that_would_be_faster():
    asked = []

    def faster(steps):
        asked.append(steps)
        return "num_gpus_for_train 2 would do"

    said = watch([{"time/wait/ref": 8.0}] * 6, faster)
    assert said[:4] == [[]] * 4 and said[4] == [
        "ref ranks wait 80% of the step for others; num_gpus_for_train 2 would do"
    ]
    assert [step["time/wait/ref"] for step in asked[0]] == [8.0] * alarms.WINDOW
    assert not any(watch([{"time/wait/ref": 8.0}] * 6))  # no faster split, nothing to say


def test_a_role_more_is_told_of_like_the_others():
    said = watch([{"time/wait/critic": 9.0}] * 6, lambda steps: "so")
    assert said[4] == ["critic ranks wait 90% of the step for others; so"]


# -- the console --------------------------------------------------------------------------------


def test_lines_of_steps_stand_below_each_other():
    common = {
        "reward/acc/right": 0.5,
        "response_length/mean": 9.5,
        "grad_norm": 0.5,
        "throughput/tokens_per_second": 80.0,
    }
    first = step_line(FINE | common | {"step": 1}, 120)
    later = step_line(
        FINE
        | common
        | {
            "step": 120,
            "reward/mean": -0.25,
            "response_length/mean": 1234.5,
            "reward/acc/right": 1.0,
            "time/step": 260.4,
        },
        120,
    )
    assert len(first) == len(later) and first.index("kl") == later.index("kl")
    assert first.startswith("step   1/120  reward +0.200  acc  50%")


def test_a_line_tells_the_mean_of_a_reward_model_or_that_it_read_nothing():
    line = step_line(FINE | {"step": 1, "reward/acc/right": 0.5, "reward/model": -1.25}, 9)
    assert "acc  50%  model -1.250  length" in line
    unread = step_line(FINE | {"step": 2, "reward/acc/right": 0.5, "reward/model/too_long": 1.0}, 9)
    assert "acc  50%  model      -  length" in unread and len(unread) == len(line)
    assert "model" not in step_line(FINE | {"step": 3, "reward/acc/right": 0.5}, 9)


def test_a_step_in_which_no_group_trains_is_shown_and_judged_by_what_it_has():
    """Without updates there is no KL, entropy, gradient or mismatch; without reward functions no
    share of right answers."""
    samples = [
        Sample(np.zeros(3, np.int32), np.zeros(3, np.float32), True, 0, reward=1.0)
        for _ in range(2)
    ]
    group = Group(0, Prompt(0, "", np.zeros(2, np.int32), ""), samples, trains=False)
    one_rank = place({role: RoleSize(1) for role in ("train", "rollout", "ref")}, colocate=True)
    batch = Batch(7, 6, [group.prompt], 2, 2)
    metrics = step_metrics(batch, summarize([group]), [None], [record_of({})], one_rank)
    assert metrics["updates"] == 0 and "kl" not in metrics and "mismatch/mean" not in metrics
    full = metrics | {"kl": 0.1, "entropy": 0.5, "grad_norm": 1.0, "mismatch/mean": 1e-7}
    line = step_line(metrics, 10)
    assert len(line) == len(step_line(full, 10))
    assert "kl       -  entropy      -  grad      -  mismatch       -" in line
    alarms = Alarms(1e-3, 0.05, lambda working: None)
    for step in range(1, 8):
        said = alarms.look((full if step == 3 else metrics) | {"step": step})
        assert len(said) == (2 if step == 1 else 0), said  # equal rewards, cut responses
    jumped = alarms.look(full | {"step": 8, "kl": 1.5})
    assert len(jumped) == 1 and "1.50 nats a token" in jumped[0]


def test_progress_of_all_replicas_is_added_up():
    assert progress_text([None, None]) == ""
    notices = [json.dumps([3, 8, 100.0, 17]), json.dumps([5, 8, 50.4, 40]), None]
    assert progress_text(notices) == "8/16 samples, 150 tok/s, longest running 40 tokens"
    assert progress_text(["[8, 8, 90.0, 0]"] * 2) == "16/16 samples, learning"


def test_rollout_ranks_post_samples_done_and_the_longest_running_answer(broken):
    _, posted, longest = broken
    done, total, rates, running = zip(*map(json.loads, posted), strict=True)
    assert done[-1] == 128 and set(total) == {128} and list(done) == sorted(done)
    assert min(rates) >= 0 and max(rates) > 0
    assert longest - 1 <= max(running) <= longest


BAR = """
import itertools, logging, sys, time
from r1zero.observe.live import LiveBar
notices = itertools.chain(["[41, 64, 812.4, 214]"], itertools.repeat("[64, 64, 90, 0]"))
bar = LiveBar(2, 0, lambda: ["[1, 64, 1.0, 9]", next(notices), None], shown=sys.stderr.isatty())
time.sleep(2.5)
bar.step()
bar.close()
"""


def shown_by(stderr):
    here = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    return subprocess.run(
        [sys.executable, "-c", BAR], env=here, stderr=stderr, timeout=LONG, check=True
    )


def test_the_bar_lives_on_a_terminal_and_nowhere_else():
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shown_by(terminal)
    shown = os.read(ours, 65536).decode()
    assert "0/2" in shown and "42/128 samples, 813 tok/s, longest running 214 tokens" in shown
    assert "65/128 samples, 91 tok/s, longest running 9 tokens" in shown and "1/2" in shown
    assert shown_by(subprocess.PIPE).stderr == b""
