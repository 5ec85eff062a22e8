"""Likelihoods, parameters and images for their tests; every dimension different."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vae_ray import Experiment
from vae_ray.models.likelihoods import Likelihood, build_likelihood

BATCH, CHANNELS, HEIGHT, WIDTH = SHAPE = (3, 2, 5, 4)
SETTINGS: dict[str, dict[str, Any]] = {
    "gaussian": {"scale": 0.3},
    "laplace": {"scale": 0.3},
    "discretized_logistic": {"components": 7},
}


def build(name: str, **settings: Any) -> Likelihood:
    given = {"name": name, **SETTINGS.get(name, {}), **settings}
    return build_likelihood(Experiment.from_dict({"likelihood": given}).likelihood)


def random_params(likelihood: Likelihood, *, channels: int = CHANNELS, size: float = 3.0, seed: int = 5) -> Tensor:
    """Parameters of a batch in float64, normal with standard deviation `size`."""
    shape = (BATCH, likelihood.num_params(channels), HEIGHT, WIDTH)
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_images(*, channels: int = CHANNELS, seed: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images of 256 levels, black and white among them: k / 255 as the loader gives them."""
    pixels = torch.randint(0, 256, (BATCH, channels, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed))
    pixels[:, :, 0, 0], pixels[:, :, 1, 1] = 0, 255
    return pixels.to(dtype) / 255


def all_levels() -> Tensor:
    """Every level of one pixel, `(256, 1, 1, 1)`, float64."""
    return (torch.arange(256, dtype=torch.float64) / 255)[:, None, None, None]
