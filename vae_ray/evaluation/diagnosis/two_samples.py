"""Can a classifier tell two samples apart? If it can, their distributions differ (Lopez-Paz & Oquab 2017)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vae_ray.seeds import stream

HIDDEN, STEPS, LR, WEIGHT_DECAY = 64, 150, 0.01, 0.01
MOST_DIMENSIONS = 128
"""Of which the classifier sees those whose mean and variance differ most in the half that it is trained on."""


def separation(a: NDArray[np.floating], b: NDArray[np.floating], *, seed: int = 0) -> float:
    """The area under the ROC curve of a classifier of rows of `a` against rows of `b`, on held-out halves.

    C2ST (Lopez-Paz & Oquab 2017, arXiv:1610.06545) with the area in place of the accuracy: the probability that of a
    pair (row of b, row of a) the classifier ranks b's higher. About 0.5 of equal distributions (standard error about
    1 / sqrt(6 n) for n held-out rows of each), 1 if they can be told apart without error. The classifier is a network
    of one hidden layer, trained with noise and weights of `seed` alone.

    Args:
        a: `(n, d)`.
        b: `(n, d)`; the rows at the same place may belong to the same image, which is then in one half.
    """
    halves = [_tensor(rows[start::2]) for start in (0, 1) for rows in (a, b)]
    train_a, train_b, test_a, test_b = halves
    where = _differing(train_a, train_b)
    both = torch.cat([train_a, train_b])[:, where]
    center, scale = both.mean(0), both.std(0).clamp_min(1e-6)
    x, y = (both - center) / scale, torch.cat([torch.zeros(len(train_a)), torch.ones(len(train_b))])
    network = _network(x.shape[1], seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(network(x)[:, 0], y).backward()
            optimizer.step()
    with torch.no_grad():
        scores = [network((rows[:, where] - center) / scale)[:, 0] for rows in (test_a, test_b)]
    return area_under_curve(*scores)


def area_under_curve(negative: Tensor, positive: Tensor) -> float:
    """P(positive > negative) + P(equal) / 2 of scores `(n,)` and `(m,)` (Mann & Whitney 1947)."""
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double())
    up_to = torch.searchsorted(ordered, positive.double(), right=True)
    return float((below + up_to).double().mean()) / (2 * len(negative))


def _network(dimensions: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "two-sample classifier"))
        return nn.Sequential(nn.Linear(dimensions, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1))


def _differing(a: Tensor, b: Tensor) -> Tensor:
    """Indices of at most `MOST_DIMENSIONS` columns."""
    tiny = 1e-12
    variances = a.var(0) + tiny, b.var(0) + tiny
    difference = (a.mean(0) - b.mean(0)).square() / (variances[0] + variances[1]) + (
        variances[0] / variances[1]
    ).log().abs()
    return difference.topk(min(MOST_DIMENSIONS, len(difference))).indices


def _tensor(rows: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).float()
