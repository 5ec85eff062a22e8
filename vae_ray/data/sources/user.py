"""Images from a user's own function."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vae_ray.config import user_code
from vae_ray.config.sections.data import UserData
from vae_ray.data.decoding import ImageRules
from vae_ray.data.rows import Part, Rows
from vae_ray.data.shards import SPLITS
from vae_ray.data.sources.decoded import Decoded, rows_of
from vae_ray.errors import UserError
from vae_ray.storage.reading import short_repr

logger = logging.getLogger(__name__)


class UserSource:
    """A user's own function of its settings.

    It returns the images, as an array or tensor, or yields them in blocks; or a dict of such by split: "train", "test"
    and perhaps "val". Images are uint8 `(N, C, H, W)`; a block `(images, labels)` has a whole number for each image, or
    a dict of numbers by name. The function is called again when its file or its settings change.
    """

    in_process = True
    num_images: int | None = None
    names: dict[str, list[str]] = {}  # noqa: RUF012 (of no instance's own)

    def __init__(self, config: UserData) -> None:
        self.path, self.settings = config.source, config.settings
        function = user_code.load(config.source, key="data.source")
        self.version = f"{config.source};{sorted(config.settings.items())};{user_code.digest(function)}"

    def describe(self) -> str:
        return self.path

    def fingerprint(self) -> str:
        return self.version

    def native_shape(self) -> tuple[int, int, int] | None:
        return None

    def parts(self, num_rows: int) -> Iterator[Part]:
        made = user_code.call(self.path, self.settings, key="data.source")
        by_split: dict[str | None, Any] = {None: made}
        if isinstance(made, Mapping):
            if not {"train", "test"} <= made.keys() <= set(SPLITS):
                raise UserError(
                    f"data.source: {self.path} returned a dict with the keys {short_repr(list(made))}, should have "
                    "'train', 'test' and perhaps 'val'"
                )
            by_split = {split: made[split] for split in SPLITS if split in made}
        for split, images in by_split.items():
            for pixels, columns in self._joined(split, images, num_rows):
                for start in range(0, len(pixels), num_rows):
                    rows = slice(start, start + num_rows)
                    block = pixels[rows], {name: values[rows] for name, values in columns.items()}
                    yield Part(split, len(block[0]), block)

    def read(self, part: Part, rules: ImageRules) -> Rows:
        return rows_of(*part.payload)

    def _joined(self, split: str | None, images: Any, num_rows: int) -> Iterator[Decoded]:
        """The blocks, small ones joined to at least `num_rows`."""
        waiting: list[Decoded] = []
        first: Decoded | None = None
        for block in self._blocks(split, images):
            first = block if first is None else first
            if block[0].shape[1:] != first[0].shape[1:]:
                shapes = " and ".join(str(each[0].shape[1:]) for each in (first, block))
                raise UserError(f"data.source: {self.path} gave images of shape {shapes}; should be of one shape")
            if block[1].keys() != first[1].keys():
                raise UserError(f"data.source: {self.path} gave labels for some images only, should be for all or none")
            waiting.append(block)
            if sum(len(pixels) for pixels, _ in waiting) >= num_rows:
                yield _concatenated(waiting)
                waiting = []
        if waiting:
            yield _concatenated(waiting)

    def _blocks(self, split: str | None, images: Any) -> Iterator[Decoded]:
        """What was returned or is yielded, checked."""
        if _is_block(images):
            yield self._checked(split, images)
            return
        if not isinstance(images, Iterable) or isinstance(images, str | bytes | Mapping):
            raise UserError(
                f"data.source: {self.path} returned a {type(images).__name__}, should return images, yield blocks of "
                "them, or return a dict with the keys 'train' and 'test'"
            )
        iterator, end = iter(images), object()
        while True:
            with user_code.errors_named(self.path, key="data.source"):
                block = next(iterator, end)
            if block is end:
                return
            yield self._checked(split, block)

    def _checked(self, split: str | None, block: Any) -> Decoded:
        from vae_ray.data.images import as_tensor  # torch, of which the user's function may return tensors

        images, labels = block if isinstance(block, tuple) and len(block) == 2 else (block, None)
        pixels = as_tensor(images, key=f"data.source: {self.path}")
        what = "" if split is None else f" for {split!r}"
        dtype = str(pixels.dtype).removeprefix("torch.")
        if dtype != "uint8" or pixels.ndim != 4 or not pixels.numel():
            raise UserError(
                f"data.source: {self.path} gave {dtype} of shape {tuple(pixels.shape)}{what}, should be uint8 of shape "
                "(N, C, H, W) with at least one image"
            )
        _, channels, height, width = pixels.shape
        if split in (None, "train") and channels > 4 and width in (1, 3, 4):
            logger.warning(
                "data.source: %s: images of shape %s are read as %d channels of %dx%d pixels; should be (channels, "
                "height, width)",
                *(self.path, tuple(pixels.shape[1:]), channels, height, width),
            )
        columns = labels if isinstance(labels, Mapping) else {} if labels is None else {"label": labels}
        named = {str(name): self._column(str(name), values, len(pixels), what) for name, values in columns.items()}
        return pixels.contiguous().cpu().numpy(), named

    def _column(self, name: str, values: Any, num: int, what: str) -> np.ndarray[Any, Any]:
        from vae_ray.data.images import as_tensor

        tensor = as_tensor(values, key=f"data.source: {name} of {self.path}")
        is_whole = not tensor.is_complex() and bool((tensor == tensor.long()).all())
        if tensor.shape != (num,) or (name == "label" and not is_whole):
            raise UserError(
                f"data.source: {self.path} gave labels of shape {tuple(tensor.shape)} for {num} images{what}, should "
                "be one whole number an image, or None"
            )
        return (tensor.long() if is_whole else tensor.double()).cpu().numpy()


def _is_block(images: Any) -> bool:
    """Whether it is images, or images and labels, and not an iterable of such."""
    first = images[0] if isinstance(images, tuple) and len(images) == 2 else images
    return hasattr(first, "shape") and hasattr(first, "dtype")


def _concatenated(blocks: list[Decoded]) -> Decoded:
    columns = {name: np.concatenate([each[name] for _, each in blocks]) for name in blocks[0][1]}
    return np.concatenate([pixels for pixels, _ in blocks]), columns
