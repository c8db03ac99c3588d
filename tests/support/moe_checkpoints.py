"""Checkpoints of megatron-core's own GPTModel with SequentialMLP experts, and with its own latent
attention, in a world of 4."""

from __future__ import annotations

import queue
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import (
    MLATransformerConfig,
    TransformerConfig,
    multi_latent_attention,
)
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import load_file

from r1zero.models.config import ModelConfig

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How Megatron cuts a model over 4 ranks; `etp` cuts each expert."""

    tp: int
    pp: int
    ep: int
    etp: int


def exchange_body(rank: int, size: int, store: object, folder: str, layout: Layout) -> list[str]:
    """Write DIR/legacy and DIR/dist of the model in DIR/hf; load DIR/from_us_* as Megatron does.

    Returns the names of parameters that did not come as DIR/hf has them.
    """
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    model_parallel_cuda_manual_seed(5)
    home = Path(folder)
    shape = ModelConfig.from_folder(home / "hf")
    model = _model(shape, layout)
    wanted = _own_part(model, _by_hand(home / "hf", shape), shape, layout)
    with torch.no_grad():
        for name, parameter in _held(model).items():
            parameter.copy_(wanted[name])
    _write(model, home, shape, layout)
    wrong = []
    for kind in ("legacy", "dist"):
        converted = home / f"from_us_{kind}" / "iter_0000001"
        if converted.is_dir():
            found = _load(model, converted, kind, layout)
            wrong += [f"{kind} {name}" for name in wanted if not wanted[name].equal(found[name])]
    return wrong


def _held(model: GPTModel) -> State:
    """What a checkpoint must have: parameters, and biases of experts, which are none."""
    biases = {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")
    }
    return dict(model.named_parameters()) | biases


def _write(model: GPTModel, home: Path, shape: ModelConfig, layout: Layout) -> None:
    """Save as Megatron-LM does, in both of its layouts."""
    assert shape.experts is not None
    sizes = Namespace(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        num_experts=shape.experts.count,
        moe_router_topk=shape.experts.top_k,
    )
    legacy = home / "legacy" / "iter_0000007" / _place(layout)
    legacy.mkdir(parents=True)
    content = {"args": sizes, "checkpoint_version": 3.0, "iteration": 7}
    state = model.state_dict_for_save_checkpoint()
    torch.save(content | {"model": state}, legacy / "model_optim_rng.pt")
    sharded = home / "dist" / "iter_0000007"
    sharded.mkdir(parents=True, exist_ok=True)
    # Else it spawns a process to hold one.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(content | {"model": model.sharded_state_dict()}, str(sharded))
    for kind in ("legacy", "dist"):
        (home / kind / "latest_checkpointed_iteration.txt").write_text("7")


def _load(model: GPTModel, folder: Path, kind: str, layout: Layout) -> State:
    """Load as Megatron-LM does, into parameters that were zeros."""
    with torch.no_grad():
        for parameter in _held(model).values():
            parameter.zero_()
    if kind == "legacy":
        path = folder / _place(layout) / "model_optim_rng.pt"
        state = torch.load(path, weights_only=False)["model"]
    else:
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))["model"]
    model.load_state_dict(state, strict=True)
    return _held(model)


def _place(layout: Layout) -> str:
    """The folder of this rank's legacy file, as Megatron-LM's get_checkpoint_name has it."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if layout.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    return name + f"_{parallel_state.get_expert_model_parallel_rank():03d}"


def _model(shape: ModelConfig, layout: Layout) -> GPTModel:
    assert shape.experts is not None
    alike = len(shape.experts.layers) == shape.num_layers
    pattern = [int(layer in shape.experts.layers) for layer in range(shape.num_layers)]
    kind = TransformerConfig if shape.latent is None else MLATransformerConfig
    config = kind(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        num_moe_experts=shape.experts.count,
        moe_ffn_hidden_size=shape.experts.ffn_hidden_size,
        moe_router_topk=shape.experts.top_k,
        moe_layer_freq=1 if alike else pattern,
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **_latent_options(shape),
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if shape.latent is not None:
        # Its constructor asks whether modules are Transformer Engine's, which is not installed, and only
        # the core attention of that takes keys and values of unlike sizes. It has no parameters.
        for name in ("TELinear", "TEColumnParallelLinear", "Linear"):
            setattr(multi_latent_attention, name, type(name, (), {}))
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = IdentityOp
    return GPTModel(
        config,
        spec,
        shape.vocab_size,
        shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        parallel_output=True,
    )


def _latent_options(shape: ModelConfig) -> dict[str, Any]:
    """What a model with latent attention has beside."""
    if shape.latent is None:
        return {}
    assert shape.experts is not None
    return {
        "q_lora_rank": shape.latent.query_latent,
        "kv_lora_rank": shape.latent.rank,
        "qk_head_dim": shape.latent.nope_dim,
        "qk_pos_emb_head_dim": shape.latent.rope_dim,
        "v_head_dim": shape.latent.value_dim,
        "rope_type": "rope",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": shape.experts.shared_ffn_size,
    }


def _own_part(model: GPTModel, whole: State, shape: ModelConfig, layout: Layout) -> State:
    """This rank's part of the whole model, by the names of its modules."""
    assert shape.experts is not None
    held = shape.experts.count // layout.ep
    first_layer = parallel_state.get_pipeline_model_parallel_rank() * (4 // layout.pp)
    first_expert = parallel_state.get_expert_model_parallel_rank() * held
    own = {}
    for name, parameter in _held(model).items():
        words = name.split(".")
        if words[1] == "layers":
            words[2] = str(first_layer + int(words[2]))
        parts = layout.tp
        part = parallel_state.get_tensor_model_parallel_rank()
        if "local_experts" in words:
            words[6] = str(first_expert + int(words[6]))
            parts = layout.etp
            part = parallel_state.get_expert_tensor_parallel_rank()
        own[name] = _cut(name, whole[".".join(words)], parts, part).clone()
        assert own[name].shape == parameter.shape, name
    return own


def _cut(name: str, full: torch.Tensor, parts: int, part: int) -> torch.Tensor:
    """Megatron's cut of one parameter, by what kind of module has it."""
    if name.endswith("linear_fc1.weight"):
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(parts)[part], up.chunk(parts)[part]])
    if name.endswith(("linear_fc2.weight", "linear_proj.weight")):
        return full.chunk(parts, dim=1)[part]
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return full.chunk(parts)[part]
    return full


def _by_hand(folder: Path, shape: ModelConfig) -> State:
    """The whole model by Megatron's names, every expert by itself, out of the folder's files."""
    hf = load_file(folder / "model.safetensors")
    whole = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    assert shape.experts is not None
    for layer in range(shape.num_layers):
        theirs = f"model.layers.{layer}."
        if shape.latent is None:
            named = dict(_attention(hf, theirs, shape))
        else:
            named = dict(_latent_attention(hf, theirs))
        if layer in shape.experts.layers:
            named["mlp.router.weight"] = hf[theirs + "mlp.gate.weight"]
            for expert in range(shape.experts.count):
                place = f"mlp.experts.{expert}."
                local = f"mlp.experts.local_experts.{expert}."
                named |= dict(_gated(hf, theirs + place, local))
            named |= dict(_beside_experts(hf, theirs + "mlp."))
        else:
            named |= dict(_gated(hf, theirs + "mlp.", "mlp."))
        whole |= {f"decoder.layers.{layer}.{name}": value for name, value in named.items()}
    return whole


def _gated(hf: State, theirs: str, ours: str) -> Iterator[tuple[str, torch.Tensor]]:
    gate = hf[theirs + "gate_proj.weight"]
    up = hf[theirs + "up_proj.weight"]
    yield ours + "linear_fc1.weight", torch.cat([gate, up])
    yield ours + "linear_fc2.weight", hf[theirs + "down_proj.weight"]


def _beside_experts(hf: State, theirs: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The bias of each expert and the shared ones, where there are some."""
    bias = hf.get(theirs + "gate.e_score_correction_bias")
    if bias is not None:
        yield "mlp.router.expert_bias", bias
        yield from _gated(hf, theirs + "shared_experts.", "mlp.shared_experts.")


def _latent_attention(hf: State, theirs: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Both have the same matrices, by other names."""
    yield "input_layernorm.weight", hf[theirs + "input_layernorm.weight"]
    yield "pre_mlp_layernorm.weight", hf[theirs + "post_attention_layernorm.weight"]
    names = {
        "q_proj": "linear_q_proj",
        "q_a_proj": "linear_q_down_proj",
        "q_a_layernorm": "q_layernorm",
        "q_b_proj": "linear_q_up_proj",
        "kv_a_proj_with_mqa": "linear_kv_down_proj",
        "kv_a_layernorm": "kv_layernorm",
        "kv_b_proj": "linear_kv_up_proj",
        "o_proj": "linear_proj",
    }
    for name, ours in names.items():
        weight = hf.get(f"{theirs}self_attn.{name}.weight")
        if weight is not None:
            yield f"self_attention.{ours}.weight", weight


def _attention(hf: State, theirs: str, shape: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    yield "input_layernorm.weight", hf[theirs + "input_layernorm.weight"]
    yield "pre_mlp_layernorm.weight", hf[theirs + "post_attention_layernorm.weight"]
    query = hf[theirs + "self_attn.q_proj.weight"].chunk(shape.num_kv_heads)
    key = hf[theirs + "self_attn.k_proj.weight"].chunk(shape.num_kv_heads)
    value = hf[theirs + "self_attn.v_proj.weight"].chunk(shape.num_kv_heads)
    groups = [torch.cat(rows) for rows in zip(query, key, value, strict=True)]
    yield "self_attention.linear_qkv.weight", torch.cat(groups)
    yield "self_attention.linear_proj.weight", hf[theirs + "self_attn.o_proj.weight"]
    for part in "qk":
        yield (
            f"self_attention.{part}_layernorm.weight",
            hf[f"{theirs}self_attn.{part}_norm.weight"],
        )
