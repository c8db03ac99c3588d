"""Rotary position frequencies, equal for the trainer and the rollout engine."""

from __future__ import annotations

import math

import torch

from r1zero.models.config import ModelConfig


def inverse_frequencies(shape: ModelConfig) -> torch.Tensor:
    """Angles per position, fp32 [head_dim / 2] (RoFormer, eq. 15; scaling as in Llama 3.1).

    Llama-3 scaling leaves short wavelengths alone, divides long ones by `factor` and blends
    between.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)  # 0: long wavelength, divide; 1: short, keep
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotary_tables(
    shape: ModelConfig, positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [positions, head_dim], the half-angles laid out twice for rotate-half."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(shape))
    angles = torch.cat([angles, angles], dim=-1).to(device)
    return angles.cos(), angles.sin()
