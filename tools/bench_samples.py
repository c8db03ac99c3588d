"""Seconds that the samples of a step cost between two steps: on rank 0 alone, and on the replicas that
drew them.

    python tools/bench_samples.py --samples 256 --tokens 2000 --replicas 6

Synthetic samples of equal length and random tokens, by the tokenizer of --model (default: the tiny one).
One process, so a replica's seconds are those of a rank with a core of its own. Prints one JSON line:

    alone      one rank makes and writes the rows of all samples while all others wait
    prepare    a replica makes the rows of its share; it would wait for others meanwhile
    write      a replica writes its share when the advantages are known
    show       rank 0 joins the sums of all replicas and gives the files their name
    bytes      of the files of the step; of what a replica tells rank 0
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.config.keys import EMBEDDED
from r1zero.config.paths import user_path
from r1zero.data.prompts import decode, load_tokenizer
from r1zero.observe.sample_log import SampleLog
from r1zero.observe.sample_summary import join_summaries
from r1zero.run_folder.samples import SampleFiles, samples_path
from r1zero.types import Batch, Group, Outcome, Prompt, Sample, SampleSummary, Score

SIZE = 16  # samples of a prompt
STEP = 1


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2000, help="of a response")
    parser.add_argument("--replicas", type=int, default=6)
    parser.add_argument(
        "--model", type=user_path, default=EMBEDDED / "tiny" / "model", help="has a tokenizer"
    )
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    text_of = partial(decode, tokenizer, special=True)
    groups = _groups(args.samples, args.tokens, len(tokenizer))
    prompts = [group.prompt for group in groups]
    batch = Batch(STEP, 0, prompts, SIZE, args.samples)
    asked = {"samples": args.samples, "tokens": args.tokens, "replicas": args.replicas}
    print(json.dumps(asked | measure(batch, groups, args.replicas, text_of)))
    return 0


def measure(
    batch: Batch, groups: list[Group], replicas: int, text_of: Callable[[np.ndarray], str]
) -> dict[str, float]:
    """Let one rank do all, then each replica its share, the slowest of which counts."""
    with tempfile.TemporaryDirectory() as folder:
        alone, _ = _work(Path(folder), batch, groups, 1, text_of)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        found, summaries = _work(run, batch, groups, replicas, text_of)
        began = time.perf_counter()
        join_summaries(summaries)
        SampleFiles(replicas, 1, STEP).show(run, STEP)
        shown = time.perf_counter() - began
        path = samples_path(run, STEP)
        files = list(path.iterdir()) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
    return {
        "alone": sum(alone),
        "prepare": found[0],
        "write": found[1],
        "show": shown,
        "bytes": size,
        "summary_bytes": max(len(pickle.dumps(summary)) for summary in summaries),
    }


def _work(
    run: Path,
    batch: Batch,
    groups: list[Group],
    replicas: int,
    text_of: Callable[[np.ndarray], str],
) -> tuple[tuple[float, float], list[SampleSummary]]:
    """Seconds to prepare and to write, of the slowest replica, and what they tell."""
    files = SampleFiles(replicas, 1, STEP)
    advantages = np.ones((len(groups), SIZE))
    prepare = []
    write = []
    summaries = []
    for replica in range(replicas):
        log = SampleLog(files, replica, text_of, [], list(groups[0].samples[0].scores))
        log.add(batch, groups[replica::replicas])
        began = time.perf_counter()
        log.prepare(batch)
        prepared = time.perf_counter()
        log.write(batch, advantages, run)
        prepare.append(prepared - began)
        write.append(time.perf_counter() - prepared)
        assert log.unwritten is None, log.unwritten
        summary = log.take(batch)
        assert summary is not None
        summaries.append(summary)
    return (max(prepare), max(write)), summaries


def _groups(samples: int, tokens: int, vocabulary: int) -> list[Group]:
    random = np.random.default_rng(0)
    groups = []
    for position in range(samples // SIZE):
        drawn = []
        for _ in range(SIZE):
            ids = random.integers(0, vocabulary, tokens).astype(np.int32)
            reward = float(random.integers(2))
            scores = {"acc": Score(reward, Outcome(1 - int(reward)))}
            drawn.append(Sample(ids, np.zeros(tokens, np.float32), False, 0, scores, reward))
        prompt = Prompt(position, "What is 1+1?", np.zeros(200, np.int32), "2")
        groups.append(Group(position, prompt, drawn))
    return groups


if __name__ == "__main__":
    sys.exit(main())
