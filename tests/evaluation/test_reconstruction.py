"""Truth: errors of reconstructions against their definitions, written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vae_ray.evaluation.reconstruction import mean_squared_error, peak_signal_to_noise, structural_similarity


def images(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ssim_of_windows(x: Tensor, y: Tensor, size: int) -> float:
    """SSIM of one image by a loop over channels and windows."""
    radius = (size - 1) // 2
    weights = np.array(
        [
            [math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-radius, radius + 1)]
            for i in range(-radius, radius + 1)
        ]
    )
    weights /= weights.sum()
    values = []
    for channel in range(x.shape[0]):
        for row in range(x.shape[1] - size + 1):
            for column in range(x.shape[2] - size + 1):
                a, b = (image[channel, row : row + size, column : column + size].numpy() for image in (x, y))
                m, n = (weights * a).sum(), (weights * b).sum()
                v, w = (weights * (a - m) ** 2).sum(), (weights * (b - n) ** 2).sum()
                c = (weights * (a - m) * (b - n)).sum()
                values.append((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4)))
    return float(np.mean(values))


@pytest.mark.parametrize(("height", "width", "size"), [(13, 16, 11), (11, 11, 11), (17, 8, 7), (5, 6, 5), (1, 4, 1)])
def test_ssim_is_the_mean_over_windows(height: int, width: int, size: int) -> None:
    x = images(2, 3, height, width, seed=0)
    y = (0.6 * x + 0.4 * images(2, 3, height, width, seed=1)).clamp(0, 1)
    expected = [ssim_of_windows(a, b, size) for a, b in zip(x, y, strict=True)]
    assert structural_similarity(x, y).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(structural_similarity(x, y), structural_similarity(y, x))


def test_ssim_of_inverted_contrast_is_negative_and_of_flat_images_the_luminance() -> None:
    x = images(4, 1, 12, 15, seed=2)
    assert bool((structural_similarity(x, 1 - x) < -0.5).all())
    flat = [torch.full((1, 2, 12, 15), value) for value in (0.25, 0.75)]
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert float(structural_similarity(*flat)) == pytest.approx(expected, abs=1e-12)


def test_identical_images_have_no_error() -> None:
    x = images(3, 2, 13, 14, seed=3).float()
    assert mean_squared_error(x, x).tolist() == [0.0] * 3
    assert peak_signal_to_noise(x, x).tolist() == pytest.approx([100.0] * 3, abs=1e-12)
    assert structural_similarity(x, x).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_psnr_of_an_offset_is_its_logarithm() -> None:
    x = torch.zeros(2, 3, 4, 5)
    offsets = torch.tensor([0.5, 0.01], dtype=torch.float64).view(2, 1, 1, 1)
    assert mean_squared_error(x, x + offsets).tolist() == pytest.approx([0.25, 1e-4], rel=1e-12)
    assert peak_signal_to_noise(x, x + offsets).tolist() == pytest.approx([20 * math.log10(2), 40.0], rel=1e-12)


@pytest.mark.parametrize("error", [mean_squared_error, peak_signal_to_noise, structural_similarity])
def test_an_image_has_the_same_error_in_any_batch(error: object) -> None:
    assert callable(error)
    x, y = images(7, 2, 12, 13, seed=4), images(7, 2, 12, 13, seed=5)
    whole = error(x, y)
    assert whole.dtype == torch.float64
    shards = [error(x[rows], y[rows]) for rows in (slice(0, 1), slice(1, 6), slice(6, 7))]
    # a product of matrices may sum in another order in another batch
    assert torch.cat(shards).tolist() == pytest.approx(whole.tolist(), abs=1e-14)
