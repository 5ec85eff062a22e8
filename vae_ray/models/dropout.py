"""Dropout whose masks have addresses, as latent noise has: a row's mask does not depend on who computes the row.

Srivastava et al. 2014 (JMLR 15:1929). Of feature maps whole channels are dropped (Tompson et al. 2015,
arXiv:1411.4280): neighbouring pixels are so alike that dropping single ones changes little.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn

from vae_ray.models.noise import latent_noise

NOISE = "dropout"


class Dropout(nn.Module):
    """Drops each of `width` units, or channels, with probability `p` inside of `dropout_masks`; elsewhere none."""

    def __init__(self, p: float, width: int) -> None:
        super().__init__()
        self.p, self.width = p, width
        self.mask: Tensor | None = None
        """`(num_samples * N, width)`, 0 or 1 / (1 - p)."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `(rows, width, ...)` of N images, or of all samples of N images."""
        if self.mask is None or not self.training:  # a vamp prior encodes its pseudo-inputs in evaluation mode
            return x
        # the rows of the first sample are the first: the encoder, which sees each image once, has their masks
        mask = self.mask[: len(x)].to(x.dtype)
        return x * mask.reshape(len(x), self.width, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        return f"p={self.p}, width={self.width}"


def dropout_layers(model: nn.Module) -> list[Dropout]:
    """The layers of `model` that drop something."""
    return [layer for layer in model.modules() if isinstance(layer, Dropout) and layer.p > 0]


@contextlib.contextmanager
def dropout_masks(
    layers: Sequence[Dropout],
    rows: slice,
    seed: int,
    *address: str | int,
    num_samples: int = 1,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Masks for a pass over the rows `rows` of a global batch, a function of seed, address, layer, row and sample.

    The first of k samples has the masks of k = 1.
    """
    shapes = tuple((layer.width,) for layer in layers)
    drawn = latent_noise(shapes, rows, seed, NOISE, *address, num_samples=num_samples, device=device) if layers else ()
    for layer, normal in zip(layers, drawn, strict=True):
        # a standard normal is below this with probability p
        layer.mask = (normal > NormalDist().inv_cdf(layer.p)) / (1 - layer.p)
    try:
        yield
    finally:
        for layer in layers:
            layer.mask = None
