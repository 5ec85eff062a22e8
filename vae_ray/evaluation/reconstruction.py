"""How far a reconstruction is from its image: one number an image, so that means over images are exact over shards.

Images are `(N, C, H, W)` in [0, 1] of any floating dtype, a batch at a time; errors are float64 `(N,)`. All errors are
small where most pixels are background: they compare models on one data set, and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_DECIBELS = 100.0
"""PSNR of identical images, and of an MSE below 1e-10; one of 100,000 pixels that is off by 1/255 has 98 dB."""
WINDOW, SIGMA = 11, 1.5
"""Pixels of a side, and the standard deviation in pixels, of SSIM's Gaussian window."""
C1, C2 = 0.01**2, 0.03**2
"""(K L)² with K1 and K2 of the paper and a data range L of 1."""


def mean_squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """MSE = mean of (x - x')² over an image's channels and pixels; 0 (equal) to 1.

    Good for: how much is lost at all; it is the Gaussian likelihood's distortion up to a factor and a constant.
    Misleads: a mean over plausible images beats each of them; a shift by one pixel costs more than blur.
    """
    return (x.double() - reconstruction.double()).square().flatten(1).mean(1)


def peak_signal_to_noise(x: Tensor, reconstruction: Tensor) -> Tensor:
    """PSNR = -10 log10(MSE) in dB, with a data range of 1; 0 to `MOST_DECIBELS`, which equal images have, not infinity.

    Its mean over images is not the PSNR of the mean MSE: it weighs relative improvements, of good images too.

    Good for: comparison with the literature of compression and restoration. Misleads: as MSE does; and a few images
    that are nearly exact, as empty ones are, lift the mean.
    """
    return -10 * mean_squared_error(x, reconstruction).clamp(min=10 ** (-MOST_DECIBELS / 10)).log10()


def structural_similarity(x: Tensor, reconstruction: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, IEEE TIP 13:600, eq. 13): the mean of a map over channels and positions; -1 to 1 (equal).

    At each position of the Gaussian window of `WINDOW` pixels that lies wholly inside of the image (as in the authors'
    program; without its later subsampling of large images), with the window's weighted means m, variances s² and
    covariance s_xy: (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x² + m_y² + C1)(s_x² + s_y² + C2)). Of images with a side below
    11 pixels the window is the largest odd square that fits, with the same sigma and weights that sum to one: their
    numbers are comparable with each other only.

    Good for: whether edges and texture are there, which MSE hardly sees. Misleads: where both images are flat it is 1
    (a black border counts as a success) and where one of them is nearly so it is all or nothing; binary images.
    """
    size = min(WINDOW, *(side - 1 + side % 2 for side in x.shape[2:]))
    rows, columns = (_window_means(side, size).to(x.device) for side in x.shape[2:])

    def mean(image: Tensor) -> Tensor:  # the window is a product of two: (N, C, H, W) -> (N, C, H', W')
        return rows @ (image @ columns.T)

    x, y = x.double(), reconstruction.double()
    m_x, m_y = mean(x), mean(y)
    product, squares = m_x * m_y, m_x.square() + m_y.square()
    covariance, variances = mean(x * y) - product, mean(x.square() + y.square()) - squares
    luminance = (2 * product + C1) / (squares + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).flatten(1).mean(1)


def _window_means(side: int, size: int) -> Tensor:
    """The matrix `(side - size + 1, side)` whose rows hold the Gaussian window at each position along a side."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.softmax(-0.5 * (offsets / SIGMA).square(), 0)
    return torch.stack([F.pad(weights, (start, side - size - start)) for start in range(side - size + 1)])
