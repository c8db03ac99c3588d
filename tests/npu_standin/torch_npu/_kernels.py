"""Norms, rotary positions, SwiGLU, cache writes: what the documentation says that they compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torch_npu._bodies import body, differentiable, limit

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@differentiable("self", "gamma")
def npu_rms_norm(self, gamma, epsilon=1e-6):
    """x / rms(x) * gamma over the last axis; and 1 / rms."""
    limit(self.dtype in FLOATS, f"npu_rms_norm of {self.dtype}")
    limit(gamma.dtype in (self.dtype, torch.float32), f"gamma is {gamma.dtype}, x {self.dtype}")
    limit(gamma.shape == self.shape[-gamma.dim() :], f"gamma {gamma.shape} for {self.shape}")
    scale = torch.rsqrt(self.float().pow(2).mean(-1, keepdim=True) + epsilon)
    normed = self.float() * scale * gamma.float()
    return normed.to(self.dtype), scale


@body
def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    """The norm of the sum, 1 / rms, and the sum. Without gradients."""
    limit(x1.dtype == x2.dtype == gamma.dtype, f"{x1.dtype}, {x2.dtype} and {gamma.dtype}")
    limit(x1.shape == x2.shape, f"{x1.shape} and {x2.shape}")
    total = x1 + x2
    normed, scale = npu_rms_norm(total, gamma, epsilon)
    return normed, scale, total


@differentiable("self")
def npu_swiglu(self, dim=-1):
    """silu(first half) * second half."""
    limit(self.is_contiguous() and self.numel() > 0, "npu_swiglu takes contiguous, full tensors")
    limit(self.shape[dim] % 2 == 0, f"npu_swiglu of {self.shape}")
    gate, up = self.chunk(2, dim)
    return F.silu(gate) * up


def _turned(x, mode):
    if mode == "half":
        left, right = x.chunk(2, -1)
        return torch.cat((-right, left), -1)
    limit(mode == "interleave", f"rotary_mode {mode}")
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


@differentiable("self")
def npu_rotary_mul(self, r1, r2, rotary_mode="half", rotate=None):
    """x * cos + turned(x) * sin."""
    limit(self.dim() in (3, 4), f"npu_rotary_mul of {self.dim()} axes")
    limit(self.dim() == r1.dim() == r2.dim(), f"cos has {r1.dim()} axes, x {self.dim()}")
    limit(self.shape[-1] % 2 == 0 and self.shape[-1] < 896, f"head size {self.shape[-1]}")
    limit(self.dtype == r1.dtype == r2.dtype, f"cos is {r1.dtype}, x {self.dtype}")
    limit(rotate is None, "a matrix `rotate` is not played here")
    for axis in range(self.dim()):
        limit(r1.shape[axis] in (1, self.shape[axis]), f"cos {r1.shape} for {self.shape}")
    return (self * r1 + _turned(self, rotary_mode) * r2).contiguous()  # however x lies


@body
def npu_apply_rotary_pos_emb(query, key, cos, sin, layout="BSND", rotary_mode="half"):
    """Turn queries and keys by the same rows of cos and sin."""
    limit(layout in ("BSND", "TND"), f"layout {layout} is not played here")
    limit(query.dtype == key.dtype == cos.dtype == sin.dtype, "query, key, cos and sin differ")
    limit(cos.dim() == query.dim(), f"cos has {cos.dim()} axes, query {query.dim()}")
    turned = []
    for x in (query, key):
        turned.append(x * cos + _turned(x, rotary_mode) * sin)
    return tuple(turned)


def _check_slots(slots, cache, count):
    limit(slots.dtype in (torch.int32, torch.int64), f"slots are {slots.dtype}")
    limit(slots.numel() == count, f"{slots.numel()} slots for {count} tokens")
    limit(slots.unique().numel() == slots.numel(), "two tokens go to one slot")
    most = cache.shape[0] * cache.shape[1]
    if slots.numel() and not (int(slots.min()) >= 0 and int(slots.max()) < most):
        raise RuntimeError(f"npu_standin: slot {int(slots.max())} lies outside of the cache")


@body
def npu_scatter_pa_kv_cache(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    *,
    compress_lens=None,
    compress_seq_offsets=None,
    seq_lens=None,
    cache_mode="PA_NZ",
):
    """Write tokens [T, kv heads, D] to their slots of caches [blocks, block, kv heads, D]. D may be
    another one for values than for keys."""
    limit(cache_mode == "Norm", f"cache_mode {cache_mode}: the caches lie in NZ order then")
    contiguous = (key, value, key_cache, value_cache, slot_mapping)
    limit(all(x.is_contiguous() for x in contiguous), "npu_scatter_pa_kv_cache: not contiguous")
    limit(key.dtype in (torch.float16, torch.bfloat16, torch.int8), f"keys of {key.dtype}")
    limit(key.dtype == value.dtype == key_cache.dtype == value_cache.dtype, "types differ")
    limit(key.dim() == value.dim() == 3, f"keys {key.shape}, values {value.shape}")
    limit(key.shape[:2] == value.shape[:2], f"keys {key.shape}, values {value.shape}")
    for new, cache in ((key, key_cache), (value, value_cache)):
        limit(cache.dim() == 4 and cache.shape[2:] == new.shape[1:], "a cache of other heads")
    limit(key_cache.shape[:2] == value_cache.shape[:2], "two caches of other blocks")
    limit(slot_mapping.dim() == 1, f"slot_mapping has {slot_mapping.dim()} axes")
    _check_slots(slot_mapping, key_cache, len(key))
    slots = slot_mapping.long()
    key_cache.view(-1, *key_cache.shape[2:])[slots] = key
    value_cache.view(-1, *value_cache.shape[2:])[slots] = value


@body
def npu_scatter_nd_update_(self, indices, updates):
    """self[indices[i]] = updates[i], where the last axis of indices addresses leading axes."""
    limit(indices.dtype in (torch.int32, torch.int64) and indices.dim() >= 2, "indices")
    limit(self.dtype == updates.dtype, f"{self.dtype} and {updates.dtype}")
    self[tuple(indices.long().unbind(-1))] = updates


@body
def npu_scaled_masked_softmax(x, mask, scale=1, fixed_triu_mask=False):
    """Softmax of scaled scores without those that the mask hides."""
    return (x.float() * scale).masked_fill(mask, -torch.inf).softmax(-1).to(x.dtype)
