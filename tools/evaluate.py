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
from datetime import timedelta
from math import inf
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from r1zero.config.command_line import CommandLine
from r1zero.config.paths import expand, user_path
from r1zero.config.schema import (
    MAP_KEYS,
    ActorRollout,
    Algorithm,
    Config,
    Ref,
    ResourcePool,
    Reward,
    Training,
)
from r1zero.data.layout import ColumnLayout
from r1zero.data.problems import parse_json
from r1zero.data.template import TEMPLATES, Template
from r1zero.distributed.detect import check_dtype, uses_npu
from r1zero.distributed.launch import Launch, read_launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.distributed.process import is_first, refuse, run_rank
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.preflight import (
    checks,
    files,
)
from r1zero.preflight.datasets import check_data, compares
from r1zero.run_folder.folder import check_writable
from r1zero.weights.detect import config_folder, model_folder


def main(arguments: list[str]) -> int:
    """Evaluate; returns the exit code."""
    args = parse(arguments)
    try:
        launch = read_launch()
        cfg = config(args)
        problems = check(args, cfg, launch)
    except BadInput as error:
        return refuse([str(error)], is_first())
    if problems:
        return refuse(problems, launch.is_first, launch.other_node)
    return run(args, cfg, launch)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        type=expand,
        help="Hugging Face model folder, or Megatron checkpoint",
    )
    add(
        "--data",
        required=True,
        nargs="+",
        type=expand,
        help="data sets: files, folders or preprocessed",
    )
    add("--k", type=int, default=1, help="answers to each problem")
    add("--problems", type=int, help="take only the first so many of each data set")
    add("--temperature", type=float, default=1.0, help="0: the most likely token")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--max-new-tokens", type=int, default=2048, help="longest answer")
    add("--prompt-type", default="qwen_r1", help="name of a prompt template")
    add("--prompt-type-path", default=str(TEMPLATES), type=expand, help="templates file")
    add(
        "--stop",
        nargs="*",
        default=[],
        metavar="TOKEN",
        help="texts or ids of more tokens that end an answer, as in actor_rollout.stop",
    )
    add(
        "--map-keys",
        nargs="+",
        default=["{}"],
        metavar="JSON",
        help="column of each part, once for all data sets, or once for each in turn; default "
        + json.dumps(MAP_KEYS),
    )
    add("--tokenizer-name-or-path", type=expand, help="folder; default MODEL")
    add(
        "--verifier",
        nargs="+",
        default=["acc", "format"],
        help="scorers, as in algorithm.verifier_function",
    )
    add(
        "--dtype",
        choices=["bf16", "fp32"],
        help="default: that of the model's config.json; bf16 on NPUs",
    )
    add("--seed", type=int, default=1234)
    add("--tensor-model-parallel-size", type=int, default=1)
    add(
        "--max-tokens-to-oom",
        type=int,
        default=131072,
        help="tokens in a replica's KV cache at most",
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
    add("--workers", type=int, default=2, help="processes that score, beside each replica")
    add("--deadline-seconds", type=float, default=10.0, help="for one answer and one scorer")
    add(
        "--output",
        type=user_path,
        help="folder of the reports; default runs/evaluation/<name of MODEL>",
    )
    return parser.parse_args(arguments)


def config(args: argparse.Namespace) -> Config:
    """Write the arguments as the configuration of a run. BadInput for malformed ones."""
    tokenizer = args.tokenizer_name_or_path or args.model
    dtype = args.dtype or (
        "bf16" if uses_npu(None) else model_dtype(config_folder(args.model, tokenizer))
    )
    training = Training(
        global_batch_size=1,
        seq_length=args.max_new_tokens + 1,
        train_iters=1,
        seed=args.seed,
        bf16=dtype == "bf16",
        prompt_type=args.prompt_type,
        prompt_type_path=args.prompt_type_path,
        eval_data_path=args.data[0],
        tokenizer_name_or_path=tokenizer,
        eval_samples_per_prompt=args.k,
        eval_temperature=args.temperature,
        eval_top_p=args.top_p,
        eval_top_k=args.top_k,
    )
    actor = ActorRollout(
        load=args.model,
        data_path=args.data[0],
        ppo_mini_batch_size=2,
        n_samples_per_prompt=2,
        max_prompt_length=1,
        max_tokens_to_oom=args.max_tokens_to_oom,
        stop=args.stop,
        infer_tensor_parallel_size=args.tensor_model_parallel_size,
    )
    output = args.output or Path("runs/evaluation") / Path(args.model).name
    return Config(
        name="evaluate",
        output_dir=str(output),
        training=training,
        actor_rollout=actor,
        ref=Ref(load=args.model),
        reward=Reward(workers=args.workers, deadline_seconds=args.deadline_seconds),
        algorithm=Algorithm(
            verifier_function=args.verifier,
            verifier_weight=[1 / len(args.verifier)] * len(args.verifier),
        ),
        resource_pool=ResourcePool(colocate=True),
        model={},
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


def layout(keys: dict[str, str]) -> ColumnLayout:
    return ColumnLayout(keys, held_out=True, columns_key="--map-keys", skip_key="")


def model_dtype(folder: Path) -> str:
    """Return the dtype that a model folder's config.json names; fp32 when it is neither of the
    two."""
    path = folder / "config.json"
    if path.is_file():
        entries = parse_json(str(path), path.read_text())
    else:
        entries = {}
    if "bfloat16" in (entries.get("dtype"), entries.get("torch_dtype")):
        return "bf16"
    return "fp32"


def check(args: argparse.Namespace, cfg: Config, launch: Launch) -> list[str]:
    """Return a sentence for everything that is wrong, found before torch is imported."""
    wrong = [
        (flag, value, "must be at least 1")
        for flag, value in (
            ("--k", args.k),
            ("--max-new-tokens", args.max_new_tokens),
            ("--workers", args.workers),
            ("--problems", args.problems),
            ("--tensor-model-parallel-size", args.tensor_model_parallel_size),
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
    problems += check_dtype(f"--dtype: {args.dtype}", cfg.training.bf16, None)
    problems += checks.check_rewards(cfg) + check_writable("--output", cfg.output_dir)
    return problems or check_files(args, cfg)


def check_files(args: argparse.Namespace, cfg: Config) -> list[str]:
    """Look at model, tokenizer, template and data."""
    folder = model_folder(cfg, "actor_rollout")
    problems = files.check_weights("--model", Path(args.model), folder)
    if problems:
        vocab_size = files.LARGEST
    else:
        vocab_size = ModelConfig.from_folder(folder).vocab_size
    if not problems:
        problems += files.check_end_of_text("--model", folder, vocab_size)
    tokenizer = Path(cfg.training.tokenizer_name_or_path)
    problems += files.check_tokenizer("--tokenizer-name-or-path", tokenizer, vocab_size)
    wrong = files.check_template("--prompt-type", args.prompt_type, args.prompt_type_path)
    if wrong:
        template = None
    else:
        template = Template(args.prompt_type, args.prompt_type_path)
    for path, keys in map_keys(args).items():
        problems += check_data("--data", path, layout(keys), template, compares(cfg), vocab_size)
    problems += wrong
    return problems or files.check_ends(cfg, args.data, "--model", "--prompt-type", "--stop")


def run(args: argparse.Namespace, cfg: Config, launch: Launch) -> int:
    """Join the world and answer."""

    def prepare(world):  # noqa: ANN001, ANN202 - types of modules that are imported late
        from r1zero.evaluation.standalone import prepare

        return prepare(cfg, world, map_keys(args), args.problems, args.max_new_tokens)

    def work(evaluators) -> None:  # noqa: ANN001
        from r1zero.evaluation.standalone import run

        run(evaluators, Path(cfg.output_dir), args.round_samples or None)

    tp = args.tensor_model_parallel_size
    size = launch.world_size
    placement = place({"rollout": RoleSize(size, tp)}, colocate=True)
    return run_rank(launch, placement, timedelta(minutes=45), False, False, prepare, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
