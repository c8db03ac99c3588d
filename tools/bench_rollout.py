#!/usr/bin/env python3
"""Measure the rollout engine, beside transformers' generate and the machine's own limits. Prints
one JSON line.

    python tools/bench_rollout.py --model 135m --prompts 16 --samples 4 --prompt-len 128 --lengths fixed:128 \\
        --dtype bf16 --threads 2 --repeats 3 --vs transformers --roofline

--model is a Hugging Face folder or a shape (135m, 0.5b, tiny; random weights). --lengths is
fixed:N, lognormal:MEAN:SIGMA (of the underlying normal; the mean is that of the lengths) capped at
--cap, or a file with one length a line. Lengths are forced: both systems draw exactly the same
number of tokens for each sample. Ours includes laying out the weights once, as after a publish.
Medians of --repeats, the two systems taking turns, after a warm-up of each that is not counted (all
of ours, a few tokens of theirs).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r1zero.errors import BadInput

if TYPE_CHECKING:  # torch is imported when the arguments are known to be good
    import torch

    from r1zero.rollout.decoder import Chunk, Extended

sys.path[0] = str(Path(__file__).resolve().parents[1])

SHAPES = {  # Hugging Face config keys
    "135m": dict(
        architectures=["LlamaForCausalLM"],
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "0.5b": dict(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="135m")
    parser.add_argument("--prompts", type=at_least_1, default=16)
    parser.add_argument("--samples", type=at_least_1, default=4)
    parser.add_argument("--prompt-len", type=at_least_1, default=128)
    parser.add_argument("--lengths", default="fixed:128")
    parser.add_argument("--cap", type=at_least_1, default=512)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=at_least_1, default=2)
    parser.add_argument("--repeats", type=at_least_1, default=3)
    parser.add_argument(
        "--max-running",
        type=at_least_1,
        default=None,
        help="rows of our engine; default all that fit",
    )
    parser.add_argument(
        "--max-tokens", type=at_least_1, default=10**6, help="KV budget of our engine, in tokens"
    )
    parser.add_argument("--vs", choices=("transformers",))
    parser.add_argument("--roofline", action="store_true")
    return parser.parse_args()


def at_least_1(text: str) -> int:
    """Read a count for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def draw_lengths(spec: str, count: int, cap: int) -> np.ndarray:
    """Forced response lengths, int [count]. BadInput for a spec that gives none."""
    kind, _, rest = spec.partition(":")
    try:
        if kind == "lognormal":
            mean, sigma = map(float, rest.split(":"))
            drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
            return np.clip(drawn.round(), 1, cap).astype(int)
        found = [
            int(word) for word in ([rest] if kind == "fixed" else Path(spec).read_text().split())
        ]
    except (OSError, ValueError) as error:
        raise BadInput(
            f"--lengths: {spec} is neither fixed:N, lognormal:MEAN:SIGMA nor a file with a length "
            f"a line ({error})"
        ) from None
    if min(found, default=0) < 1:
        raise BadInput(f"--lengths: {spec} must give lengths of at least 1, such as fixed:128")
    return np.resize(found, count)


def main() -> int:
    """Run the benchmark."""
    args = parse()
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        lengths = draw_lengths(args.lengths, args.prompts * args.samples, args.cap)
        model = Model(args)
    except BadInput as error:
        print(f"bench_rollout.py: {error}", file=sys.stderr)
        return 2
    result = protocol(args, lengths) | measure(args, model, lengths)
    result["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    rounded = {
        key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()
    }
    print(json.dumps(rounded))
    return 0


def protocol(args: argparse.Namespace, lengths: np.ndarray) -> dict[str, Any]:
    """What is measured."""
    names = ("model", "prompts", "samples", "prompt_len", "lengths", "dtype", "threads", "repeats")
    result = {name: getattr(args, name) for name in (*names, "max_running", "max_tokens")}
    result["tokens"] = int(lengths.sum())
    result["mean_length"] = float(lengths.mean())
    result["max_length"] = int(lengths.max())
    return result


def measure(args: argparse.Namespace, model: Model, lengths: np.ndarray) -> dict[str, float]:
    """Run the systems in turns, after a warm-up of each, and the machine's limits between them."""
    random = np.random.default_rng(1)
    shape = (args.prompts, args.prompt_len)
    prompts = random.integers(10, model.shape.vocab_size, shape, dtype=np.int32)
    ours = Ours(args, model, prompts, lengths)
    theirs = Theirs(args, model, prompts, lengths) if args.vs else None
    our_runs = []
    their_runs = []
    limits = []
    if args.roofline:
        limits.append(machine_limits(model.dtype))
    ours.run()
    if theirs:
        theirs.run(warm_up=True)
    for _ in range(args.repeats):
        our_runs.append(ours.run())
        if theirs:
            their_runs.append(theirs.run())
        if args.roofline:
            limits.append(machine_limits(model.dtype))
    result = median(our_runs, "")
    result["tokens_per_second"] = lengths.sum() / result["seconds"]
    if theirs:
        result |= median(their_runs, "transformers_")
        result["transformers_tokens_per_second"] = lengths.sum() / result["transformers_seconds"]
        result["ratio"] = result["transformers_seconds"] / result["seconds"]
    if args.roofline:
        result |= roofline(args, model, ours, result["decode_seconds"], limits)
    return result


def median(runs: list[dict], prefix: str) -> dict[str, float]:
    """The median of each figure."""
    result: dict[str, float] = {}
    for key in runs[0]:
        result[prefix + key] = float(statistics.median(run[key] for run in runs))
    return result


class Model:
    """The weights both systems run: a transformers model, and its shape."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import (
            AutoModelForCausalLM,
            LlamaConfig,
            LlamaForCausalLM,
            Qwen2Config,
            Qwen2ForCausalLM,
        )

        from r1zero.models.config import ModelConfig

        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
        if args.model in SHAPES:
            config = SHAPES[args.model]
            self.shape = ModelConfig.from_config(config)
            kinds = {
                "llama": (LlamaConfig, LlamaForCausalLM),
                "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            }
            make_config, make = kinds[self.shape.family]
            self.theirs = make(
                make_config(
                    **{key: value for key, value in config.items() if key != "architectures"}
                )
            )
            self.theirs = self.theirs.to(self.dtype).eval()
        else:
            self.shape = ModelConfig.from_folder(args.model)
            self.theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=self.dtype).eval()


class Ours:
    """The engine, one replica, no tensor parallelism."""

    def __init__(
        self, args: argparse.Namespace, model: Model, prompts: np.ndarray, lengths: np.ndarray
    ) -> None:
        import tempfile

        import torch

        from r1zero.models.params import FIRST, WHOLE, param_table
        from r1zero.rollout.decoder import Decoder
        from r1zero.rollout.engine import EngineLimits, NativeEngine
        from r1zero.rollout.interface import EngineListener, Sampling
        from r1zero.types import Batch, Prompt
        from r1zero.weights.open import open_weights

        budget = int(lengths.max())
        decoder = Decoder(
            model.shape, 1, None, model.dtype, torch.device("cpu"), args.prompt_len + budget
        )
        limits = EngineLimits(budget, args.max_tokens, args.max_running)
        self.engine = NativeEngine(decoder, (), limits)
        self.engine.listeners.append(EngineListener(on_step=self._count))
        self.target = self.engine.weights()
        with tempfile.TemporaryDirectory() as folder:
            model.theirs.save_pretrained(folder)
            weights = open_weights(folder, model.shape)
            for tensor, shard in weights.stream(
                param_table(model.shape), FIRST, WHOLE, model.dtype
            ):
                self.target.write(tensor, shard, WHOLE)
        self.sampling = Sampling(1.0, 1.0, 0, seed=0)
        texts = [Prompt(i, "", tokens, "") for i, tokens in enumerate(prompts)]
        self.batch = Batch(1, 0, texts, args.samples, args.prompts * args.samples)
        self.lengths = lengths
        self.budgets = lengths.reshape(args.prompts, args.samples)
        self.steps = 0

    def run(self) -> dict[str, float]:
        """One generation of the whole batch, with the layout of the weights inside the clock."""
        engine = self.engine
        extend = self.engine.decoder.extend
        spent = [0.0]
        self.steps = 0
        preempted = engine.preemptions

        def timed_extend(chunks: Sequence[Chunk]) -> list[Extended]:
            began = time.perf_counter()
            found = extend(chunks)
            spent[0] += time.perf_counter() - began
            return found

        # the clock goes around one method of this object
        engine.decoder.extend = timed_extend  # type: ignore[method-assign]
        began = time.perf_counter()
        self.target.commit(0)
        prepared = time.perf_counter()
        engine.submit(self.batch, range(len(self.batch.prompts)), self.sampling, self.budgets)
        groups = engine.collect(self.batch.everything)
        seconds = time.perf_counter() - began
        engine.decoder.extend = extend  # type: ignore[method-assign]
        assert [len(s.tokens) for g in groups for s in g.samples] == self.lengths.tolist()
        return {
            "seconds": seconds,
            "prepare_seconds": prepared - began,
            "prefill_seconds": spent[0],
            "decode_seconds": seconds - (prepared - began) - spent[0],
            "preemptions": engine.preemptions - preempted,
        }

    def _count(self) -> None:
        self.steps += 1


class Theirs:
    """transformers' generate as trainers call it: one padded batch, sampling, every copy of a
    prompt prefilled."""

    def __init__(
        self, args: argparse.Namespace, model: Model, prompts: np.ndarray, lengths: np.ndarray
    ) -> None:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        self.model = model.theirs
        self.lengths = lengths
        start = args.prompt_len
        self.inputs = torch.from_numpy(np.repeat(prompts, args.samples, axis=0).astype(np.int64))

        class Ends(StoppingCriteria):
            """Each row is done at its own length."""

            def __call__(self, ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
                return torch.from_numpy(ids.shape[1] - start >= lengths)

        self.criteria = StoppingCriteriaList([Ends()])

    def run(self, warm_up: bool = False) -> dict[str, float]:
        """One generation of the whole batch, or of its first tokens."""
        import torch

        if warm_up:
            longest = 4
        else:
            longest = int(self.lengths.max())
        began = time.perf_counter()
        with torch.no_grad():
            found = self.model.generate(
                self.inputs,
                attention_mask=torch.ones_like(self.inputs),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=longest,
                stopping_criteria=self.criteria,
                pad_token_id=0,
                eos_token_id=None,
            )
        assert found.shape[1] == self.inputs.shape[1] + longest
        return {"seconds": time.perf_counter() - began}


def roofline(
    args: argparse.Namespace,
    model: Model,
    ours: Ours,
    decode_seconds: float,
    limits: list[tuple[float, float]],
) -> dict[str, float]:
    """The least time of the decode phase on this machine, and the fraction of it reached.

    A step must read all weights and the live keys and values once (bytes / measured read bandwidth)
    and multiply (flops / measured peak of a large product); the two can overlap, so the least is
    the larger, summed over steps. The machine's limits are the best of those measured before,
    between and after the runs.
    """
    size = model.dtype.itemsize
    shape = model.shape
    bandwidth, peak = (max(measured) for measured in zip(*limits, strict=True))
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size
    products = shape.num_parameters - (
        0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    )
    least = 0.0
    running = args.max_running or len(ours.lengths)
    # Rows in flight when samples start in order as rows get free.
    for rows, tokens in in_flight(ours.lengths, running, args.prompt_len, args.samples):
        moved = products * size + tokens * per_token
        multiplied = (
            2 * products * rows + 4 * shape.num_layers * shape.num_heads * shape.head_dim * tokens
        )
        least += max(moved / bandwidth, multiplied / peak)
    return {
        "read_gigabytes_per_second": bandwidth / 1e9,
        "peak_gigaflops": peak / 1e9,
        "decode_steps": ours.steps,
        "roofline_decode_seconds": least,
        "roofline_fraction": least / decode_seconds,
    }


def in_flight(
    lengths: np.ndarray, running: int, prompt_len: int, group: int
) -> list[tuple[int, int]]:
    """(rows, live tokens, shared prompts counted once) of each decoding step."""
    waiting = list(enumerate(lengths))
    rows: list[list[int]] = []
    steps = []
    while waiting or rows:
        while waiting and len(rows) < running:
            number, length = waiting.pop(0)
            if length > 1:
                rows.append([number // group, 1, length])
        if rows:
            shared = len({row[0] for row in rows}) * prompt_len
            steps.append((len(rows), shared + sum(row[1] for row in rows)))
        for row in rows:
            row[1] += 1
        rows = [row for row in rows if row[1] < row[2]]
    return steps


def machine_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of summing a large array, flops a second of a large square product."""
    import torch

    array = torch.ones(64 * 2**20, dtype=torch.float32)
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return array.numel() * 4 / best(array.sum), 2 * 2048**3 / best(lambda: a @ b)


def best(call: Callable[[], object]) -> float:
    """Least seconds of several calls."""
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
