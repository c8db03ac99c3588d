"""Rotary position frequencies, equal for the trainer and the rollout engine."""

from __future__ import annotations

import math

import torch

from r1zero.models.config import ModelConfig, RopeScaling, YarnScaling


def inverse_frequencies(shape: ModelConfig) -> torch.Tensor:
    """Angles per position, fp32 [rotary_dim / 2] (RoFormer, eq. 15)."""
    dim = shape.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / shape.rope_theta**exponents
    match shape.rope_scaling:
        case RopeScaling() as scaling:
            return _llama3(frequencies, scaling)
        case YarnScaling() as scaling:
            return _yarn(frequencies, scaling, shape.rope_theta)
    return frequencies


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Scaling as in Llama 3.1: short wavelengths stay, long ones are divided by `factor`, and those
    between are blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)  # 0: long wavelength, divide; 1: short, keep
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: torch.Tensor, scaling: YarnScaling, theta: float) -> torch.Tensor:
    """YaRN (arXiv:2309.00071, section 3.2), with the ramp over the numbers of columns, rounded
    outwards, as transformers and DeepSeek-V3 have it."""
    half = len(frequencies)

    def column_of(turns: float) -> float:
        """The column that turns so often over the original positions."""
        wavelength = scaling.original_max_positions / turns
        return half * math.log(wavelength / (2 * math.pi)) / math.log(theta)

    first = max(math.floor(column_of(scaling.beta_fast)), 0)
    last = min(math.ceil(column_of(scaling.beta_slow)), 2 * half - 1)
    ramp = (torch.arange(half).float() - first) / max(last - first, 0.001)
    ramp = ramp.clamp(0.0, 1.0)  # 0: many turns, keep; 1: few, divide
    return (1 - ramp) * frequencies + ramp * frequencies / scaling.factor


def rotary_tables(
    shape: ModelConfig, positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [positions, rotary_dim], the half-angles laid out twice for rotate-half."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(shape))
    angles = torch.cat([angles, angles], dim=-1).to(device)
    cos = angles.cos()
    sin = angles.sin()
    if isinstance(shape.rope_scaling, YarnScaling):
        cos *= shape.rope_scaling.table_scale
        sin *= shape.rope_scaling.table_scale
    return cos, sin
