"""Truth: distances between sets of features against closed forms and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray

from vae_ray.errors import UserError
from vae_ray.evaluation.samples import frechet_distance, kernel_distance, precision_recall, squared_mmd

Array = NDArray[np.float64]


def normal(num: int, dim: int, *, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((num, dim))


def whitened(num: int, dim: int, *, seed: int) -> Array:
    """Points whose mean is exactly 0 and whose unbiased covariance is the identity."""
    points = normal(num, dim, seed=seed)
    return np.linalg.qr(points - points.mean(0))[0] * np.sqrt(num - 1)


# --- FID ------------------------------------------------------------------------------------------------


def test_fid_of_diagonal_gaussians_is_the_closed_form() -> None:
    """|m - m'|² + sum (s - s')²."""
    s, other_s = np.array([0.5, 2.0, 1e-3, 0.0, 30.0]), np.array([1.5, 0.25, 1e-3, 2.0, 7.0])
    m, other_m = np.array([1.0, 0.0, -2.0, 0.5, 3.0]), np.array([0.0, 0.25, -2.0, 1.5, -1.0])
    expected = np.square(m - other_m).sum() + np.square(s - other_s).sum()
    found = frechet_distance(whitened(40, 5, seed=0) * s + m, whitened(70, 5, seed=1) * other_s + other_m)
    assert found == pytest.approx(expected, rel=1e-12)


def test_fid_of_a_shift_is_its_squared_length_and_of_a_scaled_set_that_of_the_scale() -> None:
    x, shift = normal(50, 7, seed=2) @ normal(7, 7, seed=3), np.arange(7.0)
    variance = x.var(0, ddof=1).sum()
    assert frechet_distance(x, x + shift) == pytest.approx(np.square(shift).sum(), rel=1e-12)
    centred = x - x.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance, rel=1e-12)


@pytest.mark.parametrize(("num", "other", "dim"), [(60, 45, 6), (5, 45, 11), (45, 5, 11), (4, 5, 11), (2, 2, 1)])
def test_fid_is_the_formula_with_a_matrix_square_root(num: int, other: int, dim: int) -> None:
    x, y = normal(num, dim, seed=4) @ normal(dim, dim, seed=5), 0.5 * normal(other, dim, seed=6) + 1
    covariance, other_covariance = (np.cov(points.T).reshape(dim, dim) for points in (x, y))
    root = scipy.linalg.sqrtm(covariance + 0j)  # of a symmetric matrix
    between = scipy.linalg.sqrtm(root @ other_covariance @ root).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariance + other_covariance - 2 * between)
    # the independent form takes roots of eigenvalues that should be 0 and are 1e-16
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)


@pytest.mark.parametrize("num", [5, 60])
def test_fid_of_a_set_and_itself_in_another_order_is_zero(num: int) -> None:
    x = normal(num, 9, seed=7) * np.logspace(-6, 3, 9)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-12 * x.var(0).sum())


# --- KID ------------------------------------------------------------------------------------------------


def test_squared_mmd_is_the_mean_over_pairs() -> None:
    x, y = normal(6, 3, seed=8), normal(5, 3, seed=9) + 0.5

    def kernel(a: Array, b: Array) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3)

    within = [np.mean([kernel(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert squared_mmd(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_kid_is_unbiased_and_its_standard_error_is_the_spread_of_its_values() -> None:
    """Of equal distributions, 400 times: the mean is within 3 of its own standard errors of 0."""
    found = [
        kernel_distance(normal(40, 3, seed=2 * i), normal(60, 3, seed=2 * i + 1), seed=i, num_blocks=5)
        for i in range(400)
    ]
    values, errors = np.array(found).T
    assert abs(values.mean()) < 3 * values.std() / 20
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(), rel=0.15)  # 4 degrees of freedom each
    assert 0.3 < (values < 0).mean() < 0.8


def test_kid_of_a_shift_of_a_gaussian_is_the_closed_form() -> None:
    """In one dimension, for N(0, 1) and N(s, 1): E (x x' + 1)³ = sum over i of C(3, i) E[x^i]², and so on."""
    s = 0.7
    moments, other = (1, 0, 1, 0), (1, s, 1 + s**2, 3 * s + s**3)
    expected = sum(c * (a - b) ** 2 for c, a, b in zip((1, 3, 3, 1), moments, other, strict=True))
    value, error = kernel_distance(normal(9000, 1, seed=10), normal(6000, 1, seed=11) + s, seed=0, num_blocks=30)
    assert abs(value - expected) < 3 * error
    assert error < 0.1 * expected


def test_kid_depends_on_the_seed_alone() -> None:
    x, y = normal(50, 4, seed=12), normal(45, 4, seed=13)
    assert kernel_distance(x, y, seed=1) == kernel_distance(x, y, seed=1) != kernel_distance(x, y, seed=2)


# --- precision and recall -------------------------------------------------------------------------------


def precision_by_loops(real: Array, generated: Array, k: int) -> float:
    """The share of `generated` within a ball of `real`; with the sets exchanged, the recall."""
    radii = [sorted(np.linalg.norm(a - b) for j, b in enumerate(real) if i != j)[k - 1] for i, a in enumerate(real)]
    inside = [any(np.linalg.norm(a - b) <= r for a, r in zip(real, radii, strict=True)) for b in generated]
    return float(np.mean(inside))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_a_loop_over_balls(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_ray.evaluation.samples.CHUNK", 7)
    real, generated = normal(60, 4, seed=14), 0.7 * normal(45, 4, seed=15) + 0.4
    found = precision_recall(real, generated, k=k)
    assert found == (precision_by_loops(real, generated, k), precision_by_loops(generated, real, k))
    assert 0 < found.recall < found.precision <= 1


@pytest.mark.parametrize("copies", [1, 5])
def test_equal_sets_have_precision_and_recall_one(copies: int) -> None:
    """Of five copies of each image the balls have radius 0."""
    x = np.tile(normal(30, 6, seed=16) + 1000, (copies, 1))
    assert precision_recall(x, x[::-1]) == (1.0, 1.0)


def test_missing_modes_cost_recall_and_bad_images_precision() -> None:
    left, right = normal(200, 2, seed=17) - 100, normal(200, 2, seed=18) + 100
    both = np.concatenate([left, right])
    assert precision_recall(both, left) == (1.0, 0.5)
    assert precision_recall(left, both) == (0.5, 1.0)
    assert precision_recall(left, right) == (0.0, 0.0)


def test_too_few_images_are_refused() -> None:
    x = normal(3, 2, seed=19)
    with pytest.raises(UserError, match="fid: got 3 real and 1 generated images, should be at least 2 of each"):
        frechet_distance(x, x[:1])
    with pytest.raises(UserError, match="kid: got 3 real and 3 generated images, should be at least 20 of each"):
        kernel_distance(x, x, seed=0)
    with pytest.raises(
        UserError, match="precision and recall: got 3 real and 3 generated images, should be at least 4"
    ):
        precision_recall(x, x)
