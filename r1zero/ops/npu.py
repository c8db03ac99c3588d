"""Fused operators of torch_npu (Ascend NPU): RMSNorm, SwiGLU, RoPE, KV cache, attention, experts.

One function an operator, its arguments and shapes in our terms; the call is held to torch_npu's
published signature by a test. Not yet run on hardware.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from r1zero.distributed.torch_modules import torch_npu_module

# Side of the compressed causal mask that the attention reads for any sequence length.
MASK_SIDE = 2048
# Values of `sparse_mode`: which part of the mask counts.
NO_MASK = 0
CAUSAL_TO_THE_LAST = 3  # causal, aligned at the last query and the last key
# Values of arguments of the experts' operators.
COUNTS = (
    1  # of `expert_tokens_num_type` and `group_list_type`: tokens of each expert, not their sums
)
NOT_QUANTISED = -1
PLACES_BY_COPY = 0  # of `row_idx_type`: for each copy its place among the sorted rows
ONE_OUTPUT = 2  # of `split_item`
SPLIT_ROWS = 0  # of `group_type`: the groups are groups of rows
# Packed sequences of one call of npu_fusion_attention, by its documentation.
MOST_SEQUENCES = 1024
# Sizes of latent attention that npu_fused_infer_attention_score_v2 takes, by its documentation.
LATENT_RANK = 512
LATENT_ROPE = 64
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


@functools.cache
def _causal_mask(device: torch.device) -> torch.Tensor:
    """The compressed causal mask, True where a key is hidden: 4 MB, made once for all layers."""
    # Generation may be the first to need it, in inference mode, whose tensors no gradient may use.
    with torch.inference_mode(False):
        side = (MASK_SIDE, MASK_SIDE)
        return torch.ones(side, dtype=torch.bool, device=device).triu(1)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: list[int],
    cu_seqlens_k: list[int],
    scale: float,
) -> torch.Tensor:
    """Causal attention over packed sequences by npu_fusion_attention. Differentiable.

    query [Tq, heads, D], key and value [Tk, kv heads, D] -> [Tq, heads, D]. Sequence i ends before
    query cu_seqlens_q[i] and key cu_seqlens_k[i]: no leading 0. Its last query sees all its keys.
    More sequences than a call may have go through several calls.
    """
    if len(cu_seqlens_q) <= MOST_SEQUENCES:
        return _fusion_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    ends_q = _ends_by_call(cu_seqlens_q)
    ends_k = _ends_by_call(cu_seqlens_k)
    # One split each, since the backward pass of every slice would fill and add a whole gradient.
    queries = query.split([ends[-1] for ends in ends_q])
    keys = key.split([ends[-1] for ends in ends_k])
    values = value.split([ends[-1] for ends in ends_k])
    outputs = []
    for call in zip(queries, keys, values, ends_q, ends_k, strict=True):
        outputs.append(_fusion_attention(*call, scale))
    return torch.cat(outputs)


def _ends_by_call(ends: list[int]) -> list[list[int]]:
    """Cut the ends of sequences into those of each call, counted from where the call begins."""
    result = []
    begin = 0
    for first in range(0, len(ends), MOST_SEQUENCES):
        part = ends[first : first + MOST_SEQUENCES]
        result.append([end - begin for end in part])
        begin = part[-1]
    return result


def _fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_q: list[int],
    ends_k: list[int],
    scale: float,
) -> torch.Tensor:
    """One call: varlen_attention of at most MOST_SEQUENCES.

    The documentation wants values shaped as keys, so narrower ones get columns of zeros, whose
    products are cut off again.
    """
    width = value.shape[2]
    if width < key.shape[2]:
        value = F.pad(value, (0, key.shape[2] - width))
    output = torch_npu_module().npu_fusion_attention(
        query,
        key,
        value,
        head_num=query.shape[1],
        input_layout="TND",
        atten_mask=_causal_mask(query.device),
        scale=scale,
        actual_seq_qlen=ends_q,
        actual_seq_kvlen=ends_k,
        sparse_mode=CAUSAL_TO_THE_LAST,
    )[0]
    return output[..., :width]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis by npu_rms_norm. Differentiable. x [..., D], weight [D]."""
    return torch_npu_module().npu_rms_norm(x, weight, epsilon=eps)[0]


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The RMSNorm of x + delta, and the sum itself, by npu_add_rms_norm. Not differentiable.

    x and delta [..., D], weight [D], all of one type.
    """
    normed, _, total = torch_npu_module().npu_add_rms_norm(x, delta, weight, epsilon=eps)
    return normed, total


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last axis by npu_swiglu: [..., 2 F] -> [..., F]."""
    return torch_npu_module().npu_swiglu(gate_up, dim=-1)


def sort_by_expert(
    x: torch.Tensor, ids: torch.Tensor, first: int, end: int, total: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies of tokens, sorted by their experts, by npu_moe_init_routing_v2. Not differentiable.

    x [T, H], ids int32 [T, k] in [0, total). Returns rows [T * k, H], of which those that go to the
    experts [first, end) come first, and what follows them is undefined; the place of each copy
    among them, int32 [T * k], -1 of those that go elsewhere; and the rows of each expert, int64
    [end - first]. Copy i is that of token i // k: so vllm-ascend uses the places, the
    documentation does not say it.
    """
    rows, places, counts, _ = torch_npu_module().npu_moe_init_routing_v2(
        x,
        ids,
        active_num=ids.numel(),
        expert_num=total,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=NOT_QUANTISED,
        active_expert_range=[first, end],
        row_idx_type=PLACES_BY_COPY,
    )
    return rows, places, counts


def grouped_matmul(rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Multiply groups of rows by a matrix each, by npu_grouped_matmul. Not differentiable.

    rows [T, in], weight [groups, in, out] or a transposed view, counts int64 [groups], the rows of
    each group, which add up to T. Two groups at least, and 1024 at most; `in` and `out` are below
    65536. Returns [T, out].
    """
    return torch_npu_module().npu_grouped_matmul(
        [rows],
        [weight],
        group_list=counts,
        group_list_type=COUNTS,
        split_item=ONE_OUTPUT,
        group_type=SPLIT_ROWS,
    )[0]


def rotary_mul(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE by npu_rotary_mul: halves (a, b) -> (a cos - b sin, b cos + a sin). Differentiable.

    All have four axes and one type. Of the documented layouts two are used: x [B, T, heads, D] with
    cos and sin [1 or B, T, 1, D], and x [T, B, heads, D] with [T, 1, 1, D]; B and heads below 1000,
    D even and below 896. x may lie in any order, the result is contiguous.
    """
    return torch_npu_module().npu_rotary_mul(x, cos, sin, rotary_mode="half")


def write_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write the keys and values of T tokens into a block cache by npu_scatter_pa_kv_cache.

    keys and values [T, kv heads, D], caches [blocks, block, kv heads, D], all contiguous; D of keys
    and of values may differ. slots [T], int32 or int64: block * size of a block + place in it, no
    two the same.
    """
    torch_npu_module().npu_scatter_pa_kv_cache(
        keys,
        values,
        key_cache,
        value_cache,
        slots,
        cache_mode="Norm",  # else the caches are taken to lie in NZ order
    )


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    """Decode attention over a block cache by npu_fused_infer_attention_score.

    query [n, heads, D], caches [blocks, block, kv heads, D], block_table int32 [n, most blocks],
    lengths: tokens of each row. fp16 or bf16. Returns [n, heads * D].
    """
    blocks, block, kv_heads, _ = key_cache.shape
    # Of the two layouts of a cache that are documented for BNSD queries, (blocks, block, kv heads *
    # D) and (blocks, kv heads, block, D), the first: npu_scatter_pa_kv_cache writes no other. The
    # documentation calls the second one usually faster to read.
    output, _ = torch_npu_module().npu_fused_infer_attention_score(
        query[:, :, None].contiguous(),
        key_cache.view(blocks, block, -1),
        value_cache.view(blocks, block, -1),
        block_table=block_table,
        actual_seq_lengths_kv=lengths,
        num_heads=query.shape[1],
        num_key_value_heads=kv_heads,
        scale=query.shape[2] ** -0.5,
        input_layout="BNSD",
        block_size=block,
        sparse_mode=NO_MASK,
    )
    return output.view(len(query), -1)


def takes_latents(rank: int, rope_dim: int, heads: int) -> bool:
    """Whether `paged_latent_attention` takes latent attention of these sizes."""
    return rank == LATENT_RANK and rope_dim == LATENT_ROPE and heads <= LATENT_HEADS[-1]


def paged_latent_attention(
    query: torch.Tensor,
    turned: torch.Tensor,
    latents: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    lengths: list[int],
    scale: float,
) -> torch.Tensor:
    """Decode attention in the latent space over a block cache, by
    npu_fused_infer_attention_score_v2.

    A score is scale * (query . latent + turned . key), and latents are what is mixed. query
    [n, heads, 512] and turned [n, heads, 64] lie in any order; latents [blocks, block, 1, 512] and
    keys [blocks, block, 1, 64] are contiguous, of 16 or 128 tokens a block, with less than 2^31
    elements; block_table int32 [n, most blocks]; lengths: tokens of each row. fp16 or bf16. Returns
    [n, heads, 512], which lies head by head, as the product that takes it back to values reads it.
    """
    blocks, block, _, rank = latents.shape
    heads = query.shape[1]
    counted = next(count for count in LATENT_HEADS if count >= heads)
    # One kv head lies in memory alike in both documented layouts of a cache, so (blocks, kv heads,
    # block, D) is named, which is said to be the faster one.
    cache = latents.view(blocks, 1, block, rank)
    output, _ = torch_npu_module().npu_fused_infer_attention_score_v2(
        _with_heads(query, counted),
        cache,
        cache,
        query_rope=_with_heads(turned, counted),
        key_rope=keys.view(blocks, 1, block, -1),
        block_table=block_table,
        actual_seq_kvlen=lengths,
        num_query_heads=counted,
        num_key_value_heads=1,
        softmax_scale=scale,
        input_layout="BNSD_NBSD",  # takes [n, heads, 1, D] and gives [heads, n, 1, D]
        block_size=block,
        sparse_mode=NO_MASK,
    )
    return output[:heads, :, 0].transpose(0, 1)


def _with_heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """x [n, heads, D] with heads of zeros behind its own, if they are fewer than `count`: contiguous
    [n, count, 1, D]."""
    missing = count - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.contiguous()[:, :, None]
