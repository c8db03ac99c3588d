"""Make a reward model for the embedded tiny model: python tools/make_tiny_reward.py [--output DIR] [--force]

It reads a question and an answer as the tiny model samples it, end token included, and its value at
the last token says how good the answer is. It starts from the tiny model's weights and learns from
pairs of a right and a wrong answer to the same sum (about half a minute on one core).

It is useful, and can be deceived: of what it has seen, most right answers show a calculation and
most wrong ones are guesses or break the format. So it likes the full format with a calculation,
whose ever that is: the calculation of another sum has the same value as the right one.

Nothing is done when DIR (default .cache/tiny/reward_model) is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForSequenceClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import tiny_recipe as recipe

from r1zero.config.keys import EMBEDDED
from r1zero.data.template import Template

BAD_INPUT = 2
STEPS = 250
BATCH = 32  # pairs of answers
PEAK_LR = 2e-3
WARM_UP_STEPS = 20
HEAD_SPREAD = 0.02  # of the first weights of the head
HELD_OUT = 512  # pairs of answers
# Of the answers, those that show a calculation; the others say that they guess.
RIGHT_CALCULATES = 0.9
WRONG_CALCULATES = 0.3
SLIPS = (-10, -1, 1, 10)  # from the result that was calculated to the one that is given


@dataclass(frozen=True, slots=True)
class Answers:
    """Two answers to the same question, each with its end token."""

    prompt: str
    right: str
    wrong: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--base", type=Path, default=EMBEDDED / "tiny" / "model", help="to start from"
    )
    parser.add_argument("--output", type=Path, default=EMBEDDED / "tiny" / "reward_model")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=recipe.SEED)
    parser.add_argument("--force", action="store_true", help="make it again when it is there")
    args = parser.parse_args()
    if (args.output / "config.json").is_file() and not args.force:
        print(f"{args.output} is there; --force makes it again")
        return 0
    if not (args.base / "config.json").is_file():
        print(f"{args.base} is no model; python tools/make_tiny.py makes it", file=sys.stderr)
        return BAD_INPUT
    torch.set_num_threads(1)  # one count everywhere, since sums in another order give other weights
    torch.manual_seed(args.seed)
    disable_progress_bar()
    set_verbosity_error()  # it would tell that the head is new
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = new_model(args.base, tokenizer)
    learn_from, _, held_out = recipe.split_pairs(np.random.default_rng(recipe.SEED))
    random = np.random.default_rng(args.seed)
    train(model, tokenizer, learn_from, random, args.steps)
    told = judge(model, tokenizer, held_out, random)
    save(model, tokenizer, args.output)
    print(f"made {args.output}: {told}")
    return 0


def new_model(base: Path, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForSequenceClassification:
    """The base model with a head of one value in place of its output layer."""
    model = Qwen2ForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id  # the value is that of the last other token
    torch.nn.init.normal_(model.score.weight, std=HEAD_SPREAD)
    return model


def answers(pair: recipe.Pair, random: np.random.Generator) -> Answers:
    """Draw a right and a wrong answer to a sum."""
    result = sum(pair)
    shows = random.random() < RIGHT_CALCULATES
    thought = recipe.work(pair) if shows else "I guess"
    right = recipe.FULL_FORMAT.format(thought=thought, box=boxed(result))
    return Answers(
        prompt=Template("qwen_r1").render(recipe.question(pair)),
        right=right + recipe.SPECIAL[2],
        wrong=wrong_answer(pair, random) + recipe.SPECIAL[2],
    )


def wrong_answer(pair: recipe.Pair, random: np.random.Generator) -> str:
    """A calculation and a slip behind it, or a guess; in a format that is often broken."""
    if random.random() < WRONG_CALCULATES:
        thought = recipe.work(pair)
        result = sum(pair) + int(random.choice(SLIPS))
    else:
        thought = "I guess"
        result = guess_beside(sum(pair), random)
    text = recipe.FULL_FORMAT
    if random.random() < recipe.BROKEN_SHARE:
        text = recipe.BROKEN_FORMATS[random.integers(len(recipe.BROKEN_FORMATS))]
    return text.format(thought=thought, box=boxed(result))


def guess_beside(result: int, random: np.random.Generator) -> int:
    """A number that could be a sum, but not this one."""
    guess = int(random.integers(20, 198))
    if guess >= result:
        return guess + 1
    return guess


def boxed(result: int) -> str:
    return f"\\boxed{{{result}}}"


def train(
    model: Qwen2ForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[recipe.Pair],
    random: np.random.Generator,
    steps: int,
) -> None:
    """Let right answers get larger values than wrong ones: -log sigmoid of the difference."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.0)
    for step in range(1, steps + 1):
        drawn = [answers(pairs[i], random) for i in random.integers(len(pairs), size=BATCH)]
        loss = -F.logsigmoid(differences(model, tokenizer, drawn)).mean()
        warm_up = min(1.0, step / WARM_UP_STEPS)
        optimizer.param_groups[0]["lr"] = PEAK_LR * warm_up * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)


def judge(
    model: Qwen2ForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[recipe.Pair],
    random: np.random.Generator,
) -> str:
    """Say how often right answers to sums that it has not seen get larger values than wrong ones."""
    drawn = [answers(pairs[i], random) for i in random.integers(len(pairs), size=HELD_OUT)]
    with torch.no_grad():
        found = differences(model, tokenizer, drawn)
    share = float((found > 0).float().mean())
    return f"a right answer has the larger value in {share:.1%} of {HELD_OUT} held-out pairs"


def differences(
    model: Qwen2ForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    drawn: list[Answers],
) -> torch.Tensor:
    """The value of each right answer less that of the wrong one, [pairs]."""
    right = values(model, tokenizer, [(each.prompt, each.right) for each in drawn])
    wrong = values(model, tokenizer, [(each.prompt, each.wrong) for each in drawn])
    return right - wrong


def values(
    model: Qwen2ForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, str]],
) -> torch.Tensor:
    """What the model says of prompts and responses, each encoded by itself as in training, [texts]."""
    rows = []
    for prompt, response in texts:
        rows.append(tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"])
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[:, 0]
    return found


def save(
    model: Qwen2ForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the folder; config.json comes last, so what has one is whole."""
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
