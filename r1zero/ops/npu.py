"""Fused operators of torch_npu (Ascend NPU): varlen flash attention, paged decode attention.

One function an operator, its arguments and shapes in our terms; the call is held to torch_npu's
published signature by a test. Not yet run on hardware.
"""

from __future__ import annotations

import torch

from r1zero.distributed.torch_modules import torch_npu_module

# Side of the compressed causal mask that the attention reads for any sequence length.
MASK_SIDE = 2048
# Values of `sparse_mode`: which part of the mask counts.
NO_MASK = 0
CAUSAL_TO_THE_LAST = 3  # causal, aligned at the last query and the last key


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
    """
    side = (MASK_SIDE, MASK_SIDE)
    mask = torch.ones(side, dtype=torch.bool, device=query.device).triu(1)
    return torch_npu_module().npu_fusion_attention(
        query,
        key,
        value,
        head_num=query.shape[1],
        input_layout="TND",
        atten_mask=mask,
        scale=scale,
        actual_seq_qlen=cu_seqlens_q,
        actual_seq_kvlen=cu_seqlens_k,
        sparse_mode=CAUSAL_TO_THE_LAST,
    )[0]


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    """Decode attention over a block cache by npu_fused_infer_attention_score.

    query [n, heads, D], keys and values [blocks, kv heads, block, D], block_table int32 [n, most
    blocks], lengths: tokens of each row. Returns [n, heads * D].
    """
    output, _ = torch_npu_module().npu_fused_infer_attention_score(
        query[:, :, None].contiguous(),
        keys,
        values,
        block_table=block_table,
        actual_seq_lengths_kv=lengths,
        num_heads=query.shape[1],
        num_key_value_heads=keys.shape[1],
        scale=query.shape[2] ** -0.5,
        input_layout="BNSD",
        block_size=keys.shape[2],
        sparse_mode=NO_MASK,
    )
    return output.view(len(query), -1)
