"""The VAE: joins an encoder and a decoder through the posterior, and knows the range of its pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_ray.config.experiment import ModelConfig
from vae_ray.models.latents import DiagonalGaussian
from vae_ray.models.networks.mlp import mlp

Factory = Callable[[ModelConfig, tuple[int, int, int]], tuple[nn.Module, nn.Module]]

NETWORKS: dict[str, Factory] = {
    "mlp": mlp,
}


class Forward(NamedTuple):
    """What one pass through the model gives."""

    mu: Tensor
    """Posterior mean, `(batch, latent_dim)`."""
    logvar: Tensor
    """Posterior log variance, `(batch, latent_dim)`."""
    logits: Tensor
    """Likelihood parameters, `(batch, channels, height, width)`."""

    @property
    def posterior(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.mu, self.logvar)


class VAE(nn.Module):
    """Encoder, reparametrisation and decoder. Outputs are float32 (float64 for a double model), also under autocast."""

    def __init__(self, config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.latent_dim = config.latent_dim
        self.signed_input = config.encoder_range == "signed"
        self.encoder, self.decoder = NETWORKS[config.network](config, image_shape)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """q(z|x) for images `(batch, channels, height, width)` in [0, 1]."""
        encoder_input = torch.add(-1.0, x, alpha=2.0) if self.signed_input else x
        mu, logvar = _at_least_float32(self.encoder(encoder_input)).chunk(2, dim=1)
        return DiagonalGaussian(mu, logvar)

    def decode(self, z: Tensor) -> Tensor:
        """Logits `(batch, channels, height, width)` of the likelihood, for z `(batch, latent_dim)`."""
        return _at_least_float32(self.decoder(z))

    def forward(self, x: Tensor, eps: Tensor) -> Forward:
        """One pass with the noise `eps ~ N(0, I)` of shape `(batch, latent_dim)`.

        Returns plain tensors, so that data-parallel wrappers can see them.
        """
        posterior = self.encode(x)
        return Forward(posterior.mu, posterior.logvar, self.decode(posterior.rsample(eps)))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def build_vae(config: ModelConfig, image_shape: tuple[int, int, int], *, seed: int) -> VAE:
    """A VAE with torch's default initialisation, a function of `seed` alone; leaves the global RNG as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VAE(config, image_shape)
