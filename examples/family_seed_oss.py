"""A model family from outside the package: Seed-OSS (ByteDance, 2025), the dense block with biases.

    training:
        model_families: ["examples/family_seed_oss.py:SeedOss"]
    actor_rollout:
        load: Seed-OSS-36B-Base

docs/extending.md explains what a family is.
"""

from __future__ import annotations

from r1zero.models.dense import NEUTRAL, DenseFamily


class SeedOss(DenseFamily):
    """transformers' SeedOssForCausalLM: biases on queries, keys and values, heads of 128."""

    name = "seed_oss"
    architectures = ("SeedOssForCausalLM",)
    neutral = NEUTRAL | {"attention_bias": True, "attention_out_bias": False}
    default_head_dim = 128
    qkv_bias = True
