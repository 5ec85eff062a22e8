"""Priors by name: one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vae_ray.config import user_code
from vae_ray.config.fields import UserEntry
from vae_ray.models.priors.base import Prior as Prior
from vae_ray.models.priors.base import StandardPrior as StandardPrior
from vae_ray.models.priors.flow import FlowPrior
from vae_ray.models.priors.mixture import MixturePrior
from vae_ray.models.priors.vamp import VampPrior

PRIORS: dict[str, Callable[..., Prior]] = {
    # each takes latent_shape (of the top group), image_shape, num_classes (0: no condition) and the entry's settings
    "standard": StandardPrior,
    "mixture": MixturePrior,
    "vamp": VampPrior,
    "flow": FlowPrior,
}


def build_prior(
    config: Any, latent_shape: tuple[int, ...], *, image_shape: tuple[int, int, int], num_classes: int = 0
) -> Prior:
    """The prior of `model.prior`; raises `UserError` for a user's function that returns none."""
    if isinstance(config, UserEntry):
        prior = user_code.call(config.name, config.settings, key="model.prior", latent_shape=latent_shape)
        return user_code.expect(prior, Prior, key="model.prior", path=config.name)
    settings = config.model_dump(exclude={"name"})
    return PRIORS[config.name](latent_shape, image_shape=image_shape, num_classes=num_classes, **settings)
