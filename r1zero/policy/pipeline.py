"""Pipeline parallelism (1F1B): run microbatches through a role's stages, forward or with backward.

Megatron's schedule for two stages and three microbatches, F forward and B backward:

    stage 0    F0  F1      B0  F2  B1      B2
    stage 1        F0  B0  F1  B1  F2  B2

Packed microbatches differ in length, so every stage packs each one itself and the hidden states
that come from the stage before have its shape. One without items (algo/lockstep.py) is run like the
others, and its loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)

from r1zero.algo.packing import Microbatch, TrainSample, pack
from r1zero.algo.zigzag import shard
from r1zero.ops.token_gather import join_rows
from r1zero.policy.logprobs import token_logprobs
from r1zero.policy.megatron import RoleModel

# From (microbatch, log-probs [R], entropy [R]) to (loss, anything to hand back).
LossFunction = Callable[[Microbatch, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]


def run_pipeline(
    model: RoleModel,
    module: torch.nn.Module,
    microbatches: list[list[TrainSample]],
    temperature: float,
    loss: LossFunction,
    backward: bool,
) -> list[Any]:
    """Feed the microbatches through this replica. Returns what `loss` handed back, one for each
    microbatch with items, on the last stage; nothing on the others."""
    assert microbatches, "a pipeline needs at least one microbatch"

    def forward_step(batches: Any, stage: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        batch = _pack(model, next(batches))
        last_step = partial(_loss_step, model, batch, temperature=temperature, loss=loss)
        return model.hidden(batch, stage), last_step

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


def _pack(model: RoleModel, items: list[TrainSample]) -> Microbatch:
    """The tokens of a microbatch that this rank computes."""
    grid = model.grid
    multiple = 1
    if model.config.sequence_parallel:
        multiple = grid.span.tp
    if grid.span.cp == 1:
        return pack(items, model.device.torch, multiple)
    whole = pack(items, torch.device("cpu"))
    return shard(whole, grid.span.cp, grid.cp_index, multiple, model.device.torch)


def _loss_step(
    model: RoleModel,
    batch: Microbatch,
    hidden: torch.Tensor,
    temperature: float,
    loss: LossFunction,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """From the last stage's hidden states [T, 1, H] to what Megatron's schedule takes: the loss, a
    token count that is not used, and what `loss` handed back.

    Under context parallelism each rank computes the loss of all rows, which may depend on whole
    responses, and learns from its own.
    """
    rows = model.full_hidden(hidden)[batch.logit_positions]
    head = model.module.head_weight()
    logprobs, entropy = token_logprobs(
        rows, head, batch.own_targets, temperature, model.groups.tp, model.unused
    )
    if batch.own_rows is not None and batch.items:
        own = torch.stack([logprobs, entropy])
        group = model.grid.groups["cp"]
        logprobs, entropy = join_rows(own, batch.own_rows, len(batch.targets), group)
    value = logprobs.sum()  # 0, when nothing is predicted
    handed_back = None
    if batch.items:
        value, handed_back = loss(batch, logprobs, entropy)
    return value, torch.tensor(0, dtype=torch.int, device=model.device.torch), handed_back


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

    handed_back = run_pipeline(model, module, microbatches, temperature, keep, backward=False)
    return {number: values for pairs in handed_back for number, values in pairs}
