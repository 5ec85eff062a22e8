"""Priors p(z) of the top group. A prior is a module: it may have parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vae_ray.config import user_code
from vae_ray.config.fields import UserEntry
from vae_ray.models.latents import Distribution, StandardNormal


class Prior(nn.Module):
    """Base of all priors; `latent_shape` is the top group's shape."""

    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape

    def forward(self, num: int, like: Tensor, condition: Tensor | None = None) -> Distribution:
        """p(z) for `num` examples, on the device and in the dtype of `like`.

        `condition` `(num, num_classes)` is one-hot; only priors that have parameters depend on it.
        """
        raise NotImplementedError


class StandardPrior(Prior):
    """N(0, I)."""

    def forward(self, num: int, like: Tensor, condition: Tensor | None = None) -> Distribution:
        return StandardNormal(torch.zeros((), dtype=like.dtype, device=like.device).expand(num, *self.latent_shape))


PRIORS: dict[str, Callable[..., Prior]] = {
    # each is given the entry's settings, the shape of the top group and, by keyword, num_classes (0: no condition)
    "standard": lambda config, latent_shape, num_classes: StandardPrior(latent_shape),
}


def build_prior(config: Any, latent_shape: tuple[int, ...], *, num_classes: int = 0) -> Prior:
    """The prior of `model.prior`; raises `UserError` for a user's function that returns none."""
    if isinstance(config, UserEntry):
        prior = user_code.call(config.name, config.settings, key="model.prior", latent_shape=latent_shape)
        return user_code.expect(prior, Prior, key="model.prior", path=config.name)
    return PRIORS[config.name](config, latent_shape, num_classes=num_classes)
