"""What goes into report.html: how folders are read, which samples are kept, that writing harms no
run."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.report_runs import add_model, append, plain, samples_path, write_run, write_step

from r1zero.report import page as report
from r1zero.report.history import RunHistory
from r1zero.report.model_scores import model_scores
from r1zero.report.page import PACKED_BYTES, LiveReport, open_runs, write_report
from r1zero.report.sample_selection import STEP_BYTES, TEXT_LIMIT, pack_step

ROOT = Path(__file__).resolve().parents[2]


def unpacked(packed: str) -> dict:
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def as_json(folder: Path) -> dict:
    history = RunHistory(folder, PACKED_BYTES)
    history.read()
    return history.as_json()


def random_text(seed: int, length: int) -> str:
    """Text that hardly packs."""
    return "".join(map(chr, np.random.default_rng(seed).integers(33, 127, length)))


def test_reading_a_growing_run_bit_by_bit_gives_what_reading_it_once_gives(tmp_path):
    history = RunHistory(tmp_path / "run", PACKED_BYTES)
    for step in range(1, 8):
        write_step(tmp_path / "run", step)
        if step % 3 == 0:
            history.read()
    history.read()
    assert history.as_json() == as_json(tmp_path / "run")


def test_a_few_files_at_a_time_come_to_the_same_in_the_end(tmp_path):
    write_run(tmp_path, 9)
    history = RunHistory(tmp_path, PACKED_BYTES)
    history.read(most_files=4)
    assert sorted(history.as_json()["packed"]) == [6, 7, 8, 9], "the newest first"
    history.read(most_files=4)
    history.read(most_files=4)
    once = as_json(tmp_path)
    assert (
        history.as_json()["series"] == once["series"]
        and history.as_json()["packed"] == once["packed"]
    )


def test_percentiles_are_those_of_all_samples(tmp_path):
    write_run(tmp_path, 1)
    lengths = pq.read_table(samples_path(tmp_path, 1))["response_length"].to_numpy()
    series = as_json(tmp_path)["series"]
    for share in (10, 50, 90):
        assert series[f"response_length/p{share}"] == [pytest.approx(np.percentile(lengths, share))]


def test_scores_of_the_reward_model_by_verdict_and_by_length(tmp_path):
    """Of one question with 8 answers, of which odd ones are right and longer ones have higher scores; one
    was too long for the model."""
    write_step(tmp_path, 1, prompts=1)
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, None]
    add_model(tmp_path, 1, lambda step, position, member: values[member])
    found = model_scores(pq.read_table(samples_path(tmp_path, 1)))
    assert found == {
        "reward/model/of_right": (2 + 8 + 32) / 3,
        "reward/model/of_wrong": (1 + 4 + 16 + 64) / 4,
        "reward/model/of_quarter_1": (1 + 2) / 2,
        "reward/model/of_quarter_2": (4 + 8) / 2,
        "reward/model/of_quarter_3": (16 + 32) / 2,
        "reward/model/of_quarter_4": 64,
    }
    series = as_json(tmp_path)["series"]
    assert {key: series[key] for key in found} == {key: [value] for key, value in found.items()}


def test_verdicts_on_what_the_model_scored_are_those_of_acc_or_else_of_the_first_rule(tmp_path):
    write_step(tmp_path, 1, prompts=1)
    add_model(tmp_path, 1, lambda step, position, member: float(member))
    rows = pq.read_table(samples_path(tmp_path, 1)).to_pylist()
    for row in rows:
        row["outcome/a"] = "graded"
        row["outcome/b"] = "right" if row["member"] < 2 else "timeout"
    both = model_scores(pa.Table.from_pylist(rows))
    assert both["reward/model/of_right"] == (1 + 3 + 5 + 7) / 4
    for row in rows:
        row["outcome/acc"] = None
    other = model_scores(pa.Table.from_pylist(rows))
    assert other["reward/model/of_right"] == 0.5 and "reward/model/of_wrong" not in other
    alone = pa.Table.from_pylist(rows).drop_columns(["outcome/acc", "outcome/b"])
    assert set(model_scores(alone)) == {f"reward/model/of_quarter_{n}" for n in (1, 2, 3, 4)}


def test_steps_whose_samples_are_not_kept_are_measured_all_the_same(tmp_path):
    for step in range(1, 7):
        write_step(tmp_path, step, prompts=2)
        add_model(tmp_path, step, lambda step, position, member: step + float(member))
    history = RunHistory(tmp_path, 1_000)
    history.read()
    found = history.as_json()
    assert len(found["packed"]) < 6
    assert found["series"]["reward/model/of_right"] == [step + 4.0 for step in range(1, 7)]
    plain_run = write_run(tmp_path / "without", 2)
    assert not [key for key in as_json(plain_run)["series"] if key.startswith("reward/model")]


def test_a_resumed_run_shows_the_attempt_that_counts(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write_step(tmp_path, step, kl=1.0)
    for step in (4, 5, 6):  # resumed from the checkpoint of step 3
        write_step(tmp_path, step, lambda *_: "second attempt", kl=2.0)
    run = as_json(tmp_path)
    assert run["steps"] == [1, 2, 3, 4, 5, 6] and run["series"]["kl"] == [1, 1, 1, 2, 2, 2]
    assert run["resumed"] == [4]
    assert set(unpacked(run["packed"][4])["samples"]["response"]) == {"second attempt"}


@pytest.mark.parametrize(("written", "resets"), [("3", [3, 6]), ("null", []), ("often", [])])
def test_steps_after_which_the_reference_was_reset(tmp_path, written, resets):
    write_run(tmp_path, 7)
    text = (tmp_path / "config.yaml").read_text()
    text += f"actor_rollout_ref: {{ref: {{reset_interval: {written}}}}}\n"
    (tmp_path / "config.yaml").write_text(text)
    assert as_json(tmp_path)["resets"] == resets


def test_steps_that_a_resumed_run_has_not_done_again_are_not_shown(tmp_path):
    history = RunHistory(tmp_path, PACKED_BYTES)
    for step in (1, 2, 3, 4):
        write_step(tmp_path, step)
    history.read()
    write_step(tmp_path, 2)
    history.read()
    run = history.as_json()
    assert run["steps"] == [1, 2] and sorted(run["packed"]) == [1, 2]


def test_metrics_of_older_or_broken_runs_are_taken_as_far_as_they_go(tmp_path):
    write_step(tmp_path, 1)
    append(
        tmp_path / "metrics.jsonl",
        {
            "step": 2,
            "kl": float("nan"),
            "loss": float("inf"),
            "grad_norm": None,
            "note": "text",
            "new/metric": 3,
        },
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 3, "kl": 0.\n[1, 2]\n{"kl": 1}\n{"step": 4, "kl": 0.25}\n{"step": 5, "kl"'
        )
    samples_path(tmp_path, 1).write_bytes(b"PAR1 cut off")
    (tmp_path / "config.yaml").write_text("name: [")
    run = as_json(tmp_path)
    assert run["steps"] == [1, 2, 4] and run["series"]["kl"] == [0.001, None, 0.25]
    assert run["series"]["loss"] == [None, None, None] and run["series"]["new/metric"] == [
        None,
        3,
        None,
    ]
    assert "note" not in run["series"] and run["name"] == tmp_path.name
    assert unpacked(run["packed"][1])["spans"] and "samples" not in unpacked(run["packed"][1])


def test_a_folder_of_files_is_shown_as_the_one_file_that_it_stands_for(tmp_path):
    """As several rollout replicas leave it."""
    write_run(tmp_path, 1)
    expected = as_json(tmp_path)
    path = samples_path(tmp_path, 1)
    table = pq.read_table(path)
    path.unlink()
    path.mkdir()
    for replica in range(2):
        pq.write_table(table.slice(replica * 64, 64), path / f"replica_{replica:04d}.parquet")
    assert as_json(tmp_path) == expected


def test_spans_of_a_few_ranks_have_their_roles(tmp_path):
    """The line of a large world names its ranks; older ones hold all ranks of theirs."""
    write_step(tmp_path, 1)
    spans = [[0, "update", 1.0, 2.0], [700, "rollout", 0.5, 2.0]]
    line = {"step": 1, "ranks": [0, 700], "roles": [["train"], ["rollout"]], "spans": spans}
    (tmp_path / "logs" / "spans.jsonl").unlink()
    append(tmp_path / "logs" / "spans.jsonl", line)
    run = as_json(tmp_path)
    assert run["roles"] == {0: ["train"], 700: ["rollout"]}
    assert [span[0] for span in unpacked(run["packed"][1])["spans"]] == [0, 700]


def test_all_samples_are_kept_when_they_fit(tmp_path):
    write_run(tmp_path, 1)
    content = unpacked(as_json(tmp_path)["packed"][1])
    rows = pq.read_table(samples_path(tmp_path, 1)).to_pylist()
    columns = (content["samples"][name] for name in ("group", "member", "response"))
    shown = {
        (content["prompts"][group]["prompt"], member): response
        for group, member, response in zip(*columns, strict=True)
    }
    assert shown == {(row["prompt"], row["member"]): row["response"] for row in rows}
    assert content["total"] == len(rows)


def test_when_samples_do_not_fit_the_same_prompts_are_kept_whole_at_every_step(tmp_path):
    for step in (1, 2):
        write_step(
            tmp_path,
            step,
            lambda step, p, m: random_text(step * 9_000 + p * 8 + m, 1_000),
            prompts=32,
        )
    packed = as_json(tmp_path)["packed"]
    contents = [unpacked(packed[step]) for step in (1, 2)]
    kept = [sorted(prompt["prompt_index"] for prompt in content["prompts"]) for content in contents]
    assert 2 <= len(kept[0]) < 32 and kept[0] == kept[1]
    assert kept[0] != list(range(100, 100 + len(kept[0]))), "scattered over the data"
    for step, content in zip((1, 2), contents, strict=True):
        assert len(packed[step]) <= STEP_BYTES
        assert np.bincount(content["samples"]["group"]).tolist() == [8] * len(kept[0])


def test_prompts_whose_scoring_failed_are_kept_first(tmp_path):
    write_step(tmp_path, 1, lambda step, p, m: random_text(p * 8 + m, 1_000), prompts=32)
    table = pq.read_table(samples_path(tmp_path, 1))
    rows = table.to_pylist()
    for row in rows:
        place = row["position"], row["member"]
        row["outcome/acc"] = {(5, 2): "timeout", (30, 7): "crash"}.get(place, "right")
        row |= {"score/model": 1.0, "outcome/model": "too_long" if place == (9, 0) else "graded"}
    content = unpacked(pack_step(type(table).from_pylist(rows), []))
    assert {105, 109, 130} == {prompt["prompt_index"] for prompt in content["prompts"][:3]}


def test_a_long_text_loses_its_middle_and_says_so(tmp_path):
    write_step(tmp_path, 1, lambda *_: "a" * 100_000 + "end", prompts=1, samples=2)
    response = unpacked(as_json(tmp_path)["packed"][1])["samples"]["response"][0]
    assert len(response) < TEXT_LIMIT + 60 and response.endswith("end")
    assert "92,003 characters left out" in response


def test_a_long_run_stays_below_its_limit_and_says_which_steps_it_shows(tmp_path):
    write_run(tmp_path, 20, prompts=2, samples=2)
    whole = as_json(tmp_path)
    limit = sum(map(len, whole["packed"].values())) // 3
    history = RunHistory(tmp_path, limit)
    history.read()
    run = history.as_json()
    assert sum(map(len, run["packed"].values())) <= limit
    assert run["packedEvery"] == 4 and sorted(run["packed"]) == [4, 8, 12, 16, 20]
    assert run["series"] == whole["series"], "charts lose nothing"


def test_a_hundred_steps_of_128_samples_stay_below_5_megabytes(tmp_path):
    write_run(tmp_path, 100, lambda step, p, m: random_text(step * 128 + p * 8 + m, 400))
    write_report(tmp_path / "report.html", open_runs([tmp_path]))
    assert 1e6 < (tmp_path / "report.html").stat().st_size < 5e6


def test_no_text_can_leave_its_place_in_the_page(tmp_path):
    write_step(tmp_path, 1, lambda *_: "</script><script>alert(1)</script>\0\u202e\u2028")
    (tmp_path / "config.yaml").write_text("name: '</script><!--'\n", encoding="utf-8")
    write_report(tmp_path / "report.html", open_runs([tmp_path]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("</script") == 4 == page.count("<script"), "those of page.html"
    assert "\0" not in page and "\u202e" not in page


@pytest.fixture
def said(caplog, monkeypatch):
    """What the logger says; a run of an earlier test may have cut it from the root."""
    monkeypatch.setattr(logging.getLogger("r1zero"), "propagate", True)
    caplog.set_level(logging.INFO, "r1zero")
    return caplog


@pytest.mark.parametrize("trouble", ["in the way", "disk full", "our bug"])
def test_trouble_with_the_report_is_a_warning(tmp_path, said, trouble, monkeypatch):
    write_run(tmp_path, 1)
    live = LiveReport(tmp_path, interval=1)
    if trouble == "in the way":
        (tmp_path / "report.html").mkdir()
    elif trouble == "disk full":
        monkeypatch.setattr(report.os, "replace", lambda *_: Path("/dev/full").write_text("a"))
    else:
        monkeypatch.setattr(report, "render", lambda runs: 1 // 0)
    live.after_step(1)
    live.finish()
    warnings = [record.getMessage() for record in said.records if record.levelno == logging.WARNING]
    assert (
        len(warnings) == 2
        and "was not written" in warnings[0]
        and "training goes on" in warnings[0]
    )
    assert not list(tmp_path.glob("*.partial"))


def test_writing_takes_one_percent_of_the_time_at_most(tmp_path, monkeypatch):
    now, written = [100.0], []

    def write(path, histories):
        written.append(now[0])
        now[0] += 0.5  # seconds that a writing takes

    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(report, "write_report", write)
    live = LiveReport(tmp_path, interval=2)
    for step in range(1, 1001):
        now[0] += 1.0  # seconds of a step
        live.after_step(step)
    assert len(written) > 15, "but it is written"
    assert 0.5 * len(written) / (now[0] - 100) < 0.0101
    live.finish()
    assert written[-1] == now[0] - 0.5, "the end does not wait"


def test_interval_0_means_at_the_end_only(tmp_path):
    write_run(tmp_path, 1)
    live = LiveReport(tmp_path, interval=0)
    live.after_step(1)
    assert not (tmp_path / "report.html").exists()
    live.finish()
    assert (tmp_path / "report.html").exists()


def tool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "report.py"), *arguments],
        cwd=cwd,
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_tool_reports_one_run_in_its_folder_and_several_beside_them(tmp_path):
    write_run(tmp_path / "a", 2)
    write_run(tmp_path / "b", 3, lambda *_: plain(1, 1, 1))
    assert tool("a", cwd=tmp_path).returncode == 0 and (tmp_path / "a" / "report.html").exists()
    done = tool("a", "b", cwd=tmp_path)
    assert done.returncode == 0 and "2 steps of a, 3 steps of b" in done.stdout, done.stderr
    assert (tmp_path / "comparison.html").exists()


def test_the_tool_refuses_what_is_no_run_with_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    done = tool("empty", cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "empty is no run folder" in done.stderr
    )
