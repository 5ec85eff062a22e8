"""Paths between codes."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """`(N, steps, latent_dim)` on the line from a to b, both `(N, latent_dim)`, at `t` `(steps,)` in [0, 1]."""
    return torch.lerp(a[:, None], b[:, None], t[None, :, None].to(a))


def spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """`(N, steps, latent_dim)` on the great arc from a to b (Shoemake 1985); a line where they are parallel."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    omega = torch.acos(cosine)[:, None, None]
    t = t[None, :, None].to(a)
    # slerp(a, b, t) = sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b
    sine = torch.sin(omega)
    arc = (torch.sin((1 - t) * omega) * a[:, None] + torch.sin(t * omega) * b[:, None]) / sine
    return torch.where(sine.abs() < 1e-4, torch.lerp(a[:, None], b[:, None], t), arc)


INTERPOLATIONS = {"linear": linear, "spherical": spherical}
