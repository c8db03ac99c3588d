"""Model, optimizer and random states on disk: megatron-core's torch_dist sharded checkpoints.

Model and optimizer are saved as whole tensors cut into named regions, so any layout reads what any
other wrote; the names are those that megatron-core's GPTModel gives them. Writing is done by this
process itself, in a thread if asked to: megatron-core would fork writers, which a process with an
open NPU must not do, and spawn a manager, which imports everything once more.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random

from r1zero.checkpoint.manifest import File, describe
from r1zero.distributed.collectives import gather_objects
from r1zero.errors import BadInput
from r1zero.policy.actor import Actor

# Whole tensors, gathered from the data-parallel ranks: the one kind that TP, PP and DP may change
# under.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


class Writing:
    """A save under way on this train rank: `run` writes this rank's files, `finalize` makes them
    one checkpoint.

    Constructing it is collective over the train ranks.
    """

    def __init__(self, policy: Actor, folder: Path, step: int) -> None:
        self._policy = policy
        self._folder = folder
        self.files: dict[str, File] = {}
        self.error: str | None = None
        self._thread: threading.Thread | None = None
        # It would make the folder, and those around it, once more.
        filesystem_async.FileSystemWriterAsync.prepare_local_plan = lambda _, plan: plan
        # else it spawns a process to hold one
        filesystem_async._results_queue = queue.SimpleQueue()
        with _inside(policy):
            state = _sharded_state(policy, loading=False)
            state |= {
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
        if self._request.preload_fn:
            self._buckets = self._request.preload_fn()
        else:
            self._buckets = []

    def start(self) -> None:
        """Write beside the training, from a copy. A process that fails meanwhile does not wait for
        it."""
        self._buckets = _staged(self._buckets, self._policy)
        self._thread = threading.Thread(target=self.run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def run(self) -> None:
        """Write and sync this rank's files, and describe them; `error` then says what went
        wrong."""
        if self._request.async_fn is None:  # other replicas write all of this rank's tensors
            return
        transforms = self._request.async_fn.args[0]
        _, _, results = self._request.async_fn_args
        written = {}
        for number, bucket in enumerate(self._buckets):
            answer: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
            counter: queue.Queue[int] = queue.Queue()
            counter.put(number)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, answer, counter, use_fsync=True
            )
            written[number] = answer.get()[1]
            if isinstance(written[number], Exception):
                self.error = _reason(written[number])
                return
            try:
                self.files[bucket[1]] = describe(self._folder / bucket[1])
            except OSError as error:  # the disk took it and does not give it back
                self.error = str(error)
                return
        results.put(written)
        self._buckets = []

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
        state = _sharded_state(policy, loading=True)
        try:
            loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
        except (CheckpointingException, KeyError) as error:
            raise BadInput(
                f"{folder} does not hold this model and its optimizer: {error}"
            ) from None
        missing, unexpected = policy.model.module.load_state_dict(loaded["model"], strict=False)
        assert not unexpected and all(name.endswith("._extra_state") for name in missing), (
            missing,
            unexpected,
        )
        _load_optimizer(policy, loaded["optimizer"])
    for group, values in zip(policy.optimizer.param_groups, configured, strict=True):
        group.update(values)
    policy.scheduler.num_steps = 0
    policy.scheduler.step(increment=updates)


def _load_optimizer(policy: Actor, state: dict) -> None:
    """Fill the optimizer. The state of its parameters goes past `load_state_dict`: MindSpeed's, which
    stands for Megatron's on NPUs, does not know this way of sharding."""
    [optimizer] = policy.optimizer.chained_optimizers
    of_parameters = state.pop("param_state")
    policy.optimizer.load_state_dict(state)
    optimizer.load_parameter_state_from_fully_reshardable(of_parameters)


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


def _sharded_state(policy: Actor, loading: bool) -> dict:
    # megatron-core 0.16.1 leaves the padding between buckets out of the tensors it gathers, and
    # then cuts parameters out of them at places that count it: behind the first bucket, optimizer
    # state would be saved shifted. Padding that counts as content keeps both at one measure.
    for buffer in policy.ddp.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    metadata = SHARDING | {"dp_cp_group": policy.model.groups.dp}
    model = policy.model.module.sharded_state_dict(metadata=metadata)
    if policy.grid.span.dp == 1:
        for optimizer in policy.optimizer.chained_optimizers:
            optimizer.get_parameter_state_dp_zero = functools.partial(_whole_state, optimizer)
    # Linear layers keep an empty place for Transformer Engine's fp8 state: objects, which would be
    # pickled.
    model = {
        name: part
        for name, part in model.items()
        if isinstance(part, ShardedTensor | ShardedTensorFactory)
    }
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, loading, metadata=metadata),
    }


class _Parts(dict):
    """Tensors by where they begin in a flat buffer, in place of the buffer: a slice of it is one of
    them."""

    def __getitem__(self, part: slice) -> torch.Tensor:
        return super().__getitem__(part.start)


def _whole_state(optimizer: DistributedOptimizer, **_: object) -> dict:
    """What get_parameter_state_dp_zero returns, of a single replica: its own state as it lies
    there.

    Megatron gathers the shards of all replicas into one buffer, in five passes over the memory;
    here is nothing to gather. Loading writes into the state in place.
    """
    state: dict = {"buckets_coalesced": True}
    for number, (ranges, buffer) in enumerate(
        zip(optimizer.gbuf_ranges, optimizer.buffers, strict=True)
    ):
        world: dict[str, _Parts] = {}
        for parameter, (start, _, _) in buffer.param_index_map.items():
            for key, tensor in optimizer._get_main_param_and_optimizer_states(parameter).items():
                world.setdefault(key, _Parts())[start] = tensor.detach().flatten()
        state[number] = dict.fromkeys(ranges, world)
    return state


# Megatron's save strategies have no common public type
def _strategy(policy: Actor) -> Any:
    """One file a train rank; data-parallel replicas share the work."""
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    if policy.grid.span.dp > 1:
        return FullyParallelSaveStrategyWrapper(strategy, policy.model.groups.dp)
    return strategy


def _staged(buckets: list, policy: Actor) -> list:
    """Copy what the next update would change; what was gathered or moved from a device is a copy
    already."""
    trained = [
        *policy.model.module.parameters(),
        *(p for group in policy.optimizer.param_groups for p in group["params"]),
        *(
            t
            for optimizer in policy.optimizer.chained_optimizers
            for state in optimizer.optimizer.state.values()
            for t in state.values()
        ),
    ]
    live = {tensor.untyped_storage().data_ptr() for tensor in trained}

    def stage(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() in live:
            return tensor.clone()
        return tensor

    result = []
    for path, name, (objects, tensors) in buckets:
        result.append((path, name, (objects, [(item, stage(tensor)) for item, tensor in tensors])))
    return result
