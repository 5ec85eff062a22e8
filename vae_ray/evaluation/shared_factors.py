"""Disentanglement scores of classifiers that tell which factor a group of images shares.

The papers generate the images of a group; here they are drawn, with replacement, from those that there are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vae_ray.evaluation.factor_prediction import linear_scores, one_hot, softmax_loss
from vae_ray.evaluation.mutual_information import Floats, Levels
from vae_ray.seeds import stream

MIN_STD = 0.05
"""In units of the prior's standard deviation: a dimension whose codes vary less is dead and left out."""
NUM_TRAIN, NUM_TEST = 10_000, 5_000
"""Groups for the classifier and for its accuracy, as in Locatello et al. 2019; the latter's standard error is 0.7 %."""
Shape = tuple[int, int]
"""How many values a group shares, and how many images share each."""
ONE_VALUE: Shape = (1, 64)
PAIRS: Shape = (64, 2)
BLOCK_GROUPS = 256
"""Whose codes are in memory at once."""


def factor_vae_score(codes: Floats, factors: Levels, *, seed: int) -> float:
    """Accuracy of the FactorVAE metric (Kim & Mnih 2018, arXiv:1802.05983, section 4): 1 / K (chance) to 1.

    The images of a group share the value of one factor, of each equally many groups. Each dimension is divided by its
    standard deviation over all images; the one with the least variance over the group votes for the factor. A majority
    vote per dimension is the classifier, tested on further groups. Dimensions with a standard deviation below
    `MIN_STD` have no vote; without any the score is chance.

    Good for: one dimension per factor, without hyperparameters. Misleads: near 1 although a factor is spread over
    several dimensions; a factor that the code ignores is still guessed right if no other is; two factors in one
    dimension cost only one of them.
    """
    num_factors, scaled = factors.shape[1], _standardised(codes)
    if not scaled.shape[1]:
        return 1 / num_factors
    votes = np.zeros((2, scaled.shape[1], num_factors))
    for half, num in enumerate((NUM_TRAIN, NUM_TEST)):
        for k, level in enumerate(factors.T):
            rng = np.random.default_rng(stream(seed, "factor_vae_score", half, k))
            variances = _over_groups(lambda group: group.var(1), scaled, level, num // num_factors, ONE_VALUE, rng)
            votes[half, :, k] = np.bincount(variances.argmin(1), minlength=scaled.shape[1])
    train, test = votes
    return float(test[np.arange(len(test)), train.argmax(1)].sum() / test.sum())


def beta_vae_score(codes: Floats, factors: Levels, *, seed: int) -> float:
    """Accuracy of the beta-VAE metric (Higgins et al. 2017, section 3): 1 / K (chance) to 1.

    The two images of each pair of a group share the value of one factor. A linear classifier (softmax regression)
    tells which from the mean of |code - code'| over the pairs, and is tested on further groups. Dimensions are divided
    by their standard deviation first, and dead ones are left out as in `factor_vae_score`; the paper does neither.

    Good for: comparison with the literature. Misleads: a rotated code can reach 1, since the classifier combines
    dimensions, as can one in which the last factor is recognised by the absence of the others.
    """
    num_factors, scaled = factors.shape[1], _standardised(codes)
    if not scaled.shape[1]:
        return 1 / num_factors
    differences: list[list[Floats]] = [[], []]
    for half, num in enumerate((NUM_TRAIN, NUM_TEST)):
        for k, level in enumerate(factors.T):
            rng = np.random.default_rng(stream(seed, "beta_vae_score", half, k))
            differences[half].append(_over_groups(_mean_difference, scaled, level, num // num_factors, PAIRS, rng))
    (train, labels), (test, test_labels) = (
        (np.concatenate(parts), np.repeat(np.arange(num_factors), list(map(len, parts)))) for parts in differences
    )
    scores = linear_scores(train, one_hot(labels, num_factors), test, loss=softmax_loss)
    return float((scores.argmax(1) == test_labels).mean())


def _mean_difference(pairs: Floats) -> Floats:
    """Of pairs `(groups, 2 * pairs, d)` the mean of |first - second|, `(groups, d)`."""
    return np.abs(pairs[:, ::2] - pairs[:, 1::2]).mean(1)


def _standardised(codes: Floats) -> Floats:
    """The codes over their standard deviations, without dead dimensions."""
    std = codes.std(0)
    return codes[:, std >= MIN_STD] / std[std >= MIN_STD]


def _over_groups(
    statistic: Callable[[Floats], Floats],
    codes: Floats,
    level: Levels,
    num: int,
    shape: Shape,
    rng: np.random.Generator,
) -> Floats:
    """`statistic` of the codes `(groups, images, d)` of `num` groups, in blocks: `(num, d)`.

    The probability of a shared value is its number of images; one of a single image would share it with itself.
    """
    order, counts = np.argsort(level, kind="stable"), np.bincount(level)
    starts, shared = np.cumsum(counts) - counts, level[counts[level] > 1]
    num_values, num_images = shape
    results = []
    for start in range(0, num, BLOCK_GROUPS):
        block = min(BLOCK_GROUPS, num - start)
        values = shared[rng.integers(len(shared), size=(block, num_values, 1))]
        rows = order[starts[values] + rng.integers(counts[values], size=(block, num_values, num_images))]
        results.append(statistic(codes[rows.reshape(block, -1)]))
    return np.concatenate(results)
