"""IWAE with doubly reparametrized gradients of the encoder (Tucker et al. 2019, arXiv:1810.04152, eq. 8).

The gradient is the same on average as IWAE's; its signal-to-noise ratio grows with k, where that of IWAE falls.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vae_ray.errors import UserError
from vae_ray.models.latents import DiagonalGaussian
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Output
from vae_ray.objectives.base import MODEL, Losses, elbo_terms, gaussian_posterior, mean_over_samples
from vae_ray.objectives.iwae import Iwae, negative_bound
from vae_ray.parallel.global_batch import GlobalBatch


class Dreg(Iwae):
    """`num_samples` is k. Terms and loss are IWAE's; only gradients through z differ."""

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        if len(output.groups) > 1:
            raise UserError(
                f"objective: got dreg, which is for one latent group, but this network has {len(output.groups)}, whose "
                "posteriors depend on the samples above them; for example --objective iwae"
            )
        (group,) = output.groups
        distortion, rate = elbo_terms(output, x, likelihood)
        posterior = gaussian_posterior(group, "dreg")
        # log q's own parameters get no gradient: on average it is in the second factor of w below
        constant = DiagonalGaussian(posterior.mean.detach(), posterior.logvar.detach())
        log_ratio = constant.log_prob(group.z) - group.prior.log_prob(group.z)
        log_weights = -distortion - log_ratio.view_as(distortion)
        # Normalised w_i weigh the gradients of decoder and prior, as in IWAE; on the way through z to the encoder the
        # hook makes them w_i². A prior that is made with the encoder (vamp) gets w_i: it does not come through z.
        w = torch.softmax(log_weights.detach(), dim=0)
        if group.z.requires_grad:
            group.z.register_hook(lambda gradient: gradient * w.view(-1, *[1] * (gradient.ndim - 1)))
        surrogate = -(w * log_weights).sum(0)
        loss = negative_bound(log_weights.detach()) + (surrogate - surrogate.detach())
        terms = {"loss": loss, "distortion": mean_over_samples(distortion), "rate": mean_over_samples(rate)}
        return Losses({MODEL: loss.sum()}, terms)
