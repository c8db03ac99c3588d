"""Throws random and hostile answers at the reward executor: none may be called right, hang, or be
late.

    python tools/fuzz_rewards.py [--count 100000] [--seed 0] [--deadline 2] [--workers 2]

Right answers are odd enough that no hostile answer is right by chance. Prints a table by kind of
input; exit code 1 when a verdict, a time or a worker's memory is out of bounds.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1zero.reward.config import RewardConfig
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.types import RewardInput

NAMES = ["acc", "base_acc", "format", "strict_format", "reasoning_steps", "repetition", "overlong"]
LATE_SECONDS = 1.0  # beyond the deadline
MEMORY_MEGABYTES = 512  # that a worker may grow by
WORKER_MEGABYTES = 200  # of a worker with sympy loaded

GOLDS = [
    "7368787",
    r"\frac{104729}{7919}",
    "0.7368787",
    r"\sqrt{104729}",
    "(7919,104729)",
    r"[7919,\infty)",
    r"\{7919,104729\}",
    "x^2+7919x+104729",
    "y=7919x",
    r"7919\pi",
    r"\begin{pmatrix}7919\\104729\end{pmatrix}",
    r"\text{Zanzibar}",
    "x>7919",
    r"104729^\circ",
    "7919+104729i",
]
SOUP = (
    r"\frac{ \sqrt{ \left( \right) \boxed{ \text{ \binom{ \sum \int \prod \lim \infty \pi \le \ne \cup "
    r"\cap \in \to \begin{pmatrix} \end{pmatrix} \\ & $ $$ \( \) \[ \] { } ( ) [ ] ^ _ ^{ _{ + - * / = < "
    r"> ! | , . ; : % # ~ ' x y z n i e sin cos log 0 1 2 3 10 .5 1e9 \cdot \times \pm \sin \log_ "
    r"\overline{ \mathbb{R} \% \$ \{ \} \fbox{ and or cm \circ \dots "
    "<think> </think> <answer> </answer>"
).split()
CODE = [
    "__import__('os').system('sleep 60')",
    "eval('9**9**9')",
    "import sys; sys.exit(0)",
    "while True: pass",
    "[x for x in range(10**9)]",
    "lambda: (yield)",
    "os.kill(os.getppid(), 9)",
    "Symbol('x')**Integer(10)**10**10",
    "open('/dev/zero').read()",
    "'a' * 10**10",
    "def f(): return f()",
    "print(f'{9**9**9}')",
    "\\input{/etc/passwd}",
]
TOWERS = [
    "9^{9^{9^{%d}}}",
    "2^{2^{%d}}",
    "10^{10^{%d}}",
    "%d!!!!",
    "(%d!)!",
    r"\binom{10^{%d}}{10^8}",
    r"7^{-9^{%d}}",
    r"\sum_{n=1}^{10^{%d}} \frac{1}{n}",
    r"\prod_{n=1}^{10^{%d}} n",
    r"\int_0^1 x^{x^{x^{%d}}} dx",
    "(x+1)^{10^{%d}}",
    r"\sqrt[10^{%d}]{2^{10^9}}",
    r"\log_{10^{%d}} 9^{9^9}",
    r"(1+\frac{1}{10^{%d}})^{10^{10}}",
    "1e%d99999",
    r"\sin(10^{10^{%d}})",
    r"\left(\frac{x^{99}-1}{x-1}\right)^{%d99}",
    r"(a+b+c+d+e+f+g)^{%d0}",
    r"0.\overline{%d}",
]
BAIT = [
    "a",
    "1",
    "1,",
    " ",
    "(",
    "-",
    "\\text{",
    "\\ ",
    "$",
    "0",
    "1 ",
    "\\frac1",
    ".",
    "and ",
    "x=",
    "{}",
    "\\,",
    "^",
    "cm ",
    "\\left(",
    "1/",
    "%",
    "'",
    "\t",
    "\\\\",
    "**",
    "1e1",
    "\u00bd",
    "+-",
    "||",
    "\\boxed{",
    "</answer>",
    "Step 1:",
]
MARKS = (
    "\u202e\u202d\u200b\u200f\u2066\u2069\ufeff\u0301"
    "\u0000\u001b\u0085\u2028\ud800\udfff\U0001f600\u0660\uff15\u00b2"
)


def unbalanced(r: random.Random) -> str:
    return "".join(r.choices("{}()[]\\$|", k=r.randint(1, 200)))


def tower(r: random.Random) -> str:
    return r.choice(TOWERS) % r.randint(3, 99)


def nested(r: random.Random) -> str:
    before, after = r.choice(
        [
            ("{", "}"),
            ("(", ")"),
            (r"\frac{1}{", "}"),
            (r"\sqrt{", "}"),
            ("x^{", "}"),
            ("-", ""),
            (r"\left(", r"\right)"),
            (r"\boxed{", "}"),
            (r"\text{", "}"),
            ("|", "|"),
            ("[1,", "]"),
        ]
    )
    depth = int(10 ** r.uniform(0.5, 4))
    return before * depth + "1" + after * r.choice([depth, depth, depth - 1])


def control(r: random.Random) -> str:
    letters = ["\x00", "\x07", "\x1b[2J", "\x7f", "\r", "\x0b", "5", "x"]
    return "".join(r.choice(letters) for _ in range(r.randint(1, 60)))


def huge_text(r: random.Random) -> str:
    piece = r.choice(
        ["5", "5,", "x+", "{", "\\boxed{1}", "\n", "a b ", "\u6211", "\\frac{1}{2}+", "1/"]
    )
    return piece * (r.choice([10**4, 10**5, 10**6]) // len(piece))


def marks(r: random.Random) -> str:
    return "".join(r.choice([*MARKS, "5", "x", "+", "1"]) for _ in range(r.randint(1, 80)))


def code(r: random.Random) -> str:
    return r.choice(CODE)


def bait(r: random.Random) -> str:
    return r.choice(BAIT) * int(10 ** r.uniform(1, 4.5)) + r.choice(["", "!", "}", "x", ")"])


def soup(r: random.Random) -> str:
    return r.choice(["", " "]).join(r.choices(SOUP, k=r.randint(1, 60)))


def noise(r: random.Random) -> str:
    size = r.randint(1, 100)
    return "".join(chr(r.choice([r.randint(0, 127), r.randint(0, 0x10FFFF)])) for _ in range(size))


def many(r: random.Random) -> str:
    size = int(10 ** r.uniform(0, 2.3))
    row = [str(r.randint(-9, 9)) for _ in range(size)]
    matrix = r"\begin{pmatrix}" + r"\\".join(["&".join(row)] * min(size, 20)) + r"\end{pmatrix}"
    return r.choice(
        [
            r"\{" + ",".join(row) + r"\}",
            ",".join(row),
            matrix,
            r"\cup".join(f"[{a},{a}1)" for a in row),
            "=".join(row),
            "+".join(f"x_{a}" for a in row),
            "<".join(row),
            r"\pm".join(row),
            r" \text{ or } ".join(f"x={a}" for a in row),
        ]
    )


def digits(r: random.Random) -> str:
    text = "".join(r.choices("0123456789", k=int(10 ** r.uniform(1, 4))))
    form = r.choice(
        ["{}", "0.{}", "-{}", r"\frac{{{}}}{{3}}", "1e{}", "{}e{}", r"\sqrt{{{}}}", "{}%", "1/{}"]
    )
    return form.replace("{}", text)


def near(r: random.Random) -> str:
    """A right answer with one digit or letter changed."""
    gold = r.choice(GOLDS)
    at = r.choice([i for i, letter in enumerate(gold) if letter.isdigit()] or [len(gold) - 2])
    return gold[:at] + ("1" if gold[at] != "1" else "3") + gold[at + 1 :]


KINDS: list[Callable[[random.Random], str]] = [
    unbalanced,
    tower,
    nested,
    control,
    huge_text,
    marks,
    code,
    bait,
    soup,
    noise,
    many,
    digits,
    near,
]
WEIGHTS = [10, 1, 6, 8, 1, 10, 5, 8, 20, 10, 8, 6, 7]  # towers mostly end at the deadline


def hostile(seed: int, number: int) -> tuple[str, RewardInput]:
    """Return input `number` of a seed, and its kind."""
    r = random.Random(f"{seed} {number}")
    [kind] = r.choices(KINDS, WEIGHTS)
    text = kind(r)
    form = r.choice(
        [
            r"\boxed{%s}",
            r"<think>a</think><answer>\boxed{%s}</answer>",
            r"So $\boxed{%s}$.",
            "%s",
            r"\boxed{%s",
        ]
    )
    gold = r.choice(GOLDS)
    if kind is near:
        if text == gold:
            gold = "7368787"
        if text in GOLDS:
            text = "3"
    response = form.replace("%s", text)
    return kind.__name__, RewardInput(
        "", response, gold, tokens=len(response), limit=4096, truncated=False
    )


class Memory:
    """Peaks of the resident memory of worker processes, in megabytes, where Linux tells them."""

    def __init__(self) -> None:
        self.peak = 0

    def look(self, pids: list[int]) -> None:
        for pid in pids:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue  # it has just ended
            peaks = [int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")]
            self.peak = max([self.peak, *peaks])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Throw random and hostile answers at the reward executor."
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--deadline",
        type=float,
        default=2.0,
        help="seconds for one reward function and one response",
    )
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    """Fuzz the reward executor; returns the exit code."""
    args = parse()
    config = RewardConfig(
        names=NAMES,
        weights=[1.0] * len(NAMES),
        workers=args.workers,
        deadline_seconds=args.deadline,
        worker_memory_megabytes=MEMORY_MEGABYTES,
    )
    kinds: list[str] = []
    counts: Counter[tuple[str, str]] = Counter()
    high: list[int] = []
    memory, began = Memory(), time.monotonic()
    with RewardExecutor(config) as executor:

        def inputs() -> Iterator[list[RewardInput]]:
            for number in range(args.count):
                kind, case = hostile(args.seed, number)
                kinds.append(kind)
                memory.look(executor.pool.processes)
                yield [case]

        for number, [scores] in enumerate(
            tqdm(executor.stream(inputs()), total=args.count, disable=None)
        ):
            memory.look(executor.pool.processes)
            counts[kinds[number], "all"] += 1
            for score in scores.values():
                counts[kinds[number], score.outcome.name.lower()] += score.outcome.failed
            if scores["acc"].value > -1 or scores["base_acc"].value > 0:
                high.append(number)
        slowest = executor.pool.slowest_seconds
        replaced = executor.pool.replaced
    seconds = time.monotonic() - began
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{'kind':12s} {'inputs':>8s} {'timeouts':>9s} {'crashes':>8s}")
    for kind in dict.fromkeys(kinds):
        print(
            f"{kind:12s} {counts[kind, 'all']:8d} {counts[kind, 'timeout']:9d} "
            f"{counts[kind, 'crash']:8d}"
        )
    print(
        f"{args.count} inputs in {seconds:.0f} s; {replaced} workers replaced; "
        f"slowest call {slowest:.2f} s with a deadline of {args.deadline:g} s;\n"
        f"peak memory {memory.peak} MB of a worker, {own} MB here; called right: "
        f"{high[:20] or 'none'}"
    )
    bad = (
        high
        or slowest > args.deadline + LATE_SECONDS
        or memory.peak > WORKER_MEGABYTES + MEMORY_MEGABYTES
    )
    if bad:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
