"""`prepare`: images become a data set that runs on any machine read, decoded once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from vae_ray.config.experiment import Experiment
from vae_ray.config.sections.data import DataConfig, ImagesData, PreparedData, UserData
from vae_ray.data import preparation
from vae_ray.data.cache import cache_directory, run_here
from vae_ray.data.preparation import Plan
from vae_ray.data.rows import Source
from vae_ray.data.shards import DATASET_FILE, Description
from vae_ray.data.sources import build_source, plan_of
from vae_ray.data.sources.memory import MemorySource
from vae_ray.errors import CorruptFile, UserError, one_line
from vae_ray.run_files.progress import preparation_view
from vae_ray.storage.directory import open_directory
from vae_ray.storage.filesystems import check_writable
from vae_ray.storage.lease import lease
from vae_ray.storage.locations import absolute, is_uri
from vae_ray.storage.reading import short_repr
from vae_ray.storage.remote import RemoteDirectory
from vae_ray.storage.retry import describe_os_error
from vae_ray.training.placement import uses_cluster


def prepare(
    root: str | Path | None = None,
    *,
    out: str | Path,
    images: Any = None,
    labels: Any = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Description:
    """Write a prepared data set, which `{"data.root": out}` trains on; inside a Ray cluster on all of its nodes.

    What was decoded before a kill is not decoded again, and nothing is done where the same was prepared already.

    Args:
        root: images as `data.root` takes them: a folder, an archive, arrays or Parquet files.
        out: a new directory, or a URI (s3://BUCKET/...).
        images: instead of `root` an array `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)`, or a dict of arrays by split:
            "train", "test" and perhaps "val".
        labels: of `images`: one number or text an image, or a dict of such by name (or by split).
        overrides: keys of the section data, as in `{"data.image_size": 32}`; unlike the preset images, image_size is
            null unless it is given.
        quiet: `False` shows progress on stderr.

    Raises:
        UserError: there are no images, they cannot be used, or `out` is something else.
    """
    if (root is None) == (images is None):
        raise UserError("prepare: got root and images, or neither; should be one of them")
    if not isinstance(out, str | Path) or not str(out).isprintable() or not str(out):
        raise UserError(f"out: got {short_repr(out)}, should be a new directory, or a URI such as s3://BUCKET/images")
    if not isinstance(overrides, Mapping | None) or not all(str(key).startswith("data.") for key in overrides or ()):
        raise UserError(
            f'overrides: got {short_repr(overrides)}, should be keys of data, as in {{"data.image_size": 32}}'
        )
    if images is not None and {"data.root", "data.source"} & {*(overrides or ())}:
        raise UserError("overrides: got data.root or data.source beside images; leave one of them out")
    given = {"data.source": "auto", **({} if root is None else {"data.root": str(root)}), **(overrides or {})}
    config = Experiment().with_overrides(given).data
    return prepare_data(config, out, source=None if images is None else MemorySource(images, labels), quiet=quiet)


def prepare_data(
    config: DataConfig | UserData, out: str | Path, *, source: Source | None = None, quiet: bool = True
) -> Description:
    """`prepare` for a section `data`; a `source` replaces the one that it names."""
    if source is None:
        _refuse_prepared(config)
        source = build_source(config, cache_directory(config))
    plan, location = plan_of(config, source), absolute(out, key="--out")
    try:
        if (existing := _existing(plan, location)) is not None:  # before a lock is written among a user's own files
            return existing
        check_writable(location, key="--out")
        with _held(location):
            if (existing := _existing(plan, location)) is not None:
                return existing
            with preparation_view(quiet=quiet) as progress:
                if not uses_cluster():
                    return preparation.prepare(plan, location, run=run_here, progress=progress)
                from vae_ray.distributed.preparation import prepare_on_cluster  # this machine alone needs no Ray

                return prepare_on_cluster(plan, location, progress=progress)
    except OSError as error:
        raise UserError(
            f"--out: {location} cannot be used ({describe_os_error(error)}); nothing that was decoded is lost: make "
            "room or access, and start again"
        ) from None


def _refuse_prepared(config: DataConfig | UserData) -> None:
    """Raise `UserError` if `data.root` is a prepared data set."""
    root = config.root if isinstance(config, ImagesData | PreparedData) else None
    if root is not None:
        with contextlib.suppress(OSError):  # what cannot be read is named by its source
            directory = open_directory(absolute(root, key="data.root"), key="data.root")
            if directory.read(DATASET_FILE) is not None:
                raise UserError(f"data.root: {root} is prepared already; train with --data.root {root}, or copy it")
    if isinstance(config, PreparedData):
        raise UserError(f"data.source: got 'prepared', but {root} has to be prepared first; leave it out")


@contextlib.contextmanager
def _held(location: str) -> Iterator[None]:
    """Hold the directory for the body; raises `UserError` if another process prepares there."""
    if is_uri(location):
        with lease(RemoteDirectory(location, key="--out"), name=location):
            yield
        return
    try:
        with filelock.FileLock(Path(location) / ".lock").acquire(blocking=False):
            yield
    except filelock.Timeout:
        raise UserError(f"--out: got {location!r}, where another process prepares images right now; wait") from None


def _existing(plan: Plan, location: str) -> Description | None:
    """The same data set, if it is there; raises `UserError` for anything else that is not an interrupted one."""
    directory = open_directory(location, key="--out")
    content = directory.read(DATASET_FILE)
    if content is not None:
        with contextlib.suppress(ValueError, CorruptFile):
            if (description := Description.from_json(content)).key == plan.key:
                return description
        raise UserError(f"--out: got {location!r}, which has another data set; choose a new directory, or delete it")
    ours = preparation.OURS
    if foreign := [name for name in sorted(_names_in(location)) if not ours.fullmatch(name)]:
        raise UserError(
            f"--out: got {location!r}, which has other files ({one_line(foreign[0])}, ...); choose a new directory"
        )
    return None


def _names_in(location: str) -> Iterable[str]:
    """What lies at a location: of a directory of this machine, which may be large, its own names alone."""
    if is_uri(location):
        return RemoteDirectory(location, key="--out").list()
    return os.listdir(location) if os.path.isdir(location) else ()
