"""An exponential moving average of the weights (Polyak & Juditsky 1992), evaluated in place of the last ones."""

from __future__ import annotations

import copy

import torch

from vae_ray.models.vae import VAE


class AveragedWeights:
    """A copy of the model whose weights follow it: average = d * average + (1 - d) * weight after every update.

    d is min(decay, (1 + n) / (10 + n)) at the n-th update, so that the initial weights are soon forgotten. Buffers
    are those of the model.
    """

    def __init__(self, model: VAE, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.num_updates = decay, 0

    @torch.no_grad()
    def update(self, model: VAE) -> None:
        """Take one update of `model` into the average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        averages, weights = ([p.detach() for p in each.parameters()] for each in (self.model, model))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
