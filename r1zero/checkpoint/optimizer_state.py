"""What a train rank holds of the optimizer's state, told as boxes of whole tensors.

Megatron's distributed optimizer lays a rank's parameters end to end and cuts the line into one run
for each data-parallel rank, wherever the cut falls. The run of one matrix is at most three boxes of
it, that of stacked experts at most five. Elements 3 to 16 of four rows of five:

     .  .  .  3  4        row 0, columns 3 and 4
     5  6  7  8  9        rows 1 and 2
    10 11 12 13 14
    15 16  .  .  .        row 3, columns 0 and 1

So each rank writes its own run and reads its own run, and nobody gathers anything. On disk all boxes
together are the whole tensors of megatron-core's "fully_reshardable" sharding, under its names: any
layout reads them, and so does Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from r1zero.policy.offload import master_of
from r1zero.policy.optimizer import MOMENTS

# What megatron-core writes beside the tensors, for its own reader.
SHARDING_TYPE = "fully_reshardable"
SHARDING = {
    "distrib_optim_sharding_type": SHARDING_TYPE,
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


def sharded_optimizer_state(
    optimizer: DistributedOptimizer, model: Mapping[str, ShardedTensor | ShardedTensorFactory]
) -> dict[str, ShardedTensor]:
    """The master weights and moments that this rank holds, in place: views of the optimizer's own.

    `model` describes where the rank's parameters lie in the whole model. Moments that no update has
    made yet are zeros.
    """
    descriptions = {description.data: description for description in model.values()}
    result = {}
    for parameter, start, stop in _runs(optimizer):
        parts = list(_parts(descriptions[parameter]))
        for state, flat in _values(optimizer, parameter).items():
            for box in _boxes_of_run(parts, start, stop, flat, state):
                result[f"{box.key} {box.global_offset}"] = box
    return result


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Cut the elements start..stop of a tensor, in flat order, into boxes: (offset, size) of each,
    in that order.

    >>> list(boxes((4, 5), 3, 17))
    [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]

    Of experts, two matrices of one row each: the rest of the first, and half of the second.

    >>> list(boxes((2, 1, 4), 3, 6))
    [((0, 0, 3), (1, 1, 1)), ((1, 0, 0), (1, 1, 2))]
    """
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    while start < stop:
        axis = _whole_axis(strides, start, stop)
        offset = tuple(start // stride % side for stride, side in zip(strides, shape, strict=True))
        whole = (stop - start) // strides[axis]
        count = min(whole, shape[axis] - offset[axis])
        size = (1,) * axis + (count,) + shape[axis + 1 :]
        yield offset, size
        start += prod(size)


def _whole_axis(strides: Sequence[int], start: int, stop: int) -> int:
    """The first axis of which start..stop begins with a whole slice: rows before their elements."""
    for axis, stride in enumerate(strides):
        if start % stride == 0 and stop - start >= stride:
            return axis
    raise AssertionError("the last axis has slices of one element")


def _runs(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Each parameter of which this rank holds elements, and which: start..stop of its flat
    order."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _values(
    optimizer: DistributedOptimizer, parameter: torch.nn.Parameter
) -> dict[str, torch.Tensor]:
    """The master weight and Adam's moments of what this rank holds of a parameter, flat."""
    group, number = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][number]
    moments = optimizer.optimizer.state.get(main, {})
    values = {"param": master_of(main).detach()}
    for name in MOMENTS:
        values[name] = moments[name] if name in moments else torch.zeros_like(values["param"])
    return values


def _parts(
    description: ShardedTensor | ShardedTensorFactory,
) -> Iterator[tuple[int, ShardedTensor]]:
    """The regions of whole tensors that a parameter is made of, and where each begins in its flat
    order: linear_fc1 is two, the gate's rows and below them those of up."""
    if isinstance(description, ShardedTensor):
        yield 0, description
        return
    begin = description.data.storage_offset()
    parts = description.build()
    for part in parts:
        assert part.data.is_contiguous(), f"{part.key} does not lie in one piece"
        yield part.data.storage_offset() - begin, part
    assert sum(part.data.numel() for part in parts) == description.data.numel(), description.key


def _boxes_of_run(
    parts: list[tuple[int, ShardedTensor]], start: int, stop: int, flat: torch.Tensor, state: str
) -> Iterator[ShardedTensor]:
    """Describe `flat`, the values of the elements start..stop of a parameter with these parts."""
    for begin, part in parts:
        first = max(start, begin)
        last = min(stop, begin + prod(part.local_shape))
        for offset, size in boxes(part.local_shape, first - begin, last - begin):
            data = flat[first - start : first - start + prod(size)]
            yield _box(part, offset, data.view(size), state)
            first += prod(size)


def _box(
    part: ShardedTensor, offset: tuple[int, ...], data: torch.Tensor, state: str
) -> ShardedTensor:
    """A box of a region. Axes that the whole tensor has more, that of the layers, come first."""
    more = part.prepend_axis_num
    inner = [own + extra for own, extra in zip(part.global_offset[more:], offset, strict=True)]
    shape = (1,) * more + tuple(data.shape)
    return ShardedTensor(
        key=f"optimizer.state.{state}.{part.key}",
        data=data.view(shape),
        dtype=data.dtype,
        local_shape=shape,
        global_shape=part.global_shape,
        global_offset=(*part.global_offset[:more], *inner),
        axis_fragmentations=None,  # no regular grid
        # Of TP ranks that hold the same, and of the two stages of a tied embedding, the first
        # writes; each data-parallel rank has other elements.
        replica_id=(*part.replica_id[:2], 0),
    )
