"""Codes of all images of a data set, as Parquet: a directory of parts, or one file that is joined of them.

splits -> pieces, which any worker encodes -> parts, one file each -> the file. A part is written when all its pieces
are there, under a name that depends on the images alone; so a process that was killed continues with the parts that
are missing. In memory are the images of one piece a worker, and the codes of the parts that are not yet whole: as
workers take the pieces in order, at most one part more than there are workers.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.data.batches import Loader
from vae_ray.errors import CorruptFile, UserError, one_line
from vae_ray.evaluation import observations
from vae_ray.evaluation.observations import (
    Arrays,
    EvaluationBatch,
    Observation,
    Observer,
    Piece,
    Progress,
    Run,
    joined,
    observe,
    observed,
    pieces,
)
from vae_ray.models.latents import DiagonalGaussian
from vae_ray.models.traversal import join_groups
from vae_ray.models.vae import VAE
from vae_ray.storage.directory import Directory, LocalDirectory, open_directory
from vae_ray.storage.locations import absolute, join_location, split_location
from vae_ray.storage.records import verify, with_checksum

MOST_ROWS = 8192
"""Of a part."""
PART_BYTES = 32 << 20
"""Parts of long codes have fewer rows."""
MANIFEST = "_manifest.json"
"""What the parts are codes of. Readers of a directory of Parquet files leave out names that begin with `_`."""
METADATA = b"vae_ray"
"""The key of the same in a file's own metadata."""
OWN_COLUMNS = ("split", "number", "code", "logvar", "z", "rate")


def mean(batch: EvaluationBatch) -> dict[str, Tensor]:
    """`code`: posterior means, as `TrainedVAE.encode` gives them."""
    return {"code": observations.codes(batch)["codes"]}


def sample(batch: EvaluationBatch) -> dict[str, Tensor]:
    """`code`: one z ~ q(z|x), of all groups side by side, by the noise of evaluation."""
    return {"code": join_groups(tuple(group.z for group in batch.output.groups))}


def everything(batch: EvaluationBatch) -> dict[str, Tensor]:
    """`code`, the posterior mean; `logvar` of the top group; `z`, the sample; `rate` of it in nats."""
    posterior = batch.output.groups[0].posterior
    if not isinstance(posterior, DiagonalGaussian):
        raise UserError(f"what: got 'all', but {type(posterior).__name__} has no log variance; use mean or sample")
    z = sample(batch)["code"]
    return {**mean(batch), "logvar": posterior.logvar.flatten(1), "z": z, "rate": batch.output.rate()}


WHAT: dict[str, Observer] = {"mean": mean, "sample": sample, "all": everything}


class Codes(NamedTuple):
    """What was written."""

    out: str
    """Path or URI."""
    num_images: dict[str, int]
    """By split."""
    columns: list[str]
    num_found: int
    """Images whose codes an earlier call has left there."""


class Part(NamedTuple):
    """The rows of one file."""

    number: int
    split: str
    rows: Sequence[slice]
    """Of its pieces."""

    @property
    def name(self) -> str:
        """Sorted by name, parts are in the order of their images."""
        return f"part-{self.number:05d}.parquet"

    @property
    def num_images(self) -> int:
        return self.rows[-1].stop - self.rows[0].start


def write_codes(
    model: VAE,
    experiment: Experiment,
    loaders: Mapping[str, Loader],
    out: str,
    *,
    what: str,
    weights: str,
    run: Run,
    progress: Progress,
) -> Codes:
    """Write the codes of all images of the loaders, in their order; continue if a part of them is there.

    Args:
        model: in evaluation mode.
        experiment: of the loaders, as workers open them.
        loaders: by split.
        out: a directory of parts, or a file if it ends in `.parquet`; a path or URI.
        what: a key of `WHAT`.
        weights: SHA-256 of the model's weights.
        run: who encodes.
        progress: called with the number of images so far, and of all.

    Raises:
        UserError: there are codes of something else, or other files; or nothing can be written there.
    """
    location = absolute(out, key="--out")
    above, name = split_location(location)
    is_file = name.endswith(".parquet")
    folder = f"{name}.parts" if is_file else name
    size, precision = experiment.training.evaluation_batch_size, experiment.training.precision
    first, *_ = loaders.values()
    one = observe(model, first, slice(0, 1), [WHAT[what]], precision=precision)
    num_pieces = max(1, min(MOST_ROWS, PART_BYTES // sum(array[0].nbytes for array in one.values())) // size)
    parts = list(_parts(loaders, size, num_pieces))
    manifest = {
        "weights": weights,
        "images": {split: fingerprint(loader) for split, loader in loaders.items()},
        "what": what,
        "seed": experiment.run.seed,
        "data.binarize": experiment.data.binarize,
        "training.precision": precision,
        "rows of a piece and a part": [size, size * num_pieces],
        "label_names": first.split.names,
    }
    written = Codes(
        location,
        {split: len(loader.indices) for split, loader in loaders.items()},
        ["split", "number", *map(_column, _labels(loaders)), *one],
        num_found=0,
    )
    try:
        place = open_directory(above, key="--out")
        directory = open_directory(join_location(above, folder), key="--out")
        if is_file and _is_complete(place, name, manifest, location):
            place.delete_directory(folder)
            return written._replace(num_found=sum(written.num_images.values()))
        present = _present(directory, manifest, location)
        missing = [part for part in parts if part.name not in present]
        num_found = sum(part.num_images for part in parts) - sum(part.num_images for part in missing)

        def report(num_done: int, num_images: int) -> None:
            progress(num_found + num_done, num_found + num_images)

        for part, arrays in _encoded(model, experiment, loaders, missing, what=what, run=run, progress=report):
            directory.write(part.name, _parquet(part, arrays, loaders, manifest))
        if is_file:
            _join(parts, directory, place, name)
            place.delete_directory(folder)
    except OSError as error:
        raise UserError(f"--out: {location} cannot be written ({error.strerror or one_line(error)[:200]})") from None
    return written._replace(num_found=num_found)


def fingerprint(loader: Loader) -> str:
    """SHA-256 of the images and labels of a loader, in order."""
    digest, split = hashlib.sha256(), loader.split
    for name, values in {"": split.digests, **split.columns}.items():
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(values[loader.indices].numpy()).tobytes())
    return digest.hexdigest()


def images_digest(loader: Loader) -> str:
    """SHA-256 of the images of a loader, in order."""
    return hashlib.sha256(loader.split.digests[loader.indices].numpy().tobytes()).hexdigest()


def _parts(loaders: Mapping[str, Loader], size: int, num_pieces: int) -> Iterator[Part]:
    number = 0
    for split, loader in loaders.items():
        rows = pieces(len(loader.indices), size)
        for start in range(0, len(rows), num_pieces):
            yield Part(number, split, rows[start : start + num_pieces])
            number += 1


def _encoded(
    model: VAE,
    experiment: Experiment,
    loaders: Mapping[str, Loader],
    parts: Sequence[Part],
    *,
    what: str,
    run: Run,
    progress: Progress,
) -> Iterator[tuple[Part, Arrays]]:
    """Each part with its arrays, as soon as all its pieces are there."""
    if not parts:
        return
    places = [(part, place) for part in parts for place in range(len(part.rows))]
    given = [Piece(part.split, part.rows[place]) for part, place in places]
    waiting: dict[int, dict[int, Arrays]] = {}
    whole = Observation(experiment, model, loaders, given, {split: [WHAT[what]] for split in loaders})
    for number, arrays in observed(whole, run, progress):
        part, place = places[number]
        waiting.setdefault(part.number, {})[place] = arrays
        if len(waiting[part.number]) == len(part.rows):
            found = waiting.pop(part.number)
            yield part, joined([found[place] for place in sorted(found)])


def _parquet(part: Part, arrays: Arrays, loaders: Mapping[str, Loader], manifest: Mapping[str, Any]) -> bytes:
    """The file of a part: one row group."""
    rows = slice(part.rows[0].start, part.rows[-1].stop)
    loader = loaders[part.split]
    labels = loader.labels(loader.indices[rows])
    columns: dict[str, Any] = {
        "split": pa.array([part.split] * part.num_images),
        "number": pa.array(np.arange(rows.start, rows.stop)),
        **{_column(name): pa.array(labels[name].numpy()) for name in _labels(loaders)},
        **{name: _floats(values) for name, values in arrays.items()},
    }
    table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(manifest, sort_keys=True)})
    sink = io.BytesIO()
    with _writer(sink, table.schema) as writer:
        writer.write_table(table, row_group_size=len(table))
    return sink.getvalue()


def _floats(values: np.ndarray[Any, Any]) -> pa.Array:
    """float32 numbers, or lists of fixed length."""
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _labels(loaders: Mapping[str, Loader]) -> list[str]:
    """The labels and factors that the images of all splits have."""
    first, *others = (loader.split.columns for loader in loaders.values())
    return [name for name in first if all(name in columns for columns in others)]


def _column(label: str) -> str:
    return f"data_{label}" if label in OWN_COLUMNS else label


def _writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    # random digits have no values in common
    return pq.ParquetWriter(sink, schema, use_dictionary=["split"])


def _is_complete(place: Directory, name: str, manifest: Mapping[str, Any], location: str) -> bool:
    """Whether the file is there; raises `UserError` for another one of that name."""
    if (file := place.open(name)) is None:
        return False
    try:
        with file:
            metadata = pq.read_schema(file).metadata or {}
        _check_same(json.loads(metadata[METADATA]), manifest, location)
    except (pa.ArrowException, KeyError, ValueError):
        raise UserError(f"--out: {location} is a file that encode has not written; choose another name") from None
    return True


def _present(directory: Directory, manifest: Mapping[str, Any], location: str) -> set[str]:
    """The parts that are there; makes the directory one of these codes.

    Raises `UserError` if it is one of others, or of something else.
    """
    content = directory.read(MANIFEST)
    names = {name for name in directory.list() if not name.startswith(".partial-")}
    if content is not None:
        try:
            _check_same(verify(json.loads(content)), manifest, location)
        except ValueError:
            raise CorruptFile(
                f"--out: {location} has a damaged {MANIFEST}; delete it, or choose another name"
            ) from None
        return names
    if names:
        raise UserError(f"--out: {location} has other files, {sorted(names)[0]!r} is one; choose a new directory")
    directory.write(MANIFEST, json.dumps(with_checksum(manifest), indent=1).encode())
    return set()


def _check_same(stored: Mapping[str, Any], manifest: Mapping[str, Any], location: str) -> None:
    """Raise `UserError` that names the first difference."""
    plain = json.loads(json.dumps(manifest))
    for key in {**plain, **stored}:
        if stored.get(key) != plain.get(key):
            raise UserError(
                f"--out: {location} has codes that differ from these in {key}; delete it, or choose another name"
            )


def _join(parts: Sequence[Part], directory: Directory, place: Directory, name: str) -> None:
    """Write one file of all parts; never holds more than two of them."""
    tables = _tables(parts, directory)
    first = next(tables)
    folder = place.path if isinstance(place, LocalDirectory) else None
    with tempfile.TemporaryFile(dir=folder) as file:
        with _writer(file, first.schema) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table, row_group_size=len(table))
        file.seek(0)
        place.write(name, file)


def _tables(parts: Sequence[Part], directory: Directory) -> Iterator[pa.Table]:
    for part in parts:
        try:
            table = pq.read_table(io.BytesIO(directory.read(part.name) or b""))
            if len(table) != part.num_images:
                raise ValueError(f"{len(table)} rows, should be {part.num_images}")
        except (pa.ArrowException, ValueError) as error:
            reason = one_line(error)[:200]
            raise CorruptFile(f"{part.name}: damaged ({reason}); delete it and run the same command again") from None
        yield table
