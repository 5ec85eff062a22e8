"""What a source of images is: rows of images with labels, read in parts.

The first stage of the data flow: source -> parts -> rows -> shards of a data set -> batches. A part is what one task
reads and decodes, in any process: this module and what decodes import no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules

Columns = dict[str, NDArray[Any]]
"""Labels and factors by name: int64 or float64 `(N,)`, one value a row."""


class Skipped(NamedTuple):
    """A file or row that cannot be used."""

    name: str
    reason: str


class Part(NamedTuple):
    """Rows that one task reads."""

    split: str | None
    """"train", "val" or "test" where the source says so; None: rows are assigned by their content."""
    num: int
    payload: Any
    """What the source needs to read them; can be pickled."""


class Rows(NamedTuple):
    """The decoded rows of a part, in order."""

    images: list[NDArray[np.uint8]]
    """Each `(C, H, W)`."""
    columns: Columns
    skipped: list[Skipped]
    notes: Counter[str]
    """How many images something harmless but unexpected was done to, by what it is: "first of several frames"."""


class Source(Protocol):
    """Where images come from; can be pickled unless `in_process`."""

    @property
    def in_process(self) -> bool:
        """Whether its parts are cheap to read, or cannot be sent to another process."""
        ...

    @property
    def num_images(self) -> int | None:
        """Before any is skipped; None if it is not known until all are read."""
        ...

    @property
    def names(self) -> dict[str, list[str]]:
        """Of the values 0, 1, ... of label columns, by column."""
        ...

    def describe(self) -> str:
        """What lies there, as in "a folder of 300 images in 3 classes"."""
        ...

    def fingerprint(self) -> str:
        """A string that changes when the raw data does; raises `UserError` where they are missing."""
        ...

    def native_shape(self) -> tuple[int, int, int] | None:
        """`(C, H, W)` of the first image, where it is known without reading all."""
        ...

    def parts(self, num_rows: int) -> Iterator[Part]:
        """All rows in the order of the data set, at most `num_rows` of one split a part."""
        ...

    def read(self, part: Part, rules: ImageRules) -> Rows:
        """The rows of a part, decoded by `rules`; raises `UserError` if none of the source can be read."""
        ...
