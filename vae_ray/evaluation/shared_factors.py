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
"""In units of the prior's standard deviation, as in disentanglement_lib: a dimension whose codes vary less is dead."""
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
    vote per dimension is the classifier, tested on further groups. Dead dimensions (`MIN_STD`) have no vote, as in the
    paper, which leaves out those that equal the prior; if all are dead the score is chance.

    Good for: whether factors move different dimensions. Misleads: 1 although a factor is spread over several
    dimensions; a factor that the code ignores can win the votes of dimensions of noise; of two factors in one dimension
    only one is lost.
    """
    num_factors, scaled = factors.shape[1], _standardised(codes)
    if not scaled.shape[1]:
        return 1 / num_factors
    # the votes (K, d) of the groups to train and to test on
    train, test = (
        np.stack([np.bincount(winners, minlength=scaled.shape[1]) for winners in variances.argmin(2)])
        for variances in _train_and_test(lambda group: group.var(1), scaled, factors, ONE_VALUE, seed)
    )
    return float(test[train.argmax(0), np.arange(scaled.shape[1])].sum() / test.sum())


def beta_vae_score(codes: Floats, factors: Levels, *, seed: int) -> float:
    """Accuracy of the beta-VAE metric (Higgins et al. 2017, section 3): 1 / K (chance) to 1.

    The two images of each pair of a group share the value of one factor. A linear classifier (softmax regression)
    tells which from the mean of |code - code'| over the pairs, and is tested on further groups. Dimensions are divided
    by their standard deviation first, and dead ones are left out as in `factor_vae_score`; the paper does neither.

    Good for: comparison with the literature. Misleads: high for rotated codes, since the classifier combines
    dimensions; 1 although the code ignores one factor, which is recognised by the absence of the others.
    """
    num_factors, scaled = factors.shape[1], _standardised(codes)
    if not scaled.shape[1]:
        return 1 / num_factors
    train, test = _train_and_test(_mean_difference, scaled, factors, PAIRS, seed)
    labels = np.repeat(np.arange(num_factors), train.shape[1])
    train, test = train.reshape(-1, scaled.shape[1]), test.reshape(-1, scaled.shape[1])
    scores = linear_scores(train, one_hot(labels, num_factors), test, loss=softmax_loss)
    return float((scores.argmax(1) == np.repeat(np.arange(num_factors), len(test) // num_factors)).mean())


def _mean_difference(pairs: Floats) -> Floats:
    """Of pairs `(groups, 2 * pairs, d)` the mean of |first - second|, `(groups, d)`."""
    return np.abs(pairs[:, ::2] - pairs[:, 1::2]).mean(1)


def _standardised(codes: Floats) -> Floats:
    """The codes over their standard deviations, without dead dimensions."""
    std = codes.std(0)
    return codes[:, std >= MIN_STD] / std[std >= MIN_STD]


def _train_and_test(
    statistic: Callable[[Floats], Floats], codes: Floats, factors: Levels, shape: Shape, seed: int
) -> list[Floats]:
    """`statistic` of the groups to train and to test on, of each factor equally many: twice `(K, groups, d)`."""
    return [
        np.stack(
            [
                _over_groups(statistic, codes, level, num // factors.shape[1], shape, stream(seed, name, shape[0], k))
                for k, level in enumerate(factors.T)
            ]
        )
        for name, num in (("train", NUM_TRAIN), ("test", NUM_TEST))
    ]


def _over_groups(
    statistic: Callable[[Floats], Floats], codes: Floats, level: Levels, num: int, shape: Shape, seed: int
) -> Floats:
    """`statistic` of the codes `(groups, images, d)` of `num` groups, in blocks: `(num, d)`.

    The probability of a shared value is its number of images; one of a single image would share it with itself.
    """
    order, counts = np.argsort(level, kind="stable"), np.bincount(level)
    starts, shared = np.cumsum(counts) - counts, level[counts[level] > 1]
    (num_values, num_images), rng = shape, np.random.default_rng(seed)
    results = []
    for start in range(0, num, BLOCK_GROUPS):
        block = min(BLOCK_GROUPS, num - start)
        values = shared[rng.integers(len(shared), size=(block, num_values, 1))]
        rows = order[starts[values] + rng.integers(counts[values], size=(block, num_values, num_images))]
        results.append(statistic(codes[rows.reshape(block, -1)]))
    return np.concatenate(results)
