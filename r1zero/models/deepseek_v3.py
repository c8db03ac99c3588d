"""DeepSeek-V3, R1, Moonlight: latent attention, dense layers first, then experts chosen by groups.

    h += proj(attention(latents of norm(h)))          latent_attention.py
    h += experts(norm(h)) + shared experts(norm(h))   moe.py; the first layers have a dense MLP

DeepSeek-V3 technical report (arXiv:2412.19437), section 2.1; transformers' DeepseekV3ForCausalLM.
Beside the dense block's table (params.py), in place of linear_qkv, with R the latent of queries and L
that of keys and values:

    Megatron                                              Hugging Face            cut by TP
    self_attention.linear_q_down_proj.weight   [R, H]     q_a_proj                -
    self_attention.q_layernorm.weight          [R]        q_a_layernorm           -
    self_attention.linear_q_up_proj.weight     [Q, R]     q_b_proj                rows
    self_attention.linear_q_proj.weight        [Q, H]     q_proj (without R)      rows
    self_attention.linear_kv_down_proj.weight  [L + r, H] kv_a_proj_with_mqa      -
    self_attention.kv_layernorm.weight         [L]        kv_a_layernorm          -
    self_attention.linear_kv_up_proj.weight    [K, L]     kv_b_proj               rows

Rows of Q are nope + rope columns of each head, those of K nope + value, and r is rope. Layers behind
the last one, which predict further tokens (MTP), are passed over in a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from r1zero.errors import BadInput
from r1zero.models import hf_config, moe
from r1zero.models.config import Experts, Latent, ModelConfig, YarnScaling
from r1zero.models.dense import NEUTRAL, DenseFamily, gated_mlp, layer_param
from r1zero.models.family import DecoderBlock, LayerWeights
from r1zero.models.latent_block import LatentBlock
from r1zero.models.moe_block import BEST_OF_GROUP, MoeMlp
from r1zero.models.params import ParamSpec

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec


class DeepseekV3(DenseFamily):
    """transformers' DeepseekV3ForCausalLM, without the prediction of further tokens."""

    name = "deepseek_v3"
    architectures = ("DeepseekV3ForCausalLM",)
    checked_arguments = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "num_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_router_score_function",
    )
    neutral: ClassVar[Mapping[str, object]] = NEUTRAL | {
        "attention_bias": False,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }

    # -- config.json and Megatron's names ------------------------------------------------------

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json. Raises KeyError or BadInput."""
        hf_config.refuse_others(config, self.neutral)
        hf_config.fp8_block(config)
        layers = hf_config.count(config, "num_hidden_layers")
        heads = hf_config.count(config, "num_attention_heads")
        hf_config.refuse_others(config, {"num_key_value_heads": heads})
        latent = _read_latent(config)
        theta, scaling = hf_config.rope(config, ("default", "yarn"))
        return ModelConfig(
            family=self.name,
            num_layers=layers,
            hidden_size=hf_config.count(config, "hidden_size"),
            ffn_hidden_size=hf_config.count(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=latent.query_dim,
            vocab_size=hf_config.count(config, "vocab_size"),
            max_positions=hf_config.count(config, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=hf_config.positive(config, "rms_norm_eps"),
            tie_word_embeddings=hf_config.flag(config, "tie_word_embeddings"),
            qkv_bias=False,
            qk_norm=False,
            experts=_read_experts(config, layers),
            latent=latent,
            further_layers=_further_layers(config),
        )

    def matches_megatron(self, keys: Mapping[str, Any]) -> bool:
        """Latent attention, and experts chosen by sigmoid."""
        return bool(keys.get("multi_latent_attention")) and bool(keys.get("num_experts"))

    def hf_from_megatron(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of a model in Megatron's names. Raises KeyError or BadInput."""
        hf_config.refuse_others(
            keys, {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
        )
        dense = moe.dense_layers(keys)
        if dense != list(range(len(dense))):
            raise BadInput(
                f"moe_layer_freq: the layers {dense} have no experts, but only those before all others "
                "may have none"
            )
        return {
            "num_hidden_layers": keys["num_layers"],
            "hidden_size": keys["hidden_size"],
            "intermediate_size": keys["ffn_hidden_size"],
            "num_attention_heads": keys["num_attention_heads"],
            "vocab_size": keys["padded_vocab_size"],
            "max_position_embeddings": keys["max_position_embeddings"],
            "rope_parameters": _rope_from_megatron(keys),
            "rms_norm_eps": keys.get("norm_epsilon", 1e-6),
            "tie_word_embeddings": not keys.get("untie_embeddings_and_output_weights", False),
            "q_lora_rank": keys.get("q_lora_rank"),
            "kv_lora_rank": keys["kv_lora_rank"],
            "qk_nope_head_dim": keys["qk_head_dim"],
            "qk_rope_head_dim": keys["qk_pos_emb_head_dim"],
            "v_head_dim": keys["v_head_dim"],
            "n_routed_experts": keys["num_experts"],
            "num_experts_per_tok": keys["moe_router_topk"],
            "moe_intermediate_size": keys["moe_ffn_hidden_size"],
            "n_shared_experts": _number_of_shared(keys),
            "n_group": keys.get("moe_router_num_groups"),
            "topk_group": keys.get("moe_router_group_topk"),
            "routed_scaling_factor": keys.get("moe_router_topk_scaling_factor", 1.0),
            "first_k_dense_replace": len(dense),
        }

    def to_megatron(self, config: ModelConfig) -> dict[str, Any]:
        """Say the same in Megatron's names."""
        latent = latent_of(config)
        return {
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.ffn_hidden_size,
            "num_attention_heads": config.num_heads,
            "padded_vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_positions,
            "norm_epsilon": config.norm_eps,
            "rotary_base": config.rope_theta,
            "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
            "multi_latent_attention": True,
            "q_lora_rank": latent.query_latent,
            "kv_lora_rank": latent.rank,
            "qk_head_dim": latent.nope_dim,
            "qk_pos_emb_head_dim": latent.rope_dim,
            "v_head_dim": latent.value_dim,
            **_megatron_rope(config),
            **moe.megatron_arguments(config),
        }

    def in_own_words(self, config: ModelConfig, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Layers with experts are a list unless all are alike."""
        said = super().in_own_words(config, keys)
        if "moe_layer_freq" in keys:
            said["moe_layer_freq"] = moe.plain_pattern(keys["moe_layer_freq"], config.num_layers)
        return said

    # -- parameters and sizes ------------------------------------------------------------------

    def layer_params(self, config: ModelConfig, layer: int) -> list[ParamSpec]:
        """One layer; the rows of the tables above, in params.py and in moe.py."""
        hidden = (config.hidden_size,)
        return [
            layer_param(layer, "input_layernorm.weight", "input_layernorm.weight", hidden, None),
            *_latent_params(config, layer),
            layer_param(
                layer, "pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden, None
            ),
            *self.mlp_params(config, layer),
        ]

    def mlp_params(self, config: ModelConfig, layer: int) -> list[ParamSpec]:
        """Router and experts, or a dense MLP."""
        if not moe.has_experts(config, layer):
            return gated_mlp(config, layer)
        return moe.moe_params(config, layer)

    def cut_sizes(self, config: ModelConfig) -> dict[str, int]:
        """Heads, the MLP's inner size where there is one, that of shared experts, the vocabulary."""
        sizes = {
            "num_attention_heads": config.num_heads,
            "moe_shared_expert_intermediate_size": moe.experts_of(config).shared_ffn_size,
            "vocabulary": config.vocab_size,
        }
        if not moe.layers_are_alike(config):
            sizes["ffn_hidden_size"] = config.ffn_hidden_size
        return sizes

    def activation_elements(
        self, config: ModelConfig, layer: int, tp: int, sequence_parallel: bool
    ) -> float:
        """Elements kept of a token, counted as of the dense block.

        Cut by sequence parallelism: inputs and outputs of both norms, both residual sums, and the
        latents before and behind their norms. Whole on every TP rank: the gathered latents. Cut by TP:
        queries before and behind the turn, keys, values and attention's output.
        """
        latent = latent_of(config)
        down = 2 * (latent.query_latent or 0) + latent.rank + latent.cached_dim
        whole = (6 * config.hidden_size + down) / (tp if sequence_parallel else 1)
        heads = 3 * latent.query_dim + latent.nope_dim + 3 * latent.value_dim
        attention = latent.cached_dim + config.num_heads * heads / tp
        return whole + attention + self.mlp_elements(config, layer, tp, sequence_parallel)

    def mlp_elements(
        self, config: ModelConfig, layer: int, tp: int, sequence_parallel: bool
    ) -> float:
        """What experts keep, or a dense MLP."""
        if not moe.has_experts(config, layer):
            return super().mlp_elements(config, layer, tp, sequence_parallel)
        tokens = 1 / tp if sequence_parallel else 1
        return tokens * moe.activation_elements(config) + moe.shared_elements(config, tp)

    def kv_cache_elements(self, config: ModelConfig, tp: int) -> float:
        """A latent and a shared key of each layer, whole on every TP rank."""
        return config.num_layers * latent_of(config).cached_dim

    def gathered_elements(self, config: ModelConfig, tp: int) -> float:
        """A latent and a shared key."""
        return latent_of(config).cached_dim

    # -- the two engines -----------------------------------------------------------------------

    def transformer_options(self, config: ModelConfig) -> dict[str, Any]:
        """Those of experts."""
        return moe.transformer_options(config)

    def layer_spec(
        self, config: ModelConfig, layer: int, groups: ProcessGroupCollection
    ) -> ModuleSpec:
        """The dense block's spec with our attention, and with experts behind the first layers."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        from r1zero.models.latent_attention import LatentAttention

        spec = super().layer_spec(config, layer, groups)
        spec.submodules.self_attention = ModuleSpec(
            module=LatentAttention,
            params={"latent": latent_of(config), "scale": config.attention_scale},
        )
        # Checkpoints name norms as Megatron does beside its own latent attention.
        spec.submodules.sharded_state_dict_keys_map = {}
        if moe.has_experts(config, layer):
            spec.submodules.mlp = moe.expert_layer(config)
        return spec

    def decoder_block(self, config: ModelConfig, layer: int, weights: LayerWeights) -> DecoderBlock:
        """One layer of the rollout engine."""
        if not moe.has_experts(config, layer):
            return LatentBlock(config, layer, weights)
        return LatentBlock(config, layer, weights, MoeMlp(config, layer, weights))


def latent_of(config: ModelConfig) -> Latent:
    """The sizes of latent attention of a model that has it."""
    assert config.latent is not None, f"a model of {config.family} without latent attention"
    return config.latent


def _latent_params(config: ModelConfig, layer: int) -> list[ParamSpec]:
    """Those of attention; the rows of the table at the top."""
    latent = latent_of(config)
    hidden = config.hidden_size
    query = config.num_heads * latent.query_dim
    expanded = config.num_heads * (latent.nope_dim + latent.value_dim)
    mixed = config.num_heads * latent.value_dim

    def param(name: str, hf: str, view: tuple[int, ...], axis: int | None) -> ParamSpec:
        names = (f"self_attention.{name}.weight", f"self_attn.{hf}.weight")
        return layer_param(layer, *names, view, axis)

    if latent.query_latent is None:
        table = [param("linear_q_proj", "q_proj", (query, hidden), 0)]
    else:
        table = [
            param("linear_q_down_proj", "q_a_proj", (latent.query_latent, hidden), None),
            param("q_layernorm", "q_a_layernorm", (latent.query_latent,), None),
            param("linear_q_up_proj", "q_b_proj", (query, latent.query_latent), 0),
        ]
    return [
        *table,
        param("linear_kv_down_proj", "kv_a_proj_with_mqa", (latent.cached_dim, hidden), None),
        param("kv_layernorm", "kv_a_layernorm", (latent.rank,), None),
        param("linear_kv_up_proj", "kv_b_proj", (expanded, latent.rank), 0),
        param("linear_proj", "o_proj", (hidden, mixed), 1),
    ]


# -- config.json ---------------------------------------------------------------------------------


def _read_latent(config: Mapping[str, Any]) -> Latent:
    """The sizes of attention by config.json. Raises KeyError or BadInput.

    `head_dim` there is that of the columns that RoPE turns, and says nothing new.
    """
    query_latent = None
    if config["q_lora_rank"] is not None:
        query_latent = hf_config.count(config, "q_lora_rank")
    rope_dim = hf_config.count(config, "qk_rope_head_dim")
    if rope_dim % 2:
        raise BadInput(
            f"qk_rope_head_dim: {rope_dim} must be even, since rotary positions turn pairs"
        )
    return Latent(
        query_latent=query_latent,
        rank=hf_config.count(config, "kv_lora_rank"),
        nope_dim=hf_config.count(config, "qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=hf_config.count(config, "v_head_dim"),
    )


def _read_experts(config: Mapping[str, Any], num_layers: int) -> Experts:
    """The experts by config.json. Raises KeyError or BadInput."""
    count = moe.num_experts(config, "n_routed_experts")
    top_k = hf_config.count(config, "num_experts_per_tok")
    groups, top_k_groups = _read_groups(config, count, top_k)
    chosen_from = count // groups * top_k_groups
    if not 2 <= top_k <= chosen_from:
        raise BadInput(
            f"num_experts_per_tok: {top_k} is not supported; 2 to {chosen_from}, those that a token may "
            "choose from, are"
        )
    dense = config["first_k_dense_replace"]
    if not isinstance(dense, int) or not 0 <= dense < num_layers:
        raise BadInput(
            f"first_k_dense_replace: {hf_config.written(dense)} must be 0 to {num_layers - 1}: behind "
            "these layers come those with experts"
        )
    ffn = hf_config.count(config, "moe_intermediate_size")
    return Experts(
        count=count,
        top_k=top_k,
        ffn_hidden_size=ffn,
        layers=tuple(range(dense, num_layers)),
        scores="sigmoid",
        groups=groups,
        top_k_groups=top_k_groups,
        scale=hf_config.positive(config, "routed_scaling_factor"),
        shared_ffn_size=ffn * hf_config.count(config, "n_shared_experts"),
    )


def _read_groups(config: Mapping[str, Any], count: int, top_k: int) -> tuple[int, int]:
    """Groups of experts, and of how many of them a token takes its own. Null is one group.

    A group counts as much as its two best experts. Megatron takes top_k / topk_group of them, which
    must be the same.
    """
    if config.get("n_group") in (None, 1):
        hf_config.refuse_others(config, {"topk_group": 1})
        return 1, 1
    groups = hf_config.count(config, "n_group")
    top_k_groups = hf_config.count(config, "topk_group")
    if count % groups or count // groups < BEST_OF_GROUP:
        raise BadInput(
            f"n_group: {groups} does not deal n_routed_experts {count} evenly, two to a group at least"
        )
    if top_k_groups > groups:
        raise BadInput(f"topk_group: {top_k_groups} is more than n_group {groups}")
    if top_k // top_k_groups != BEST_OF_GROUP:
        raise BadInput(
            f"topk_group: {top_k_groups} is not supported with num_experts_per_tok {top_k}; only half "
            "as many groups as experts of a token are"
        )
    return groups, top_k_groups


def _further_layers(config: Mapping[str, Any]) -> int:
    """Layers in a folder that predict further tokens."""
    for key in hf_config.FURTHER_LAYERS:
        if config.get(key):
            return hf_config.count(config, key)
    return 0


# -- Megatron's names ----------------------------------------------------------------------------


def _number_of_shared(keys: Mapping[str, Any]) -> int:
    """The shared experts, each as large as a routed one. Raises KeyError or BadInput."""
    size = hf_config.count(keys, "moe_shared_expert_intermediate_size")
    single = hf_config.count(keys, "moe_ffn_hidden_size")
    if size % single:
        raise BadInput(
            f"moe_shared_expert_intermediate_size: {size} must be a multiple of moe_ffn_hidden_size "
            f"{single}"
        )
    return size // single


# YaRN in Megatron's names, and in Hugging Face's.
_YARN_KEYS = {
    "rotary_scaling_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "original_max_position_embeddings": "original_max_position_embeddings",
}


def _rope_from_megatron(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The section rope_parameters of config.json. Raises KeyError."""
    theta = keys.get("rotary_base", hf_config.DEFAULT_ROPE_THETA)
    if keys.get("rope_type", "rope") == "rope":
        return {"rope_type": "default", "rope_theta": theta}
    found = {"rope_type": keys["rope_type"], "rope_theta": theta}
    for key, name in _YARN_KEYS.items():
        found[name] = keys[key]
    return found


def _megatron_rope(config: ModelConfig) -> dict[str, Any]:
    """Rotary positions in the names of Megatron's arguments."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnScaling):
        return {"rope_type": "rope"}
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
