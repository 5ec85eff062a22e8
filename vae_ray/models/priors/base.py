"""What a prior is: p(z) of the top group, a module that may have parameters; and N(0, I)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_ray.models.latents import Distribution, StandardNormal

TopPosterior = Callable[[Tensor, Tensor | None], Distribution | None]
"""`(images, condition) -> q(z|x)` of the top group; None where it does not depend on the images alone."""
DrawImages = Callable[[int, Tensor | None], Tensor]
"""`(num, classes) -> (num, C, H, W)`: random training images in [0, 1], of `classes` `(num,)` in a conditional VAE."""


class Prior(nn.Module):
    """Base of all priors; `latent_shape` is the top group's shape, `(d,)` or `(c, h, w)`."""

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape

    def forward(self, num: int, like: Tensor, condition: Tensor | None = None) -> Distribution:
        """p(z) for `num` examples, on the device and in the dtype of `like`.

        `condition` `(num, num_classes)` is one-hot; only priors that have parameters depend on it.
        """
        raise NotImplementedError

    def attach(self, top_posterior: TopPosterior) -> None:
        """Called once by the VAE: gives q(z|x) to a prior that is made of it. The network's weights stay the VAE's."""

    def start_at(self, draw_images: DrawImages) -> None:
        """Called before the first step of a run, for a prior that starts at training images."""


class StandardPrior(Prior):
    """N(0, I), whatever the condition is."""

    def __init__(self, latent_shape: tuple[int, ...], **_: Any) -> None:
        super().__init__(latent_shape)

    def forward(self, num: int, like: Tensor, condition: Tensor | None = None) -> Distribution:
        return StandardNormal(torch.zeros((), dtype=like.dtype, device=like.device).expand(num, *self.latent_shape))
