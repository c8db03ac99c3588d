#!/usr/bin/env python3
"""Convert weights between Hugging Face folders and Megatron checkpoints, in bounded memory.

    python tools/convert_ckpt.py --from models/Qwen2.5-7B --to ckpt --tp 2 --pp 4
    python tools/convert_ckpt.py --from runs/r1/checkpoints --to models/trained --hf-dir models/Qwen2.5-7B

    python tools/convert_ckpt.py --model-type-hf llama2 --load-model-type hf --save-model-type mg \
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 4 --params-dtype bf16 \
        --load-dir models/Qwen2.5-7B --save-dir ckpt           # the same, with Megatron's names

Sources are detected: a Hugging Face folder; Megatron checkpoints, legacy or torch_dist, at any TP
and PP, of the iteration that the tracker names, or of the folder of one. Values are copied bit for
bit unless --params-dtype asks for another type. The target appears complete or not at all. Exit
codes: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from r1zero.config.paths import user_path
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig, ValueHead
from r1zero.models.family import family_of, register_own
from r1zero.models.params import FIRST, WHOLE, param_table
from r1zero.models.value_head import (
    classifier_keys,
    is_reward_model,
    read_reward_config,
    with_value_head,
)
from r1zero.weights.detect import CONFIG, config_folder, detect, layout_text
from r1zero.weights.open import open_weights, stored_shape
from r1zero.weights.save_huggingface import copy_beside, save_hf, written_config
from r1zero.weights.save_megatron import LegacyLayout, save_dist, save_legacy
from r1zero.weights.source import Weights
from r1zero.weights.value_head import as_written

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {"hf": "Hugging Face", "mg": "Megatron"}


def main() -> int:
    """Convert; returns the exit code."""
    try:
        convert(parse(sys.argv[1:]))
    except BadInput as error:
        print(f"convert_ckpt: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:  # torch's writers make RuntimeErrors of full disks
        print(f"convert_ckpt: {error}; nothing was written", file=sys.stderr)
        return 1
    return 0


class Parser(argparse.ArgumentParser):
    """Raises what is wrong with the arguments, to be told like all else."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; --help shows the options")


def parse(words: list[str]) -> argparse.Namespace:
    """Read the arguments, spelled with dashes or underscores. BadInput for wrong ones."""
    parser = Parser(
        prog="convert_ckpt.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_places(parser)
    _add_layout(parser)
    _add_accepted(parser)
    dashed = [
        re.sub(r"^--[\w-]+", lambda option: option[0].replace("_", "-"), word) for word in words
    ]
    return parser.parse_args(dashed)


def _add_places(parser: argparse.ArgumentParser) -> None:
    """What is read and what is written."""
    add = parser.add_argument
    add(
        "--load-dir", "--from", required=True, type=user_path, metavar="DIR", help="weights to read"
    )
    add("--save-dir", "--to", required=True, type=user_path, metavar="DIR", help="folder to make")
    add(
        "--load-model-type",
        "--from-type",
        choices=TYPES,
        help="what --load-dir must hold; default any",
    )
    add(
        "--save-model-type",
        "--to-type",
        choices=TYPES,
        help="what to write; default: the other one",
    )
    add(
        "--hf-dir",
        "--config-from",
        type=user_path,
        metavar="DIR",
        help=(
            "folder with config.json and tokenizer of a Megatron source; default: beside the "
            "checkpoint"
        ),
    )
    add(
        "--orm",
        action="store_true",
        help=(
            "the Megatron source has a value head of one layer (rm_head); needed where config.json "
            "is that of the model below it"
        ),
    )
    add(
        "--model-family",
        nargs="*",
        default=[],
        metavar="PLACE",
        help="families of your own, as in training.model_families",
    )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    """How the weights are cut, padded and typed."""
    add = parser.add_argument
    add("--target-tensor-parallel-size", "--tp", type=at_least_1, default=1, metavar="N")
    add("--target-pipeline-parallel-size", "--pp", type=at_least_1, default=1, metavar="N")
    add(
        "--target-expert-parallel-size",
        "--ep",
        type=at_least_1,
        default=1,
        metavar="N",
        help="parts into which legacy files share out experts, each of which stays whole; default 1",
    )
    add(
        "--moe-grouped-gemm",
        action="store_true",
        help="write experts to legacy files as Megatron's GroupedMLP keeps them, not SequentialMLP",
    )
    add(
        "--num-layer-list",
        "--layers-per-stage",
        metavar="N,N,...",
        help="layers of each pipeline stage; default even",
    )
    add(
        "--ckpt-format",
        "--mg-format",
        choices=["legacy", "torch", "torch_dist"],
        default="legacy",
        help="of Megatron output; torch_dist fits any TP, PP and EP; default legacy, also called torch",
    )
    add(
        "--make-vocab-size-divisible-by",
        type=at_least_1,
        default=1,
        metavar="N",
        help="pad the vocabulary of legacy files to a multiple of N times TP; default 1",
    )
    add(
        "--params-dtype",
        "--dtype",
        choices=DTYPES,
        help="type to write; default that of the source",
    )


def _add_accepted(parser: argparse.ArgumentParser) -> None:
    """Flags of other converters that mean nothing here."""
    add = parser.add_argument
    add("--model-type-hf", "--family", metavar="NAME", help="accepted; config.json tells the model")
    for name in ("--use-mcore-models", "--add-qkv-bias"):
        add(name, action="store_true", help="accepted; always so where the model is")
    add("--model-type", choices=["GPT"], help="accepted")
    add(
        "--expert-tensor-parallel-size",
        choices=["1"],
        help="accepted; experts that are written are not cut by tensor parallelism",
    )
    add(
        "--tokenizer-model",
        metavar="FILE",
        help="accepted; tokenizer files are copied with config.json",
    )


def convert(args: argparse.Namespace) -> None:
    """Check everything, then convert. BadInput for bad input, OSError when writing fails."""
    start = time.monotonic()
    register_own("--model-family", args.model_family)
    found = detect(args.load_dir)
    source = "hf" if found.kind == "hf" else "mg"
    if args.load_model_type not in (None, source):
        raise BadInput(
            f"--load-model-type {args.load_model_type}: {args.load_dir} holds {TYPES[source]} "
            f"weights ({found}); say {source}, or leave it out"
        )
    kind = args.save_model_type or ("mg" if source == "hf" else "hf")
    beside, target = folders(args, source, kind)
    if beside is not None:
        shape = read_shape(args, beside)
    else:
        shape = stored_shape(found)
    if args.orm and shape.value_head is None:
        shape = with_value_head(shape, ValueHead())
    layout = plan_layout(args, shape)
    if kind == "mg" and args.ckpt_format == "torch_dist":
        refuse_layout_of_experts(args)
    weights = open_weights(args.load_dir, shape)
    name, dtype = type_to_write(args, weights)
    print(f"from: {weights.found}", flush=True)
    if kind == "hf":
        assert beside is not None, "folders() asks for it"
        target.parent.mkdir(parents=True, exist_ok=True)
        written = as_written(weights, dtype)
        save_hf(
            target,
            written,
            weights.stream(param_table(written), FIRST, WHOLE, dtype),
            beside,
            torch_name(dtype),
            beside={CONFIG: config_text(args, beside, dtype)},
        )
    else:
        with new_folder(target) as folder:
            if args.ckpt_format == "torch_dist":
                save_dist(folder, weights, dtype)
            else:
                save_legacy(folder, weights, dtype, layout)
            if beside is not None:
                copy_beside(beside, folder, torch_name(dtype))
                (folder / CONFIG).write_text(config_text(args, beside, dtype))
    print(
        f"to:   {told(target, layout)}, {name}, {shape.num_parameters * dtype.itemsize / 1e9:.2f} GB in "
        f"{time.monotonic() - start:.0f} s"
    )


def read_shape(args: argparse.Namespace, beside: Path) -> ModelConfig:
    """The model by its config.json, which tells a reward model; --orm is for one whose folder does
    not. BadInput when it has no value head that can be read."""
    if is_reward_model(beside):
        return read_reward_config(beside)
    if args.orm and detect(args.load_dir).kind == "hf":
        return read_reward_config(args.load_dir)  # says that it is none
    return ModelConfig.from_folder(beside)


def config_text(args: argparse.Namespace, beside: Path, dtype: torch.dtype) -> str:
    """The config.json to write: of the folder `beside`, and of a reward model also where that is the
    folder of the model that it was made from."""
    config = written_config(beside, torch_name(dtype))
    if args.orm and not is_reward_model(beside):
        config |= classifier_keys(config)
    return json.dumps(config, indent=2) + "\n"


def told(target: Path, layout: LegacyLayout) -> str:
    """What was written. Names of legacy files do not tell stages from experts, but the plan does:

    mp_rank_01_003 may be of TP2 PP4, and of TP2 PP1 EP4.
    """
    found = detect(target)
    if found.kind != "legacy":
        return str(found)
    cuts = layout_text(layout.tp, layout.pp, layout.ep)
    return f"{replace(found, files={})}, saved at {cuts}"


def folders(args: argparse.Namespace, source: str, kind: str) -> tuple[Path | None, Path]:
    """The folder with config.json, None when it may be done without, and the folder to make."""
    target: Path = args.save_dir
    beside: Path = args.hf_dir or config_folder(args.load_dir, fallback=target)
    # the original's folder, as MindSpeed-LLM has it
    if source == "mg" and kind == "hf" and beside == target:
        target = target / "mg2hf"
    if not (beside / CONFIG).is_file():
        if kind == "hf" or args.hf_dir is not None:
            raise BadInput(
                f"{args.hf_dir or args.load_dir} has no {CONFIG}; name the original model's "
                "folder with --hf-dir"
            )
        return None, new(args.save_dir)
    return beside, new(target)


def new(target: Path) -> Path:
    """The folder to make. BadInput when something is there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(
            f"--save-dir: {target} exists and is not empty; name a new folder, or remove it"
        )
    return target


def type_to_write(args: argparse.Namespace, weights: Weights) -> tuple[str, torch.dtype]:
    """The type asked for, or that of all tensors. BadInput when they differ."""
    if args.params_dtype is not None:
        return args.params_dtype, DTYPES[args.params_dtype]
    known = {dtype: name for name, dtype in DTYPES.items()}
    names = sorted(known.get(dtype, str(dtype)) for dtype in weights.dtypes)
    if len(names) > 1 or names[0] not in DTYPES:
        raise BadInput(
            f"{weights.found.folder} holds {', '.join(names)}; choose one type to write with "
            f"--params-dtype {'|'.join(DTYPES)}"
        )
    return names[0], DTYPES[names[0]]


def plan_layout(args: argparse.Namespace, shape: ModelConfig) -> LegacyLayout:
    """The cuts of legacy files. BadInput when they do not fit the model."""
    check_cuts(args, shape)
    return LegacyLayout(
        tp=args.target_tensor_parallel_size,
        layers=layers_of_stages(args, shape),
        vocab_multiple=args.make_vocab_size_divisible_by,
        ep=args.target_expert_parallel_size,
        grouped_experts=args.moe_grouped_gemm,
    )


def check_cuts(args: argparse.Namespace, shape: ModelConfig) -> None:
    """BadInput when TP or EP does not divide what it cuts."""
    tp = args.target_tensor_parallel_size
    ep = args.target_expert_parallel_size
    cut = {"num_attention_heads": shape.num_heads, "qkv rows": shape.qkv_size}
    if "ffn_hidden_size" in family_of(shape).cut_sizes(shape):
        cut["ffn_hidden_size"] = shape.ffn_hidden_size
    uneven = [f"{key} {size}" for key, size in cut.items() if size % tp]
    if uneven:
        raise BadInput(
            f"--target-tensor-parallel-size {tp} does not divide {', '.join(uneven)}; "
            "choose one that does"
        )
    if shape.experts is None and ep > 1:
        raise BadInput(
            f"--target-expert-parallel-size {ep}: this model has no experts; leave it out"
        )
    if shape.experts is None and args.moe_grouped_gemm:
        raise BadInput("--moe-grouped-gemm: this model has no experts; leave it out")
    if shape.experts is not None and shape.experts.count % ep:
        raise BadInput(
            f"--target-expert-parallel-size {ep} does not divide num_experts "
            f"{shape.experts.count}; choose one that does"
        )


def refuse_layout_of_experts(args: argparse.Namespace) -> None:
    """BadInput for what says how legacy files keep experts: torch_dist has one way."""
    if args.target_expert_parallel_size > 1:
        raise BadInput(
            f"--target-expert-parallel-size {args.target_expert_parallel_size}: torch_dist fits any; "
            "leave it out"
        )
    if args.moe_grouped_gemm:
        raise BadInput("--moe-grouped-gemm: torch_dist keeps experts in one way; leave it out")


def layers_of_stages(args: argparse.Namespace, shape: ModelConfig) -> tuple[int, ...]:
    """Layers of each pipeline stage. BadInput when they cannot be so."""
    pp = args.target_pipeline_parallel_size
    if args.num_layer_list is None:
        if shape.num_layers % pp:
            raise BadInput(
                f"--target-pipeline-parallel-size {pp} does not divide num_layers "
                f"{shape.num_layers}; choose one that does, or say --num-layer-list"
            )
        return (shape.num_layers // pp,) * pp
    words = args.num_layer_list.split(",")
    layers = tuple(int(word) for word in words if word.strip().isdecimal())
    if (
        len(layers) != len(words)
        or len(layers) != pp
        or sum(layers) != shape.num_layers
        or 0 in layers
    ):
        raise BadInput(
            f"--num-layer-list {args.num_layer_list} must be {pp} numbers of layers, one for each "
            f"pipeline stage, that add up to {shape.num_layers}"
        )
    return layers


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder beside `target` that takes its place when all went well."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()  # it is empty
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def at_least_1(text: str) -> int:
    """Read a positive number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def torch_name(dtype: torch.dtype) -> str:
    """The name of a type as config.json has it."""
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
