"""Image files in a folder, or in an archive of it: flat, in class folders, or below train/, val/ and test/."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vae_ray.data.decoding import ImageRules, Unusable, decode_image
from vae_ray.data.rows import Part, Rows, Skipped
from vae_ray.data.sources.columns import SPLIT_WORDS
from vae_ray.data.sources.containers import OUTSIDE, Entry, open_container
from vae_ray.errors import UserError, one_line

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
}
HIDDEN = {"thumbs.db", "desktop.ini", "__macosx"}
NUM_KINDS = 5
"""Of files, that a description names."""


class Item(NamedTuple):
    """An image file."""

    entry: Entry
    split: str | None
    label: int
    """Of its class folder; -1 where there are none."""


class Folder:
    """Images of a folder of this machine, of a .zip or .tar, or of a folder at a URI."""

    in_process = False

    def __init__(self, location: str) -> None:
        self.location = location
        self._container = open_container(location)
        self._read_listing()

    def __getstate__(self) -> dict[str, object]:
        """Without the listing: a part has its own files."""
        return {**self.__dict__, "items": []}

    def _read_listing(self) -> None:
        entries, directories = self._container.entries()
        images, self.ignored = _images_among(entries, directories)
        if not images:
            found = ", ".join(f"{num} {what}" for what, num in self.ignored.most_common(5)) or "nothing"
            raise UserError(
                f"data.root: {self.location} has no images, it has {found}; should have .jpg, .png, .tif or the like"
            )
        self.items, classes, self.warnings = _arranged(images, directories, location=self.location)
        self.num_images: int | None = len(self.items)
        self.names = {"label": classes} if classes else {}
        self._description = self._described()

    def _described(self) -> str:
        suffixes = Counter(os.path.splitext(item.entry.name)[1].lower() for item in self.items)
        kinds = ", ".join(f"{num:,} {suffix}" for suffix, num in suffixes.most_common(NUM_KINDS))
        classes = f" in {len(self.names['label'])} classes" if self.names else ""
        most = self.ignored.most_common(NUM_KINDS)
        ignored = ", ".join(f"{num:,} {what}" for what, num in most)
        num_others = sum(self.ignored.values()) - sum(num for _, num in most)
        others = f" and {num_others:,} others" if num_others else ""
        name = os.path.basename(self.location.rstrip("/")) or self.location
        what = f"{self._container.kind} of {kinds}{classes}{f'; ignored {ignored}{others}' if ignored else ''}"
        return one_line(f"{name} ({what})")

    def describe(self) -> str:
        return self._description

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for entry, split, label in self.items:
            line = f"{entry.name}\0{entry.num_bytes}\0{entry.version}\0{split}\0{label}\n"
            digest.update(line.encode(errors="surrogatepass"))
        return digest.hexdigest()

    @functools.cached_property
    def _first(self) -> tuple[int, int, int] | None:
        for item in [item for item in self.items[:20] if not item.entry.fault]:
            for content in self._container.read_all([item.entry]):
                if isinstance(content, bytes):
                    try:
                        channels, height, width = decode_image(content, ImageRules()).shape
                    except Unusable:
                        continue
                    return channels, height, width
        return None

    def native_shape(self) -> tuple[int, int, int] | None:
        return self._first

    def parts(self, num_rows: int) -> Iterator[Part]:
        start = 0
        while start < len(self.items):
            split = self.items[start].split
            chosen = [item for item in self.items[start : start + num_rows] if item.split == split]
            yield Part(split, len(chosen), chosen)
            start += len(chosen)

    def read(self, part: Part, rules: ImageRules) -> Rows:
        images, labels, skipped = [], [], []
        readable = [item for item in part.payload if not item.entry.fault]
        contents = self._container.read_all([item.entry for item in readable])
        for entry, _, label in part.payload:
            try:
                if entry.fault:
                    raise Unusable(entry.fault)
                content = next(contents)
                if isinstance(content, OSError):
                    raise Unusable(f"cannot be read ({content.strerror or one_line(content)[:120]})")
                images.append(decode_image(content, rules))
                labels.append(label)
            except Unusable as error:
                skipped.append(Skipped(entry.name, str(error)))
        columns = {"label": np.array(labels, np.int64)} if self.names else {}
        return Rows(images, columns, skipped, Counter())


def _images_among(entries: list[Entry], directories: list[str]) -> tuple[list[Entry], Counter[str]]:
    """The image files, in the order of their paths, and how many others there are, by what they are."""
    images, ignored = [], Counter[str]()
    hidden = {above for path in directories if (above := _hidden_folder(path)) not in ("", OUTSIDE)}
    for entry in entries:
        *folders, name = entry.name.split("/")
        suffix = os.path.splitext(name)[1].lower()
        if folders[:1] == [OUTSIDE]:
            ignored["outside of the archive"] += 1
        elif above := _hidden_folder("/".join(folders)):
            hidden.add(above)
        elif _is_hidden(name):
            ignored["hidden"] += 1
        elif suffix not in SUFFIXES:
            ignored[suffix if 1 < len(suffix) < 9 and suffix.isascii() else "without a suffix"] += 1
        else:
            images.append(entry)
    ignored += Counter({"hidden": len(hidden)})  # each once, whatever it holds
    return sorted(images, key=lambda entry: entry.name.split("/")), ignored


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def _hidden_folder(path: str) -> str:
    """The first hidden folder of a path, from its beginning; empty if there is none."""
    parts = path.split("/")
    return next(("/".join(parts[: index + 1]) for index, part in enumerate(parts) if _is_hidden(part)), "")


def _arranged(images: list[Entry], directories: list[str], *, location: str) -> tuple[list[Item], list[str], list[str]]:
    """The images with split and label, split by split; the names of the classes; what a user should know of them."""
    paths = [entry.name.split("/") for entry in images]
    depth = 0  # of directories that hold everything, such as the only one inside an archive
    while len({path[depth] for path in paths}) == 1 and min(map(len, paths)) > depth + 1:
        depth += 1
    tops = {path[depth] for path in paths if len(path) > depth + 1}
    is_flat = any(len(path) == depth + 1 for path in paths)
    splits = {top for top in tops if top.lower() in SPLIT_WORDS}
    if len({SPLIT_WORDS[top.lower()] for top in splits}) < 2:
        splits = set()
    if splits and (is_flat or tops - splits):
        other = "files" if is_flat else f"{sorted(tops - splits)[0]}/"
        raise UserError(
            f"data.root: {location} has images in {', '.join(f'{top}/' for top in sorted(splits))} and beside them in "
            f"{other}; move these into one of the splits, or out"
        )
    class_at = depth + bool(splits)
    outside = sum(len(path) == class_at + 1 for path in paths)
    names = sorted({path[class_at] for path in paths}) if not outside else []
    codes = {name: code for code, name in enumerate(names)}
    items = [
        Item(entry, SPLIT_WORDS[path[depth].lower()] if splits else None, codes.get(path[class_at], -1))
        for entry, path in zip(images, paths, strict=True)
    ]
    order = {"train": 0, "val": 1, "test": 2, None: 0}
    items.sort(key=lambda item: order[item.split])  # stable: by name inside a split
    warnings = []
    if 0 < outside < len(paths):
        warnings.append(
            f"{outside:,} of {len(paths):,} images lie beside folders, which are thus not taken for classes"
        )
    if names:
        above = ["/".join([*paths[0][:depth], top]) for top in splits] or ["/".join(paths[0][:depth])]
        used = {"/".join(path[: class_at + 1]) for path in paths}
        empty = [path for path in directories if path.rpartition("/")[0] in above and not _hidden_folder(path)]
        warnings += [f"the class folder {one_line(path)}/ has no images" for path in sorted({*empty} - used)]
    return items, names, warnings
