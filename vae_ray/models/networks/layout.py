"""How feature maps lie in memory: the one place that decides it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGE_LAYOUT = torch.channels_last
"""Measured with oneDNN on AVX2, batch 64: 5 to 10 % less time than contiguous maps in a convolution that halves or
doubles, 30 % in one that keeps the size. Weights stay contiguous, as optimizers and checkpoints have them."""


class ImageLayout(nn.Module):
    """The first of a row of convolutions: puts maps `(N, C, H, W)` into `IMAGE_LAYOUT`, which the others keep."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=IMAGE_LAYOUT)
