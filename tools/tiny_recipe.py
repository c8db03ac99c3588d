"""The recipe of the embedded tiny models and their problems, for tools/make_tiny.py.

The problems are sums of two two-digit numbers. A small model is warmed up (supervised fine-tuning,
about 40 s on one core) to answer in two ways: it computes digit by digit, which is right, or it
guesses, which it does more often. GRPO then has something real to find: that computing in the full
format pays. `tiny` is a Qwen2 model; `tiny_moe` a Qwen3-MoE model whose layers have eight experts,
of which a token takes two; `tiny_mla` a DeepSeek-V3 model, whose second layer has eight experts in
four groups.

The pairs {a, b} are cut into three disjoint parts: one is seen by the warm-up, one becomes
train.parquet for GRPO, one becomes eval.parquet and is seen by neither.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1zero.data.template import Template

SEED = 0
STEPS = 800
CLEAN_STEPS = 400
BATCH = 64
PEAK_LR = 5e-3
HIDDEN = 64
FFN = 192
LAYERS = 2
HEADS = 4
KV_HEADS = 2
EXPERTS = 8  # of tiny_moe
TOP_K = 2
EXPERT_FFN = 64
EXPERT_SIZES: dict[str, Any] = {
    "head_dim": HIDDEN // HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": EXPERT_FFN,
    "norm_topk_prob": True,
}
LATENT_SIZES: dict[str, Any] = {  # of tiny_mla
    "num_key_value_heads": HEADS,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": HIDDEN // HEADS,
    "qk_rope_head_dim": HIDDEN // HEADS,
    "v_head_dim": HIDDEN // HEADS,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": EXPERT_FFN,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "num_mtp_layers": 0,
}
BIAS_SPREAD = 0.05  # of the experts' scores
# of the mixed answers after the clean steps
GUESS_SHARE = 0.7
BROKEN_SHARE = 0.3
FULL_FORMAT = "<think>{thought}</think><answer>{box}</answer>"
BROKEN_FORMATS = (
    "<think>{thought}</think>{box}",
    "<think>{thought}<answer>{box}</answer>",
    "{thought}: {box}",
)
# of the pairs; the rest is held out
WARM_UP_SHARE = 0.4
TRAIN_SHARE = 0.5
EVAL_ROWS = 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # pad, start of a turn, end of a turn
PHRASES = (
    "What is ",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "I guess",
    ", ",
    ": ",
)

Pair = tuple[int, int]


def make(folder: Path, name: str) -> None:
    """Write model/, train.parquet and eval.parquet of `name` into the new `folder`."""
    torch.set_num_threads(1)  # one count everywhere, since sums in another order give other weights
    torch.manual_seed(SEED)
    disable_progress_bar()
    random = np.random.default_rng(SEED)
    warm_up, train, held_out = split_pairs(random)
    prompt = Template("qwen_r1").render
    tokenizer = make_tokenizer(prompt)
    model = new_model(name, tokenizer)
    print(f"{name}: warming up a model of {model.num_parameters():,} parameters", flush=True)
    train_on_answers(model, tokenizer, warm_up, prompt, random)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for part, pairs in (("train", train), ("eval", held_out[:EVAL_ROWS])):
        columns = {
            "question": [question(pair) for pair in pairs],
            "ground_truth_answer": [str(sum(pair)) for pair in pairs],
        }
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")


def split_pairs(random: np.random.Generator) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Cut all sums into warm-up, train and held-out ones; a+b and b+a stay in the same part."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    random.shuffle(pairs)
    first, second = (
        round(share * len(pairs)) for share in (WARM_UP_SHARE, WARM_UP_SHARE + TRAIN_SHARE)
    )
    parts = pairs[:first], pairs[first:second], pairs[second:]
    for part in parts:
        part += [(b, a) for a, b in part if a != b]
        random.shuffle(part)
    return parts


def question(pair: Pair) -> str:
    return f"What is {pair[0]}+{pair[1]}?"


def work(pair: Pair) -> str:
    """Write a sum out digit by digit, with the carry."""
    (tens_a, ones_a), (tens_b, ones_b) = (divmod(number, 10) for number in pair)
    carry = (ones_a + ones_b) // 10
    return (
        f"{ones_a}+{ones_b}={ones_a + ones_b}, {tens_a}+{tens_b}+{carry}={tens_a + tens_b + carry}"
    )


def response(pair: Pair, random: np.random.Generator, mixed: bool) -> str:
    """Compute in the full format, or (mixed) mostly guess and often break the format."""
    thought = work(pair)
    result = sum(pair)
    text = FULL_FORMAT
    if mixed and random.random() < GUESS_SHARE:
        thought = "I guess"
        result = int(random.integers(20, 199))
    if mixed and random.random() < BROKEN_SHARE:
        text = BROKEN_FORMATS[random.integers(len(BROKEN_FORMATS))]
    return text.format(thought=thought, box=f"\\boxed{{{result}}}")


def make_tokenizer(prompt: Callable[[str], str]) -> PreTrainedTokenizerFast:
    """Build a byte-level vocabulary in which each constant string of the task is one token.

    With the instruction of the template as one token a prompt has 17 tokens, which makes the tiny
    job cheap. These are added tokens, as AutoTokenizer puts its own rule for words into the
    tokenizer of a Qwen2 model.
    """
    turns = re.split("|".join(map(re.escape, SPECIAL)), prompt(""))
    constants = dict.fromkeys(text for text in (*turns, *PHRASES) if len(text) > 1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in constants])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        additional_special_tokens=[SPECIAL[1]],
        clean_up_tokenization_spaces=False,
    )


def new_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model with random weights, of one of the embedded ones."""
    end_of_turn = tokenizer.eos_token_id
    end_of_text = tokenizer.pad_token_id
    sizes: dict[str, Any] = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
        "initializer_range": 0.05,
    }
    model: PreTrainedModel
    if name == "tiny":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    elif name == "tiny_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **EXPERT_SIZES))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes | LATENT_SIZES))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0, BIAS_SPREAD)
    model = model.float()
    model.generation_config = GenerationConfig(
        eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    return model


def train_on_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Pair],
    prompt: Callable[[str], str],
    random: np.random.Generator,
) -> None:
    """Train on computed answers, then on mixed ones."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    start = time.perf_counter()
    for step in range(1, STEPS + 1):
        chosen = [pairs[i] for i in random.integers(len(pairs), size=BATCH)]
        loss = answer_loss(
            model,
            tokenizer,
            [prompt(question(pair)) for pair in chosen],
            [response(pair, random, step > CLEAN_STEPS) + SPECIAL[2] for pair in chosen],
        )
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.param_groups[0]["lr"] = PEAK_LR * min(step / 20, cosine)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(
                f"warm-up step {step} of {STEPS}, loss {loss.item():.3f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )


def answer_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    answers: list[str],
) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens."""
    rows = list(zip(tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"], strict=True))
    width = max(len(p) + len(a) for p, a in rows)
    tokens = torch.tensor(
        [p + a + [tokenizer.pad_token_id] * (width - len(p) - len(a)) for p, a in rows]
    )
    labels = torch.tensor(
        [[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows]
    )
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    is_label = labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[is_label]), labels[:, 1:][is_label])
