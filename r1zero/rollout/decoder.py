"""The forward pass of generation, in Megatron's weight layout, so that publishing only copies.

Two entries: `prefill` runs whole prompts laid end to end, `decode` runs one token of every running
sample. Tensor parallel with one all-reduce per block half; logits stay cut over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1zero.algo.rotary import rotary_tables, rotate
from r1zero.model import ModelShape
from r1zero.rollout.kv_cache import PromptCache, SlotCache
from r1zero.weights.names import local_shape, tensors
from r1zero.world.device import Segments, packed_causal_attention


@dataclass(frozen=True, slots=True)
class Layer:
    """This rank's weights of one layer."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    proj: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Decoder:
    """The rollout ranks' copy of the policy. `weights` are the buffers that publishing writes into."""

    def __init__(self, shape: ModelShape, tp: int, group: dist.ProcessGroup | None, dtype: torch.dtype,
                 device: torch.device, max_positions: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.group = group if tp > 1 else None
        self.heads, self.kv_heads = shape.num_heads // tp, shape.num_kv_heads // tp
        self.weights = {
            t.name: torch.zeros(local_shape(t, tp), dtype=dtype, device=device)
            for t in tensors(shape)}
        cos, sin = rotary_tables(shape, max_positions, device)
        self.cos, self.sin = cos.to(dtype), sin.to(dtype)
        self.layers = [self._layer(i) for i in range(shape.num_layers)]
        self.embedding = self.weights["embedding.word_embeddings.weight"]
        self.final_norm = self.weights["decoder.final_layernorm.weight"]
        self.head = self.embedding if shape.tied else self.weights["output_layer.weight"]

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, positions: torch.Tensor, ends: list[int]) -> list[PromptCache]:
        """Run prompts laid end to end: tokens and positions int64 [T], `ends` cumulative lengths."""
        hidden = self._embed(tokens)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        keys, values = [], []
        for layer in self.layers:
            query, key, value = self._qkv(layer, hidden, cos, sin)
            keys.append(key)
            values.append(value)
            attended = packed_causal_attention(query, key, value, Segments.plain(ends), self.shape.head_dim**-0.5)
            hidden = self._mix(layer, hidden, attended.reshape(len(tokens), -1))
        last = torch.tensor(ends, device=self.device) - 1
        logits = self._logits(hidden[last])
        all_keys, all_values = torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2)
        starts = [0, *ends[:-1]]
        return [PromptCache(all_keys[:, :, a:b], all_values[:, :, a:b], logits[i])
                for i, (a, b) in enumerate(zip(starts, ends, strict=True))]

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int, cache: SlotCache) -> torch.Tensor:
        """Run one token of rows [0, n): token and its position, int64 [n]; `longest` = max position + 1.

        Writes the tokens' keys and values into the cache. Returns fp32 logits [n, V / TP].
        """
        count = len(tokens)
        rows = torch.arange(count, device=self.device)
        hidden = self._embed(tokens)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        unseen = torch.arange(longest, device=self.device)[None] > positions[:, None]  # [n, longest]
        for index, layer in enumerate(self.layers):
            query, key, value = self._qkv(layer, hidden, cos, sin)
            cache.keys[index, rows, :, positions] = key
            cache.values[index, rows, :, positions] = value
            attended = self._attend(query, cache.keys[index], cache.values[index], unseen)
            hidden = self._mix(layer, hidden, attended)
        return self._logits(hidden)

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                unseen: torch.Tensor) -> torch.Tensor:
        """query [n, heads, D] over this layer's cache [slots, kv heads, capacity, D] -> [n, heads * D].

        The heads that share keys become the rows of one small product per (sample, kv head), so keys
        are neither expanded nor copied.
        """
        count, longest = unseen.shape
        batch = count * self.kv_heads
        grouped = query.reshape(batch, -1, self.shape.head_dim)
        keys = keys.view(-1, *keys.shape[2:])[:batch, :longest]
        values = values.view(-1, *values.shape[2:])[:batch, :longest]
        scores = torch.bmm(grouped, keys.transpose(1, 2)).float().mul_(self.shape.head_dim**-0.5)
        scores.view(count, -1, longest).masked_fill_(unseen[:, None], -torch.inf)
        return torch.bmm(scores.softmax(dim=-1).to(values.dtype), values).view(count, -1)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return F.embedding(tokens, self.embedding)
        local = tokens - dist.get_rank(self.group) * self.embedding.shape[0]
        mine = (local >= 0) & (local < self.embedding.shape[0])
        hidden = F.embedding(torch.where(mine, local, 0), self.embedding) * mine[:, None]
        dist.all_reduce(hidden, group=self.group)
        return hidden

    def _qkv(self, layer: Layer, hidden: torch.Tensor, cos: torch.Tensor,
             sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, heads, D], keys and values [T, kv heads, D], rotated."""
        dim, per_group = self.shape.head_dim, self.heads // self.kv_heads
        x = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, self.shape.norm_eps)
        x = F.linear(x, layer.qkv, layer.qkv_bias).view(len(hidden), self.kv_heads, per_group + 2, dim)
        query, key, value = x[:, :, :per_group].reshape(len(hidden), self.heads, dim), x[:, :, -2], x[:, :, -1]
        if layer.q_norm is not None:
            query = F.rms_norm(query, (dim,), layer.q_norm, self.shape.norm_eps)
            key = F.rms_norm(key, (dim,), layer.k_norm, self.shape.norm_eps)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def _mix(self, layer: Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Close the attention half and run the MLP half; one all-reduce each."""
        hidden = hidden + self._sum(F.linear(attended, layer.proj))
        x = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.shape.norm_eps)
        gate, up = F.linear(x, layer.gate_up).chunk(2, dim=-1)
        return hidden + self._sum(F.linear(F.silu(gate) * up, layer.down))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = F.rms_norm(hidden, hidden.shape[-1:], self.final_norm, self.shape.norm_eps)
        return F.linear(hidden, self.head).float()

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial

    def _layer(self, index: int) -> Layer:
        def weight(name: str) -> torch.Tensor | None:
            return self.weights.get(f"decoder.layers.{index}.{name}")

        return Layer(
            input_norm=weight("input_layernorm.weight"), qkv=weight("self_attention.linear_qkv.weight"),
            qkv_bias=weight("self_attention.linear_qkv.bias"), q_norm=weight("self_attention.q_layernorm.weight"),
            k_norm=weight("self_attention.k_layernorm.weight"), proj=weight("self_attention.linear_proj.weight"),
            mlp_norm=weight("pre_mlp_layernorm.weight"), gate_up=weight("mlp.linear_fc1.weight"),
            down=weight("mlp.linear_fc2.weight"))
