#!/usr/bin/env python3
"""The first day on Ascend NPUs: look at everything that a run counts on, item by item.

    python tools/npu_check.py                        all NPUs of this node, full size
    python tools/npu_check.py --devices 2 --size small       a quick look
    python tools/npu_check.py --only operators,graphs        single items
    python tools/npu_check.py --model models/Qwen2.5-0.5B    real weights where a model is run

Each item runs in processes of its own, with a time limit, and is PASS, FAIL or SKIP on one line
with its figures; FAIL and SKIP say what to do next. Everything is also in a JSON file, with the last
lines that a failed item printed. docs/first_day.md explains each item. Exit codes: 0 nothing failed,
1 something did, 2 this cannot run here.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone

import psutil

from npu_checks.check import Outcome, read_outcomes
from r1zero.config.command_line import CommandLine
from r1zero.distributed.detect import uses_npu
from r1zero.distributed.process import begin, refuse
from r1zero.errors import BadInput, nearest

SPAWN = ROOT / "r1zero" / "distributed" / "spawn.py"
CHILD = ROOT / "tools" / "npu_checks" / "child.py"
# What processes of an item get unless the user has set it.
DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# What they get in any case: an operator without a kernel is an error, and not a slow run on the CPU.
FORCED = {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}
# Variables that the JSON tells of, by how they begin; no others, since some hold secrets.
TOLD = (
    "ASCEND_",
    "CPU_AFFINITY_CONF",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "GLOO_SOCKET_IFNAME",
    "HCCL_",
    "INF_NAN_MODE_ENABLE",
    "LD_PRELOAD",
    "MULTI_STREAM_MEMORY_REUSE",
    "NPU_STANDIN_",
    "OMP_NUM_THREADS",
    "P2P_HCCL_BUFFSIZE",
    "PYTORCH_",
    "TASK_QUEUE_ENABLE",
    "TORCH_",
)
OUTPUT_LINES = 60  # of a failed item that the JSON keeps
ENDS_SECONDS = 10.0  # that processes may take to leave when their time is over


def one(devices: int) -> int:
    """The item has one process."""
    return 1


def two(devices: int) -> int:
    """It has two, whether or not there are two devices."""
    return 2


def pair(devices: int) -> int:
    """It has two where there are two devices."""
    return min(2, devices)


def every(devices: int) -> int:
    """It has one for each device."""
    return devices


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the check."""

    name: str  # of its file in npu_checks/
    processes: Callable[[int], int]  # for so many devices
    seconds: float  # it may take
    advice: str  # when its processes end without saying why
    needs: tuple[str, ...] = ()  # items that must not have failed
    least_devices: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)  # which wins over the user's


ITEMS = (
    Item("versions", one, 300, "source CANN's set_env.sh, and see docs/ascend.md for versions"),
    Item(
        "float64",
        two,
        300,
        "look at MindSpeed's clone: branch core_r0.16.0, and einops, scipy and triton-ascend",
    ),
    Item("environment", one, 120, "the table of variables could not be made: send us the JSON"),
    Item(
        "groups",
        every,
        900,
        "look at the links between devices and at HCCL_SOCKET_IFNAME; `HCCL_CONNECT_TIMEOUT=120` "
        "lets a group that does not connect say so earlier",
        needs=("float64",),
        least_devices=2,
    ),
    Item(
        "operators",
        one,
        900,
        "an operator without a kernel, or one that this CANN refuses: send us the JSON",
        needs=("float64",),
    ),
    Item(
        "draws",
        every,
        600,
        "see that HCCL connects: `--only groups`",
        needs=("float64", "groups"),
    ),
    Item(
        "graphs",
        pair,
        900,
        "train with actor_rollout.decode_graphs=false, and send us the JSON",
        needs=("operators", "groups"),
    ),
    Item(
        "mismatch",
        one,
        1800,
        "the step of the model did not end: send us the JSON",
        needs=("operators",),
    ),
    Item(
        "publish",
        every,
        900,
        "run `--only groups`; a smaller training.publish_bucket_megabytes needs less memory",
        needs=("groups",),
        least_devices=2,
    ),
    Item(
        "tiny_job",
        one,
        2700,
        "the job did not end: send us the JSON",
        needs=("groups", "operators"),
        environment={"HCCL_DETERMINISTIC": "true"},
    ),
    Item(
        "model_step",
        one,
        2700,
        "the step did not end: send us the JSON",
        needs=("groups", "operators"),
    ),
    Item(
        "long_wait",
        every,
        900,
        "HCCL ended a rank that did nothing wrong: set HCCL_EXEC_TIMEOUT=0, and send us the JSON",
        needs=("groups",),
        least_devices=2,
        environment={"HCCL_EXEC_TIMEOUT": "120"},
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the items that were asked for; returns the exit code."""
    args = parse(arguments)
    try:
        devices = usable_devices(args.devices)
        items = chosen(args.only, args.first)
        check_paths(args)
    except BadInput as error:
        return refuse([str(error)], prints=True)
    report = Report(args, devices)
    print(f"{devices} NPUs, size {args.size}; each item runs in processes of its own", flush=True)
    for item in items:
        print(f"{item.name:12} ", end="", flush=True)
        outcome = run_item(item, args, devices, report.broken)
        print(told(outcome), flush=True)
        report.add(item, outcome)
    print(report.summary())
    return 1 if report.failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLine(prog="npu_check.py", description=__doc__)
    parser.add_argument("--devices", type=int, help="NPUs to use; default all that are visible")
    parser.add_argument(
        "--size",
        choices=("full", "small"),
        default="full",
        help="small: small shapes and short waits, whose speeds say nothing",
    )
    parser.add_argument("--only", help="items to run, with commas between")
    parser.add_argument("--from", dest="first", help="the item to begin with")
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder of some 0.5B parameters to run"
    )
    parser.add_argument(
        "--limit-factor", type=float, default=1.0, help="stretches the time limit of every item"
    )
    parser.add_argument("--out", type=Path, default=Path("npu_check.json"), help="the JSON file")
    return parser.parse_args(arguments)


def usable_devices(wanted: int | None) -> int:
    """How many NPUs to use. BadInput where there are none, or less than wanted."""
    if not uses_npu(None):
        raise BadInput(
            "this machine has no NPU that torch_npu sees: install torch_npu and source CANN's "
            "set_env.sh (docs/ascend.md), or run this on a node with NPUs"
        )
    from r1zero.distributed import device

    visible = device.count("npu")
    if wanted is None:
        return visible
    if not 1 <= wanted <= visible:
        raise BadInput(f"--devices {wanted} must be from 1 to {visible}, which are visible here")
    return wanted


def chosen(only: str | None, first: str | None) -> list[Item]:
    """The items to run, in their order. BadInput for a name that is none."""
    names = [item.name for item in ITEMS]
    wanted = names if only is None else only.split(",")
    for name in [*wanted, *([first] if first else [])]:
        if name not in names:
            raise BadInput(f"{name} is no item{nearest(name, names)}: {', '.join(names)}")
    begin_at = names.index(first) if first else 0
    return [item for item in ITEMS[begin_at:] if item.name in wanted]


def check_paths(args: argparse.Namespace) -> None:
    """BadInput for a model that is none, a JSON file that cannot be written, a factor below 0."""
    if args.model is not None and not (args.model / "config.json").is_file():
        raise BadInput(f"--model {args.model} has no config.json; name a Hugging Face folder")
    if args.limit_factor <= 0:
        raise BadInput(f"--limit-factor {args.limit_factor:g} must be above 0, such as 2")
    try:
        args.out.touch()
    except OSError as error:
        raise BadInput(f"--out {args.out} cannot be written ({error.strerror})") from None


# -- one item -------------------------------------------------------------------------------------


def run_item(
    item: Item, args: argparse.Namespace, devices: int, broken: Mapping[str, str]
) -> Outcome:
    """Run an item in processes of its own, unless something that it needs is not there.

    `broken` names items that nothing can be built on, and for each the one that failed.
    """
    if devices < item.least_devices:
        return Outcome("SKIP", f"needs {item.least_devices} devices, and has {devices}")
    for name in item.needs:
        if name in broken:
            cause = broken[name]
            return Outcome("SKIP", f"needs {cause}, which failed", f"mend {cause} first")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="npu_check-") as scratch:
        folder = Path(scratch) / "item"
        folder.mkdir()
        log = Path(scratch) / "output"
        code = run_processes(item, args, devices, folder, log)
        outcome = judged(item, folder, code, log.read_text(errors="replace").splitlines())
    return replace(outcome, seconds=round(time.monotonic() - began, 1))


def run_processes(
    item: Item, args: argparse.Namespace, devices: int, folder: Path, log: Path
) -> int | None:
    """Run the processes of an item; their exit code, None when the time was over."""
    command = [sys.executable, SPAWN, "--nproc-per-node", item.processes(devices), CHILD]
    command += [item.name, folder, "--devices", devices]
    if args.size == "small":
        command.append("--small")
    if args.model is not None:
        command += ["--model", args.model.resolve()]
    environment = {**DEFAULTS, **os.environ, **FORCED, **item.environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            return process.wait(item.seconds * args.limit_factor)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_all(process)


def end_all(process: subprocess.Popen) -> None:
    """End a process and all that it has started, also those that do not listen."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, left = psutil.wait_procs([*family, psutil.Process(process.pid)], ENDS_SECONDS)
    for stuck in left:
        stuck.kill()
    process.wait()


def judged(item: Item, folder: Path, code: int | None, output: Sequence[str]) -> Outcome:
    """What the ranks told, or else what their end says."""
    tail = "\n".join(output[-OUTPUT_LINES:])
    told_by = read_outcomes(folder)
    for rank, outcome in told_by:
        if outcome.verdict == "FAIL":
            where = f"rank {rank}: " if item.processes is not one else ""
            return replace(outcome, line=where + outcome.line, output=tail)
    if code is None:
        return Outcome(
            "FAIL",
            "did not end within its time; --limit-factor 2 gives it twice the time",
            item.advice,
            output=tail,
        )
    if code != 0 or not told_by:
        return Outcome("FAIL", last_words(output, code), item.advice, output=tail)
    return told_by[0][1]


def last_words(output: Sequence[str], code: int) -> str:
    """The sentence of processes that ended without a verdict: the program's own, else their last
    line."""
    own = [text for text in output if text.startswith("r1zero: ")]
    said = [text.strip() for text in output if text.strip()]
    if own:
        return own[-1].removeprefix("r1zero: ")
    if said:
        return f"ended with exit code {code}: {said[-1]}"
    return f"ended with exit code {code} and no word"


# -- what is told ---------------------------------------------------------------------------------


def told(outcome: Outcome) -> str:
    """An outcome on one line, with the next thing to do below."""
    text = f"{outcome.verdict} {outcome.seconds:7.1f} s  {outcome.line}"
    if outcome.advice:
        text += f"\n{'':13}next: {outcome.advice}"
    return text


class Report:
    """The outcomes so far, and the JSON file, which is written anew after each."""

    def __init__(self, args: argparse.Namespace, devices: int) -> None:
        self._path: Path = args.out
        self._outcomes: dict[str, Outcome] = {}
        self.broken: dict[str, str] = {}  # items that failed or need one that did, and that one
        self._head = {
            "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "arguments": sys.argv[1:],
            "devices": devices,
            "size": args.size,
            "machine": machine(),
            "environment": environment(os.environ),
        }

    def add(self, item: Item, outcome: Outcome) -> None:
        """Keep an outcome, on disk, too."""
        self._outcomes[item.name] = outcome
        causes = [self.broken[name] for name in item.needs if name in self.broken]
        if outcome.verdict == "FAIL":
            self.broken[item.name] = item.name
        elif causes:
            self.broken[item.name] = causes[0]
        items = {name: asdict(outcome) for name, outcome in self._outcomes.items()}
        text = json.dumps(self._head | {"items": items}, indent=1)
        self._path.write_text(text + "\n")

    @property
    def failed(self) -> bool:
        """Whether any item failed."""
        return any(outcome.verdict == "FAIL" for outcome in self._outcomes.values())

    def summary(self) -> str:
        """How many passed, and where the JSON is."""
        verdicts = [outcome.verdict for outcome in self._outcomes.values()]
        counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in ("PASS", "FAIL", "SKIP")]
        return f"{', '.join(counts)}; everything is in {self._path}"


def machine() -> dict[str, object]:
    """What this machine is, without its name."""
    uname = os.uname()
    return {
        "system": f"{uname.sysname} {uname.release}",
        "architecture": uname.machine,
        "cores": os.cpu_count(),
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
    }


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, as the user has set them."""
    return {name: variables[name] for name in sorted(variables) if name.startswith(TOLD)}


if __name__ == "__main__":
    begin()
    sys.exit(main())
