"""What an objective is: how distortion, rate and its own terms combine into a loss.

Names after Alemi et al. 2018 (arXiv:1711.00464): distortion = -log p(x|z), rate = KL(q(z|x) || p(z)), in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_ray.errors import UserError
from vae_ray.models.latents import DiagonalGaussian, Group, StandardNormal
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Output, repeated
from vae_ray.parallel.global_batch import GlobalBatch

MODEL = "model"
"""The parameter set of the model, and of whatever is trained together with it."""


class Losses(NamedTuple):
    """What one pass of a worker gives; all sums are over this worker's rows."""

    loss: dict[str, Tensor]
    """A scalar a parameter set; added over workers and divided by the size of the global batch it is the loss."""
    terms: dict[str, Tensor]
    """Values by row, `(num_rows,)`: "distortion", "rate", "loss" and the objective's own; their means are logged."""


class Objective(nn.Module):
    """Base of all objectives; a module, because it may have trained parameters and buffers of its own."""

    terms: tuple[str, ...] = ()
    """Names of what it logs besides loss, distortion and rate."""
    num_samples: int = 1
    """Samples of z for each image, k."""
    min_images: int = 1
    """Images that a global batch needs; the last one of an epoch may have fewer, its losses must be finite."""

    def settings(self, epochs: float, steps: int) -> dict[str, float]:
        """Scheduled values after that many (fractional) epochs and steps, as in `{"beta": 0.4}`; they are logged."""
        return {}

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        """The losses of this worker's images `x` `(num_rows, C, H, W)`; the caller divides by `batch.size`."""
        raise NotImplementedError

    def update(self, losses: Losses, batch: GlobalBatch) -> None:
        """Change the objective's own buffers after an update of the weights, by what it gave. Collective."""

    def parameter_sets(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Parameters by the name of their loss, each set with an optimizer of its own; frozen ones are left out."""
        return {MODEL: [p for module in (model, self) for p in module.parameters() if p.requires_grad]}


def elbo_terms(output: Output, x: Tensor, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """distortion and rate in nats, `(k, N)` each, for the images `x` `(N, C, H, W)` in [0, 1]."""
    shape = (output.num_samples, len(x))
    return -likelihood.log_prob(output.params, repeated(x, output.num_samples)).view(shape), output.rate().view(shape)


def of_global_batch(value: Tensor, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
    """A function of the whole global batch as an addend of a loss, and as a term by row.

    Every worker has the same `value`, attached to its own rows (`GlobalBatch.gather`). The caller divides the loss by
    the size of the global batch, and the mean over rows counts the value once.
    """
    return batch.size * value, value.detach().expand(batch.num_rows)


def gaussian_posterior(group: Group, objective: str) -> DiagonalGaussian:
    """The posterior of a group; raises `UserError` for one of another kind than the objective is defined for."""
    if not isinstance(group.posterior, DiagonalGaussian):
        kind = type(group.posterior).__name__
        raise UserError(
            f"objective: got {objective}, which needs posteriors that are a DiagonalGaussian, not a {kind}; for "
            "example --objective elbo"
        )
    return group.posterior


def require_standard_prior(group: Group, objective: str, reason: str) -> None:
    """Raise `UserError` unless the prior of a group is N(0, I)."""
    if not isinstance(group.prior, StandardNormal):
        kind = type(group.prior).__name__
        raise UserError(
            f"objective: got {objective}, which needs the prior N(0, I), not a {kind}: {reason}; for example "
            "--model.prior standard"
        )


def mean_over_samples(values: Tensor) -> Tensor:
    """`(N,)` of `(k, N)`."""
    return values[0] if len(values) == 1 else torch.mean(values, dim=0)
