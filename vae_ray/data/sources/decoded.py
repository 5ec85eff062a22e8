"""Sources whose files hold pixels already: all images of a split are read at once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules
from vae_ray.data.rows import Columns, Part, Rows

Decoded = tuple[NDArray[np.uint8], Columns]
"""uint8 `(N, C, H, W)` and labels of the images."""


class DecodedSource:
    """A source that loads uint8 images `(N, C, H, W)` and their labels split by split."""

    in_process = True
    num_images: int | None = None
    names: dict[str, list[str]] = {}  # noqa: RUF012 (of no instance's own)
    splits: tuple[str, ...] = ("train", "test")

    def load(self, split: str) -> Decoded:
        """All images of a split; raises `UserError` for a damaged file."""
        raise NotImplementedError

    @functools.cached_property
    def _loaded(self) -> Mapping[str, Decoded]:
        return {split: self.load(split) for split in self.splits}

    def native_shape(self) -> tuple[int, int, int] | None:
        pixels, _ = self._loaded[self.splits[0]]
        return pixels.shape[1], pixels.shape[2], pixels.shape[3]

    def parts(self, num_rows: int) -> Iterator[Part]:
        for split, (pixels, _) in self._loaded.items():
            for start in range(0, len(pixels), num_rows):
                yield Part(split, min(num_rows, len(pixels) - start), start)

    def read(self, part: Part, rules: ImageRules) -> Rows:
        pixels, columns = self._loaded[str(part.split)]
        return rows_of(
            pixels[part.payload :][: part.num], {k: v[part.payload :][: part.num] for k, v in columns.items()}
        )


def rows_of(pixels: NDArray[np.uint8], columns: Mapping[str, NDArray[Any]]) -> Rows:
    """Decoded rows as they are."""
    return Rows(list(pixels), dict(columns), [], Counter())
