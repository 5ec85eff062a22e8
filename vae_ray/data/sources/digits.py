"""The handwritten digits inside scikit-learn."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from vae_ray.data.sources.decoded import Decoded, DecodedSource


class Digits(DecodedSource):
    """The 1,797 handwritten digits of 8x8 pixels inside scikit-learn (UCI Optical Recognition, test part).

    They come without a split: every fifth image is test (359), the others are train (1,438).
    """

    def describe(self) -> str:
        return "digits"

    def fingerprint(self) -> str:
        return f"sklearn-{version('scikit-learn')}"  # without its import, which takes a second and a half

    def load(self, split: str) -> Decoded:
        from sklearn.datasets import load_digits

        digits = load_digits()
        is_test = np.arange(len(digits.target)) % 5 == 4
        is_wanted = is_test if split == "test" else ~is_test
        grey = np.rint(digits.images[is_wanted] * (255 / 16)).astype(np.uint8)  # levels 0..16
        return grey[:, None], {"label": digits.target[is_wanted].astype(np.int64)}
