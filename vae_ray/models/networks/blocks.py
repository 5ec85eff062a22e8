"""Parts of convolutional networks: residual blocks, attention, labels, and sizes that halve and double exactly.

Feature maps are `(N, channels, h, w)`. Layers carry the gain that `initialization: he` gives them (`with_gain`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_ray.models.dropout import Dropout
from vae_ray.models.networks.base import random_parameter, with_gain
from vae_ray.models.networks.mlp import ACTIVATIONS

Size = tuple[int, int]

GAINS = {"relu": math.sqrt(2.0), "gelu": 1.533, "silu": 1.677, "tanh": 1.592}
"""1 / sqrt(E[f(n)²]) for n ~ N(0, 1): a layer after f with this gain gives a signal of variance 1 again."""
RESIDUAL_GAIN = 0.1
"""Of the last layer of a residual branch: a network of any depth starts near the identity (Zhang et al. 2019)."""


class ResidualBlock(nn.Module):
    """x + conv(f(norm(conv(f(norm(x)))))), pre-activation (He et al. 2016, arXiv:1603.05027) with GroupNorm.

    `(N, num_in, h, w) -> (N, num_out, h, w)`; a 1 x 1 convolution on the way around where these differ. `groups`
    divides both. The embedding of a label is added behind the second norm, which could take it away again.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int | None = None,
        *,
        groups: int = 8,
        activation: str = "silu",
        dropout: float = 0.0,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        num_out = num_in if num_out is None else num_out
        self.norm1 = nn.GroupNorm(groups, num_in)
        self.conv1 = with_gain(nn.Conv2d(num_in, num_out, 3, padding=1), GAINS[activation])
        self.norm2 = nn.GroupNorm(groups, num_out)
        self.label = LabelEmbedding(num_classes, num_out) if num_classes else None
        self.dropout = Dropout(dropout, num_out) if dropout else nn.Identity()
        self.conv2 = with_gain(nn.Conv2d(num_out, num_out, 3, padding=1), RESIDUAL_GAIN)
        self.around = nn.Identity() if num_in == num_out else with_gain(nn.Conv2d(num_in, num_out, 1), 1.0)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(self.activation(self.norm1(x))))
        if self.label is not None and condition is not None:
            h = h + self.label(condition)
        return self.around(x) + self.conv2(self.dropout(self.activation(h)))


class SelfAttention(nn.Module):
    """x + attention between all pixels of a feature map (Vaswani et al. 2017), one head; the size is kept."""

    def __init__(self, channels: int, *, groups: int = 8) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.project_in = with_gain(nn.Conv2d(channels, 3 * channels, 1), 1.0)
        self.project_out = with_gain(nn.Conv2d(channels, channels, 1), RESIDUAL_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        # (N, 3c, h, w) -> three of (N, 1, h * w, c)
        q, k, v = self.project_in(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, dim=3)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT
        return x + self.project_out(attended.reshape(x.shape))


class LabelEmbedding(nn.Module):
    """A learned vector for each class, of one-hot `(N, num_classes)`; added to all pixels of the channels."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.weight = random_parameter(num_classes, channels)

    def forward(self, condition: Tensor, ndim: int = 4) -> Tensor:
        """`(N, channels, 1, ...)` of `ndim` dimensions."""
        vectors = condition.to(self.weight) @ self.weight
        return vectors.reshape(*vectors.shape, *[1] * (ndim - 2))


class Sequence(nn.Sequential):
    """Layers one after the other; those that have an embedding of the label are given the label."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, condition) if getattr(layer, "label", None) is not None else layer(x)
        return x


def halved(size: Size) -> Size:
    """The size after a halving; a side of less than 4 is kept, an odd one loses its last half."""
    height, width = (side // 2 if side >= 4 else side for side in size)
    return height, width


def sizes_of(size: Size, num_halvings: int) -> list[Size]:
    """Sizes from the image's to the smallest."""
    sizes = [size]
    for _ in range(num_halvings):
        sizes.append(halved(sizes[-1]))
    return sizes


def _kernel(large: Size, small: Size) -> dict[str, Size]:
    """Of a convolution from `large` to `small`: 4 and stride 2 along a side that halves, 3 and 1 along any other.

    A kernel of 4 meets each pixel equally often in both directions; one of 3 leaves a chequered pattern.
    """
    strides = [1 if a == b else 2 for a, b in zip(large, small, strict=True)]
    return {"kernel_size": (strides[0] + 2, strides[1] + 2), "stride": (strides[0], strides[1]), "padding": (1, 1)}


def down(num_in: int, num_out: int, large: Size, small: Size, *, gain: float = 1.0) -> nn.Module:
    """A convolution from size `large` to `small`, one of `halved`."""
    return with_gain(nn.Conv2d(num_in, num_out, **_kernel(large, small)), gain)  # type: ignore[arg-type]


def up(num_in: int, num_out: int, small: Size, large: Size, *, gain: float = 1.0) -> nn.Module:
    """The transposed convolution from `small` to exactly `large`.

    Twice as fast as nearest neighbours and a convolution of 3 x 3, with the same size of receptive field.
    """
    return with_gain(nn.ConvTranspose2d(num_in, num_out, **_transposed(small, large)), gain)  # type: ignore[arg-type]


class ToPixels(nn.ConvTranspose2d):
    """The last layer of a decoder: `up`, with a bias for each pixel, so that it can start at the mean image."""

    def __init__(self, num_in: int, num_params: int, small: Size, large: Size) -> None:
        super().__init__(num_in, num_params, **_transposed(small, large), bias=False)  # type: ignore[arg-type]
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(num_params, *large))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        options = (self.stride, self.padding, self.output_padding)
        return F.conv_transpose2d(x, self.weight, None, *options).contiguous() + self.bias  # type: ignore[arg-type]


def _transposed(small: Size, large: Size) -> dict[str, Size]:
    kernel = _kernel(large, small)
    odd = [a - b * stride for a, b, stride in zip(large, small, kernel["stride"], strict=True)]
    return {**kernel, "output_padding": (odd[0], odd[1])}
