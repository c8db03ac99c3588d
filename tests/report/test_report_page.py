"""report.html in headless Chromium: drawn, searchable, readable, silent; of a tiny run and of a
real one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axe_playwright_python.sync_playwright import Axe
from support import worlds
from support.browser import DESKTOP, PHONE, opened
from support.report_runs import add_model, append, samples_path, write_run, write_step

from r1zero.report.page import open_runs, write_report

STEPS, PROMPTS = 4, 16  # every step draws the same prompts
# SmolLM2-135M, 60 steps: docs/results.md
REAL = Path(__file__).resolve().parents[2] / "docs" / "smollm2_mawps"
REAL_STEPS, REAL_EVALUATIONS = 60, (0, 20, 40, 60)
HOSTILE = (
    "</script><img src=x onerror=alert(1)><b>bold</b> \0 \u202etxet\u202c \u2028 $\\frac{a}{b}$ "
    "<|im_end|>"
)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A real run of 4 ranks, with the report that it wrote."""
    home = tmp_path_factory.mktemp("report")
    pq.write_table(pq.read_table(tiny / "train.parquet").slice(0, PROMPTS), home / "train.parquet")
    return worlds.run(
        home / "run",
        4,
        "tiny",
        [
            f"training.train_iters={STEPS}",
            "training.report_interval=2",
            f"actor_rollout.data_path={home}/train.parquet",
        ],
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The report of the real run."""
    path = tmp_path_factory.mktemp("real") / "report.html"
    write_report(path, open_runs([REAL]))
    return path


@pytest.fixture
def page(browser, run):
    with opened(browser, run / "report.html") as found:
        yield found.page


def count(page) -> str:
    # Typing is waited for; a clock of the page's own rings after the one that waits there.
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    return page.inner_text(".count")


def rows(run: Path, steps: int = STEPS, evaluations: tuple[int, ...] = (0, STEPS)) -> list[dict]:
    """All samples that the run left, those of the evaluations too."""
    training = [
        row | {"step": step} for step in range(1, steps + 1) for row in worlds.samples(run, step)
    ]
    return training + [row | {"step": step} for step in evaluations for row in held_out(run, step)]


def held_out(run: Path, step: int) -> list[dict]:
    return pq.read_table(run / "evaluation" / f"step_{step:06d}.parquet").to_pylist()


def violations(page, wide: bool = True) -> list[str]:
    """What axe objects to. On a narrow screen it cannot judge the colours of a table that is
    scrolled out of sight; on a `wide` one nothing may stay undecided."""
    options = {
        "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
        "resultTypes": ["violations", "incomplete"],  # of what passes, one element for each rule
    }
    found = Axe().run(page, options=options).response
    assert any(rule["id"] == "color-contrast" for rule in found["passes"]), "texts were measured"
    undecided = [rule for rule in found["incomplete"] if wide and rule["id"] == "color-contrast"]
    return [
        f"{rule['id']}: {node['target']} {node['failureSummary']}"
        for rule in found["violations"] + undecided
        for node in rule["nodes"]
    ]


def ink(page) -> list[int]:
    """Coloured pixels of each chart."""
    return page.evaluate("""() => [...document.querySelectorAll("canvas")].map((canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let found = 0;
        for (let i = 0; i < data.length; i += 4) found += data[i + 3] > 40;
        return found;
    })""")


def chart(page, title: str):
    return page.locator("article.chart", has=page.get_by_role("heading", name=title, exact=True))


def picture(found) -> str:
    return found.locator("canvas").evaluate("canvas => canvas.toDataURL()")


def test_a_run_leaves_a_page_that_draws_itself_and_asks_nobody(browser, run):
    with opened(browser, run / "report.html") as found:
        found.page.get_by_text("more metrics").click()
        assert found.complaints == []
        assert [address for address in found.requests if not address.startswith("data:")] == [
            (run / "report.html").resolve().as_uri()
        ]
        drawn = ink(found.page)
        assert len(drawn) >= 15 and min(drawn) > 300, drawn
        assert f"step {STEPS} of {STEPS}" in found.page.inner_text("#status")


def test_the_real_run_draws_itself_and_is_searched(browser, real):
    assert real.stat().st_size < 5e6 * REAL_STEPS / 100
    samples = rows(REAL, REAL_STEPS, REAL_EVALUATIONS)
    with opened(browser, real) as found:
        page = found.page
        assert f"step {REAL_STEPS} of {REAL_STEPS}" in page.inner_text("#status")
        drawn = ink(page)
        assert len(drawn) >= 15 and min(drawn) > 300, drawn
        assert count(page) == f"{len(samples):,} samples"
        page.get_by_label("Step from", exact=True).fill("50")
        page.get_by_label("acc", exact=True).select_option("right")
        late = [row for row in samples if row["step"] >= 50 and row["outcome/acc"] == "right"]
        assert count(page).startswith(f"{len(late)} of ") and len(late) > 20
        page.get_by_role("searchbox").fill("HOW MANY")
        asked = [
            row
            for row in late
            if "how many" in row["prompt"].split("<|im_start|>user")[-1].lower()
            or "how many" in row["response"].lower()
        ]
        assert count(page).startswith(f"{len(asked)} of ") and 0 < len(asked) < len(late)
        page.get_by_role("button", name="Clear").click()
        page.get_by_label("Problems", exact=True).select_option("heldOut")
        page.locator(".entry").first.click()
        page.get_by_role("button", name="side by side over 4 steps").click()
        assert page.locator(".board .column h4").all_inner_texts() == [
            f"after step {step}" for step in REAL_EVALUATIONS
        ]
        assert found.complaints == []
        assert [address for address in found.requests if not address.startswith("data:")] == [
            real.as_uri()
        ]


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_the_real_run_meets_wcag_aa(browser, real, size, scheme):
    with opened(browser, real, size, scheme) as found:
        assert violations(found.page, wide=size == DESKTOP) == []
        found.page.get_by_role("tab", name="By question").click()
        assert violations(found.page, wide=size == DESKTOP) == []
        assert found.page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_pointing_at_a_step_reads_all_charts_there(page, run):
    expected = worlds.metrics(run)
    plot = chart(page, "KL to the reference").locator(".u-over")
    plot.scroll_into_view_if_needed()
    # step 2 of 1 to 4
    plot.hover(position={"x": plot.bounding_box()["width"] * 1.02 / (STEPS - 1), "y": 40})
    steps = set(page.locator(".grid .chart:has(canvas) .at").all_inner_texts())
    assert steps == {"step 2"}
    assert chart(page, "Right answers").locator(".value").all_inner_texts() == [
        f"{expected[1][f'reward/{rule}/right']:.1%}" for rule in ("acc", "format")
    ]
    assert chart(page, "Response length").locator(".value").first.inner_text() == (
        f"{expected[1]['response_length/mean']:.1f}"
    )
    page.mouse.move(0, 0)
    assert chart(page, "Right answers").locator(".value").all_inner_texts() == [
        f"{expected[-1][f'reward/{rule}/right']:.1%}" for rule in ("acc", "format")
    ]


def test_the_keyboard_reads_values_and_walks_the_samples(page, run):
    expected = worlds.metrics(run)
    chart(page, "Right answers").locator(".plot").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    said = page.inner_text("#announce")
    assert said.startswith("step 3: ") and f"acc {expected[2]['reward/acc/right']:.1%}" in said
    assert chart(page, "Reward").locator(".at").inner_text() == "step 3"
    page.keyboard.press("Escape")
    assert chart(page, "Reward").locator(".at").inner_text() == ""
    page.locator(".entry").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert page.locator('.entry[aria-pressed="true"]').count() == 1


def test_smoothing_and_hiding_change_what_is_drawn(page):
    reward = chart(page, "Reward")
    plain = picture(reward)
    page.get_by_label("Strong", exact=True).check()
    smooth = picture(reward)
    page.get_by_label("Off", exact=True).check()
    assert plain == picture(reward) != smooth
    reward.get_by_role("button", name="acc").click()
    assert plain != picture(reward)


def test_filters_and_search_find_what_the_files_hold(page, run):
    samples = rows(run)
    assert count(page) == f"{len(samples):,} samples"
    page.get_by_role("searchbox").fill("i GUESS")
    guesses = [row for row in samples if "i guess" in row["response"].lower()]
    assert count(page).startswith(f"{len(guesses)} of ") and page.locator("mark").count() > 0
    page.get_by_label("Step from", exact=True).fill("2")
    page.get_by_label("Step to", exact=True).fill("3")
    later = [row for row in guesses if 2 <= row["step"] <= 3]
    assert count(page).startswith(f"{len(later)} of ")
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("acc", exact=True).select_option("right")
    page.get_by_label("Reward from", exact=True).fill("0.1")
    right = [row for row in samples if row["outcome/acc"] == "right" and row["reward"] >= 0.1]
    assert len(right) > 0 and count(page).startswith(f"{len(right)} of ")
    page.get_by_role("searchbox").fill("nothing says this")
    assert count(page).startswith("0 of ") and "No sample passes" in page.inner_text(".list")


def test_a_sample_is_shown_with_its_parts_scores_and_reasons(page, run):
    page.get_by_label("acc", exact=True).select_option("wrong")
    page.get_by_label("format", exact=True).select_option("right")
    count(page)
    page.locator(".entry").first.click()
    detail, question_text = page.locator(".detail"), page.inner_text(".detail .question-text")
    step = int(detail.locator("dd").first.inner_text())
    answers = [row for row in rows(run) if row["step"] == step and question_text in row["prompt"]]
    thought, answer = (
        detail.locator(".think .text").inner_text(),
        detail.locator(".answer .text").inner_text(),
    )
    assert question_text.startswith("What is ") and "\n" not in question_text, (
        "the template is taken away"
    )
    assert any(
        row["response"].startswith(f"<think>{thought}</think><answer>{answer}</answer>")
        for row in answers
    )
    assert "differs from the ground truth" in detail.inner_text()
    assert detail.locator(".truth").inner_text() == answers[0]["ground_truth"]


def test_answers_to_one_question_stand_side_by_side_by_step(page, run):
    page.locator(".entry").first.click()
    asked = page.inner_text(".detail .question-text")
    page.get_by_role("button", name="side by side over 4 steps").click()
    columns = page.locator(".board .column")
    assert columns.locator("h4").all_inner_texts() == [
        f"step {step}" for step in range(1, STEPS + 1)
    ]
    for step in range(1, STEPS + 1):
        wanted = [row for row in worlds.samples(run, step) if asked in row["prompt"]]
        shown = columns.nth(step - 1).locator(".reward").all_inner_texts()
        rewards = sorted((row["reward"] for row in wanted), reverse=True)
        assert [float(text.replace("\u2212", "-")) for text in shown] == rewards
    tops = {columns.nth(i).bounding_box()["y"] for i in range(STEPS)}
    assert len(tops) == 1, "beside one another"


def test_held_out_problems_are_shown_before_and_after(page, run):
    entries = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    shown = page.locator(".held-out tbody tr").all_inner_texts()
    assert len(shown) == 2 and [
        f"{entry['pass@1']:.1%}" in row for entry, row in zip(entries, shown, strict=True)
    ]
    page.get_by_label("Problems", exact=True).select_option("heldOut")
    assert count(page).startswith(f"{2 * len(held_out(run, 0))} of ")
    page.locator(".entry").first.click()
    asked = page.inner_text(".detail .question-text")
    page.get_by_role("button", name="side by side over 2 steps").click()
    columns = page.locator(".board .column")
    assert columns.locator("h4").all_inner_texts() == ["after step 0", f"after step {STEPS}"]
    after = next(row for row in held_out(run, STEPS) if asked in row["prompt"])
    assert columns.nth(1).locator(".part .text").first.inner_text() in after["response"]


def test_the_timeline_shows_who_worked_when(page, run):
    page.get_by_label("Earlier step").click()
    assert "step 3" in page.inner_text(".timeline .at")
    assert page.locator(".rank .who b").all_inner_texts() == ["rollout", "rollout", "ref", "train"]
    spans = worlds.spans(run, 3)
    began, ended = min(span[2] for span in spans), max(span[3] for span in spans)
    updates = [start for rank, name, start, _ in spans if (rank, name) == (0, "update")]
    wanted = sorted((start - began) / (ended - began) for start in updates)
    bars = page.locator(".rank", has_text="train").locator(".phase-update")
    shown = sorted(bars.evaluate_all("bars => bars.map((bar) => parseFloat(bar.style.left) / 100)"))
    assert shown == pytest.approx(wanted, abs=1e-3) and len(shown) == 2


# light on a desktop: the real run, and several runs
@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "dark"), (PHONE, "dark")])
def test_every_text_and_control_meets_wcag_aa(browser, run, size, scheme):
    with opened(browser, run / "report.html", size, scheme) as found:
        assert found.page.evaluate("document.documentElement.dataset.theme") == scheme
        assert violations(found.page, wide=size == DESKTOP) == []
        found.page.get_by_role("tab", name="By question").click()
        assert violations(found.page, wide=size == DESKTOP) == []


def test_on_a_phone_nothing_is_cut_off_and_one_pane_shows_at_a_time(browser, run):
    with opened(browser, run / "report.html", PHONE) as found:
        page = found.page
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        assert not page.locator(".detail").is_visible()
        page.locator(".entry").nth(1).click()
        assert page.locator(".detail").is_visible() and not page.locator(".list").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        page.get_by_role("button", name="Back to the list").click()
        assert page.locator(".list").is_visible() and not page.locator(".detail").is_visible()


def test_hostile_texts_harm_nothing_and_are_shown_as_they_are(browser, tmp_path):
    texts = [HOSTILE, "x" * 100_000, "<think>never closed", "no opening</think>", "", "\\boxed{"]
    write_step(tmp_path, 1, lambda step, p, m: texts[p], prompts=6, samples=2)
    (tmp_path / "config.yaml").write_text("name: '</script><b>config</b>'\n")
    rows = pq.read_table(samples_path(tmp_path, 1)).to_pylist()
    rows[-1] |= {"outcome/acc": "crash", "failure": "acc: <b>no</b> reason"}
    pq.write_table(pa.Table.from_pylist(rows), samples_path(tmp_path, 1))
    write_report(tmp_path / "report.html", open_runs([tmp_path]))
    with opened(browser, tmp_path / "report.html") as found:
        page = found.page
        page.get_by_label("acc", exact=True).select_option("crash")
        assert count(page) == "1 of 12 samples" and "<b>no</b> reason" in page.inner_text(
            ".detail .why"
        )
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("searchbox").fill("onerror")
        assert count(page) == "2 of 12 samples"
        shown = page.inner_text(".detail .response")
        assert (
            "</script><img src=x onerror=alert(1)><b>bold</b>" in shown
            and "$\\frac{a}{b}$" in shown
        )
        assert "\u2400" in shown and "\u27e6RLO\u27e7" in shown and "\u202e" not in shown
        assert (
            page.locator("main img").count() == 0
            and page.inner_text("h1") == "</script><b>config</b>"
        )
        for query, kind in (("never closed", "think"), ("no opening", "think")):
            page.get_by_role("searchbox").fill(query)
            count(page)
            assert page.locator(f".detail .{kind} .text").inner_text() == query
        page.get_by_role("searchbox").fill("characters left out")
        assert count(page) == "2 of 12 samples"
        assert found.complaints == []


def test_old_runs_without_samples_or_spans_are_shown_as_far_as_they_go(browser, tmp_path):
    for step in (1, 2, 3):
        kl = float("nan") if step == 2 else 0.1
        append(tmp_path / "metrics.jsonl", {"step": step, "kl": kl, "old/metric": step})
    write_report(tmp_path / "report.html", open_runs([tmp_path]))
    with opened(browser, tmp_path / "report.html") as found:
        assert found.complaints == []
        assert len(ink(found.page)) == 1 and "Not recorded: reward," in found.page.inner_text(
            "#learning"
        )
        assert "left no samples" in found.page.inner_text("#samples")
        assert "No spans were recorded" in found.page.inner_text(".timeline")
        assert "no config.yaml" in found.page.inner_text("#configuration")


def test_before_the_first_step_the_page_says_so(browser, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    write_report(tmp_path / "report.html", open_runs([tmp_path]))
    with opened(browser, tmp_path / "report.html") as found:
        assert found.complaints == [] and "No step is finished yet" in found.page.inner_text("main")


def test_several_runs_are_laid_over_one_another(browser, run, tmp_path):
    write_run(tmp_path / "other", 9)
    write_step(tmp_path / "other", 8)  # resumed
    write_report(tmp_path / "both.html", open_runs([run, tmp_path / "other"]))
    with opened(browser, tmp_path / "both.html") as found:
        page = found.page
        assert found.complaints == [] and violations(page) == []
        assert page.locator(".figures tbody th").first.inner_text() == "run"
        kl = chart(page, "KL to the reference")
        assert kl.locator(".label").all_inner_texts() == ["run", "other"]
        both = picture(kl)
        page.get_by_label("other", exact=True).uncheck()
        assert picture(kl) != both
        page.get_by_label("Run", exact=True).select_option(label="other")
        assert count(page) == f"{8 * 128:,} of {len(rows(run)) + 8 * 128:,} samples"


def model_run(folder: Path, steps: int = 6) -> Path:
    """A run in which the reward model likes long answers better and better, right or not, and whose
    right answers become fewer."""
    for step in range(1, steps + 1):
        numbers = {
            "reward/model": 0.5 * step,
            "reward/model/std": 1.0,
            "reward/model/correlation/acc": 0.5 - 0.2 * step,
            "reward/model/length_correlation": 0.1 * step,
            "reward/model/too_long": 1 / 128,
            "reward/acc/right": 0.8 - 0.1 * step,
        }
        write_step(folder, step, **numbers)
        add_model(folder, step, liked)
    (folder / "config.yaml").write_text("name: liked\n")
    return folder


def liked(step: int, position: int, member: int) -> float | None:
    return None if (position, member) == (0, 0) else float(step * member)


def test_a_reward_model_stands_beside_the_rules_and_against_length(browser, tmp_path):
    folder = model_run(tmp_path / "liked")
    write_report(folder / "report.html", open_runs([folder]))
    with opened(browser, folder / "report.html") as found:
        page = found.page
        assert found.complaints == [] and violations(page) == []
        titles = page.locator("#learning .chart h3").all_inner_texts()
        at = titles.index("Right answers")
        assert titles[at + 1 : at + 4] == [
            "Reward model",
            "Reward model by length",
            "Agreement of the reward model",
        ]
        charts = [chart(page, title) for title in titles[at : at + 4]]
        tops = {each.bounding_box()["y"] for each in charts[:2]}
        assert len(tops) == 1, "side by side"
        labels = [each.locator(".label").all_inner_texts() for each in charts]
        values = [each.locator(".value").all_inner_texts() for each in charts]
        assert labels[0] == ["acc"] and values[0] == ["20.0%"], "the model is no rule"
        assert labels[1] == ["mean", "right", "wrong", "spread"]
        # Members 1, 3, 5 and 7 are right; of the others one of 16 groups lacks its 0.
        wrong = 6 * (16 * (2 + 4 + 6)) / (16 * 4 - 1)
        assert values[1] == ["3.00", "24.00", f"{wrong:.2f}", "1.00"]
        assert labels[2] == ["shortest", "2nd quarter", "3rd quarter", "longest"]
        means = [float(value) for value in values[2]]
        assert means == sorted(means) and means[3] == pytest.approx(6 * 6.5, abs=0.5)
        assert labels[3] == ["acc", "response length"] and values[3] == ["\u22120.70", "0.60"]
        assert chart(page, "Reward").locator(".label").all_inner_texts() == ["reward", "acc"]
        assert "Model score" in page.locator(".tile dt").all_inner_texts()
        page.get_by_label("model", exact=True).select_option("too_long")
        assert count(page) == f"6 of {6 * 128} samples"
        why = page.locator(".detail .scores tr", has_text="model").inner_text()
        assert "! too long" in why and "the reward model has 512 positions" in why


def test_a_run_without_a_reward_model_has_nothing_of_one(browser, tmp_path):
    folder = write_run(tmp_path / "rules", 2)
    write_report(folder / "report.html", open_runs([folder]))
    with opened(browser, folder / "report.html") as found:
        assert "eward model" not in found.page.inner_text("#learning")


def test_steps_at_which_the_reference_was_reset_are_marked(browser, tmp_path):
    pictures = []
    for interval in ("null", "4"):
        folder = write_run(tmp_path / interval, 9)
        text = (folder / "config.yaml").read_text()
        text += f"actor_rollout_ref: {{ref: {{reset_interval: {interval}}}}}\n"
        (folder / "config.yaml").write_text(text)
        write_report(folder / "report.html", open_runs([folder]))
        with opened(browser, folder / "report.html") as found:
            assert found.complaints == []
            assert ("reference reset 2 times" in found.page.inner_text("#status")) == (
                interval == "4"
            )
            pictures.append(picture(chart(found.page, "KL to the reference")))
    assert pictures[0] != pictures[1]


def test_a_hundred_steps_open_quickly(browser, tmp_path):
    write_run(tmp_path, 100)
    write_report(tmp_path / "report.html", open_runs([tmp_path]))
    with opened(browser, tmp_path / "report.html") as found:
        page = found.page
        assert found.complaints == [] and count(page) == "12,800 samples"
        page.get_by_role("searchbox").fill("step 77, member 3<")
        assert count(page) == "16 of 12,800 samples"
        assert page.evaluate("performance.now()") < 15_000
        page.get_by_role("tab", name="By question").click()
        assert page.locator(".board .column").count() == 100


def test_named_data_sets_and_their_scores_are_told_apart(browser, tmp_path):
    """Two evaluation sets, and a training set with a reward function that scores no other."""
    folder = write_run(tmp_path / "run", 1)
    scores = {"pass@1": 0.25, "hard/pass@1": 0.75, "hard/reward/acc/right": 0.5}
    append(folder / "evaluation.jsonl", {"step": 1, **scores})
    path = samples_path(folder, 1)
    written = pq.read_table(path).to_pylist()
    own = "score/mine.runs", "outcome/mine.runs"
    for row in written:
        is_code = row["position"] == 0
        row["source"] = "code" if is_code else "math"
        row |= dict(zip(own, (1.0, "right") if is_code else (None, None), strict=True))
    pq.write_table(pa.Table.from_pylist(written), path)
    for place in (folder / "evaluation", folder / "evaluation" / "hard"):
        place.mkdir()
        pq.write_table(pa.Table.from_pylist(written[:8]), place / "step_000001.parquet")
    write_report(folder / "report.html", open_runs([folder]))
    with opened(browser, folder / "report.html") as found:
        assert found.complaints == []
        told = found.page.locator(".held-out tbody tr").all_inner_texts()
        assert len(told) == 2
        assert told[0].startswith("step 1") and "25.0%" in told[0]
        assert told[1].startswith("hard, step 1") and "75.0%" in told[1]
        found.page.get_by_label("Problems", exact=True).select_option("training")
        assert count(found.page).startswith(f"{len(written)} of ")
        found.page.get_by_label("mine.runs", exact=True).select_option("right")
        assert count(found.page).startswith("8 of ")
        found.page.locator(".entry").first.click()
        assert "code" in found.page.inner_text(".detail .facts")
        found.page.get_by_label("Problems", exact=True).select_option("heldOut")
        entries = found.page.locator(".entry").all_inner_texts()
        assert sum("held out (hard)" in text for text in entries) == len(entries) / 2 == 8
