"""Items of tools/npu_check.py on ranks of the stand-in, whole or with one thing broken. Imported by
the stand-in's server alone."""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_npu
from support.patience import LONG

from npu_checks import graphs, jobs, operators, versions
from npu_checks.check import Check, Figures
from r1zero.distributed import collectives
from r1zero.distributed.device import open_device
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.rollout import sampler
from r1zero.weight_sync.broadcast import Publisher
from r1zero.weight_sync.plan import Piece


def npu_check_item(rank: int, size: int, store: dist.Store, item: str, fault: str) -> str:
    """What an item of small size prints, with a fault of FAULTS or "". Raises what the item
    raises."""
    module = importlib.import_module(f"npu_checks.{item}")
    jobs.make_tiny = lambda: None  # the fixture has
    jobs.train = functools.partial(train_here, store)
    if fault:
        FAULTS[fault]()
    for name, stands_for in (("in_world", in_forked_world), ("join", forked_store)):
        if hasattr(module, name):
            setattr(module, name, functools.partial(stands_for, store))
    os.environ["HCCL_EXEC_TIMEOUT"] = "120"
    launch = Launch("single", rank, size, rank, (0,) * size, "", 0)
    with tempfile.TemporaryDirectory() as folder:
        return module.run(Check(item, launch, size, True, None, Path(folder))).line


def in_forked_world(
    store: dist.Store,
    check: Check,
    roles: Mapping[str, RoleSize],
    work: Callable[[World], Figures],
) -> Figures:
    """As npu_checks.world.in_world, without a watchdog: here the first exception ends all ranks."""
    placement = place(roles, colocate=True)
    device = open_device("npu", check.launch.local_rank)
    return work(World(check.launch, placement, device, timedelta(seconds=LONG), store))


def train_here(
    store: dist.Store, check: Check, name: str, processes: int, overrides: list[str]
) -> Path:
    """As npu_checks.jobs.train, in this process, so once."""
    from support.npu_bodies import train_as_on_npus

    folder = check.folder / name
    job = [*jobs.ALWAYS, *overrides, f"output_dir={folder}"]
    train_as_on_npus(0, processes, store, "tiny", job)
    return folder


def forked_store(store: dist.Store, *_: Any) -> dist.Store:
    """The ranks have met."""
    return store


# -- one thing broken each ------------------------------------------------------------------------


def _replace(place: Any, name: str, change: Callable[[Callable], Callable]) -> Callable[[], None]:
    """A fault that puts `change(what is there)` in place of a function."""

    def fault() -> None:
        setattr(place, name, change(getattr(place, name)))

    return fault


def _without(*keywords: str) -> Callable[[Callable], Callable]:
    """The same function, to which these keywords do not come through."""

    def change(function: Callable) -> Callable:
        def call(*args: Any, **given: Any) -> Any:
            for keyword in keywords:
                given.pop(keyword, None)
            return function(*args, **given)

        return call

    return change


def _one_short(keyword: str) -> Callable[[Callable], Callable]:
    """The same function, to which these lengths come one short."""

    def change(function: Callable) -> Callable:
        def call(*args: Any, **given: Any) -> Any:
            given[keyword] = [max(1, length - 1) for length in given[keyword]]
            return function(*args, **given)

        return call

    return change


def _rotary_part_is_zero(function: Callable) -> Callable:
    def call(*args: Any, query_rope: torch.Tensor, **given: Any) -> Any:
        return function(*args, query_rope=query_rope * 0, **given)

    return call


def _copies_run_by_choice(function: Callable) -> Callable:
    """All first experts of the tokens, then all second ones."""

    def call(x: torch.Tensor, ids: torch.Tensor, **given: Any) -> Any:
        rows, places, *rest = function(x, ids, **given)
        return (rows, places.view(ids.shape).t().flatten(), *rest)

    return call


def _sine_is_negative(function: Callable) -> Callable:
    def tables(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = function(*args)
        return cos, -sin

    return tables


def _gradient_is_halved(function: Callable) -> Callable:
    def call(*args: Any, **given: Any) -> Any:
        output, *rest = function(*args, **given)
        return ((output + output.detach()) / 2, *rest)

    return call


def _parts_are_swapped(function: Callable) -> Callable:
    def all_gather(parts: list[torch.Tensor], *args: Any, **given: Any) -> Any:
        return function(parts[::-1], *args, **given)

    return all_gather


def _bf16_sum_is_one_more(function: Callable) -> Callable:
    def all_reduce(tensor: torch.Tensor, *args: Any, **given: Any) -> Any:
        work = function(tensor, *args, **given)
        if tensor.dtype == torch.bfloat16:
            tensor[-1] += 1
        return work

    return all_reduce


def _nothing_is_sent(_: Callable) -> Callable:
    return lambda operations: []


def _lengths_stay(function: Callable) -> Callable:
    first: list[Any] = []

    def update(graph: Any, cpu_update_input: list) -> None:
        first.append(cpu_update_input)
        function(graph, cpu_update_input=first[0])

    return update


def _without_graphs(decoder: Callable) -> Callable:
    return lambda *args: decoder(*args[:-1], False)


def _first_elements_are_one_more(write: Callable) -> Callable:
    def change(publisher: Publisher, piece: Piece, values: torch.Tensor) -> None:
        write(publisher, piece, values + (piece.offset == 0))

    return change


def _lets_all_through(_: Callable) -> Callable:
    return lambda world: None


def _logits_are_sharper(function: Callable) -> Callable:
    def sample(logits: torch.Tensor, *args: Any) -> Any:
        return function(logits * 1.03, *args)

    return sample


def _a_program_that_dies() -> None:
    jobs.train = _train
    jobs.MAIN = Path(tempfile.mkdtemp()) / "main.py"
    jobs.MAIN.write_text("raise SystemExit('r1zero: rank 0 (train) is out of memory')")


def _import_fails(_: Callable) -> Callable:
    def import_mindspeed() -> None:
        raise ImportError("No module named 'einops'")

    return import_mindspeed


def _mindspeeds_sum() -> None:
    collectives._OWN["all_reduce"] = dist.all_reduce


def _queue_for_no_graphs() -> None:
    os.environ["TASK_QUEUE_ENABLE"] = "2"


_train = jobs.train  # in processes of their own

FAULTS: dict[str, Callable[[], None]] = {
    "versions are judged": _replace(versions, "is_standin", lambda _: lambda: False),
    "MindSpeed cannot be imported": _replace(versions, "import_mindspeed", _import_fails),
    "MindSpeed's sum": _mindspeeds_sum,
    "a queue without graphs": _queue_for_no_graphs,
    "no mask": _replace(torch_npu, "npu_fusion_attention", _without("atten_mask")),
    "half a gradient": _replace(torch_npu, "npu_fusion_attention", _gradient_is_halved),
    "lengths one short": _replace(
        torch_npu, "npu_fused_infer_attention_score", _one_short("actual_seq_lengths_kv")
    ),
    "lengths of latents one short": _replace(
        torch_npu, "npu_fused_infer_attention_score_v2", _one_short("actual_seq_kvlen")
    ),
    "latents without the rotary part": _replace(
        torch_npu, "npu_fused_infer_attention_score_v2", _rotary_part_is_zero
    ),
    "copies in another order": _replace(
        torch_npu, "npu_moe_init_routing_v2", _copies_run_by_choice
    ),
    "the sign of the sine": _replace(operators, "rotary_tables", _sine_is_negative),
    "a sum in bf16": _replace(dist, "all_reduce", _bf16_sum_is_one_more),
    "nothing sent": _replace(dist, "batch_isend_irecv", _nothing_is_sent),
    "graphs with stale lengths": _replace(torch_npu.npu.NPUGraph, "update", _lengths_stay),
    "graphs that are not captured": _replace(graphs, "Decoder", _without_graphs),
    "weights changed on the way": _replace(Publisher, "_write", _first_elements_are_one_more),
    "a barrier that nobody waits at": _replace(World, "barrier", _lets_all_through),
    "sharper logits in rollout": _replace(sampler, "sample", _logits_are_sharper),
    "a program that dies": _a_program_that_dies,
    "parts of an all_gather swapped": _replace(dist, "all_gather", _parts_are_swapped),
}
