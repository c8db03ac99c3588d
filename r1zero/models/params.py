"""The one table of weights: what each tensor is called, where it lives and how it is cut.

    Megatron (local spec, layers numbered globally)             Hugging Face               cut by TP
    embedding.word_embeddings.weight            [V, H]          embed_tokens               rows
    decoder.layers.N.
      input_layernorm.weight                    [H]             input_layernorm            -
      self_attention.linear_qkv.weight          [Q + 2K, H]     q_proj, k_proj, v_proj     rows
      self_attention.linear_qkv.bias            [Q + 2K]        their biases (qwen2)       rows
      self_attention.{q,k}_layernorm.weight     [head]          {q,k}_norm (qwen3)         -
      self_attention.linear_proj.weight         [H, Q]          o_proj                     columns
      pre_mlp_layernorm.weight                  [H]             post_attention_layernorm   -
      mlp.linear_fc1.weight                     [2 F, H]        gate_proj, up_proj         rows of each half
      mlp.linear_fc2.weight                     [H, F]          down_proj                  columns
    decoder.final_layernorm.weight              [H]             norm                       -
    output_layer.weight                         [V, H]          lm_head (untied only)      rows

Axes: V vocabulary, H hidden, F feed-forward, Q query rows, K key (and value) rows, all global. The rows of
linear_qkv run by key-value group: the group's query heads, its key head, its value head.

Loading, saving and publishing read nothing but this table. It needs no Megatron: a rank's weights are a plain
dict from these names to tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from r1zero.errors import BadInput
from r1zero.models.config import ModelShape

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the whole model.

    `view` is the global tensor shaped so that tensor parallelism cuts one axis of it: linear_fc1 is
    (2, F, H) cut along axis 1, all others are as the table above says.
    """

    name: str  # Megatron's, with the global layer number
    hf: tuple[str, ...]  # Hugging Face sources, in the order in which they are fused
    hf_shape: tuple[tuple[int, ...], ...]  # of each source
    view: tuple[int, ...]
    axis: int | None  # of `view`, cut by TP; None: every TP rank holds the whole
    layer: int | None  # None for the embedding, the final norm and the output layer
    place: str  # "first" stage, the stage of its "layer", or "last" stage
    kv_groups: int | None = None  # linear_qkv only: how many groups its rows interleave


def tensors(shape: ModelShape) -> list[Tensor]:
    """List every tensor of the model once, in a fixed order; tied, the embedding is the output layer."""
    vocab = (shape.vocab_size, shape.hidden_size)
    table = [_plain(EMBEDDING, "model.embed_tokens.weight", vocab, 0, "first")]
    for layer in range(shape.num_layers):
        table += _layer(shape, layer)
    norm = (shape.hidden_size,)
    table.append(_plain("decoder.final_layernorm.weight", "model.norm.weight", norm, None, "last"))
    if not shape.tied:
        table.append(_plain(OUTPUT_LAYER, "lm_head.weight", vocab, 0, "last"))
    return table


def stage_tensors(shape: ModelShape, stage: int, pp: int) -> list[Tensor]:
    """List what the ranks of one pipeline stage hold, in the order of the table.

    With tied weights and several stages the last one owns a copy of the embedding named output_layer.weight.
    It is loaded from the embedding, and never published or saved.
    """
    table = tensors(shape)
    held = [tensor for tensor in table if stage_of(tensor, shape.num_layers, pp) == stage]
    if shape.tied and pp > 1 and stage == pp - 1:
        held.append(replace(table[0], name=OUTPUT_LAYER, place="last"))
    return held


def stage_of(tensor: Tensor, num_layers: int, pp: int) -> int:
    """Return the pipeline stage of a tensor, layers being spread evenly. BadInput if they cannot be."""
    if num_layers % pp:
        raise BadInput(f"num_hidden_layers {num_layers} cannot be spread evenly over {pp} pipeline stages; "
                       "choose a pipeline size that divides it")
    if tensor.layer is not None:
        return tensor.layer // (num_layers // pp)
    return 0 if tensor.place == "first" else pp - 1


def name_on_stage(tensor: Tensor, num_layers: int, pp: int) -> str:
    """Return the parameter's name as its stage's module has it: layers are counted from the stage's first."""
    if tensor.layer is None:
        return tensor.name
    head, _, tail = tensor.name.split(".", 3)[1:]
    return f"decoder.{head}.{tensor.layer % (num_layers // pp)}.{tail}"


def local_shape(tensor: Tensor, tp: int) -> tuple[int, ...]:
    """Return the shape of one TP rank's parameter in Megatron. BadInput if TP does not divide it."""
    return _fold(_local_view_shape(tensor, tp))


def local_view(tensor: Tensor, param: torch.Tensor, tp: int) -> torch.Tensor:
    """View a rank's parameter, in place, as its part of `tensor.view`: writing there writes the parameter."""
    assert tuple(param.shape) == local_shape(tensor, tp), f"{tensor.name} has the shape {tuple(param.shape)}"
    return param.detach().view(_local_view_shape(tensor, tp))


def shard(tensor: Tensor, full: torch.Tensor, tp_rank: int, tp: int) -> torch.Tensor:
    """Cut one rank's parameter out of the whole tensor in Megatron's layout for TP 1."""
    view = local_view(tensor, full, 1)
    if tensor.axis is not None:
        view = view.chunk(tp, dim=tensor.axis)[tp_rank]
    return view.reshape(local_shape(tensor, tp))


def merge(tensor: Tensor, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the parameters of all TP ranks into the whole tensor in Megatron's layout for TP 1."""
    if tensor.axis is None:
        return shards[0]
    views = [local_view(tensor, param, len(shards)) for param in shards]
    return torch.cat(views, dim=tensor.axis).view(local_shape(tensor, 1))


def _layer(shape: ModelShape, layer: int) -> list[Tensor]:
    hidden, ffn, head = shape.hidden_size, shape.ffn_size, shape.head_dim
    query, key = shape.num_heads * head, shape.num_kv_heads * head
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"

    def plain(name: str, source: str, view: tuple[int, ...], axis: int | None) -> Tensor:
        return _plain(f"{megatron}.{name}", f"{hf}.{source}", view, axis, "layer", layer)

    def qkv(kind: str, columns: tuple[int, ...]) -> Tensor:
        return Tensor(f"{megatron}.self_attention.linear_qkv.{kind}",
                      tuple(f"{hf}.self_attn.{part}_proj.{kind}" for part in "qkv"),
                      tuple((rows, *columns) for rows in (query, key, key)),
                      (shape.qkv_size, *columns), 0, layer, "layer", shape.num_kv_heads)

    table = [plain("input_layernorm.weight", "input_layernorm.weight", (hidden,), None),
             qkv("weight", (hidden,))]
    if shape.qkv_bias:
        table.append(qkv("bias", ()))
    for part in "qk" if shape.qk_norm else "":
        name, source = f"self_attention.{part}_layernorm.weight", f"self_attn.{part}_norm.weight"
        table.append(plain(name, source, (head,), None))
    gate_up = Tensor(f"{megatron}.mlp.linear_fc1.weight",
                     tuple(f"{hf}.mlp.{part}_proj.weight" for part in ("gate", "up")),
                     ((ffn, hidden), (ffn, hidden)), (2, ffn, hidden), 1, layer, "layer")
    return table + [
        plain("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (hidden, query), 1),
        plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (hidden,), None),
        gate_up,
        plain("mlp.linear_fc2.weight", "mlp.down_proj.weight", (hidden, ffn), 1),
    ]


def _plain(name: str, source: str, view: tuple[int, ...], axis: int | None, place: str,
           layer: int | None = None) -> Tensor:
    return Tensor(name, (source,), (view,), view, axis, layer, place)


def _local_view_shape(tensor: Tensor, tp: int) -> tuple[int, ...]:
    if tensor.axis is None:
        return tensor.view
    size = tensor.view[tensor.axis]
    if size % tp:
        raise BadInput(f"{tensor.name} has {size} slices along its cut axis, which tensor parallel size "
                       f"{tp} does not divide; choose a size that does")
    return tensor.view[:tensor.axis] + (size // tp,) + tensor.view[tensor.axis + 1:]


def _fold(view: tuple[int, ...]) -> tuple[int, ...]:
    """Megatron's parameters are matrices and vectors: linear_fc1's halves lie one below the other."""
    return (view[0] * view[1], view[2]) if len(view) == 3 else view
