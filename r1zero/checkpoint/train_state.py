"""Model, optimizer and random states on disk: megatron-core's torch_dist sharded checkpoints.

Model and optimizer are saved as whole tensors cut into named regions, so any layout reads what any
other wrote; the names are those that megatron-core's GPTModel gives them. Each rank writes what it
holds, tensor by tensor. Writing is done by this process itself, in a thread if asked to: megatron-core
would fork writers, which a process with an open NPU must not do, and spawn a manager, which imports
everything once more.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel import random
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from r1zero.checkpoint.manifest import describe
from r1zero.checkpoint.optimizer_state import SHARDING, SHARDING_TYPE, sharded_optimizer_state
from r1zero.checkpoint.writing import FileWriting
from r1zero.distributed.collectives import gather_objects
from r1zero.errors import BadInput
from r1zero.policy.actor import Actor

Tensors = list[tuple[WriteItem, torch.Tensor]]


class Writer(FileSystemWriterAsync):
    """Megatron's writer of one file a rank, without its folder, its copies and its processes."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is: Megatron's would make the folder, and those around it, anew."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Note what is written. Megatron's would copy everything that is part of something."""
        self.write_buckets: list[tuple[str, str, tuple[list, Tensors]]] = []
        self.results_queue: queue.SimpleQueue | None = None
        if plan.items:
            name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
            path = os.path.join(self.checkpoint_dir, name)
            tensors: Tensors = []
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor), f"{item.index.fqn} is an object"
                tensors.append((item, tensor.detach()))
            self.write_buckets = [(path, name, ([], tensors))]
            self.results_queue = queue.SimpleQueue()  # Megatron's is held by a process of its own


class OneByOne:
    """Tensors that come to host memory one after the other, as they are written."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[WriteItem, torch.Tensor]]:
        for item, tensor in self._tensors:
            yield item, _alone(tensor)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, without what else its storage holds: torch.save would write
    that, too."""
    host = tensor.to("cpu")
    if host.untyped_storage().nbytes() == host.numel() * host.itemsize:
        return host
    return host.clone()


class Writing(FileWriting):
    """A save under way on this train rank: `run` writes this rank's files, `finalize` makes them
    one checkpoint.

    Constructing it is collective over the train ranks.
    """

    def __init__(self, policy: Actor, folder: Path, step: int) -> None:
        super().__init__()
        self._policy = policy
        torch_strategies.FileSystemWriterAsync = Writer
        with _inside(policy):
            model, optimizers = _sharded_state(policy)
            for own, optimizer in zip(optimizers, policy.optimizer.chained_optimizers, strict=True):
                own |= optimizer.state_dict()  # of its groups: rates, steps
                own["param_state_sharding_type"] = SHARDING_TYPE
            _count_alike(optimizers)
            state = {
                "model": model,
                "optimizer": _chained(optimizers),
                "iteration": step,
                "checkpoint_version": 3.0,
                "opt_param_scheduler": policy.scheduler.state_dict(),
            }
            self._request = dist_checkpointing.save(
                state,
                str(folder),
                _strategy(policy),
                async_sharded_save=True,
                content_metadata=dict(SHARDING),
            )
        self._file: Path | None = None  # none when other replicas write all that this rank holds
        self._tensors: Tensors = []
        if self._request.async_fn is not None:
            _, buckets, self._results = self._request.async_fn_args
            [(path, _, (_, self._tensors))] = buckets
            self._file = Path(path)

    def copy(self) -> None:
        """See FileWriting: the next update changes all of it."""
        self._tensors = [(item, tensor.to("cpu", copy=True)) for item, tensor in self._tensors]

    def run(self) -> None:
        """See FileWriting."""
        if self._file is None:
            return
        name = self._file.name
        answer: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        counter: queue.Queue[int] = queue.Queue()
        counter.put(0)
        FileSystemWriterAsync.write_preloaded_data(
            self._request.async_fn.args[0],  # how a stream is written: as it is
            0,
            (str(self._file), name, ([], OneByOne(self._tensors))),
            answer,
            counter,
            use_fsync=True,
        )
        self._tensors = []
        _, written = answer.get()
        if isinstance(written, Exception):
            self.error = _reason(written)
            return
        try:
            self.files[name] = describe(self._file)
        except OSError as error:  # the disk took it and does not give it back
            self.error = str(error)
            return
        self._results.put({0: written})

    def finalize(self) -> None:
        """Write the table of contents, when all train ranks have written their files.
        Collective."""
        with self._policy.grid.as_default_group():
            for finish in self._request.finalize_fns:
                finish()


def _reason(error: BaseException) -> str:
    """What the system said, if it was the system: torch covers a full disk with a complaint about
    positions."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return str(found or error)


def load_policy(policy: Actor, folder: Path, updates: int) -> None:
    """Fill model and optimizer from a checkpoint of any layout, and set the schedule to `updates`.
    Collective.

    BadInput when it is not a checkpoint of this model. Hyperparameters stay as configured.
    """
    groups = policy.optimizer.param_groups
    configured = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in groups
    ]
    with _inside(policy):
        try:
            common = dist_checkpointing.load_common_state_dict(str(folder))
            for own in _unchained(common["optimizer"]):
                # Empty, of a first rank without experts; Megatron would look for this rank's in it.
                own.pop("param_state", None)
            # Past the state of its parameters, with which MindSpeed's `load_state_dict`, standing for
            # Megatron's on NPUs, does not know what to do. It makes room for that, which is filled here.
            policy.optimizer.load_state_dict(common["optimizer"])
            model, optimizers = _sharded_state(policy)
            state = {"model": model, "optimizer": _chained(optimizers)}
            loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
        except (CheckpointingException, KeyError) as error:
            raise BadInput(
                f"{folder} does not hold this model and its optimizer: {error}"
            ) from None
        missing, unexpected = policy.model.module.load_state_dict(loaded["model"], strict=False)
        expected = {name for name, p in policy.model.module.named_parameters() if p.requires_grad}
        assert not unexpected and not expected & set(missing), (missing, unexpected)
    for group, values in zip(policy.optimizer.param_groups, configured, strict=True):
        group.update(values)
    policy.scheduler.num_steps = 0
    policy.scheduler.step(increment=updates)


def rng_states(policy: Actor) -> dict[str, torch.Tensor] | None:
    """The random states of all train ranks by "rank/name", on the first of them; None elsewhere.
    Collective."""
    mine = {
        "torch": torch.get_rng_state(),
        "device": random._get_cuda_rng_state(),
        **{
            f"tracker/{name}": state
            for name, state in random.get_cuda_rng_tracker().get_states().items()
        },
    }
    control = policy.grid.role_control
    assert control is not None, "train ranks have it"
    everyone = gather_objects({name: state.cpu() for name, state in mine.items()}, control)
    if everyone is None:
        return None
    result: dict[str, torch.Tensor] = {}
    for rank, states in enumerate(everyone):
        for name, state in states.items():
            result[f"{rank}/{name}"] = state
    return result


def set_rng_states(policy: Actor, states: dict[str, torch.Tensor]) -> None:
    """Bring this train rank's random states back; the layout must be the one that saved them."""
    prefix = f"{dist.get_rank(policy.grid.role_control)}/"
    mine = {
        name.removeprefix(prefix): state
        for name, state in states.items()
        if name.startswith(prefix)
    }
    torch.set_rng_state(mine.pop("torch"))
    random._set_cuda_rng_state(mine.pop("device"))
    random.get_cuda_rng_tracker().set_states(
        {name.removeprefix("tracker/"): state for name, state in mine.items()}
    )


@contextlib.contextmanager
def _inside(policy: Actor) -> Iterator[None]:
    """Where dist_checkpointing finds the role's groups."""
    with policy.model.active(), policy.grid.as_default_group(), torch.no_grad():
        yield


def _sharded_state(
    policy: Actor,
) -> tuple[dict[str, ShardedTensor | ShardedTensorFactory], list[dict[str, Any]]]:
    """The tensors of the model and of its optimizers on this rank, in place, and where they lie in
    the whole."""
    model = _sharded_model(policy)
    optimizers = []
    for optimizer in policy.optimizer.chained_optimizers:
        optimizers.append({"param_state": sharded_optimizer_state(optimizer, model)})
    return model, optimizers


def _chained(states: list[dict[str, Any]]) -> dict[Any, Any]:
    """The states of optimizers as Megatron lays them out: of a model without experts, which have
    their own, there is one; else by number."""
    if len(states) == 1:
        return states[0]
    return dict(enumerate(states))


def _unchained(states: dict[Any, Any]) -> list[dict[str, Any]]:
    """The states of optimizers that `_chained` laid out."""
    if "optimizer" in states:
        return [states]
    return [states[number] for number in sorted(states)]


def _count_alike(states: list[dict[str, Any]]) -> None:
    """Give all groups of parameters the count of updates that they share. An Adam may not count for
    a group of which this rank has no parameters (Apex's, or an offloaded one), and other ranks read
    the count here."""
    groups = [group for own in states for group in own["optimizer"]["param_groups"]]
    count = max(group.get("step", 0) for group in groups)
    for group in groups:
        group["step"] = count


def _sharded_model(policy: Actor) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """What learns of the model; of one with adapters only these, its weights are still those of the
    start."""
    if policy.adapters is not None:
        return policy.adapters.sharded_state()
    metadata = SHARDING | {"dp_cp_group": policy.model.groups.dp}
    # Linear layers keep an empty place for Transformer Engine's fp8 state: objects, which would be
    # pickled.
    return {
        name: part
        for name, part in policy.model.module.sharded_state_dict(metadata=metadata).items()
        if isinstance(part, ShardedTensor | ShardedTensorFactory)
    }


# Megatron's save strategies have no common public type
def _strategy(policy: Actor) -> Any:
    """One file a train rank; those that hold the same (Megatron's data-parallel ranks) share the
    work."""
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    if policy.model.groups.dp.size() > 1:
        return FullyParallelSaveStrategyWrapper(strategy, policy.model.groups.dp)
    return strategy
