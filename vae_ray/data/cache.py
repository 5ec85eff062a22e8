"""The node's cache of prepared data sets: each is decoded once, by the first process that needs it, under a lock.

CACHE/
    digits-0123456789abcdef/    a prepared data set (`shards.py`), or the parts of one that was interrupted
    fetched-0123456789abcdef/   files of a prepared data set at a URI
    verified/                   notes of what was verified on this node
    datasets/                   raw files that were downloaded
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from vae_ray.config.experiment import Experiment
from vae_ray.config.sections.data import DataConfig, ImagesData, PreparedData, UserData
from vae_ray.data.dataset import Dataset, open_local, open_remote
from vae_ray.data.preparation import PartRecord, Plan, Task, delete_leftovers, prepare, too_many_skipped
from vae_ray.data.processes import run_tasks
from vae_ray.data.shards import DATASET_FILE
from vae_ray.data.sources import build_source, plan_of
from vae_ray.errors import CorruptFile, UserError
from vae_ray.machine import num_local_cpus
from vae_ray.storage.directory import LocalDirectory
from vae_ray.storage.locations import cache_root, is_uri, local_path
from vae_ray.storage.retry import describe_os_error

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with the images done and, where it is known, the number of all."""
PATIENCE_SECONDS = 5.0
"""A process that waits so long for another one's preparation says so."""
VERIFIED = "verified"
SUBDIRECTORY = re.compile(r"[\w.-]+-[0-9a-f]{16}")
OLD_FILE = re.compile(r"[\w.-]+-(train|test)-[0-9a-f]{16}\.(arrow|json)|[\w.-]+\.lock")
"""What earlier versions wrote."""


def cache_directory(config: DataConfig | UserData) -> Path:
    """Where prepared images lie: `data.cache_dir`, else `$VAE_RAY_CACHE`, else `~/.cache/vae_ray`."""
    return local_path(config.cache_dir, key="data.cache_dir") if config.cache_dir else cache_root()


def open_dataset(config: DataConfig | UserData, *, progress: Progress | None = None) -> Dataset:
    """The data set of an experiment's section `data`, prepared first if this node has not done so yet.

    Raises `UserError` if raw files are missing, damaged or unusable, or if the cache cannot be written. A corrupt file
    of the cache is named in a warning and the images are prepared again.
    """
    cache = cache_directory(config)
    if isinstance(config, PreparedData | ImagesData) and (prepared := _open_prepared(config, cache)) is not None:
        return prepared
    try:
        cache.mkdir(parents=True, exist_ok=True)
        plan = plan_of(config, build_source(config, cache))
        directory = cache / f"{name_of(config)}-{plan.key[:16]}"
        with _held(directory):
            dataset = _open_intact(directory, plan, cache)
            if dataset is None:
                prepare(plan, str(directory), run=run_here, progress=progress)
                dataset = open_local(directory, verified=cache / VERIFIED)
                assert dataset is not None
            os.utime(directory)  # when it was last used
            _check_skipped(dataset, plan)
    except OSError as error:
        raise UserError(
            f"data.cache_dir {cache}: cannot be used ({describe_os_error(error)}); try --data.cache-dir DIR"
        ) from None
    return dataset


def name_of(config: DataConfig | UserData) -> str:
    """The source's name as a part of a file's name: of a user's own images that of their folder or file."""
    text = config.source  # type: ignore[union-attr]
    if isinstance(config, ImagesData | PreparedData) and config.root is not None:
        text = config.root.rstrip("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^A-Za-z0-9.-]", "-", text).strip("-.")[:40] or "images"


def run_here(tasks: Iterator[Task]) -> Iterator[PartRecord]:
    """Run the tasks of a preparation on all cores of this machine."""
    return run_tasks(tasks, num_processes=num_local_cpus())


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold the lock of a prepared data set for the body; waits for another process that prepares it."""
    lock, is_told = filelock.FileLock(_lock_file(directory)), False
    while True:
        try:
            lock.acquire(timeout=PATIENCE_SECONDS)
            break
        except filelock.Timeout:
            if not is_told:
                logger.warning("%s: another process prepares these images; waiting for it", directory)
            is_told = True
    try:
        yield
    finally:
        lock.release()


def _lock_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")  # a name such as photos.v2 has a suffix that is none


def _open_intact(directory: Path, plan: Plan, cache: Path) -> Dataset | None:
    """The data set in the cache; None, after a warning, if it is damaged, and without one if there is none."""
    try:
        dataset = open_local(directory, verified=cache / VERIFIED)
    except CorruptFile as error:
        logger.warning("%s; preparing the images again", error)
        shutil.rmtree(directory, ignore_errors=True)
        if directory.exists():
            raise UserError(f"{directory}: is damaged and cannot be deleted; remove it") from None
        return None
    if dataset is None or dataset.description.key != plan.key:
        return None
    delete_leftovers(dataset.description, LocalDirectory(directory))  # of a process that was killed at its end
    return dataset


def _check_skipped(dataset: Dataset, plan: Plan) -> None:
    """Raise `UserError` for a data set that was prepared while more skipped images were allowed."""
    num = dataset.description.num_skipped
    num_all = num + sum(map(len, dataset.splits.values()))
    if num > plan.max_skipped_fraction * num_all:
        raise too_many_skipped(num, num_all, plan.max_skipped_fraction, named=" (vae-ray data show names them)")


def _open_prepared(config: PreparedData | ImagesData, cache: Path) -> Dataset | None:
    """The prepared data set at `data.root`; None if there is something else and `data.source` allows it."""
    if config.root is None or config.source not in ("prepared", "auto"):
        if config.source == "prepared":
            raise UserError("data.root: is missing; should be a directory or URI that vae-ray data prepare has written")
        return None
    location = config.root if is_uri(config.root) else str(local_path(config.root, key="data.root"))
    try:
        if is_uri(location):
            limit = None if config.cache_limit is None else config.cache_limit * 2**30
            dataset = open_remote(location, cache=cache, limit_bytes=limit)
        else:
            dataset = open_local(Path(location), verified=cache / VERIFIED)
    except CorruptFile as error:
        raise CorruptFile(f"{error}; delete {config.root} and prepare the images again") from None
    except OSError as error:
        raise UserError(
            f"data.root: {location} cannot be read ({describe_os_error(error)}); make it readable"
        ) from None
    if dataset is None and config.source == "prepared":
        raise UserError(
            f"data.root: got {config.root!r}, which is no prepared data set, it has no {DATASET_FILE}; write one with "
            "vae-ray data prepare"
        )
    if dataset is not None and isinstance(config, ImagesData):
        _refuse_other_settings(config, dataset)
    return dataset


def _refuse_other_settings(config: ImagesData, dataset: Dataset) -> None:
    """Raise `UserError` for a key that would change the pixels of a data set that is prepared already.

    Values that are a default, or the preset's, were probably not asked for.
    """
    prepared = dataset.description.settings
    channels, height, width = dataset.description.image_shape
    side = height if height == width else None
    own: dict[str, list[Any]] = {"image_size": [[height, width], side], "channels": [channels]}
    unasked = [each.model_dump(mode="json") for each in (ImagesData(), Experiment.preset("images").data)]
    for name, value in config.model_dump(mode="json").items():
        allowed = [prepared.get(name, value), *own.get(name, ()), *(each[name] for each in unasked)]
        if value not in allowed:
            raise UserError(
                f"data.{name}: got {value!r}, but {config.root} was prepared with {prepared[name]!r}; prepare the "
                "images again, or leave it out"
            )


class CachedDataset(NamedTuple):
    """A data set in the cache, whole or interrupted."""

    path: Path
    num_bytes: int
    seconds_unused: float
    is_complete: bool


def cached_datasets(cache: Path) -> list[CachedDataset]:
    """All that the cache has of prepared images, the longest unused first; raises `UserError` for a file."""
    if cache.exists() and not cache.is_dir():
        raise UserError(f"data.cache_dir: {cache} is a file, should be a directory")
    found = []
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.is_dir() and SUBDIRECTORY.fullmatch(path.name):
            num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            unused = time.time() - path.stat().st_mtime
            found.append(CachedDataset(path, num_bytes, unused, (path / DATASET_FILE).exists()))
    return sorted(found, key=lambda each: -each.seconds_unused)


def clean(cache: Path, *, unused_seconds: float) -> list[CachedDataset]:
    """Delete what no process holds and was not used for so long, and interrupted preparations; returns what was."""
    deleted = []
    for dataset in cached_datasets(cache):
        if dataset.is_complete and dataset.seconds_unused < unused_seconds:
            continue
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(_lock_file(dataset.path), timeout=0):
            shutil.rmtree(dataset.path)
            deleted.append(dataset)
    for file in cache.iterdir() if cache.is_dir() else ():
        if not file.is_file() or not OLD_FILE.fullmatch(file.name):
            continue
        if file.suffix != ".lock":
            file.unlink(missing_ok=True)
        elif not file.with_suffix("").exists():
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(file, timeout=0):
                file.unlink(missing_ok=True)
    return deleted
