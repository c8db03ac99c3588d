"""The dense decoder block that most families share, and what follows from it.

    h += proj(attention(qkv(norm(h))))       queries, keys: a norm of each head (Qwen3), then RoPE
    h += down(silu(gate(norm(h))) * up(norm(h)))

Pre-norm with RMSNorm (Zhang & Sennrich 2019), grouped-query attention (Ainslie et al. 2023), rotary
positions (Su et al. 2021), SwiGLU (Shazeer 2020). A family that differs overrides what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from r1zero.models import hf_config
from r1zero.models.config import ModelConfig
from r1zero.models.family import (
    MODEL_TYPE,
    DecoderBlock,
    ForwardPass,
    LayerWeights,
    ModelFamily,
)
from r1zero.models.params import EMBEDDING, OUTPUT_LAYER, ParamSpec, whole_param

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec

# x [T, H] -> this TP rank's part of the MLP's output, which is summed over the ranks.
Mlp = Callable[["torch.Tensor", ForwardPass], "torch.Tensor"]

# Keys of config.json that would change what is computed, with the one value that does not.
NEUTRAL: dict[str, object] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
}


class DenseFamily(ModelFamily):
    """Families of the dense block. The class variables are what most of them differ in."""

    checked_arguments: ClassVar[tuple[str, ...]] = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "kv_channels",
        "add_qkv_bias",
        "qk_layernorm",
    )
    neutral: ClassVar[Mapping[str, object]] = NEUTRAL
    default_head_dim: ClassVar[int | None] = None  # None: hidden size / heads
    kv_heads_may_be_missing: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False

    # -- config.json and Megatron's names ------------------------------------------------------

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json. Raises KeyError or BadInput."""
        hf_config.refuse_others(config, self.neutral)
        hf_config.fp8_block(config)  # whose weights are read as any others
        layers = hf_config.count(config, "num_hidden_layers")
        hidden = hf_config.count(config, "hidden_size")
        heads = hf_config.count(config, "num_attention_heads")
        hf_config.refuse_partial_attention(config, layers)
        theta, scaling = hf_config.rope(config)
        return ModelConfig(
            family=self.name,
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=hf_config.count(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=hf_config.kv_heads(config, heads, self.kv_heads_may_be_missing),
            head_dim=hf_config.head_dim(config, hidden, heads, self.default_head_dim),
            vocab_size=hf_config.count(config, "vocab_size"),
            max_positions=hf_config.count(config, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=hf_config.positive(config, "rms_norm_eps"),
            tie_word_embeddings=hf_config.flag(config, "tie_word_embeddings"),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
        )

    def from_megatron(self, keys: Mapping[str, Any]) -> ModelConfig:
        """Read Megatron's names. Raises KeyError or BadInput."""
        return self.read_config(self.hf_from_megatron(keys))

    def hf_from_megatron(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of a model in Megatron's names. Raises KeyError."""
        grouped = keys.get("group_query_attention", True)  # else num_query_groups does not count
        untied = keys.get("untie_embeddings_and_output_weights", False)
        return {
            "num_hidden_layers": keys["num_layers"],
            "hidden_size": keys["hidden_size"],
            "intermediate_size": keys["ffn_hidden_size"],
            "num_attention_heads": keys["num_attention_heads"],
            "num_key_value_heads": keys.get("num_query_groups") if grouped else None,
            "head_dim": keys.get("kv_channels"),
            "vocab_size": keys["padded_vocab_size"],
            "max_position_embeddings": keys["max_position_embeddings"],
            "rope_theta": keys.get("rotary_base", hf_config.DEFAULT_ROPE_THETA),
            "rms_norm_eps": keys.get("norm_epsilon", 1e-6),
            "tie_word_embeddings": not untied,
        }

    def to_megatron(self, config: ModelConfig) -> dict[str, Any]:
        """Say the same in Megatron's names."""
        keys: dict[str, Any] = {
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.ffn_hidden_size,
            "num_attention_heads": config.num_heads,
            "num_query_groups": config.num_kv_heads,
            "kv_channels": config.head_dim,
            "padded_vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_positions,
            "norm_epsilon": config.norm_eps,
            "rotary_base": config.rope_theta,
            "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
            "add_qkv_bias": config.qkv_bias,
            "qk_layernorm": config.qk_norm,
        }
        if not self.matches_megatron(keys):
            keys[MODEL_TYPE] = self.name
        return keys

    # -- parameters ----------------------------------------------------------------------------

    def params(self, config: ModelConfig) -> list[ParamSpec]:
        """The embedding, all layers, the final norm and, untied, the output layer."""
        vocab = (config.vocab_size, config.hidden_size)
        norm = (config.hidden_size,)
        table = [whole_param(EMBEDDING, "model.embed_tokens.weight", vocab, 0, place="first")]
        for layer in range(config.num_layers):
            table += self.layer_params(config, layer)
        final = "decoder.final_layernorm.weight"
        table.append(whole_param(final, "model.norm.weight", norm, None, place="last"))
        if not config.tie_word_embeddings:
            table.append(whole_param(OUTPUT_LAYER, "lm_head.weight", vocab, 0, place="last"))
        return table

    def layer_params(self, config: ModelConfig, layer: int) -> list[ParamSpec]:
        """One layer; the rows of params.py's table."""
        hidden = (config.hidden_size,)
        table = [
            layer_param(layer, "input_layernorm.weight", "input_layernorm.weight", hidden, None),
            fused_qkv(config, layer, "weight"),
        ]
        if config.qkv_bias:
            table.append(fused_qkv(config, layer, "bias"))
        if config.qk_norm:
            table += self.qk_norm_params(config, layer)
        return [
            *table,
            attention_output(config, layer),
            layer_param(
                layer, "pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden, None
            ),
            *self.mlp_params(config, layer),
        ]

    def mlp_params(self, config: ModelConfig, layer: int) -> list[ParamSpec]:
        """What stands behind the second norm of a layer."""
        return gated_mlp(config, layer)

    def qk_norm_params(self, config: ModelConfig, layer: int) -> list[ParamSpec]:
        """The norms of queries and keys: one weight for all heads."""
        head = (config.head_dim,)
        return [
            layer_param(
                layer,
                f"self_attention.{part}_layernorm.weight",
                f"self_attn.{part}_norm.weight",
                head,
                None,
            )
            for part in "qk"
        ]

    # -- sizes and memory ----------------------------------------------------------------------

    def cut_sizes(self, config: ModelConfig) -> dict[str, int]:
        """Heads, the MLP's inner size and the vocabulary."""
        return {
            "num_attention_heads": config.num_heads,
            "num_query_groups": config.num_kv_heads,
            "ffn_hidden_size": config.ffn_hidden_size,
            "vocabulary": config.vocab_size,
        }

    def activation_elements(
        self, config: ModelConfig, layer: int, tp: int, sequence_parallel: bool
    ) -> float:
        """Elements kept of a token (counted as by Korthikanti et al. 2022, with fused attention).

        Whole on every TP rank, unless cut by sequence parallelism: inputs and outputs of both norms
        and both residual sums, 6 x hidden. Cut by TP: query, key and value before and after
        rotation, attention's output, and four products of the gated MLP.
        """
        whole = 6 * config.hidden_size / (tp if sequence_parallel else 1)
        attention = 2 * config.qkv_size + config.num_heads * config.head_dim
        return whole + attention / tp + self.mlp_elements(config, layer, tp, sequence_parallel)

    def mlp_elements(
        self, config: ModelConfig, layer: int, tp: int, sequence_parallel: bool
    ) -> float:
        """Elements of these that the MLP keeps."""
        return 4 * config.ffn_hidden_size / tp

    def kv_cache_elements(self, config: ModelConfig, tp: int) -> float:
        """A key and a value for each kv head of each layer."""
        return 2 * config.num_layers * config.num_kv_heads / tp * config.head_dim

    def gathered_elements(self, config: ModelConfig, tp: int) -> float:
        """A key and a value for each kv head."""
        return 2 * config.num_kv_heads / tp * config.head_dim

    # -- the two engines -----------------------------------------------------------------------

    def layer_spec(
        self, config: ModelConfig, layer: int, groups: ProcessGroupCollection
    ) -> ModuleSpec:
        """megatron-core's local spec with our norm and our attention over packed sequences."""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from r1zero.models.megatron_modules import PackedAttention, RMSNorm

        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_norm, normalization="RMSNorm")
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_norm:
            attention.q_layernorm = RMSNorm
            attention.k_layernorm = RMSNorm
        return spec

    def decoder_block(self, config: ModelConfig, layer: int, weights: LayerWeights) -> DecoderBlock:
        """One layer of the rollout engine."""
        return DenseBlock(config, layer, weights)


class GatedMlp:
    """SwiGLU of the rollout engine: gate and up in one product."""

    def __init__(self, weights: LayerWeights, name: str = "mlp") -> None:
        self.gate_up = weights.linear(f"{name}.linear_fc1")
        self.down = weights.linear(f"{name}.linear_fc2")

    def __call__(self, x: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        """[T, H] -> [T, H], to be summed over the TP ranks."""
        return self.down(run.operators.silu_mul(self.gate_up(x)))


class DenseBlock:
    """The dense block in the rollout engine, tensor parallel with one all-reduce for each half."""

    def __init__(
        self, config: ModelConfig, layer: int, weights: LayerWeights, mlp: Mlp | None = None
    ) -> None:
        """`mlp` takes the place of the gated MLP."""
        self.layer = layer
        self.input_norm = weights.tensor("input_layernorm.weight")
        self.qkv = weights.linear("self_attention.linear_qkv")
        self.q_norm: torch.Tensor | None = None
        self.k_norm: torch.Tensor | None = None
        if config.qk_norm:
            self.q_norm = weights.tensor("self_attention.q_layernorm.weight")
            self.k_norm = weights.tensor("self_attention.k_layernorm.weight")
        self.proj = weights.linear("self_attention.linear_proj")
        self.mlp_norm = weights.tensor("pre_mlp_layernorm.weight")
        self.mlp = mlp or GatedMlp(weights)

    def __call__(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, run: ForwardPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the MLP's output [T, H] to be added by what follows."""
        x, hidden = run.operators.add_norm(hidden, delta, self.input_norm)
        mixed = run.attend(self.layer, self.qkv(x), self.q_norm, self.k_norm)
        delta = run.all_reduce(self.proj(mixed))
        x, hidden = run.operators.add_norm(hidden, delta, self.mlp_norm)
        return hidden, run.all_reduce(self.mlp(x, run))


# -- rows of the parameter table that families put together
# ------------------------------------------


def layer_param(
    layer: int, name: str, hf: str, view: tuple[int, ...], axis: int | None
) -> ParamSpec:
    """A parameter of a layer that is one tensor in both worlds."""
    return whole_param(
        f"decoder.layers.{layer}.{name}", f"model.layers.{layer}.{hf}", view, axis, layer=layer
    )


def fused_qkv(config: ModelConfig, layer: int, kind: str) -> ParamSpec:
    """Queries, keys and values as one: `kind` is "weight" [Q + 2 K, H] or "bias" [Q + 2 K]."""
    columns = (config.hidden_size,) if kind == "weight" else ()
    query = config.num_heads * config.head_dim
    key = config.num_kv_heads * config.head_dim
    return ParamSpec(
        name=f"decoder.layers.{layer}.self_attention.linear_qkv.{kind}",
        hf=tuple(f"model.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"),
        hf_shape=((query, *columns), (key, *columns), (key, *columns)),
        view=(config.qkv_size, *columns),
        axis=0,
        layer=layer,
        place="layer",
        kv_groups=config.num_kv_heads,
    )


def attention_output(config: ModelConfig, layer: int) -> ParamSpec:
    """The output projection of attention, [H, Q]."""
    view = (config.hidden_size, config.num_heads * config.head_dim)
    name = "self_attention.linear_proj.weight"
    return layer_param(layer, name, "self_attn.o_proj.weight", view, 1)


def gated_mlp(config: ModelConfig, layer: int) -> list[ParamSpec]:
    """Gate and up as one, [2 F, H], and down, [H, F]."""
    hidden = config.hidden_size
    ffn = config.ffn_hidden_size
    gate_up = ParamSpec(
        name=f"decoder.layers.{layer}.mlp.linear_fc1.weight",
        hf=tuple(f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")),
        hf_shape=((ffn, hidden), (ffn, hidden)),
        view=(2, ffn, hidden),
        axis=1,
        layer=layer,
        place="layer",
    )
    down = layer_param(layer, "mlp.linear_fc2.weight", "mlp.down_proj.weight", (hidden, ffn), 1)
    return [gate_up, down]
