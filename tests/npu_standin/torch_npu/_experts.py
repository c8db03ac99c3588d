"""Sorting tokens by expert, and grouped products: what the documentation says that they compute.

What it calls undefined is not a number here, so that nothing can rely on it.
"""

from __future__ import annotations

import torch

from torch_npu._bodies import body, limit

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_GROUPS = 1024
INNER_LIMIT = 65536


@body
def npu_moe_init_routing_v2(
    x,
    expert_idx,
    *,
    scale=None,
    offset=None,
    active_num=-1,
    expert_capacity=-1,
    expert_num=-1,
    drop_pad_mode=0,
    expert_tokens_num_type=0,
    expert_tokens_num_flag=False,
    quant_mode=-1,
    active_expert_range=(),
    row_idx_type=0,
    x_dtype=None,
):
    """Copies of tokens sorted by expert, the place of each, and how many each active expert has."""
    limit(x.dim() == 2 and x.dtype in FLOATS, f"x {x.shape} of {x.dtype}")
    limit(expert_idx.dim() == 2 and len(expert_idx) == len(x), f"expert_idx {expert_idx.shape}")
    limit(expert_idx.dtype == torch.int32, f"expert_idx is {expert_idx.dtype}")
    limit(0 < expert_num <= 10240, f"expert_num {expert_num}")
    limit(expert_tokens_num_type == 1, "only counts are played here")
    limit(expert_tokens_num_flag is True, "expert_tokens_num_flag supports True only")
    limit(quant_mode == -1 and drop_pad_mode == 0 and row_idx_type == 0, "not played here")
    limit(active_num in (-1, 0, expert_idx.numel()), "an active_num is not played here")
    first, end = active_expert_range
    limit(0 <= first < end <= expert_num, f"active_expert_range {active_expert_range}")
    flat = expert_idx.flatten().long()
    limit(int(flat.min()) >= 0 and int(flat.max()) < expert_num, "an expert that is not there")
    active = (flat >= first) & (flat < end)
    order = torch.where(active, flat, expert_num).argsort(stable=True)
    own = order[: int(active.sum())]
    rows = torch.full((len(flat), x.shape[1]), torch.nan, dtype=x.dtype)
    rows[: len(own)] = x[own // expert_idx.shape[1]]
    places = torch.full((len(flat),), -1, dtype=torch.int32)
    places[own] = torch.arange(len(own), dtype=torch.int32)
    counts = torch.bincount(flat, minlength=expert_num)[first:end]
    return rows, places, counts, torch.full((len(flat),), torch.nan)


def _check_groups(x, weight, group_list):
    limit(x.dim() == 2 and weight.dim() == 3, f"x {x.shape}, weight {weight.shape}")
    limit(x.dtype == weight.dtype and x.dtype in FLOATS, f"x {x.dtype}, weight {weight.dtype}")
    limit(x.is_contiguous(), "x does not lie in rows")
    limit(weight.is_contiguous() or weight.transpose(1, 2).is_contiguous(), "weight lies otherwise")
    limit(max(*x.shape[1:], *weight.shape[1:]) < INNER_LIMIT, "an inner axis is too long")
    limit(group_list.dtype == torch.int64 and group_list.dim() == 1, "group_list")
    limit(1 < len(group_list) <= MAX_GROUPS, f"{len(group_list)} groups")
    limit(len(group_list) == len(weight), f"{len(group_list)} groups, {len(weight)} weights")
    limit(int(group_list.min()) >= 0, "a negative group")
    limit(int(group_list.sum()) == len(x), f"groups of {int(group_list.sum())} rows of {len(x)}")


@body
def npu_grouped_matmul(
    x,
    weight,
    *,
    group_list=None,
    split_item=0,
    group_type=None,
    group_list_type=0,
    act_type=0,
    **others,
):
    """x[rows of group i] @ weight[i], for one x and one weight."""
    limit(len(x) == 1 and len(weight) == 1 and split_item in (2, 3), "only one of each is played")
    limit(group_type == 0 and group_list_type == 1 and act_type == 0, "not played here")
    limit(not any(value is not None for value in others.values()), f"{others} is not played here")
    [x], [weight] = x, weight
    _check_groups(x, weight, group_list)
    parts = []
    for rows, matrix in zip(x.split(group_list.tolist()), weight, strict=True):
        parts.append((rows.float() @ matrix.float()).to(x.dtype))
    return [torch.cat(parts)]
