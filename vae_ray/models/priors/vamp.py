"""VampPrior: the mean of the posteriors of trained pseudo-inputs (Tomczak & Welling 2018, arXiv:1705.07120, eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae_ray.errors import UserError
from vae_ray.models.latents import DiagonalGaussian, Distribution
from vae_ray.models.networks.base import random_parameter
from vae_ray.models.priors.base import DrawImages, Prior, TopPosterior
from vae_ray.models.priors.mixture import GaussianMixture

DARKEST = 0.05
"""Pseudo-inputs start between this and one minus this: nearer to black or white a logit would hardly move."""


class VampPrior(Prior):
    """p(z) = 1/K sum_k q(z|u_k), with pseudo-inputs u_k = sigmoid(logits) in (0, 1).

    They start at random training images. (The paper clips u_k to [0, 1] instead, where a pixel that has left the range
    has no gradient any more.) In a conditional VAE u_k has the class k modulo the number of classes, and p(z|y) is the
    mean over those of class y. Of a hierarchy it is the prior of the top group.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        *,
        components: int,
        image_shape: tuple[int, int, int],
        num_classes: int = 0,
    ) -> None:
        super().__init__(latent_shape)
        if components < num_classes:
            raise UserError(
                f"model.prior.components: got {components}, should be at least the {num_classes} classes; "
                f"for example --model.prior.components {10 * num_classes}"
            )
        self.num_classes = num_classes
        self.logits = random_parameter(components, *image_shape)

    def attach(self, top_posterior: TopPosterior) -> None:
        # a method of the VAE and no module: the encoder's weights are the network's, and in a copy the copy's
        self._top_posterior = top_posterior

    @torch.no_grad()
    def start_at(self, draw_images: DrawImages) -> None:
        images = draw_images(len(self.logits), self._classes(torch.device("cpu")) if self.num_classes else None)
        self.logits.copy_(torch.logit(images, eps=DARKEST))

    def forward(self, num: int, like: Tensor, condition: Tensor | None = None) -> Distribution:
        given = None if condition is None else nn.functional.one_hot(self._classes(like.device), self.num_classes)
        posterior = self._top_posterior(torch.sigmoid(self.logits), None if given is None else given.to(like))
        if not isinstance(posterior, DiagonalGaussian):
            raise UserError(
                "model.prior: vamp needs a network whose top group comes first and has a Gaussian posterior; "
                "try --model.prior mixture"
            )
        is_counted = torch.ones(1, len(self.logits), device=like.device, dtype=like.dtype)
        if condition is not None:
            is_counted = (condition.argmax(1)[:, None] == self._classes(like.device)).to(like)
        log_weights = (is_counted / is_counted.sum(1, keepdim=True)).log().expand(num, -1)
        return GaussianMixture(posterior.mean.to(like), posterior.logvar.to(like), log_weights)

    def _classes(self, device: torch.device) -> Tensor:
        """The class of each pseudo-input, `(K,)`."""
        return torch.arange(len(self.logits), device=device) % self.num_classes
