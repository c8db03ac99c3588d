"""The decoder: prefill and decode in Megatron's weight layout, so that publishing only copies.

What a layer computes is its family's block (models/family.py).

Two entries: `extend` runs many new tokens of several sequences (prompts, pieces of long prompts,
samples that lost their place), `decode` runs one token of every running sample. Tensor parallel
with one all-reduce per block half; logits stay cut over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.family import (
    Attend,
    AttendLatent,
    DecoderBlock,
    DecoderOperators,
    ForwardPass,
    LocalExperts,
    UpProjection,
    family_of,
)
from r1zero.models.params import Shards, local_shape, param_table, type_of
from r1zero.models.rotary import rotary_tables
from r1zero.models.unused import blank, local_columns
from r1zero.ops.attention import Segments, packed_causal_attention
from r1zero.rollout.block_attention import DecodeStep, PassOutput
from r1zero.rollout.expert_replicas import ExpertReplicas, SharedExperts
from r1zero.rollout.latent import expand
from r1zero.rollout.linear import Linear, Router
from r1zero.rollout.native import operators
from r1zero.rollout.npu_graphs import MOST_PADDING, DecodeGraphs
from r1zero.rollout.operators import Heads, Operators, RotaryRows
from r1zero.rollout.routes import Routes, forced_routes, ranks_agree


class LayerShards:
    """A rank's weights of one layer, as its family's block takes them (models/family.py)."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        layer: int,
        products: list[Linear | Router],
        held: list[LocalExperts],
        index: int,
        parts: int,
    ) -> None:
        """Each product that is made is added to `products`, to be laid out when weights were written,
        and the layer's experts, if it has some, to `held`: part `index` of the `parts` of EP."""
        self._weights = weights
        self._prefix = f"decoder.layers.{layer}."
        self._products = products
        self._held = held
        self._index = index
        self._parts = parts

    def tensor(self, name: str) -> torch.Tensor:
        """The weight of this name."""
        return self._weights[self._prefix + name]

    def linear(self, name: str) -> Linear:
        """The product by `name`.weight with, if there is one, `name`.bias."""
        bias = self._weights.get(f"{self._prefix}{name}.bias")
        linear = Linear(self.tensor(f"{name}.weight"), bias)
        self._products.append(linear)
        return linear

    def up_projection(self, name: str) -> Linear:
        """The same, of latents to keys and values."""
        return self.linear(name)

    def router(self, name: str) -> Router:
        """The product in fp32 by the weight of this name."""
        router = Router(self.tensor(name))
        self._products.append(router)
        return router

    def experts(self, name: str) -> LocalExperts:
        """This rank's experts. Of 8 on 4 ranks the third has those from 4 on."""
        gate_up = self.tensor(f"{name}.linear_fc1.weight")
        down = self.tensor(f"{name}.linear_fc2.weight")
        count = len(gate_up)
        own = LocalExperts(gate_up, down, first=self._index * count, total=self._parts * count)
        self._held.append(own)
        return own


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Keys and values of tokens that follow each other, each [layers, kv heads, T, D]."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def then(self, more: KeyValues) -> KeyValues:
        """These, and those of the tokens behind them."""
        keys = torch.cat([self.keys, more.keys], dim=2)
        return KeyValues(keys, torch.cat([self.values, more.values], dim=2))


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence, and what is cached of the tokens before them."""

    tokens: np.ndarray  # int [T], T > 0
    before: KeyValues | None = None  # None: these are the first
    # uint8 [T, MoE layers, k], the experts that they went to before; None: they choose
    routes: np.ndarray | None = None

    @property
    def start(self) -> int:
        if self.before is None:
            return 0
        return self.before.length

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Extended:
    """What a chunk added."""

    new: KeyValues  # of its tokens
    logits: torch.Tensor  # [V / TP] after the last one
    routes: torch.Tensor | None  # uint8 [T, MoE layers, k], the experts of its tokens


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decoding step gave, good until the next one."""

    logits: torch.Tensor  # [n, V / TP]
    routes: torch.Tensor | None  # uint8 [n, MoE layers, k], the experts of the n tokens


class Decoder:
    """The rollout ranks' copy of the policy. `weights` are the buffers that publishing writes
    into."""

    def __init__(
        self,
        shape: ModelConfig,
        tp: int,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        graphs: bool = False,
        unused: Sequence[range] = (),
        replicas: ExpertReplicas | None = None,
    ) -> None:
        """Allocate this rank's weights. `unused` ids belong to no token and are never drawn.

        `replicas`: with which this one shares experts; None: it has all of them, on its TP ranks.
        """
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.group = group if tp > 1 else None
        self.replicas = replicas
        self.heads = shape.num_heads // tp
        # of latent attention one, which all heads share
        self.kv_heads = shape.num_kv_heads // tp if shape.latent is None else 1
        self._shards = Shards(tp, ep=replicas.parts if replicas else tp)  # experts are whole
        self.weights = {
            t.name: torch.zeros(
                local_shape(t, self._shards), dtype=type_of(t, dtype), device=device
            )
            for t in param_table(shape)
        }
        cos, sin = rotary_tables(shape, max_positions, device)
        self.operators = operators(
            Heads(
                self.kv_heads,
                self.heads // self.kv_heads,
                shape.head_dim,
                shape.norm_eps,
                shape.attention_scale,
                cos.to(dtype),
                sin.to(dtype),
                shape.latent,
            )
        )
        self.operators.shares_experts = replicas is not None
        self._products: list[Linear | Router] = []
        self._experts: list[LocalExperts] = []  # by layer
        self.blocks = [self._block(layer) for layer in range(shape.num_layers)]
        self.embedding = self.weights["embedding.word_embeddings.weight"]
        self.final_norm = self.weights["decoder.final_layernorm.weight"]
        self.head = Linear(
            self.embedding if shape.tie_word_embeddings else self.weights["output_layer.weight"]
        )
        self._unused = local_columns(unused, self._first_row(), len(self.head.weight))
        self._unchecked = {"extend", "decode"}  # whose routes, since weights were written
        self.padding = 0  # rows at most that pad a step, each with a token in the cache
        self._step: Callable[[torch.Tensor, DecodeStep], PassOutput] = self._decode
        # A step of a replica that shares experts has other shapes whenever another one has more to run.
        if graphs and self.operators.capturable and replicas is None:
            self.padding = MOST_PADDING
            self._step = DecodeGraphs(self._decode, max_positions)

    def prepare(self) -> None:
        """Lay out the weights for the processor; call after they were written."""
        for product in self._products:
            product.prepare()
        self.head.prepare()
        self._unchecked = {"extend", "decode"}

    @torch.inference_mode()
    def extend(self, chunks: Sequence[Chunk]) -> list[Extended]:
        """Run new tokens of several sequences in one pass, each after the keys that it has
        already."""
        tokens = self._tensor(np.concatenate([chunk.tokens for chunk in chunks]))
        positions = self._tensor(
            np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        )
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks]).tolist()
        attention = _ChunkAttention(self.operators, chunks, positions, ends)
        last_rows = self._tensor(np.asarray(ends)) - 1
        lengths = [len(chunk.tokens) for chunk in chunks]
        forced = forced_routes([chunk.routes for chunk in chunks], lengths, self.device)
        output = self._run(tokens, attention, last_rows, forced)
        self._compare_routes("extend", output.routes)
        logits = self._logits(output.hidden)
        added = attention.added()
        extended = []
        for (first, end), last in zip(pairwise([0, *ends]), logits, strict=True):
            new = KeyValues(added.keys[:, :, first:end], added.values[:, :, first:end])
            routes = None if output.routes is None else output.routes[first:end]
            extended.append(Extended(new, last, routes))
        return extended

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray, step: DecodeStep) -> Decoded:
        """Run one token of each running sample, int64 [n]."""
        output = self._step(self._tensor(tokens), step)
        self._compare_routes("decode", output.routes)  # here, where no graph is captured
        return Decoded(self._logits(output.hidden), output.routes)

    @torch.inference_mode()
    def serve(self) -> bool:
        """Multiply by this rank's experts in the next pass of the replicas that share them. False if
        there is none: no replica has anything to run, or this one shares nothing."""
        if self.replicas is None or not self.replicas.begin(0, self.device):
            return False
        assert self.shape.experts is not None, "replicas share experts"
        nothing = self.embedding.new_empty(0, self.shape.hidden_size)
        ids = torch.empty(0, self.shape.experts.top_k, dtype=torch.int64, device=self.device)
        weights = torch.empty_like(ids, dtype=torch.float32)
        for experts in self._experts:
            self.replicas.multiply(nothing, ids, weights, experts, self.operators)
        return True

    def _decode(self, tokens: torch.Tensor, step: DecodeStep) -> PassOutput:
        """All layers of a decoding step."""
        if self.shape.latent is None:
            return self._run(tokens, _Attention(attend=self.operators.decoding(step)))
        return self._run(tokens, _Attention(attend_latent=self.operators.decoding_latent(step)))

    def _run(
        self,
        tokens: torch.Tensor,
        attention: _Attention | _ChunkAttention,
        last: torch.Tensor | None = None,
        forced: torch.Tensor | None = None,
    ) -> PassOutput:
        """All layers and the last norm, of all tokens, or for `hidden` of those at `last`. `forced`
        as in `Routes`."""
        top_k = self.shape.experts.top_k if self.shape.experts else 0
        routes = Routes(top_k, forced)
        operators: DecoderOperators = self.operators
        if self.replicas is not None:
            self.replicas.begin(len(tokens), self.device)
            operators = SharedExperts(self.operators, self.replicas)
        run = ForwardPass(
            operators, attention.attend, attention.attend_latent, self._sum, routes.choose
        )
        hidden = self._embed(tokens)
        delta: torch.Tensor | None = None
        for block in self.blocks:
            hidden, delta = block(hidden, delta, run)
        assert delta is not None, "a model has layers"
        if last is not None:
            hidden = hidden[last]
            delta = delta[last]
        x, _ = self.operators.add_norm(hidden, delta, self.final_norm)
        return PassOutput(x, routes.taken())

    def _compare_routes(self, entry: str, routes: torch.Tensor | None) -> None:
        """Compare the routes of the first pass of an entry with new weights over the TP ranks.

        Few rows may be summed otherwise than many, so both entries are looked at. Each rank computes
        the router's scores itself. If a sum over the ranks leaves other bits on each of them, two
        ranks may choose otherwise, and an expert is computed twice or never.
        """
        if routes is None or self.group is None or entry not in self._unchecked:
            return
        self._unchecked.discard(entry)
        if not ranks_agree(routes, self.group):
            raise BadInput(
                "the tensor parallel ranks of a rollout replica choose different experts for the "
                "same tokens, as their sums differ in the last bits; set "
                "actor_rollout.infer_tensor_parallel_size=1, or try training.deterministic=true"
            )

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """The output layer: [T, H] -> [T, V / TP]."""
        return blank(self.head(x), self._unused)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return F.embedding(tokens, self.embedding)
        local = tokens - self._first_row()
        mine = (local >= 0) & (local < self.embedding.shape[0])
        # Others look up row 0 for now. The 0 of torch.where would be a tensor, made in each step.
        hidden = F.embedding(local * mine, self.embedding) * mine[:, None]
        dist.all_reduce(hidden, group=self.group)
        return hidden

    def _first_row(self) -> int:
        """Id that the first row of this rank's part of the vocabulary has."""
        return self._rank() * self.embedding.shape[0]

    def _rank(self) -> int:
        """This rank's number in TP."""
        if self.group is None:
            return 0
        return dist.get_rank(self.group)

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial

    def _block(self, layer: int) -> DecoderBlock:
        index = self._rank()
        parts = self._shards.ep
        if self.replicas is not None:
            index = self.replicas.index
        weights = LayerShards(self.weights, layer, self._products, self._experts, index, parts)
        return family_of(self.shape).decoder_block(self.shape, layer, weights)


def _other(*_: object) -> torch.Tensor:
    """In the place of the attention that a model does not have."""
    raise AssertionError("a block calls the attention that its ModelConfig has")


@dataclass(frozen=True, slots=True)
class _Attention:
    """That of one pass, grouped-query or latent."""

    attend: Attend = _other
    attend_latent: AttendLatent = _other


class _ChunkAttention:
    """RoPE and causal attention of chunks, each after what is cached of its sequence."""

    def __init__(
        self,
        operators: Operators,
        chunks: Sequence[Chunk],
        positions: torch.Tensor,
        ends: Sequence[int],
    ) -> None:
        """`positions` are those of all tokens, int64 [T], and `ends` cumulative numbers of tokens."""
        self._operators = operators
        self._chunks = chunks
        self._ends = ends
        self._segments = Segments(list(ends), np.cumsum([chunk.end for chunk in chunks]).tolist())
        self._keys: list[torch.Tensor] = []  # of the layers so far, each [T, kv heads, D]
        self._values: list[torch.Tensor] = []
        self._rotary = self._rows_of_tables(positions)

    def _rows_of_tables(self, positions: torch.Tensor) -> RotaryRows:
        """The rows of cos and sin, as the model's attention takes them."""
        if self._operators.heads.latent is None:
            return self._operators.rotary(positions)
        return self._operators.latent_rotary(positions)

    def added(self) -> KeyValues:
        """Keys and values of the new tokens, behind all layers."""
        keys = torch.stack(self._keys).transpose(1, 2)
        return KeyValues(keys, torch.stack(self._values).transpose(1, 2))

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """See Attend."""
        query, key, value = self._operators.split_qkv_rope(qkv, q_norm, k_norm, self._rotary)
        key, value = self._after_cached(layer, key, value)
        return self._mix(query, key, value)

    def attend_latent(
        self,
        layer: int,
        query: torch.Tensor,
        latent: torch.Tensor,
        key: torch.Tensor,
        up: UpProjection,
    ) -> torch.Tensor:
        """See AttendLatent; keys and values of the heads are made, once for each pass."""
        tokens = self._operators.turn_latent(query, latent, key, self._rotary)
        key, latent = self._after_cached(layer, tokens.key, tokens.latent)
        keys, values = expand(latent, key, up, self._operators.latent)
        return self._mix(tokens.whole_query(), keys, values)

    def _mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of all chunks, [T, heads * D]."""
        scale = self._operators.heads.scale
        found = packed_causal_attention(query, key, value, self._segments, scale)
        return found.reshape(len(query), -1)

    def _after_cached(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what is new of a layer, and lay it behind what is cached."""
        self._keys.append(key)
        self._values.append(value)
        return _after(self._chunks, layer, key, value, self._ends)


def _after(
    chunks: Sequence[Chunk],
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    ends: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay what is cached of each sequence before its new rows.

    Returns keys and values, each [all tokens, kv heads, D]. With 2 tokens cached of sequence a
    (small letters) and none of b, new rows A A B, which end at 2 and 3, become a a A A B.
    """
    if all(chunk.before is None for chunk in chunks):
        return keys, values
    all_keys = []
    all_values = []
    first = 0
    for chunk, end in zip(chunks, ends, strict=True):
        if chunk.before is not None:
            all_keys.append(chunk.before.keys[layer].transpose(0, 1))
            all_values.append(chunk.before.values[layer].transpose(0, 1))
        all_keys.append(keys[first:end])
        all_values.append(values[first:end])
        first = end
    return torch.cat(all_keys), torch.cat(all_values)
