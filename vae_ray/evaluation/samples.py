"""Distances between two sets of images in a feature space: `(N, F)` of real and `(M, F)` of generated ones, float64.

The features decide what is seen (`vae_ray.evaluation.features`), and their name belongs to the metric's. The real
images should be those of the test split: against the training images, a model that repeats these is the best of all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vae_ray.errors import UserError
from vae_ray.seeds import generator

Features = NDArray[np.float64]

CHUNK = 1000
"""Rows of a matrix of distances that are in memory together."""
ROUNDING = 1e-12
"""Of a squared distance, relative to the largest squared norm: a point on the edge of a ball is inside."""


class Estimate(NamedTuple):
    """An estimate and its standard error."""

    value: float
    standard_error: float


class PrecisionRecall(NamedTuple):
    """Both 0 to 1."""

    precision: float
    """The share of generated images that look like real ones."""
    recall: float
    """The share of real images that the model could have generated."""


def frechet_distance(real: Features, generated: Features) -> float:
    """FID (Heusel et al. 2017, arXiv:1706.08500, eq. 6): |m - m'|² + tr(C + C' - 2 (C C')^(1/2)); 0 (equal) upwards.

    The squared 2-Wasserstein distance of the Gaussians with the sets' means and unbiased covariances. At least 2 images
    each, fewer than features too.

    Good for: one number for quality and variety together, in the order in which people rank samples of much different
    quality. Misleads: it is biased upwards in N and M, by about a constant / N that depends on the model (Binkowski et
    al. 2018; Chong & Forsyth 2020), so that only values of the same numbers of images compare, and no value is small by
    itself: that of the training images against the same test images is what a perfect model would have. It sees two
    moments only, in this feature space only. Published values are in features of another network.
    """
    _check_sizes("fid", real, generated, least=2)
    (mean, root), (other_mean, other_root) = map(_moments, (real, generated))
    # C = R^T R and C' = S^T S: the eigenvalues of C C' are the squares of the singular values of R S^T, which unlike
    # the square root of a product that is not symmetric lose no digits where they are nearly 0
    overlap = np.linalg.svd(root @ other_root.T, compute_uv=False).sum()
    spread = np.square(root).sum() + np.square(other_root).sum() - 2 * overlap
    return max(0.0, float(np.square(mean - other_mean).sum() + spread))


def kernel_distance(real: Features, generated: Features, *, seed: int, num_blocks: int = 10) -> Estimate:
    """KID (Binkowski et al. 2018, arXiv:1801.01401, section 4): MMD² with the kernel (a·b / F + 1)³; unbiased.

    The images of each set are shuffled by the seed and divided into `num_blocks` disjoint blocks. The value is the mean
    of the blocks' unbiased MMD². Blocks are independent, so that the standard deviation over the root of their number
    is the standard error; of subsets that overlap, as in the authors' program, it would not be.
    About 0 for equal distributions, and as often below as above. At least 2 images of each set a block.

    Good for: small sets, as its expectation does not depend on N. Misleads: a cubic polynomial sees three moments; a
    feature of large scale outweighs the others; values of other features do not compare.
    """
    _check_sizes("kid", real, generated, least=2 * num_blocks)
    blocks = [
        np.array_split(
            features[torch.randperm(len(features), generator=generator(seed, "kid", name)).numpy()], num_blocks
        )
        for name, features in (("real", real), ("generated", generated))
    ]
    values = np.array([squared_mmd(*pair) for pair in zip(*blocks, strict=True)])
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(num_blocks)))


def squared_mmd(x: Features, y: Features) -> float:
    """The unbiased estimator of MMD² (Gretton et al. 2012, eq. 3) with KID's kernel; each set of at least 2."""
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = ((kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) for kernel in (xx, yy))
    return float(sum(within) - 2 * xy.mean())


def precision_recall(real: Features, generated: Features, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eqs. 1 and 2).

    The manifold of a set is the union of the balls around its points whose radius is the distance to the k-th nearest
    other point of the set. Precision: the share of generated images in the real manifold. Recall: the share of real
    images in the generated manifold. More than k images each.

    Good for: which of quality (precision) and variety (recall) is missing. Misleads: one outlier has a large ball; both
    grow with k and fall with the dimension, and change with N and M, so that only equal numbers compare; the training
    images have precision and recall well below 1 against the test images.
    """
    _check_sizes("precision and recall", real, generated, least=k + 1)
    center = real.mean(0)  # distances stay, and numbers that cancel are smaller
    real, generated = real - center, generated - center
    largest = max(float(np.square(points).sum(1).max()) for points in (real, generated))
    radii, other_radii = (_squared_radii(points, k) + ROUNDING * largest for points in (real, generated))
    is_real, is_covered = np.zeros(len(generated), bool), np.zeros(len(real), bool)
    for start in range(0, len(generated), CHUNK):
        rows = slice(start, start + CHUNK)
        squared = _squared_distances(generated[rows], real)
        is_real[rows] = (squared <= radii).any(1)
        is_covered |= (squared <= other_radii[rows, None]).any(0)
    return PrecisionRecall(float(is_real.mean()), float(is_covered.mean()))


def _moments(features: Features) -> tuple[Features, Features]:
    """The mean `(F,)`, and a matrix R `(min(N, F), F)` with R^T R = the unbiased covariance."""
    mean = features.mean(0)
    return mean, np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")  # type: ignore[return-value]


def _squared_radii(points: Features, k: int) -> Features:
    """Of each point, the squared distance to the k-th nearest other one, `(N,)`."""
    chunks = (points[start : start + CHUNK] for start in range(0, len(points), CHUNK))
    # the nearest of all is the point itself
    return np.concatenate([np.partition(_squared_distances(chunk, points), k, axis=1)[:, k] for chunk in chunks])


def _squared_distances(x: Features, y: Features) -> Features:
    squared: Features = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * (x @ y.T)
    return squared


def _check_sizes(metric: str, real: Features, generated: Features, *, least: int) -> None:
    if min(len(real), len(generated)) < least:
        raise UserError(
            f"{metric}: got {len(real)} real and {len(generated)} generated images, should be at least {least} of "
            "each; try more --num-images"
        )
    if not (real.std(0).any() or generated.std(0).any()):
        raise UserError(f"{metric}: the features of all images are the same, so that they tell none apart; try others")
