"""Checkpoints of megatron-core's own GPTModel, at TP2 PP2 in a world of 4, in Megatron-LM's two
layouts."""

from __future__ import annotations

import json
import os
import queue
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

TP, PP = 2, 2
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
TOKENS = torch.arange(3, 35)[None] * 13 % 512


def write_body(rank: int, size: int, store: object, folder: str, tied: bool) -> torch.Tensor | None:
    """Write DIR/legacy and DIR/dist of a random model. Returns its logits on the last stage's first
    rank."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(TP, PP)
    model_parallel_cuda_manual_seed(5)
    model = _model(tied)
    args = _args(tied)
    legacy = Path(folder) / "legacy" / "iter_0000007" / _place()
    legacy.mkdir(parents=True)
    optimizer = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}}
    torch.save(
        {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 7,
            "optimizer": optimizer,
            "model": model.state_dict_for_save_checkpoint(),
            "rng_state": _random_states(),
        },
        legacy / "model_optim_rng.pt",
    )
    sharded = Path(folder) / "dist" / "iter_0000007"
    sharded.mkdir(parents=True, exist_ok=True)
    # Else it spawns a process to hold one. What one process puts in and takes out again needs no
    # queue between processes, whose feeder thread may be late.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(
        {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 7,
            "model": model.sharded_state_dict(),
        },
        str(sharded),
    )
    if rank == 0:
        for kind in ("legacy", "dist"):
            (Path(folder) / kind / "latest_checkpointed_iteration.txt").write_text("7")
            config = CONFIG | {"tie_word_embeddings": tied}
            (Path(folder) / kind / "config.json").write_text(json.dumps(config))
    return _logits(model)


def read_body(
    rank: int, size: int, store: object, folder: str, kind: str, tied: bool
) -> torch.Tensor | None:
    """Load an iteration's folder as Megatron-LM does. Returns the logits as write_body does."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(TP, PP)
    model_parallel_cuda_manual_seed(5)
    model = _model(tied, norm_epsilon=1e-6)
    if kind == "legacy":
        state = torch.load(Path(folder) / _place() / "model_optim_rng.pt", weights_only=False)[
            "model"
        ]
    else:
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)["model"]
    model.load_state_dict(state, strict=True)
    return _logits(model)


def _place() -> str:
    """The folder of this rank's legacy file."""
    tp = parallel_state.get_tensor_model_parallel_rank()
    return f"mp_rank_{tp:02d}_{parallel_state.get_pipeline_model_parallel_rank():03d}"


def _model(tied: bool, norm_epsilon: float = 1e-5) -> GPTModel:
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        normalization="RMSNorm",
        layernorm_epsilon=norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=TP,
        pipeline_model_parallel_size=PP,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        512,
        256,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        parallel_output=False,
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        # Norms start at one and biases at zero: they would not show.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                layer = (
                    sum(map(ord, name)) + 100 * parallel_state.get_pipeline_model_parallel_rank()
                )
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(layer))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
            elif "embedding" not in name and "output_layer" not in name:
                parameter.normal_(0, 0.08, generator=generator)
    return model.eval()


def _logits(model: GPTModel) -> torch.Tensor | None:
    """Run the stages one after the other. [1, T, V] on the first rank of the last stage."""
    length = TOKENS.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    with torch.no_grad():
        if not model.pre_process:
            received = torch.empty(length, 1, 64)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(received)
        output = model(TOKENS, torch.arange(length)[None], mask)
        if not model.post_process:
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
    return output if parallel_state.get_tensor_model_parallel_rank() == 0 else None


def _args(tied: bool) -> Namespace:
    """What matters here of the arguments that Megatron-LM keeps, with the kinds of values found
    there."""
    return Namespace(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        group_query_attention=True,
        num_query_groups=2,
        kv_channels=16,
        padded_vocab_size=512,
        max_position_embeddings=256,
        norm_epsilon=1e-5,
        rotary_base=10000,
        untie_embeddings_and_output_weights=not tied,
        add_qkv_bias=True,
        tensor_model_parallel_size=TP,
        pipeline_model_parallel_size=PP,
        params_dtype=torch.float32,
        model_type=ModelType.encoder_or_decoder,
        load=Path("somewhere"),
        data_path=["a", "b"],
        lr=1e-6,
    )


def _random_states() -> list[dict]:
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),  # noqa: NPY002 - what Megatron stores
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": os.urandom(8)},
        }
    ]
