"""How far the dimensions of a code stand for one ground-truth factor each.

Pure functions of arrays with one row an image. `codes` are float64 `(N, d)`, the means of the posteriors unless said
otherwise, and `factors` the levels of K factors, `(N, K)`, as `factor_levels` gives. None depends on the order, the
signs or the scales of the dimensions of a code, but for the threshold of dead dimensions (`shared_factors.MIN_STD`):
dimensions are standardised where a formula would depend on them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vae_ray.errors import UserError
from vae_ray.evaluation.factor_prediction import dci, explicitness
from vae_ray.evaluation.mutual_information import (
    Floats,
    Levels,
    entropies,
    histogram_bins,
    mutual_information,
    posterior_information,
)
from vae_ray.evaluation.shared_factors import beta_vae_score, factor_vae_score

BINS = 20
"""Of each dimension of a code, as in Locatello et al. 2019."""
MIN_IMAGES = 10
"""For each value of a factor, on average: with fewer every estimate is mostly bias. 100 are better."""


def disentanglement_metrics(
    mean: ArrayLike,
    factors: ArrayLike,
    *,
    seed: int,
    bins: int = BINS,
    logvar: ArrayLike | None = None,
    z: ArrayLike | None = None,
) -> dict[str, float]:
    """All metrics of this module by name; `mig_chen`, which takes N² steps, only with `logvar` and `z`.

    Args:
        mean: the posteriors' means, `(N, d)`.
        factors: integer values of the factors, `(N, K)`; those with one value are left out.
        seed: of the halves of the images that classifiers are trained and tested on, and of the groups of images that
            the beta-VAE and FactorVAE scores draw.
        bins: equal-width bins of a dimension, for `mig_locatello`, `mig_ceiling` and `modularity`.
        logvar: the posteriors' log variances, `(N, d)`.
        z: a sample of each, `(N, d)`.

    Raises:
        UserError: if no factor has two values, or the images are fewer than ten times the values of a factor.
    """
    codes, levels = np.asarray(mean, dtype=np.float64), factor_levels(factors)
    metrics = {
        "mig_locatello": mig_locatello(codes, levels, bins=bins),
        "mig_ceiling": mig_ceiling(levels, bins=bins),
        "modularity": modularity(codes, levels, bins=bins),
        "sap": sap(codes, levels),
        **{f"dci_{name}": value for name, value in dci(codes, levels, seed=seed).items()},
        "explicitness": explicitness(codes, levels, seed=seed),
        "factor_vae_score": factor_vae_score(codes, levels, seed=seed),
        "beta_vae_score": beta_vae_score(codes, levels, seed=seed),
    }
    if logvar is not None and z is not None:
        log_variance, sample = np.asarray(logvar, dtype=np.float64), np.asarray(z, dtype=np.float64)
        metrics["mig_chen"] = mig_chen(codes, log_variance, sample, levels)
    return metrics


def factor_levels(factors: ArrayLike) -> Levels:
    """The factors that vary, their values in ascending order as 0, 1, ...: int64 `(N, up to K)`.

    Raises `UserError` if no factor has two values, or if one has more than N / `MIN_IMAGES`.
    """
    values = np.asarray(factors)
    levels = np.zeros(values.shape, dtype=np.int64)
    for k, column in enumerate(values.T):
        levels[:, k] = np.unique(column, return_inverse=True)[1]
    num_levels = levels.max(0, initial=0) + 1
    if not (num_levels > 1).any():
        raise UserError(
            f"factors: got {values.shape[1]} that do not vary over {len(values)} images, should be one or more with "
            "two values or more; try images with known factors, for example --data.source sprites"
        )
    if (needed := MIN_IMAGES * (largest := int(num_levels.max()))) > len(values):
        raise UserError(
            f"images: got {len(values)}, should be {needed} or more for the {largest} values of factor "
            f"{num_levels.argmax()} (from 0); try more images, or leave that factor out"
        )
    return levels[:, num_levels > 1]


def mig_locatello(codes: Floats, factors: Levels, *, bins: int = BINS) -> float:
    """Mutual information gap of discretised means (Locatello et al. 2019, arXiv:1811.12359): 0 to `mig_ceiling`.

    The mean over factors of (I_1 - I_2) / H(v_k), I_1 and I_2 the two largest of I(bin(mean_j); v_k) over dimensions j.
    Plug-in estimates from counts, with bins of equal width between the least and the largest mean. With one dimension
    I_2 is 0.

    Good for: one number for "each factor in one dimension", without training and nearly without noise. Misleads: a
    factor of more values than bins cannot reach 1 (compare `mig_ceiling`); an outlier among the means widens all bins;
    two dimensions for one factor (an angle as sine and cosine) give 0, as does a rotation; a dimension for two factors
    is not punished. About 0 on noise.
    """
    information = mutual_information(histogram_bins(codes, bins), factors)
    return float((_gaps(information) / entropies(factors)).mean())


def mig_chen(mean: Floats, logvar: Floats, z: Floats, factors: Levels) -> float:
    """Mutual information gap of sampled codes (Chen et al. 2018, arXiv:1802.04942, section 4.1): 0 to 1.

    The same gap over the same H(v_k) as `mig_locatello`, but of I(z_j; v_k) between a factor and the continuous sample
    z ~ q(z | x), from the densities of the aggregated posterior (`posterior_information`) instead of a histogram of
    means. So no number of bins sets a ceiling below 1, and wide posteriors lower it. The two do not compare. The
    authors leave out dSprites' shape.

    Good for: VAEs; a dimension whose posterior is the prior counts as 0. Misleads: where posteriors are so narrow that
    few images with the same value overlap, every dimension identifies the image and so each of its factors: all I
    approach H(v_k), and the gap 0; more images help. Else as `mig_locatello`.
    """
    information = posterior_information(mean, logvar, z, factors)
    return float((_gaps(information) / entropies(factors)).mean())


def mig_ceiling(factors: Levels, *, bins: int = BINS) -> float:
    """`mig_locatello` of codes that are the factors, if these are independent: the mean of H(bin(v_k)) / H(v_k).

    1 with at least as many bins as a factor has values. Of equally frequent values, no code of one dimension per factor
    has more; of others, a code that spreads frequent values over more bins can have a little more.
    """
    return float((entropies(histogram_bins(factors.astype(np.float64), bins)) / entropies(factors)).mean())


def modularity(codes: Floats, factors: Levels, *, bins: int = BINS) -> float:
    """Whether each dimension informs about one factor only (Ridgeway & Mozer 2018, arXiv:1802.05312, sec. 3): 0 to 1.

    The mean over dimensions of 1 - sum_{k != k*} I_jk² / ((K - 1) I_jk*²), k* the factor that dimension j informs most
    about, I as in `mig_locatello`. Constant dimensions are left out (disentanglement_lib counts them as 0); 0 if all
    are. 1 by definition with one factor.

    Good for: the question that MIG does not ask. Misleads: says nothing about how much is known, and is *not* 0 on
    noise, whose estimated I is nearly in proportion to a factor's number of values: 0.7 for dSprites' factors.
    """
    information = mutual_information(histogram_bins(codes, bins), factors)
    squares = np.square(information[information.max(1) > 0])
    if not len(squares) or squares.shape[1] == 1:
        return float(len(squares) > 0)
    largest = squares.max(1)
    return float(1 - ((squares.sum(1) - largest) / largest).mean() / (squares.shape[1] - 1))


def sap(codes: Floats, factors: Levels) -> float:
    """Separated attribute predictability (Kumar et al. 2018, arXiv:1711.00848, section 3): 0 to 1 - 1 / L.

    The mean over factors of the gap between the two largest S_jk over dimensions j. S_jk is the paper's score of a
    categorical factor: the balanced accuracy of the best thresholds on dimension j, found and measured on the same
    images (`threshold_accuracy`). No random numbers. Codes = independent factors: the mean of 1 - 1 / L_k for L_k
    values, since the second dimension has chance.

    Good for: as MIG, with an accuracy instead of information. Misleads: disentanglement_lib's SAP of the same name is
    that of a linear one-against-rest SVM, which on one dimension cannot single out a middle value: much lower, not
    comparable; nor is the squared correlation that the paper takes for continuous factors. As with MIG two dimensions
    for one factor give 0.
    """
    scores = [[threshold_accuracy(code, level) for level in factors.T] for code in codes.T]
    return float(_gaps(np.array(scores)).mean())


def threshold_accuracy(code: Floats, level: Levels) -> float:
    """The largest balanced accuracy that thresholds on `code` `(N,)` reach for `level` `(N,)`: 1 / L (chance) to 1.

    Each level has one interval, in the order of the levels' mean codes. Exact, by dynamic programming: with A_c(t) the
    share of level c below threshold t, the best f_c(t) = A_c(t) + max_{s <= t} (f_{c-1}(s) - A_c(s)), up to f_L(inf).
    """
    order, counts = np.argsort(code, kind="stable"), np.bincount(level)
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(code[order])) + 1, [len(code)]])
    best = np.where(cuts == 0, 0.0, -np.inf)
    for c in np.argsort(np.bincount(level, weights=code) / counts, kind="stable"):
        below = np.concatenate([[0], np.cumsum(level[order] == c)])[cuts] / counts[c]
        best = below + np.maximum.accumulate(best - below)
    return float(best[-1] / len(counts))


def _gaps(scores: Floats) -> Floats:
    """The largest less the second largest of each column of `(d, K)`; of one row the row itself."""
    ordered = np.sort(np.vstack([scores, np.zeros((2 - min(len(scores), 2), scores.shape[1]))]), axis=0)
    return ordered[-1] - ordered[-2]


def gaussian_total_correlation(mean: Tensor, variance: Tensor | None = None) -> float:
    """KL(N(m, C) || prod_j N(m_j, C_jj)) in nats, with m and C those of the aggregate posterior of N images.

    In closed form -1/2 log det of the correlation matrix (Locatello et al. 2019, arXiv:1811.12359, section 5.2).

    Args:
        mean: the posteriors' means, `(N, d)`.
        variance: their variances, `(N, d)`, whose mean is added to the covariance of the means, so that C is that of z;
            None: C is that of the means.
    """
    covariance = torch.cov(mean.double().T, correction=0)
    if variance is not None:
        covariance = covariance + torch.diag(variance.double().mean(0))
    scale = covariance.diagonal().rsqrt()
    return -0.5 * float(torch.linalg.slogdet(covariance * scale * scale[:, None]).logabsdet)
