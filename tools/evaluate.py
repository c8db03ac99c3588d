#!/usr/bin/env python3
"""Score a model on problems with known answers, on any number of ranks.

    python tools/evaluate.py --model models/Qwen2.5-7B-Instruct --data math500.parquet --k 4 --temperature 0.6
    torchrun --nproc-per-node 8 tools/evaluate.py --model ... --data math500.parquet aime24.parquet --k 16
    srun -N 2 --ntasks-per-node 8 python tools/evaluate.py --model ... --tensor-model-parallel-size 2 ...

Prints pass@1 (= avg@k) and pass@2, 4, ... k with intervals, format rate, lengths, a table by level
and by subject if the data has these columns, and the protocol: all that the scores depend on.
OUTPUT/<data>.json holds the same, and OUTPUT/<data>.parquet every answer. The number of ranks does
not change the answers. Exit codes: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.config.command_line import CommandLine
from r1zero.config.paths import expand, user_path
from r1zero.config.schema import MAP_KEYS
from r1zero.data.layout import ColumnLayout
from r1zero.data.preprocessed import is_preprocessed
from r1zero.data.problems import parse_json
from r1zero.data.template import TEMPLATES, Template
from r1zero.distributed.detect import check_dtype, uses_npu
from r1zero.distributed.launch import Launch, read_launch
from r1zero.distributed.placement import Placement, RoleSize, place
from r1zero.distributed.process import end, is_first, refuse, run_rank
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.dtype import Dtype
from r1zero.models.family import register_own
from r1zero.preflight import files
from r1zero.preflight.datasets import check_data, compares
from r1zero.preflight.experts import check_dealing, check_whole_replicas
from r1zero.preflight.run import ModelFiles
from r1zero.reward.choose import choose, columns_of
from r1zero.reward.config import RewardConfig
from r1zero.rollout.engines import engine_problems
from r1zero.run_folder.folder import check_writable
from r1zero.weights.detect import config_folder

if TYPE_CHECKING:  # these need torch
    from r1zero.distributed.groups import World
    from r1zero.evaluation.standalone import EvalRequest, Evaluator

END_KEYS = files.EndKeys("--model", "--stop")


def main(arguments: list[str]) -> int:
    """Evaluate; returns the exit code."""
    args = parse(arguments)
    try:
        launch = read_launch()
        register_own("--model-family", args.model_family)
        problems = check(args, launch)
    except BadInput as error:
        return refuse([str(error)], is_first())
    if problems:
        return refuse(problems, launch.is_first, launch.other_node)
    return run(args, launch)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandLine(description=__doc__)
    _add_model(parser)
    _add_data(parser)
    _add_answers(parser)
    _add_scoring(parser)
    return parser.parse_args(arguments)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and engine").add_argument
    add(
        "--model",
        required=True,
        type=expand,
        help="Hugging Face model folder, or Megatron checkpoint",
    )
    add("--tokenizer-name-or-path", type=expand, help="folder; default MODEL")
    add(
        "--model-family",
        nargs="*",
        default=[],
        metavar="PLACE",
        help="families of your own, as in training.model_families",
    )
    add(
        "--dtype",
        choices=["bf16", "fp32"],
        help="default: that of the model's config.json; bf16 on NPUs",
    )
    add("--engine", default="native", help="rollout engine, as in actor_rollout.engine")
    add("--tensor-model-parallel-size", type=int, default=1)
    add(
        "--expert-parallel-size",
        type=int,
        help="ranks that share the experts of each layer, a multiple of the tensor parallel size, which "
        "is the default",
    )
    add(
        "--max-tokens-to-oom",
        type=int,
        default=131072,
        help="tokens in a replica's KV cache at most",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("problems").add_argument
    add(
        "--data",
        required=True,
        nargs="+",
        type=expand,
        help="data sets: files, folders or preprocessed",
    )
    add("--problems", type=int, help="take only the first so many of each data set")
    add(
        "--map-keys",
        nargs="+",
        default=["{}"],
        metavar="JSON",
        help="column of each part, once for all data sets, or once for each in turn; default "
        + json.dumps(MAP_KEYS),
    )
    add("--prompt-type", default="qwen_r1", help="name of a prompt template")
    add("--prompt-type-path", default=str(TEMPLATES), type=expand, help="templates file")


def _add_answers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("answers").add_argument
    add("--k", type=int, default=1, help="answers to each problem")
    add("--temperature", type=float, default=1.0, help="0: the most likely token")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--seed", type=int, default=1234)
    add("--max-new-tokens", type=int, default=2048, help="longest answer")
    add(
        "--stop",
        nargs="*",
        default=[],
        metavar="TOKEN",
        help="texts or ids of more tokens that end an answer, as in actor_rollout.stop",
    )
    add(
        "--round-samples",
        type=int,
        default=256,
        help=(
            "answers decoded together; 0: all of a replica's, faster, but rounding depends on the "
            "ranks"
        ),
    )


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scoring and output").add_argument
    add(
        "--verifier",
        nargs="+",
        default=["acc", "format"],
        help="reward functions, as in algorithm.verifier_function",
    )
    add("--workers", type=int, default=2, help="processes that score, beside each replica")
    add("--deadline-seconds", type=float, default=10.0, help="for one call of a reward function")
    add(
        "--output",
        type=user_path,
        help="folder of the reports; default runs/evaluation/<name of MODEL>",
    )


def output_folder(args: argparse.Namespace) -> Path:
    """Where the reports go."""
    return args.output or Path("runs/evaluation") / Path(args.model).name


def tokenizer_folder(args: argparse.Namespace) -> str:
    """Where the tokenizer is."""
    return args.tokenizer_name_or_path or args.model


def model_folder(args: argparse.Namespace) -> Path:
    """Whose config.json describes the network."""
    return config_folder(args.model, tokenizer_folder(args))


def dtype_of(args: argparse.Namespace) -> Dtype:
    """The dtype to answer in. BadInput when config.json is no JSON."""
    if args.dtype is not None:
        return Dtype(args.dtype)
    if uses_npu(None):
        return Dtype.BF16
    return model_dtype(model_folder(args))


def request(args: argparse.Namespace) -> EvalRequest:
    """Say what is to be evaluated. BadInput for malformed arguments."""
    from r1zero.evaluation.standalone import EvalRequest

    folder = model_folder(args)
    kept = kept_columns(args)
    shape = ModelConfig.from_folder(folder)
    return EvalRequest(
        model=ModelFiles(load=args.model, folder=folder, shape=shape),
        tokenizer=tokenizer_folder(args),
        dtype=dtype_of(args),
        engine=args.engine,
        max_cache_tokens=args.max_tokens_to_oom,
        stop=args.stop,
        template=Template(args.prompt_type, args.prompt_type_path),
        data={path: layout(keys, kept) for path, keys in map_keys(args).items()},
        problems=args.problems,
        samples_per_problem=args.k,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        rewards=RewardConfig(
            names=args.verifier,
            weights=[1 / len(args.verifier)] * len(args.verifier),  # only the report's mean shows
            workers=args.workers,
            deadline_seconds=args.deadline_seconds,
        ),
    )


def map_keys(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return the columns of each data set. BadInput for malformed --map-keys, or a wrong number."""
    if len(args.map_keys) not in (1, len(args.data)):
        raise BadInput(
            f"--map-keys holds {len(args.map_keys)} objects for {len(args.data)} data "
            "sets; give one, or one for each in turn"
        )
    found = [MAP_KEYS | _columns(text) for text in args.map_keys]
    if len(found) == 1:
        found *= len(args.data)
    return dict(zip(args.data, found, strict=True))


def _columns(text: str) -> dict[str, str]:
    keys = parse_json("--map-keys", text)
    is_known = isinstance(keys, dict) and set(keys) <= set(MAP_KEYS)
    if not is_known or not all(isinstance(column, str) for column in keys.values()):
        raise BadInput(
            f"--map-keys {text} must be a JSON object with keys of "
            f"{', '.join(MAP_KEYS)}, and names of columns"
        )
    return keys


def layout(keys: dict[str, str], kept: Mapping[str, str]) -> ColumnLayout:
    return ColumnLayout(keys, held_out=True, columns_key="--map-keys", skip_key="", kept=kept)


def model_dtype(folder: Path) -> Dtype:
    """Return the dtype that a model folder's config.json names; fp32 when it is neither of the
    two."""
    path = folder / "config.json"
    if path.is_file():
        entries = parse_json(str(path), path.read_text())
    else:
        entries = {}
    return Dtype.of("bfloat16" in (entries.get("dtype"), entries.get("torch_dtype")))


def check(args: argparse.Namespace, launch: Launch) -> list[str]:
    """Return a sentence for everything that is wrong, found before torch is imported."""
    wrong = [
        (flag, value, "must be at least 1")
        for flag, value in (
            ("--k", args.k),
            ("--max-new-tokens", args.max_new_tokens),
            ("--workers", args.workers),
            ("--problems", args.problems),
            ("--tensor-model-parallel-size", args.tensor_model_parallel_size),
            ("--expert-parallel-size", args.expert_parallel_size),
        )
        if value is not None and value < 1
    ]
    wrong += [
        (flag, value, "must be a number from 0 on")
        for flag, value in (
            ("--temperature", args.temperature),
            ("--top-k", args.top_k),
            ("--round-samples", args.round_samples),
            ("--seed", args.seed),
        )
        if not 0 <= value < inf
    ]
    wrong += (
        [("--top-p", args.top_p, "must be above 0, at most 1")] if not 0 < args.top_p <= 1 else []
    )
    if not 0 < args.deadline_seconds < inf:
        wrong.append(("--deadline-seconds", args.deadline_seconds, "must be a number above 0"))
    problems = [f"{flag}: {value} {sentence}" for flag, value, sentence in wrong]
    if len({Path(path).stem for path in args.data}) < len(args.data):
        problems.append(
            f"--data: two of {', '.join(args.data)} would write the same report; "
            "give them one by one"
        )
    if launch.world_size % max(args.tensor_model_parallel_size, 1):
        problems.append(
            f"--tensor-model-parallel-size: {args.tensor_model_parallel_size} does not divide the "
            f"{launch.world_size} ranks of this job"
        )
    problems += check_dtype(f"--dtype: {args.dtype}", dtype_of(args) is Dtype.BF16, None)
    problems += check_verifier(args.verifier)
    problems += engine_problems(args.engine, "--engine")
    problems += check_writable("--output", str(output_folder(args)))
    return problems or check_files(args) or check_experts(args, launch)


def check_experts(args: argparse.Namespace, launch: Launch) -> list[str]:
    """The ranks can share the model's experts as is asked."""
    asked = args.expert_parallel_size
    if asked is None:
        return []
    flag = "--expert-parallel-size"
    shape = ModelConfig.from_folder(model_folder(args))
    tp = args.tensor_model_parallel_size
    dealt = check_dealing(flag, asked, shape, launch.world_size, "of this job")
    return dealt or check_whole_replicas(flag, asked, "--tensor-model-parallel-size", tp)


def check_verifier(names: list[str]) -> list[str]:
    """Each reward function is known, and can be loaded if it is one's own."""
    try:
        choose(names, {}, "--verifier")
    except BadInput as error:
        return str(error).splitlines()
    return []


def kept_columns(args: argparse.Namespace) -> dict[str, str]:
    """The columns of the data that the reward functions see."""
    return columns_of(choose(args.verifier, {}).values())


def check_files(args: argparse.Namespace) -> list[str]:
    """Look at model, tokenizer, template and data."""
    folder = model_folder(args)
    problems = files.check_weights("--model", Path(args.model), folder)
    if problems:
        vocab_size = files.LARGEST
    else:
        vocab_size = ModelConfig.from_folder(folder).vocab_size
        problems += files.check_end_of_text("--model", folder, vocab_size)
    tokenizer = Path(tokenizer_folder(args))
    problems += files.check_tokenizer("--tokenizer-name-or-path", tokenizer, vocab_size)
    wrong = files.check_template("--prompt-type", args.prompt_type, args.prompt_type_path)
    template = None if wrong else Template(args.prompt_type, args.prompt_type_path)
    compared = compares(args.verifier)
    for path, keys in map_keys(args).items():
        columns = layout(keys, kept_columns(args))
        problems += check_data("--data", path, columns, template, compared, vocab_size)
    problems += wrong
    if problems or template is None:
        return problems
    renders = not all(is_preprocessed(path) for path in args.data)
    rendering = {"--prompt-type": template} if renders else {}
    return files.check_ends(folder, tokenizer, [template], args.stop, rendering, END_KEYS)


def placement_of(args: argparse.Namespace, launch: Launch) -> Placement:
    """Replicas on all ranks."""
    size = RoleSize(
        launch.world_size, args.tensor_model_parallel_size, ep=args.expert_parallel_size or 1
    )
    return place({"rollout": size}, colocate=True)


def run(args: argparse.Namespace, launch: Launch) -> int:
    """Join the world and answer."""

    def prepare(world: World) -> list[Evaluator]:
        from r1zero.evaluation.standalone import prepare

        return prepare(request(args), world)

    def work(evaluators: list[Evaluator]) -> None:
        from r1zero.evaluation.standalone import run

        run(evaluators, output_folder(args), args.round_samples or None)

    return run_rank(
        launch, placement_of(args, launch), timedelta(minutes=45), False, False, prepare, work
    )


if __name__ == "__main__":
    end(main(sys.argv[1:]))
