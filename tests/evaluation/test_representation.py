"""Truth: probes of codes that are labels, or noise; principal components against an eigendecomposition."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from vae_ray.errors import UserError
from vae_ray.evaluation.representation import (
    Labelled,
    accuracies,
    linear_probe_accuracy,
    neighbour_accuracy,
    principal_components,
)

NUM_CLASSES = 4


def labels(num: int, *, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, NUM_CLASSES, num)


def noise(num: int, dim: int, *, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((num, dim))


def test_codes_that_are_labels_are_read_without_error() -> None:
    train, test = (Labelled(np.eye(NUM_CLASSES)[given], given) for given in (labels(90, seed=0), labels(50, seed=1)))
    assert linear_probe_accuracy(train, test) == 1
    assert neighbour_accuracy(train, test) == 1


def test_noise_is_read_by_chance() -> None:
    """Of 2,000 guesses of one of 4 classes the share that is right has a standard deviation of 0.0097."""
    train, test = (Labelled(noise(2000, 3, seed=s), labels(2000, seed=s + 10)) for s in (0, 1))
    assert abs(linear_probe_accuracy(train, test) - 1 / NUM_CLASSES) < 0.03
    assert abs(neighbour_accuracy(train, test) - 1 / NUM_CLASSES) < 0.03


def test_the_linear_probe_sees_no_ring_and_neighbours_do() -> None:
    codes = noise(2000, 2, seed=2)
    inside = (np.linalg.norm(codes, axis=1) < np.sqrt(2 * np.log(2))).astype(np.int64)  # half of them
    train, test = Labelled(codes[:1500], inside[:1500]), Labelled(codes[1500:], inside[1500:])
    assert linear_probe_accuracy(train, test) < 0.6
    assert neighbour_accuracy(train, test) > 0.95


def test_scale_and_shift_of_a_dimension_do_not_matter_to_the_linear_probe() -> None:
    given = labels(300, seed=3)
    codes = noise(300, NUM_CLASSES, seed=4) + 2 * np.eye(NUM_CLASSES)[given]
    scaled = np.concatenate([codes * np.array([1e-4, 1.0, 50.0, 1e3]) - 7, np.full((300, 1), 3.0)], 1)
    first, second = (
        linear_probe_accuracy(Labelled(c[:200], given[:200]), Labelled(c[200:], given[200:])) for c in (codes, scaled)
    )
    assert first == second


def test_neighbours_vote() -> None:
    """The five nearest of 0 are 1, 1, 0, 0, 0 in order; of the three nearest two are 1."""
    train = Labelled(np.array([[1.0], [-2.0], [3.0], [-4.0], [5.0], [60.0]]), np.array([1, 1, 0, 0, 0, 1]))
    test = Labelled(np.array([[0.0]]), np.array([0]))
    assert neighbour_accuracy(train, test, k=5) == 1
    assert neighbour_accuracy(train, test, k=3) == 0


def test_images_without_a_label_do_not_count() -> None:
    codes, given = noise(80, 3, seed=5), labels(80, seed=6)
    wrong = Labelled(np.concatenate([codes, 5 + codes]), np.concatenate([given, np.full(80, -1)]))
    train = Labelled(codes[:60], given[:60])
    for accuracy in (linear_probe_accuracy, neighbour_accuracy):
        assert accuracy(wrong, train) == accuracy(Labelled(codes, given), train)
        assert accuracy(train, wrong) == accuracy(train, Labelled(codes, given))


def test_principal_components_are_the_eigenvectors_of_the_covariance() -> None:
    factors = noise(12, 12, seed=7)
    train, test = noise(70, 12, seed=8) @ factors + 3, noise(11, 12, seed=9) @ factors
    _, vectors = np.linalg.eigh(np.cov(train.T))
    found, other = principal_components(train, test, num=5)
    expected = (test - train.mean(0)) @ vectors[:, ::-1][:, :5]
    assert np.abs(other) == pytest.approx(np.abs(expected), abs=1e-9)  # signs are arbitrary
    assert np.cov(found.T) == pytest.approx(np.diag(np.linalg.eigvalsh(np.cov(train.T))[::-1][:5]), abs=1e-9)
    assert principal_components(train, test, num=20)[0].shape == (70, 12)


def test_accuracies_stand_beside_those_of_as_many_principal_components() -> None:
    """With one-hot codes and the digits as pixels."""
    pixels, given = load_digits(return_X_y=True)
    pixels = pixels / 16
    train, test = (Labelled(np.eye(10)[given[rows]], given[rows]) for rows in (slice(0, 1200), slice(1200, None)))
    arrays = {"codes": np.eye(10)[given], "small_pixels": pixels, "label:digit": given, "label:one": 0 * given}
    halves = ({name: each[rows] for name, each in arrays.items()} for rows in (slice(0, 1200), slice(1200, None)))
    values, errors, _, warnings = accuracies(*halves)
    pca = principal_components(pixels[:1200], pixels[1200:], num=10)
    baseline = [Labelled(codes, split.labels) for codes, split in zip(pca, (train, test), strict=True)]
    linear, neighbours = linear_probe_accuracy(*baseline), neighbour_accuracy(*baseline)
    assert values == {
        "linear_probe[digit]": 1.0,
        "neighbours[digit]": 1.0,
        "linear_probe[digit, pca of pixels]": linear,
        "neighbours[digit, pca of pixels]": neighbours,
    }
    assert 0.8 < linear < neighbours < 1
    assert errors["linear_probe[digit]"] == 0
    assert errors["linear_probe[digit, pca of pixels]"] == pytest.approx((linear * (1 - linear) / 597) ** 0.5)
    assert warnings == (
        "one: labels of 1 classes in the training images and 597 labels in the others, a classifier needs at least 2 "
        "and 1",
    )


def test_labels_of_one_class_are_refused() -> None:
    codes = Labelled(noise(9, 2, seed=10), np.zeros(9, np.int64))
    with pytest.raises(UserError, match="labels of 1 classes in the training images and 9 labels in the others"):
        linear_probe_accuracy(codes, codes)
