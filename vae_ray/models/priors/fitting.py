"""A prior fitted to the codes of a trained model, z ~ q(z|x) of its training images, in place of the one it has.

The ELBO with the aggregated posterior q(z) as prior is the largest of all priors (Hoffman & Johnson 2016, "ELBO
surgery"; Tomczak & Welling 2018, arXiv:1705.07120, section 2), and its samples lie where the decoder was trained. Ghosh
et al. 2020 (arXiv:1903.12436, section 4) fit a mixture afterwards. The fit is chosen by codes of images that it has
not seen: a tenth of them, by the seed.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vae_ray.errors import UserError
from vae_ray.models.priors.base import Prior
from vae_ray.models.priors.flow import FlowPrior
from vae_ray.models.priors.mixture import MixturePrior
from vae_ray.seeds import generator, stream

KINDS = ("mixture", "flow")
HELD_OUT = 0.1
COMPONENTS = (1, 3, 10, 30, 100)
"""Numbers of Gaussians that are tried where none is given."""
CODES_PER_COMPONENT = 20
"""As many images at least, of those that are tried."""
NUM_SAMPLES = 20_000
"""Samples of z to which a mixture is fitted: several of each of fewer images."""
LEAST_WEIGHT = 1e-6
"""Of a component in a class none of whose codes it explains."""
FLOW: dict[str, Any] = {"transforms": 6, "hidden": [64, 64]}
STEPS, STEPS_BETWEEN, BATCH, LR, MOST_NORM = 2000, 100, 512, 2e-3, 5.0
"""Of Adam: all, between evaluations, codes of each, the first learning rate, and what the gradient is cut to."""


class Posteriors(NamedTuple):
    """q(z|x) of N images, float32 on the CPU."""

    mean: Tensor
    """`(N, *shape)`."""
    logvar: Tensor
    classes: Tensor | None
    """int64 `(N,)` in a conditional VAE."""

    def sample(self, rows: Tensor, noise: torch.Generator) -> Tensor:
        """One z of each row, `(n, *shape)`."""
        eps = torch.randn(len(rows), *self.mean.shape[1:], generator=noise)
        return torch.addcmul(self.mean[rows], torch.exp(0.5 * self.logvar[rows]), eps)

    def condition(self, rows: Tensor, num_classes: int) -> Tensor | None:
        """One-hot `(n, num_classes)`."""
        return None if self.classes is None else nn.functional.one_hot(self.classes[rows], num_classes).float()


class Standardization(nn.Module):
    """The first layer of a fitted flow, whose splines act in (-5, 5): (z - mean) / std, with the interface of one."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("log_std", torch.zeros(num_features))
        self.mean: Tensor
        self.log_std: Tensor

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Towards the noise: `(N, d)`, and log |det| of the Jacobian, `(N,)`."""
        return (z - self.mean) * torch.exp(-self.log_std), -self.log_std.sum().expand(len(z))

    def inverse(self, noise: Tensor, context: Tensor) -> Tensor:
        """From the noise towards z, `(N, d)`."""
        return self.mean + torch.exp(self.log_std) * noise


def fit_prior(
    kind: str, posteriors: Posteriors, *, num_classes: int = 0, components: int | None = None, seed: int = 0
) -> tuple[Prior, dict[str, Any]]:
    """A prior of the top group and its settings, with which `empty_prior` builds another.

    Args:
        kind: "mixture" of diagonal Gaussians by EM (scikit-learn), in a conditional VAE with weights of each class; or
            "flow", `STEPS` steps of Adam with new samples of z in each, of which the best of every hundred is kept.
        posteriors: of the training images.
        num_classes: of a conditional VAE.
        components: of a mixture; None chooses among `COMPONENTS`.
        seed: of the samples of z, of the images held out, and of where the fit starts.
    """
    order = torch.randperm(len(posteriors.mean), generator=generator(seed, "fit prior", "order"))
    num_held_out = max(1, int(HELD_OUT * len(order)))
    if components is not None and components > len(order) - num_held_out:
        raise UserError(f"components: got {components}, should be at most the {len(order) - num_held_out} codes")
    parts = order[num_held_out:], order[:num_held_out]
    if kind == "mixture":
        return _fit_mixture(posteriors, *parts, num_classes=num_classes, components=components, seed=seed)
    return _fit_flow(posteriors, *parts, num_classes=num_classes, seed=seed)


def empty_prior(kind: str, settings: dict[str, Any], latent_shape: tuple[int, ...], num_classes: int) -> Prior:
    """A prior of the same tensors as a fitted one."""
    if kind == "mixture":
        return MixturePrior(latent_shape, num_classes=num_classes, **settings)
    prior = FlowPrior(latent_shape, num_classes=num_classes, **settings)
    prior.couplings.insert(0, Standardization(math.prod(latent_shape)))
    return prior


@torch.no_grad()
def log_density(prior: Prior, z: Tensor, condition: Tensor | None = None) -> NDArray[np.float64]:
    """log p(z) in nats, `(N,)`, of z `(N, *shape)`."""
    conditions = [None] * len(z) if condition is None else condition.split(BATCH)
    parts = zip(z.split(BATCH), conditions, strict=False)
    return torch.cat([prior(len(part), part, given).log_prob(part) for part, given in parts]).double().numpy()


def _fit_mixture(
    posteriors: Posteriors, fitted: Tensor, held_out: Tensor, *, num_classes: int, components: int | None, seed: int
) -> tuple[Prior, dict[str, Any]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    noise = generator(seed, "fit prior", "samples")
    tried = [k for k in COMPONENTS if k * CODES_PER_COMPONENT <= len(fitted)] or [1]
    times = -(-NUM_SAMPLES // len(fitted))
    fitted, held_out = fitted.repeat(times), held_out.repeat(times)
    z, others = (posteriors.sample(rows, noise).flatten(1).double().numpy() for rows in (fitted, held_out))
    start = stream(seed, "fit prior", "start") % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the densities of codes held out say how good it is
        fits = [
            GaussianMixture(k, covariance_type="diag", random_state=start).fit(z)
            for k in (tried if components is None else [components])
        ]
    best = max(fits, key=lambda fit: fit.score(others))
    shape, settings = tuple(posteriors.mean.shape[1:]), {"components": int(best.n_components)}
    prior = empty_prior("mixture", settings, shape, num_classes)
    assert isinstance(prior, MixturePrior)
    weights = best.weights_[None]
    if posteriors.classes is not None:
        share, classes = best.predict_proba(z), posteriors.classes[fitted].numpy()
        weights = np.stack([share[classes == c].mean(0) if c in classes else weights[0] for c in range(num_classes)])
    with torch.no_grad():
        prior.means.copy_(torch.from_numpy(best.means_).view(-1, *shape))
        prior.logvars.copy_(torch.from_numpy(np.log(best.covariances_)).view(-1, *shape))
        prior.logits.copy_(torch.from_numpy(np.log(np.maximum(weights, LEAST_WEIGHT))))
    return prior.eval().requires_grad_(False), settings


def _fit_flow(
    posteriors: Posteriors, fitted: Tensor, held_out: Tensor, *, num_classes: int, seed: int
) -> tuple[Prior, dict[str, Any]]:
    noise = generator(seed, "fit prior", "samples")
    shape = tuple(posteriors.mean.shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "fit prior", "start"))
        prior = empty_prior("flow", FLOW, shape, num_classes)
    others, given = posteriors.sample(held_out, noise), posteriors.condition(held_out, num_classes)
    z = posteriors.sample(fitted, noise).flatten(1)
    prior.load_state_dict(
        {**prior.state_dict(), "couplings.0.mean": z.mean(0), "couplings.0.log_std": z.std(0).clamp_min(1e-6).log()}
    )
    optimizer = torch.optim.Adam(prior.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best, best_state = -math.inf, prior.state_dict()
    for step in range(STEPS + 1):
        if step % STEPS_BETWEEN == 0 and (score := float(log_density(prior, others, given).mean())) > best:
            best, best_state = score, {name: tensor.clone() for name, tensor in prior.state_dict().items()}
        rows = fitted[torch.randint(len(fitted), (BATCH,), generator=noise)]
        batch = posteriors.sample(rows, noise)
        loss = -prior(BATCH, batch, posteriors.condition(rows, num_classes)).log_prob(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), MOST_NORM)
        optimizer.step()
        schedule.step()
    prior.load_state_dict(best_state)
    return prior.eval().requires_grad_(False), FLOW
