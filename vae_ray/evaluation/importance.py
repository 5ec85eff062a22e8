"""log p(x) of images by importance sampling: what models of different kinds are compared by.

Burda et al. 2016 (arXiv:1509.00519), eq. 8: log p(x) >= E log 1/k sum_i w_i with w_i = p(x, z_i) / q(z_i | x), with
equality as k grows. With k = 5,000, as in the literature, the remainder is some hundredths of a nat on MNIST.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vae_ray.evaluation.observations import EvaluationBatch
from vae_ray.models.noise import BLOCK_ROWS, latent_noise
from vae_ray.models.vae import repeated

NOISE = "importance samples"
CHUNK_SAMPLES = 50
"""Samples of an image whose noise is drawn together; part of the noise's address."""
CACHED_NUMBERS = 500_000
"""Pixels that are decoded together on a CPU, whose cache they and what is computed of them should fit into."""


@dataclass(frozen=True)
class ImportanceSamples:
    """Observes log p(x) of each image by `num_samples` samples of z, float64.

    The samples of an image depend on the seed and on its position in the split, neither on the batches nor on the
    number of workers; the first of more samples are those of fewer.
    """

    num_samples: int

    @property
    def bounds(self) -> tuple[int, ...]:
        """The numbers of samples k at which the bound is noted: 1, 5, 50, 500, ... and all."""
        powers = (5 * 10**power for power in range(9))
        return (1, *(k for k in powers if k < self.num_samples), *[self.num_samples] * (self.num_samples > 1))

    def __call__(self, batch: EvaluationBatch) -> dict[str, Tensor]:
        """Two tensors, float64.

        `log_p` `(n, number of bounds)`: log 1/k sum w for each k; `effective_samples` `(n,)`: (sum w)^2 / sum w^2.
        """
        first, last = batch.rows.start, batch.rows.stop
        # in the noise's own blocks, which are small enough for the processor's cache
        edges = sorted({first, last, *range(first + -first % BLOCK_ROWS, last, BLOCK_ROWS)})
        parts = [self._of_block(batch, slice(*edge)) for edge in itertools.pairwise(edges)]
        log_p, effective = (torch.cat(each) for each in zip(*parts, strict=True))
        return {"log_p": log_p, "effective_samples": effective}

    def _of_block(self, batch: EvaluationBatch, rows: slice) -> tuple[Tensor, Tensor]:
        own = slice(rows.start - batch.rows.start, rows.stop - batch.rows.start)
        num, device = own.stop - own.start, batch.x.device
        log_sum = torch.full((num,), -math.inf, dtype=torch.float64, device=device)
        log_squares, bounds, num_done = log_sum.clone(), [], 0
        for log_weights in self._log_weights(batch, rows, own):
            noted = [k for k in self.bounds if num_done < k <= num_done + len(log_weights)]
            for k in noted:
                some = torch.logaddexp(log_sum, log_weights[: k - num_done].logsumexp(0))
                bounds.append(some - math.log(k))
            log_sum = torch.logaddexp(log_sum, log_weights.logsumexp(0))
            log_squares = torch.logaddexp(log_squares, (2 * log_weights).logsumexp(0))
            num_done += len(log_weights)
        return torch.stack(bounds, dim=1), torch.exp(2 * log_sum - log_squares)

    def _log_weights(self, batch: EvaluationBatch, rows: slice, own: slice) -> Iterator[Tensor]:
        """log w = log p(x|z) + log p(z) - log q(z|x) of the images `own` of the batch, `(k, n)` float64, by chunks."""
        shapes, num = batch.model.latent_shapes, own.stop - own.start
        for chunk, start in enumerate(range(0, self.num_samples, CHUNK_SAMPLES)):
            k = min(CHUNK_SAMPLES, self.num_samples - start)
            noise = latent_noise(shapes, rows, batch.seed, NOISE, chunk, num_samples=k, device=batch.x.device)
            by_sample = [each.unflatten(0, (k, num)) for each in noise]
            few = max(1, CACHED_NUMBERS // (k * batch.x[0].numel())) if batch.x.device.type == "cpu" else num
            parts = [slice(first, min(first + few, num)) for first in range(0, num, few)]
            yield torch.cat([_log_weights(batch, own, part, by_sample) for part in parts], dim=1)


def _log_weights(batch: EvaluationBatch, own: slice, part: slice, noise: Sequence[Tensor]) -> Tensor:
    """Those of the images `part` of `own`, of whose noise each group has `(k, images of own, *shape)`."""
    images = slice(own.start + part.start, own.start + part.stop)
    condition = None if batch.condition is None else batch.condition[images]
    features = tuple(each[images] for each in batch.features)
    k, x = len(noise[0]), batch.x[images]
    output = batch.model.sampled(features, tuple(each[:, part].flatten(0, 1) for each in noise), k, condition)
    log_p = batch.model.likelihood.log_prob(output.params, repeated(x, k)).double()
    return (log_p - output.log_ratio()).view(k, len(x))
