"""How well, and from which dimensions of a code, factors are predicted: DCI and explicitness.

The classifiers are written here, so that no library's version changes a number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vae_ray.evaluation.mutual_information import Floats, Levels
from vae_ray.seeds import stream

Loss = Callable[[Tensor, Tensor], Tensor]
softmax_loss: Loss = functools.partial(F.cross_entropy, reduction="sum")
one_vs_rest_loss: Loss = functools.partial(F.binary_cross_entropy_with_logits, reduction="sum")


def dci(codes: Floats, factors: Levels, *, seed: int) -> dict[str, float]:
    """`disentanglement`, `completeness` and `informativeness` (Eastwood & Williams 2018, section 2): each 0 to 1.

    From importances R_jk of dimension j for factor k, R_jk summing to 1 over j, of one classifier a factor. With
    P_jk = R_jk / sum_k R_jk, disentanglement is sum_j w_j (1 - H(P_j) / log K), w_j the share of dimension j in all of
    R: whether a dimension is important for one factor only. Completeness is the mean over factors of
    1 - H(R_k) / log d: whether a factor takes one dimension only. Informativeness is the mean accuracy of the
    classifiers on the other half of the images; chance is the share of the most frequent value. With K = 1, or d = 1,
    the first, or second, is 1 by definition. A factor whose classifier uses no dimension has no importances, and the
    completeness 0.

    The classifier is a decision tree (`fit_tree`); the papers have lasso, random forests and boosted trees, and values
    compare only with the same one.

    Good for: many-to-many relations, which MIG and SAP reduce to a gap; nonlinear codes. Misleads: of two dimensions
    that say the same, a tree shares the importance only where they are equally good, and otherwise uses the better.
    """
    train, test = _halves(len(codes), seed, "dci")
    trees = [fit_tree(codes, level, train, test) for level in factors.T]
    importance = np.stack([importance for importance, _ in trees], axis=1)
    importance /= np.maximum(importance.sum(0), np.finfo(np.float64).tiny)
    per_dimension, per_factor = importance.sum(1), importance.sum(0)
    weights = per_dimension / max(per_dimension.sum(), 1.0)
    return {
        "disentanglement": float(weights @ _concentration(importance)),
        "completeness": float((_concentration(importance.T) * per_factor).mean()),
        "informativeness": float(np.mean([accuracy for _, accuracy in trees])),
    }


def fit_tree(codes: Floats, level: Levels, train: NDArray[np.int64], test: NDArray[np.int64]) -> tuple[Floats, float]:
    """Importances `(d,)` and the accuracy on the rows `test` of a decision tree fitted to the rows `train`.

    Splits are by one threshold on one dimension and maximise the information gain; its sum in nats, over images and
    splits, is a dimension's importance. Exact ties between dimensions share it. A node of n images and L levels is
    split if the gain pays for its description, log(n d) + (L - 1) / 2 log n nats: deeper, noise would be fitted, and
    its dimensions would look important. Leaves predict their most frequent level.
    """
    importance, num_correct, nodes = np.zeros(codes.shape[1]), 0, [(train, test)]
    while nodes:
        rows, test_rows = nodes.pop()
        present, labels = np.unique(level[rows], return_inverse=True)
        gains, thresholds = _best_splits(codes[rows], labels, len(present))
        largest = gains.max()
        if largest > np.log(gains.size * len(rows)) + (len(present) - 1) / 2 * np.log(len(rows)):
            tied = gains >= largest * (1 - 1e-12)
            importance[tied] += largest / tied.sum()
            j = gains.argmax()
            below, test_below = codes[rows, j] <= thresholds[j], codes[test_rows, j] <= thresholds[j]
            nodes += [(rows[below], test_rows[test_below]), (rows[~below], test_rows[~test_below])]
        else:
            num_correct += int((level[test_rows] == present[np.bincount(labels).argmax()]).sum())
    return importance, num_correct / len(test)


def _best_splits(codes: Floats, labels: Levels, num_labels: int) -> tuple[Floats, Floats]:
    """Of each column of `(n, d)` the largest information gain of one threshold, times n, and the threshold."""
    num, d = codes.shape
    gains, thresholds = np.zeros(d), np.zeros(d)
    if num_labels == 1:
        return gains, thresholds
    counts = np.arange(num + 1.0)
    x_log_x = counts * np.log(np.maximum(counts, 1))
    totals = np.bincount(labels)
    for j, code in enumerate(codes.T):
        order = np.argsort(code, kind="stable")
        cuts = np.flatnonzero(np.diff(code[order])) + 1
        if len(cuts):
            left = np.cumsum(one_hot(labels[order], num_labels), axis=0, dtype=np.int64)[cuts - 1]
            # n H = n log n - sum_c n_c log n_c; what remains to be described in the two parts
            remaining = x_log_x[cuts] + x_log_x[num - cuts] - (x_log_x[left] + x_log_x[totals - left]).sum(1)
            best = remaining.argmin()
            gains[j] = x_log_x[num] - x_log_x[totals].sum() - remaining[best]
            below, above = code[order][cuts[best] - 1 : cuts[best] + 1]
            thresholds[j] = min((below + above) / 2, np.nextafter(above, below))  # below `above` after rounding too
    return gains, thresholds


def explicitness(codes: Floats, factors: Levels, *, seed: int) -> float:
    """Mean area under the ROC curve of linear classifiers (Ridgeway & Mozer 2018, arXiv:1802.05312, section 3).

    Of each value of each factor a logistic regression on all dimensions against the other values, fitted to half of
    the images and measured on the others; the mean over the values in both halves, then over factors. From 0.5
    (chance) to 1, not rescaled.

    Good for: whether a linear layer can read the factors. Misleads: a linear function cannot rank a middle value of an
    ordered factor above both its neighbours, so codes = factors of many values have about 0.75, not 1; softmax
    regression, the default of later versions of scikit-learn, would give 1, and is not comparable.
    """
    train, test = _halves(len(codes), seed, "explicitness")
    std = codes[train].std(0)
    x = (codes - codes[train].mean(0)) / np.where(std > 0, std, 1.0)
    means = []
    for level in factors.T:
        targets = one_hot(level, int(level.max()) + 1)
        in_both = (np.ptp(targets[train], axis=0) > 0) & (np.ptp(targets[test], axis=0) > 0)
        if in_both.any():
            scores = linear_scores(x[train], targets[train][:, in_both], x[test], loss=one_vs_rest_loss)
            means.append(_areas_under_roc(scores, targets[test][:, in_both]).mean())
    return float(np.mean(means)) if means else 0.5


def linear_scores(train: Floats, targets: Floats, test: Floats, *, loss: Loss) -> Floats:
    """Scores `(num_test, classes)` of a linear classifier with intercepts, fitted to one-hot `targets`.

    Minimises `loss` + |weights|² / 2 (intercepts are free), whose only minimum L-BFGS finds.
    """
    x, x_test = (torch.from_numpy(np.hstack([rows, np.ones((len(rows), 1))])) for rows in (train, test))
    y = torch.from_numpy(targets)
    weights = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (loss(x @ weights, y) + weights[:-1].square().sum() / 2) / len(x)
        value.backward()
        return value

    optimizer.step(closure)
    return (x_test @ weights).detach().numpy()


def one_hot(labels: Levels, num: int) -> Floats:
    """float64 `(N, num)`."""
    return (labels[:, None] == np.arange(num)).astype(np.float64)


def _areas_under_roc(scores: Floats, targets: Floats) -> Floats:
    """Of each column the probability that a positive has the higher score than a negative, ties half: by ranks."""
    from scipy.stats import rankdata  # here, because every process of a training would import it

    num_positive = targets.sum(0)
    below = (rankdata(scores, axis=0) * targets).sum(0) - num_positive * (num_positive + 1) / 2
    return below / (num_positive * (len(targets) - num_positive))


def _concentration(weights: Floats) -> Floats:
    """1 - H / log(columns) of each row of `(rows, columns)` made to sum to 1; 1 for one column."""
    shares = weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(1)
    return 1 - entropy / np.log(max(weights.shape[1], 2))


def _halves(num: int, seed: int, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train and to test on."""
    rows = np.random.default_rng(stream(seed, name)).permutation(num)
    return rows[: num // 2], rows[num // 2 :]
