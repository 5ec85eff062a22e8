"""log p(x) of images by importance sampling: what models of different kinds are compared by.

Burda et al. 2016 (arXiv:1509.00519), eq. 8: -log p(x) <= -E log 1/k sum_i p(x, z_i) / q(z_i | x), with equality as k
grows. With k = 5,000, as in the literature, the remainder is some hundredths of a nat on MNIST.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vae_ray.data.batches import Loader
from vae_ray.evaluation.elbo import autocast
from vae_ray.models.noise import BLOCK_ROWS, latent_noise
from vae_ray.models.vae import VAE, repeated
from vae_ray.parallel.group import WorkerGroup

NOISE = "importance samples"
CHUNK_SAMPLES = 50
"""Samples of an image that are decoded together; part of the noise's address."""

Progress = Callable[[int, float], None]
"""Called with the images of this worker so far, and the mean over them in nats."""


@torch.inference_mode()
def importance_sampled_nll(
    model: VAE,
    loader: Loader,
    split: str,
    group: WorkerGroup,
    *,
    num_samples: int,
    precision: str = "float32",
    progress: Progress = lambda num_done, mean: None,
) -> dict[str, float]:
    """`{"test/nll": ...}`: -log p(x) in nats per image of the split in `loader`, an upper bound. Collective.

    The samples of an image depend on the seed and on its position in the split, neither on the batches nor on the
    number of workers; the first of more samples are those of fewer.
    """
    model.eval()
    total, num_images = torch.zeros((), dtype=torch.float64, device=group.device), 0
    for x, rows, _, labels in loader.evaluation(batch_size=BLOCK_ROWS * group.size):
        if len(x):
            with autocast(precision, x.device):
                log_p = _log_marginal(model, x, rows, loader.seed, num_samples, model.condition(labels))
            total -= log_p.sum()
            num_images += len(x)
            progress(num_images, float(total) / num_images)
    count = torch.tensor(num_images, dtype=torch.float64, device=group.device)
    sums = group.sum(torch.stack([total, count])).tolist()
    return {f"{split}/nll": sums[0] / sums[1] if sums[1] else math.nan}


def _log_marginal(model: VAE, x: Tensor, rows: slice, seed: int, num_samples: int, condition: Tensor | None) -> Tensor:
    """log 1/k sum_i w_i of each image, float64 `(N,)`; features are computed once."""
    features = model.features(x, condition)
    log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for chunk, start in enumerate(range(0, num_samples, CHUNK_SAMPLES)):
        k = min(CHUNK_SAMPLES, num_samples - start)
        noise = latent_noise(model.latent_shapes, rows, seed, NOISE, chunk, num_samples=k, device=x.device)
        output = model.sampled(features, noise, k, condition)
        # log w = log p(x|z) + log p(z) - log q(z|x)
        log_weights = model.likelihood.log_prob(output.params, repeated(x, k))
        for each in output.groups:
            log_weights = log_weights - each.log_ratio()
        log_sum = torch.logaddexp(log_sum, log_weights.double().view(k, len(x)).logsumexp(0))
    return log_sum - math.log(num_samples)
