"""A VAE with one latent dimension, every expectation of which is a sum over Gauss and Hermite's nodes."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_ray.models.latents import DiagonalGaussian, Distribution, Group, StandardNormal
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Output, repeated
from vae_ray.objectives import Objective
from vae_ray.objectives.base import MODEL
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import SingleProcess

NUM_NODES = 40
"""A dimension; doubling them changes no expectation here by more than 1e-9."""


class UnitGaussian(Likelihood):
    """N(params, I) of two pixels."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        residual = (x - params).flatten(1)
        return -0.5 * (residual.square() + float(np.log(2 * np.pi))).sum(1)


def gauss_hermite(k: int) -> tuple[Tensor, Tensor]:
    """Nodes `(M, k)` and weights `(M,)` of expectations over k standard normals."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NUM_NODES)
    weights = weights / weights.sum()
    grid = torch.tensor(list(itertools.product(nodes, repeat=k)), dtype=torch.float64)
    return grid, torch.tensor([np.prod(each) for each in itertools.product(weights, repeat=k)], dtype=torch.float64)


class Moments(NamedTuple):
    """Over the noise: of the loss, and of its gradient by parameter."""

    loss: float
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]


START = {"a": [0.5, 0.3], "b": [0.7], "c": [-0.8], "w": [0.8, -0.6], "o": [0.1, 0.3], "m": [-0.2], "s": [0.1]}


class LinearVae:
    """q(z|x) = N(a·x + b, e^(2 c)), p(x|z) = N(w z + o, I), p(z) = N(m, e^(2 s)); all have a gradient.

    The posterior is not the exact one, so that bounds and gradients are not degenerate. `amortized_prior` makes the
    prior's mean the encoder's of an image, as a vamp prior does.
    """

    x = torch.tensor([[0.7, -0.4]], dtype=torch.float64)

    def __init__(self, *, is_prior_standard: bool = False, amortized_prior: bool = False) -> None:
        self.is_prior_standard, self.amortized_prior = is_prior_standard, amortized_prior
        self.parameters = {name: torch.tensor(values, dtype=torch.float64) for name, values in START.items()}

    def match_exact_posterior(self) -> None:
        """Set the encoder to p(z|x) under the standard prior."""
        w, o = self.parameters["w"], self.parameters["o"]
        variance = 1 / (1 + w @ w)
        self.parameters |= {"a": variance * w, "b": -variance * (w @ o)[None], "c": 0.5 * variance.log()[None]}

    def output(self, parameters: dict[str, Tensor], noise: Tensor) -> Output:
        """One pass of the image for each row of `noise` `(M, k)`, with a row of parameters for each of them."""
        k = noise.shape[1]
        a, b, c, w, o, m, s = (repeated(rows, k) for rows in parameters.values())
        mean = (self.x * a).sum(1, keepdim=True) + b
        posterior = DiagonalGaussian(mean, 2 * c)
        z = posterior.rsample(noise.T.reshape(-1, 1))
        prior_mean = a.sum(1, keepdim=True) + b if self.amortized_prior else m
        prior: Distribution = DiagonalGaussian(prior_mean, 2 * s)
        if self.is_prior_standard:
            prior = StandardNormal(torch.zeros_like(z))
        return Output((z * w + o).reshape(-1, 1, 1, 2), (Group(z, posterior, prior),), k)

    def passes(self, objective: Objective, noise: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms `(M,)`, and gradients of the loss `(M, ...)` by parameter, for each row of `noise` `(M, k)`."""
        num = len(noise)
        rows = {name: value.expand(num, -1).clone().requires_grad_() for name, value in self.parameters.items()}
        batch = GlobalBatch(num, slice(0, num), num, SingleProcess(torch.device("cpu")))
        x = self.x.expand(num, -1).reshape(num, 1, 1, 2)
        settings = objective.settings(0.0, 0)
        losses = objective.losses(self.output(rows, noise), x, UnitGaussian(), settings, batch)
        found = torch.autograd.grad(losses.loss[MODEL], list(rows.values()), materialize_grads=True)
        terms = {name: values.detach() for name, values in losses.terms.items()}
        return terms, dict(zip(rows, found, strict=True))

    def moments(self, objective: Objective) -> Moments:
        """Expectations over the noise, exact to the quadrature."""
        noise, weights = gauss_hermite(objective.num_samples)
        terms, gradients = self.passes(objective, noise)
        mean = {name: weights @ rows for name, rows in gradients.items()}
        variance = {name: weights @ (rows - mean[name]).square() for name, rows in gradients.items()}
        return Moments(float(weights @ terms["loss"]), mean, variance)
