"""A source of images that are given, for the preparation; imports no torch, as other processes import it too."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules
from vae_ray.data.rows import Part, Rows, Skipped

Images = Sequence[NDArray[np.uint8]]


class Numbered:
    """Images `(C, H, W)` with their numbers as labels; each reading of a part is written to `log`.

    Images in `unusable` are skipped; the parts from `fails_from` on cannot be read.
    """

    in_process = False
    names: dict[str, list[str]] = {"number": ["zero", "one"]}  # noqa: RUF012

    def __init__(
        self,
        images: Images,
        *,
        log: Path | None = None,
        splits: Sequence[str | None] | None = None,
        unusable: Sequence[int] = (),
        fails_from: int | None = None,
    ) -> None:
        self.images, self.log, self.unusable, self.fails_from = images, log, set(unusable), fails_from
        self.splits = [None] * len(images) if splits is None else splits
        self.num_images: int | None = len(images)

    def describe(self) -> str:
        return "numbered images"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.splits, sorted(self.unusable))).encode())
        for image in self.images:
            digest.update(repr(image.shape).encode() + image.tobytes())
        return digest.hexdigest()

    def native_shape(self) -> tuple[int, int, int] | None:
        channels, height, width = self.images[0].shape
        return channels, height, width

    def parts(self, num_rows: int) -> Iterator[Part]:
        start = 0
        while start < len(self.images):
            stop = start
            while stop < min(start + num_rows, len(self.images)) and self.splits[stop] == self.splits[start]:
                stop += 1
            yield Part(self.splits[start], stop - start, (start, stop))
            start = stop

    def read(self, part: Part, rules: ImageRules) -> Rows:
        start, stop = part.payload
        if self.fails_from is not None and start >= self.fails_from:
            raise RuntimeError(f"the disk ends at image {self.fails_from}")
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(f"{start}\n")
        usable = [number for number in range(start, stop) if number not in self.unusable]
        skipped = [
            Skipped(f"{number}.png", f"is bad by {number}") for number in sorted(self.unusable & {*range(start, stop)})
        ]
        columns = {"number": np.array(usable, np.int64), "half": np.array(usable) / 2}
        return Rows(
            [self.images[number] for number in usable], columns, skipped, Counter(even=sum(n % 2 == 0 for n in usable))
        )


def starts_read(log: Path) -> list[int]:
    """The first images of the parts that were read, sorted."""
    return sorted(map(int, log.read_text().split())) if log.exists() else []
