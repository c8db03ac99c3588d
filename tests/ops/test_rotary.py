"""RoPE against its definition: a half-angle pair is a complex number, turned by its position."""

from __future__ import annotations

import torch

from r1zero.ops.rotary import rotate, rotate_packed


def test_halves_turn_as_complex_numbers():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    angles = torch.rand(5, 1, 4, dtype=torch.float64) * 6
    cos = torch.cat([angles.cos()] * 2, dim=-1)
    sin = torch.cat([angles.sin()] * 2, dim=-1)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected)
    torch.testing.assert_close(rotate_packed(x, cos, sin), expected)
