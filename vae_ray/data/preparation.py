"""Preparing a data set: the parts of a source are decoded, in parallel, into the shards of `shards.py`.

Each part becomes files of its own as soon as it is decoded, so that a preparation that was killed continues with the
parts that are missing. At the end small files are joined, and `dataset.json` makes the directory a data set. Imports no
torch: parts are decoded in processes that start quickly.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules
from vae_ray.data.pieces import fill_empty_split, is_whole, join_to_shards, read_piece, sum_of, write_file, write_piece
from vae_ray.data.rows import Part, Rows, Skipped, Source
from vae_ray.data.shards import (
    DATASET_FILE,
    FORMAT_VERSION,
    RESERVED,
    SKIPPED_FILE,
    SPLITS,
    SUMS_FILE,
    Description,
    File,
    Table,
    digests_of,
    fingerprint_of,
    is_test,
    rows_bytes,
    sums_bytes,
)
from vae_ray.errors import UserError
from vae_ray.storage.directory import Directory, LocalDirectory, open_directory
from vae_ray.storage.reading import short_repr
from vae_ray.storage.records import verify, with_checksum

MAX_SHARD_BYTES = 64 << 20
LARGE_SET_BYTES = 1 << 30
LARGE_SET_SHARD_BYTES = 16 << 20
"""Shards of a data set that is read in windows: a window of 256 MiB mixes 16 of them."""
NUM_PARTS = 64
"""Of a small data set: enough for many processes and for a steady progress."""
MIN_PART_ROWS = 32
PART_PREFIX = "part-"
LEFTOVER = re.compile(r"(\.partial-)?(part|train|val|test)-[0-9a-f]{5,8}(-.*)?\.(json|npz|arrow|arrow\.npz)")
"""Files of a preparation that has ended or is of something else."""
OURS = re.compile(rf"{LEFTOVER.pattern}|(train|val|test)\.rows|sums\.npz|skipped\.jsonl|\.(lock|partial-|driver-).*")
"""Files that an interrupted preparation may have left."""
DARK_LEVEL = 64
"""Images whose brightest pixel is darker are probably of fewer bits than their files say."""
NUM_NAMED = 5
"""Skipped files that a message names."""


@dataclass(frozen=True)
class Plan:
    """What is prepared, and how."""

    source: Source
    rules: ImageRules
    test_fraction: float
    """Where the source has no splits of its own."""
    max_skipped_fraction: float
    settings: dict[str, Any]
    """The keys of the section `data` that decide the pixels, for the description."""
    warnings: Sequence[str] = ()
    """What is wrong with the source as a whole."""

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of a part: a function of the source and the rules alone."""
        shape = self.source.native_shape() or (3, 64, 64)
        height, width = self.rules.size or shape[1:]
        largest = max(1, LARGE_SET_SHARD_BYTES // (shape[0] * height * width))
        wanted = -(-self.source.num_images // NUM_PARTS) if self.source.num_images else 1024
        return min(largest, max(MIN_PART_ROWS, wanted))

    def parts(self) -> Iterator[Part]:
        """The source's, with training images assigned by content where there are none to test with."""
        splits = set() if self.source.in_process else {part.split for part in self.source.parts(self.num_rows)}
        sets_aside = "train" in splits and "test" not in splits
        for part in self.source.parts(self.num_rows):
            yield part._replace(split=None) if sets_aside and part.split == "train" else part

    @property
    def source_key(self) -> str:
        """The key of the experiment that names the images, for messages."""
        return "data.root" if self.settings else "data.source"

    @functools.cached_property
    def key(self) -> str:
        """A hash of all that decides the content."""
        settings = sorted(self.settings.items())
        content = (FORMAT_VERSION, self.source.fingerprint(), repr(self.rules), self.test_fraction, settings)
        return hashlib.sha256(repr(content).encode()).hexdigest()


class PartRecord(NamedTuple):
    """What a decoded part has become: the content of its `part-00012.json`."""

    number: int
    files: dict[str, File]
    """By split."""
    num_channels: int
    sizes: dict[str, int]
    """Numbers of images by "HEIGHTxWIDTH"."""
    skipped: list[Skipped]
    notes: dict[str, int]
    num_by_content: int
    """Images that were assigned to a split by their content."""
    max_level: int
    """The brightest pixel."""

    @classmethod
    def from_json(cls, content: bytes) -> PartRecord:
        """Raises `ValueError` for what is not one."""
        plain = verify(json.loads(content))
        try:
            files = {split: File(*file) for split, file in plain.pop("files").items()}
            skipped = [Skipped(*each) for each in plain.pop("skipped")]
            return cls(files=files, skipped=skipped, **plain)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(str(error)) from None

    @property
    def num_rows(self) -> int:
        return sum(self.sizes.values()) + len(self.skipped)


class Task(NamedTuple):
    """The work on one part, in any process."""

    source: Source
    part: Part
    number: int
    rules: ImageRules
    test_fraction: float
    location: str
    key: str


class Runner(Protocol):
    """Runs tasks and yields their records as they are done."""

    def __call__(self, tasks: Iterator[Task]) -> Iterator[PartRecord]: ...


def run_task(task: Task) -> PartRecord:
    """Decode a part and write its files; its record is written last."""
    rows = task.source.read(task.part, task.rules)
    sizes = Counter(f"{image.shape[1]}x{image.shape[2]}" for image in rows.images)
    files: dict[str, File] = {}
    num_channels = num_by_content = max_level = 0
    directory = _directory(task.location)
    if len(sizes) == 1:
        table = _table(rows, source=task.source.describe())
        num_channels = table.pixels.shape[1]
        num_by_content = len(table.digests) if task.part.split is None else 0
        max_level = int(table.pixels.max())
        for split, mask in _assigned(table.digests, task.part.split, task.test_fraction).items():
            if mask.any():
                name = f"{split}-{task.key[:8]}-{task.number:06d}.arrow"
                piece = write_piece(name, table if mask.all() else table.select(mask), directory)
                files[split] = piece.file
    record = PartRecord(task.number, files, num_channels, sizes, rows.skipped, rows.notes, num_by_content, max_level)
    directory.write(_record_name(task), json.dumps(with_checksum(record._asdict())).encode())
    return record


def prepare(
    plan: Plan, location: str, *, run: Runner, progress: Callable[[int, int | None], None] | None = None
) -> Description:
    """Write the data set of `plan` to a directory or URI, which the caller holds alone; returns its description.

    `progress(images done, of all)` is called after each part. Raises `UserError` for images that cannot be used:
    nothing that was decoded is lost by that.
    """
    directory = open_directory(location, key="--out")
    records = _existing_records(plan, directory)
    num_done, num_skipped = sum(record.num_rows for record in records.values()), 0
    num_images = plan.source.num_images

    def tasks() -> Iterator[Task]:
        for index, part in enumerate(plan.parts()):
            if index not in records:
                yield Task(plan.source, part, index, plan.rules, plan.test_fraction, location, plan.key)

    for record in run(tasks()):
        records[record.number] = record
        num_done += record.num_rows
        num_skipped += len(record.skipped)
        if num_images and num_skipped > plan.max_skipped_fraction * num_images:
            break  # refused below
        if progress is not None:
            progress(num_done, num_images)
    ordered = [records[index] for index in sorted(records)]
    _refuse_unusable(plan, ordered)
    description = _join(plan, ordered, directory)
    if isinstance(directory, LocalDirectory):
        directory.sync(file.name for file in description.files)
    directory.write(DATASET_FILE, description.to_json())
    delete_leftovers(description, directory)
    return description


def delete_leftovers(description: Description, directory: Directory) -> None:
    """Delete the parts of a data set that is complete; whoever calls this holds it alone."""
    kept = {DATASET_FILE, *(file.name for file in description.files)}
    for name in directory.list().keys() - kept:
        if LEFTOVER.fullmatch(name):
            directory.delete(name)


@functools.lru_cache(maxsize=4)
def _directory(location: str) -> Directory:
    return open_directory(location, key="--out")


def _record_name(task: Task) -> str:
    return f"{PART_PREFIX}{task.key[:8]}-{task.number:06d}.json"


def _existing_records(plan: Plan, directory: Directory) -> dict[int, PartRecord]:
    """Parts that an earlier call has decoded."""
    records: dict[int, PartRecord] = {}
    if plan.source.in_process and plan.source.num_images is None:  # a user's generator starts from its beginning
        return records
    for name in sorted(directory.list()):
        if not name.startswith(f"{PART_PREFIX}{plan.key[:8]}-"):
            continue
        try:
            record = PartRecord.from_json(directory.read(name) or b"")
        except ValueError:
            continue
        if all(is_whole(file, directory) for file in record.files.values()):
            records[record.number] = record
    return records


def _table(rows: Rows, *, source: str) -> Table:
    """The rows with equal numbers of channels."""
    channels = {image.shape[0] for image in rows.images}
    if len(channels) > 1 and channels != {1, 3}:
        raise UserError(_of_several_channels(source, channels))
    if reserved := [name for name in rows.columns if name in RESERVED]:
        raise UserError(f"data.source: {source} has a column {reserved[0]!r}, which has another meaning; rename it")
    digests = digests_of(rows.images)
    images = rows.images
    if channels == {1, 3}:
        images = [image.repeat(3, axis=0) if image.shape[0] == 1 else image for image in images]
    return Table(np.stack(images), digests, rows.columns)


def _of_several_channels(source: str, channels: Iterable[int]) -> str:
    return (
        f"data.source: {source} has images of {' and '.join(map(str, sorted(channels)))} channels; should be of one "
        "number, or of 1 and 3"
    )


def _assigned(digests: NDArray[np.int64], split: str | None, fraction: float) -> dict[str, NDArray[np.bool_]]:
    """Masks of the rows of each split."""
    if split is not None:
        return {split: np.ones(len(digests), bool)}
    test = is_test(digests, fraction)
    return {"train": ~test, "test": test}


def _refuse_unusable(plan: Plan, records: list[PartRecord]) -> None:
    """Raise `UserError` unless there are images, enough of them usable, and all of one size."""
    source, skipped = plan.source, [each for record in records for each in record.skipped]
    num_read = sum(record.num_rows for record in records)
    num_all = max(num_read, plan.source.num_images or 0)
    sizes = _sizes(records)
    if skipped and len(skipped) == num_all:
        name, reason = skipped[0]
        raise UserError(
            f"data.root: none of the {num_all:,} images can be used; the first, {short_repr(name)}, {reason}"
        )
    if len(skipped) > plan.max_skipped_fraction * num_all:
        fewest = "at least " if num_read < num_all else ""
        raise too_many_skipped(len(skipped), num_all, plan.max_skipped_fraction, fewest, named=f": {_named(skipped)}")
    if not sizes:
        raise UserError(f"{plan.source_key}: {source.describe()} has no images")
    channels = sorted({record.num_channels for record in records if record.sizes} - {0})
    if len(channels) > 1 and channels != [1, 3]:
        raise UserError(_of_several_channels(source.describe(), channels))
    if len(sizes) > 1:
        counts = ", ".join(f"{size} ({num})" for size, num in sizes.most_common(NUM_NAMED))
        more = f" and {len(sizes) - NUM_NAMED} other sizes" if len(sizes) > NUM_NAMED else ""
        if not plan.settings:
            raise UserError(
                f"data.source: {source.describe()} has images of several sizes (height x width): {counts}{more}; "
                "should be of one size"
            )
        raise UserError(
            f"data.image_size: null keeps images as they are, but they have several sizes (height x width): {counts}"
            f"{more}; give one, for example --data.image-size 64"
        )
    if sum(sizes.values()) < 2:
        others = f"; {_named(skipped)}" if skipped else ""
        raise UserError(
            f"{plan.source_key}: {source.describe()} has one usable image; at least 2 are needed, one to test with"
            f"{others}"
        )


def too_many_skipped(num: int, num_all: int, allowed: float, fewest: str = "", *, named: str) -> UserError:
    """The error where more images cannot be used than `data.max_skipped_fraction` allows."""
    return UserError(
        f"data.root: {fewest}{num:,} of {num_all:,} images cannot be used{named}; mend or remove them, or allow more "
        f"with --data.max-skipped-fraction (now {allowed:g})"
    )


def _join(plan: Plan, records: list[PartRecord], directory: Directory) -> Description:
    """Join the files of the parts to shards of equal channels; the description of the result."""
    sizes = _sizes(records)
    height, width = map(int, next(iter(sizes)).split("x"))
    shape = (max(record.num_channels for record in records), height, width)
    num_bytes = int(np.prod(shape))
    is_large = sum(sizes.values()) * num_bytes > LARGE_SET_BYTES
    most_rows = max(1, (LARGE_SET_SHARD_BYTES if is_large else MAX_SHARD_BYTES) // num_bytes)
    pieces = {
        split: [read_piece(record.files[split], directory) for record in records if split in record.files]
        for split in SPLITS
    }
    if any(record.num_by_content for record in records):
        fill_empty_split(pieces, directory, key=plan.key)
    pieces = {split: of_split for split, of_split in pieces.items() if of_split}
    if missing := [split for split in ("train", "test") if split not in pieces]:
        raise UserError(
            f"{plan.source_key}: {plan.source.describe()} has {' and '.join(pieces)} images but no {missing[0]} "
            "images; should have both (data.num_validation sets validation images aside), or no splits"
        )
    digests = {split: np.concatenate([piece.digests for piece in of_split]) for split, of_split in pieces.items()}
    others = []
    for split, of_split in pieces.items():
        columns = {name: np.concatenate([piece.columns[name] for piece in of_split]) for name in of_split[0].columns}
        others.append(write_file(f"{split}.rows", rows_bytes(digests[split], columns).to_pybytes(), directory))
    sums = {split: sum_of(of_split, shape, directory) for split, of_split in pieces.items()}
    others.append(write_file(SUMS_FILE, sums_bytes(sums), directory))
    skipped = [each for record in records for each in record.skipped]
    if skipped:
        lines = "".join(json.dumps(each._asdict()) + "\n" for each in skipped)
        others.append(write_file(SKIPPED_FILE, lines.encode(), directory))
    notes = sum((Counter(record.notes) for record in records), Counter[str]())
    return Description(
        key=plan.key,
        source=plan.source.describe(),
        settings=plan.settings,
        image_shape=shape,
        shards={
            split: list(join_to_shards(split, of_split, directory, num_channels=shape[0], most_rows=most_rows))
            for split, of_split in pieces.items()
        },
        fingerprints={split: fingerprint_of(shape, values) for split, values in digests.items()},
        names=plan.source.names,
        others=others,
        num_skipped=len(skipped),
        warnings=[
            *plan.warnings,
            *_skipped_lines(skipped, num_all=sum(sizes.values()) + len(skipped)),
            *_duplicate_lines(digests),
            *_dark_lines(max(record.max_level for record in records)),
            *(f"{num} images: {what}" for what, num in notes.items()),
        ],
    )


def _sizes(records: list[PartRecord]) -> Counter[str]:
    return sum((Counter(record.sizes) for record in records), Counter())


def _skipped_lines(skipped: Sequence[Skipped], *, num_all: int) -> list[str]:
    if not skipped:
        return []
    return [f"{len(skipped)} of {num_all} images are skipped: {_named(skipped)}; all of them in {SKIPPED_FILE}"]


def _named(skipped: Sequence[Skipped]) -> str:
    """The first skipped files, with the reasons."""
    named = ", ".join(f"{short_repr(name)} {reason}" for name, reason in skipped[:NUM_NAMED])
    return named + (f" and {len(skipped) - NUM_NAMED} others" if len(skipped) > NUM_NAMED else "")


def _duplicate_lines(digests: dict[str, NDArray[np.int64]]) -> list[str]:
    num, num_test = int(np.isin(digests["test"], digests["train"]).sum()), len(digests["test"])
    what = f"{num} of the {num_test} test images are training images too, pixel by pixel: test metrics are too good"
    return [what] if num else []


def _dark_lines(max_level: int) -> list[str]:
    what = f"the brightest pixel of all images is {max_level} of 255; if their files hold fewer bits than they could"
    return (
        [f"{what}, give the values of black and white, as in --data.value-range 0,4095"]
        if max_level < DARK_LEVEL
        else []
    )
