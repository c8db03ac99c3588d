"""Pipeline parallelism (1F1B): run microbatches through a role's stages, forward or with backward.

Megatron's schedule for two stages and three microbatches, F forward and B backward:

    stage 0    F0  F1      B0  F2  B1      B2
    stage 1        F0  B0  F1  B1  F2  B2

Packed microbatches differ in length, so every stage packs each one itself and the hidden states
that come from the stage before have its shape. One without items (algo/lockstep.py) is run like the
others, and its loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)

from r1zero.algo.lockstep import fill_up
from r1zero.algo.packing import Microbatch, S, TrainSample, pack
from r1zero.algo.zigzag import shard
from r1zero.distributed.collectives import all_max
from r1zero.ops.token_gather import join_rows
from r1zero.policy.logprobs import token_logprobs
from r1zero.policy.megatron import RoleModel

# From (microbatch, the last stage's output [T (/ TP under SP), 1, H]) to (loss, anything to hand
# back). The loss may be any scalar where there is no backward pass.
LastStep = Callable[[Microbatch, torch.Tensor], tuple[torch.Tensor, Any]]
# From (microbatch, log-probs [R], entropy [R]) to the same.
LossFunction = Callable[[Microbatch, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]


def run_pipeline(
    model: RoleModel,
    module: torch.nn.Module,
    microbatches: Sequence[Sequence[TrainSample]],
    last_step: LastStep,
    backward: bool,
) -> list[Any]:
    """Feed the microbatches through this replica, and what comes out of its last stage to
    `last_step`. Returns what that handed back, one for each microbatch with items, on the last stage;
    nothing on the others."""
    assert microbatches, "a pipeline needs at least one microbatch"
    no_tokens = torch.tensor(0, dtype=torch.int, device=model.device.torch)  # Megatron counts none

    def forward_step(batches: Any, stage: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        batch = _pack(model, next(batches))

        def finish(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            loss, handed_back = last_step(batch, hidden)
            return loss, no_tokens, handed_back

        return model.hidden(batch, stage), finish

    schedule = forward_backward_no_pipelining
    communicator = None
    if model.grid.span.pp > 1:
        schedule = forward_backward_pipelining_without_interleaving
        communicator = P2PCommunicator(pp_group=model.groups.pp, config=model.config)
    with model.active(), torch.set_grad_enabled(backward):
        handed_back = schedule(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=module,
            num_microbatches=len(microbatches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=not backward,
            p2p_communicator=communicator,
            pg_collection=model.groups,
        )
    return [values for values in handed_back if values is not None]


def _pack(model: RoleModel, items: Sequence[TrainSample]) -> Microbatch:
    """The tokens of a microbatch that this rank computes."""
    grid = model.grid
    multiple = 1
    if model.config.sequence_parallel:
        multiple = grid.span.tp
    if grid.span.cp == 1:
        return pack(items, model.device.torch, multiple)
    whole = pack(items, torch.device("cpu"))
    return shard(whole, grid.span.cp, grid.cp_index, multiple, model.device.torch)


def logprob_step(model: RoleModel, temperature: float, loss: LossFunction) -> LastStep:
    """The last step that computes a loss of log-probs; 0 of a microbatch without items.

    Under context parallelism each rank computes the loss of all rows, which may depend on whole
    responses, and learns from its own.
    """

    def last_step(batch: Microbatch, hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
        rows = model.full_hidden(hidden)[batch.logit_positions]
        head = model.module.head_weight()
        logprobs, entropy = token_logprobs(
            rows, head, batch.own_targets, temperature, model.groups.tp, model.unused
        )
        if not batch.items:
            return logprobs.sum(), None  # 0, with a gradient: nothing is predicted
        if batch.own_rows is not None:
            own = torch.stack([logprobs, entropy])
            group = model.grid.groups["cp"]
            logprobs, entropy = join_rows(own, batch.own_rows, len(batch.targets), group)
        return loss(batch, logprobs, entropy)

    return last_step


def in_lockstep(model: RoleModel, own: list[list[S]]) -> list[list[S]]:
    """A replica's microbatches, filled up to as many as the replica with most has, where experts lie
    across replicas.

    Then every rank of the role asks at once. Elsewhere a replica need not wait for the others, which
    have microbatches of their own.
    """
    grid = model.grid
    if not grid.span.experts_span_replicas:
        return own
    assert grid.role_control is not None
    return fill_up(own, int(all_max(torch.tensor([len(own)]), grid.role_control)))


def compute_logprobs(
    model: RoleModel,
    module: torch.nn.Module,
    microbatches: list[list[TrainSample]],
    temperature: float,
) -> dict[int, Any]:
    """Log-probs of every item's response, fp32 [T] by item number; empty but on the last stage."""

    def keep(
        batch: Microbatch, logprobs: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        return logprobs.sum(), list(
            zip((item.number for item in batch.items), batch.split(logprobs), strict=True)
        )

    last_step = logprob_step(model, temperature, keep)
    handed_back = run_pipeline(model, module, microbatches, last_step, backward=False)
    return {number: values for pairs in handed_back for number, values in pairs}
