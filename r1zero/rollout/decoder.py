"""The forward pass of generation, in Megatron's weight layout, so that publishing only copies.

Two entries: `extend` runs many new tokens of several sequences (prompts, pieces of long prompts, samples
that lost their place), `decode` runs one token of every running sample. Tensor parallel with one all-reduce
per block half; logits stay cut over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1zero.models.rotary import rotary_tables
from r1zero.models.unused import blank, local_columns
from r1zero.models.config import ModelShape
from r1zero.rollout.block_attention import Step
from r1zero.rollout.npu_graphs import DecodeGraphs
from r1zero.rollout.linear import Linear
from r1zero.rollout.native import operators
from r1zero.rollout.operators import Heads
from r1zero.models.params import local_shape, tensors
from r1zero.distributed.device import Segments, packed_causal_attention


@dataclass(frozen=True, slots=True)
class Layer:
    """This rank's weights of one layer."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    proj: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence, and what is cached of it already."""

    tokens: np.ndarray  # int [T], T > 0
    start: int = 0  # tokens before these
    keys: torch.Tensor | None = None  # [layers, kv heads, start, D] of those; None when there are none
    values: torch.Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Extended:
    """What a chunk added."""

    keys: torch.Tensor  # [layers, kv heads, T, D] of the new tokens
    values: torch.Tensor
    logits: torch.Tensor  # [V / TP] after the last one


class Decoder:
    """The rollout ranks' copy of the policy. `weights` are the buffers that publishing writes into."""

    def __init__(self, shape: ModelShape, tp: int, group: dist.ProcessGroup | None, dtype: torch.dtype,
                 device: torch.device, max_positions: int, graphs: bool = False,
                 unused: Sequence[range] = ()) -> None:
        """Allocate this rank's weights. `unused` ids belong to no token and are never drawn."""
        self.shape, self.dtype, self.device = shape, dtype, device
        self.group = group if tp > 1 else None
        self.heads, self.kv_heads = shape.num_heads // tp, shape.num_kv_heads // tp
        self.weights = {
            t.name: torch.zeros(local_shape(t, tp), dtype=dtype, device=device)
            for t in tensors(shape)}
        cos, sin = rotary_tables(shape, max_positions, device)
        self.operators = operators(Heads(self.kv_heads, self.heads // self.kv_heads, shape.head_dim,
                                         shape.norm_eps, cos.to(dtype), sin.to(dtype)))
        self.layers = [self._layer(i) for i in range(shape.num_layers)]
        self.embedding = self.weights["embedding.word_embeddings.weight"]
        self.final_norm = self.weights["decoder.final_layernorm.weight"]
        self.head = Linear(self.embedding if shape.tied else self.weights["output_layer.weight"])
        self._unused = local_columns(unused, self._first_row(), len(self.head.weight))
        self._step = DecodeGraphs(self._decode, max_positions) if graphs else self._decode

    def prepare(self) -> None:
        """Lay out the weights for the processor; call after they were written."""
        for layer in self.layers:
            for linear in (layer.qkv, layer.proj, layer.gate_up, layer.down):
                linear.prepare()
        self.head.prepare()

    @torch.inference_mode()
    def extend(self, chunks: Sequence[Chunk]) -> list[Extended]:
        """Run new tokens of several sequences in one pass, each after the keys that it has already."""
        tokens = self._tensor(np.concatenate([chunk.tokens for chunk in chunks]))
        positions = self._tensor(np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks]))
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks]).tolist()
        segments = Segments(ends, np.cumsum([chunk.end for chunk in chunks]).tolist())
        keys, values = [], []

        def attend(index: int, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
            query, key, value = self.operators.turn(qkv, layer.q_norm, layer.k_norm, positions)
            keys.append(key)
            values.append(value)
            key, value = _after(chunks, index, 0, key, ends), _after(chunks, index, 1, value, ends)
            found = packed_causal_attention(query, key, value, segments, self.shape.head_dim**-0.5)
            return found.reshape(len(tokens), -1)

        logits = self._run(tokens, attend, last=self._tensor(np.asarray(ends)) - 1)
        all_keys, all_values = torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2)
        return [Extended(all_keys[:, :, first:end], all_values[:, :, first:end], last)
                for first, end, last in zip([0, *ends], ends, logits)]

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray, step: Step) -> torch.Tensor:
        """Run one token of each running sample, int64 [n]: logits [n, V / TP], good until the next call."""
        return self._step(self._tensor(tokens), step)

    def _decode(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        def attend(index: int, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
            return self.operators.attend(step, index, qkv, layer.q_norm, layer.k_norm)

        return self._run(tokens, attend)

    def _run(self, tokens: torch.Tensor, attend: Callable[[int, Layer, torch.Tensor], torch.Tensor],
             last: torch.Tensor | None = None) -> torch.Tensor:
        """All layers: `attend` turns [T, qkv] of a layer into [T, heads * D]. Logits of all, or at `last`."""
        between, hidden, delta = self.operators, self._embed(tokens), None
        for index, layer in enumerate(self.layers):
            x = between.add_norm(hidden, delta, layer.input_norm)
            delta = self._sum(layer.proj(attend(index, layer, layer.qkv(x))))
            x = between.add_norm(hidden, delta, layer.mlp_norm)
            delta = self._sum(layer.down(between.silu_mul(layer.gate_up(x))))
        if last is not None:
            hidden, delta = hidden[last], delta[last]
        return blank(self.head(between.add_norm(hidden, delta, self.final_norm)), self._unused)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return F.embedding(tokens, self.embedding)
        local = tokens - self._first_row()
        mine = (local >= 0) & (local < self.embedding.shape[0])
        hidden = F.embedding(torch.where(mine, local, 0), self.embedding) * mine[:, None]
        dist.all_reduce(hidden, group=self.group)
        return hidden

    def _first_row(self) -> int:
        """Id that the first row of this rank's part of the vocabulary has."""
        return 0 if self.group is None else dist.get_rank(self.group) * self.embedding.shape[0]

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial

    def _layer(self, index: int) -> Layer:
        def weight(name: str) -> torch.Tensor | None:
            return self.weights.get(f"decoder.layers.{index}.{name}")

        return Layer(
            input_norm=weight("input_layernorm.weight"),
            qkv=Linear(weight("self_attention.linear_qkv.weight"), weight("self_attention.linear_qkv.bias")),
            q_norm=weight("self_attention.q_layernorm.weight"),
            k_norm=weight("self_attention.k_layernorm.weight"),
            proj=Linear(weight("self_attention.linear_proj.weight")),
            mlp_norm=weight("pre_mlp_layernorm.weight"),
            gate_up=Linear(weight("mlp.linear_fc1.weight")), down=Linear(weight("mlp.linear_fc2.weight")))


def _after(chunks: Sequence[Chunk], layer: int, which: int, new: torch.Tensor,
           ends: list[int]) -> torch.Tensor:
    """Lay each sequence's cached keys (values: `which` 1) before its new ones: [all tokens, kv heads, D]."""
    if all(chunk.start == 0 for chunk in chunks):
        return new
    parts, first = [], 0
    for chunk, end in zip(chunks, ends, strict=True):
        if chunk.start:
            parts.append((chunk.values if which else chunk.keys)[layer].transpose(0, 1))
        parts.append(new[first:end])
        first = end
    return torch.cat(parts)
