"""One driver a name: the directory of a run or a sweep, held while it is driven, and made ready for another start."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from vae_ray.checkpoints.listing import all_checkpoints
from vae_ray.config.experiment import Experiment, differing_fields
from vae_ray.data.cache import name_of
from vae_ray.data.splits import Splits
from vae_ray.errors import CorruptFile, UserError
from vae_ray.run_files.run_directory import WRITER_LOCK_SECONDS, RunDirectory
from vae_ray.storage.filesystems import check_writable, missing_directories, removed_if_empty
from vae_ray.storage.lease import lease
from vae_ray.storage.locations import absolute, join_location
from vae_ray.storage.retry import describe_os_error
from vae_ray.storage.synced import SyncedDirectory


def run_location(experiment: Experiment) -> str:
    """The directory or URI of the (named) run."""
    return join_location(absolute(experiment.run.storage, key="run.storage"), str(experiment.run.name))


@contextlib.contextmanager
def open_run(experiment: Experiment, splits: Splits, *, resume: bool) -> Iterator[RunDirectory]:
    """The run's directory, held by this process alone; refused if the name is taken by something else."""
    check_writable(experiment.run.storage)
    run = RunDirectory.at(run_location(experiment), role="driver")

    def refuse_other_uses() -> None:
        _refuse_other_uses(run, experiment, splits, resume=resume)

    with exclusive_run(run, name=str(experiment.run.name), before=refuse_other_uses):
        yield run


@contextlib.contextmanager
def exclusive_run(directory: SyncedDirectory, *, name: str, before: Callable[[], None]) -> Iterator[None]:
    """Hold the directory of a run or sweep for the body, at a URI in a working copy, unless `before` raises.

    Raises `UserError` if another driver holds it: by a lock, or where the storage is a URI by a lease. A new directory
    disappears again, with its storage if that is new, if the body raises `UserError` before it has written anything.
    """
    if directory.mirror is not None:
        with lease(directory.mirror.remote, name=name), directory.working_copy():
            before()
            yield
        return
    before()  # so that nothing is made where something is refused
    new = missing_directories(directory.path)
    directory.path.mkdir(parents=True, exist_ok=True)
    lock = directory.path / ".driver.lock"
    try:
        with filelock.FileLock(lock).acquire(blocking=False):
            before()  # another may have come and gone
            try:
                yield
            except UserError:
                if new and not is_taken(directory.path):
                    with removed_if_empty(new):
                        shutil.rmtree(directory.path, ignore_errors=True)
                raise
    except filelock.Timeout as error:
        if Path(error.lock_file) != lock:
            raise
        raise UserError(f"run.name: {name!r} is running right now; choose another --name") from None


def _refuse_other_uses(run: RunDirectory, experiment: Experiment, splits: Splits, *, resume: bool) -> None:
    name, storage = experiment.run.name, absolute(experiment.run.storage, key="run.storage")
    run.refuse_links()
    if not run.experiment_file.exists():
        if is_taken(run.path):
            raise UserError(f"run.name: {name!r} is already used in {storage} by something else; choose another --name")
        return
    stored = run.experiment()
    _refuse_changed_experiment(run, stored)
    difference = content_differences(stored, experiment)
    if not resume:
        what = f"a different experiment ({'; '.join(difference)})" if difference else "this experiment"
        raise UserError(
            f"run.name: {name!r} is already used in {storage} by {what}; continue it with: vae-ray resume "
            f"{run.location}, or choose another --name"
        )
    if difference:
        raise UserError(f"run {name!r}: cannot be resumed with a different experiment: {'; '.join(difference)}")
    for checkpoint in all_checkpoints(run.checkpoints)[-1:]:
        checkpoint.check_images(name_of(experiment.data), splits.train.image_shape, splits.fingerprints)


def _refuse_changed_experiment(run: RunDirectory, stored: Experiment) -> None:
    """Raise `UserError` if `experiment.yaml` is no longer what the newest checkpoint was trained with."""
    for checkpoint in reversed(all_checkpoints(run.checkpoints)):
        with contextlib.suppress(CorruptFile):
            if difference := content_differences(checkpoint.experiment(), stored):
                raise UserError(
                    f"{run.experiment_file}: damaged or changed since {checkpoint.path.name} was written "
                    f"({'; '.join(difference)}); put it right, or start another run with --run.initial-weights"
                )
            return


def content_differences(old: Experiment, new: Experiment) -> list[str]:
    """In what two experiments differ besides their place; more epochs than before extend a run."""
    extended = new.training.epochs > old.training.epochs
    comparable = new.with_overrides({"training.epochs": old.training.epochs}) if extended else new
    return differing_fields(old, comparable, content_only=True)


def is_taken(path: Path) -> bool:
    """Whether something lies there that is not ours; what a kill leaves at the start of a run begins with a dot."""
    return path.is_file() or (path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()))


def discard_stale_results(run: RunDirectory) -> None:
    """Wait for the writer lock; drop a stop request, a result, and records and pictures after the newest checkpoint.

    The workers of a killed driver live on for seconds and may finish another epoch.
    """
    try:
        with run.lock("writer").acquire(timeout=WRITER_LOCK_SECONDS):
            checkpoints = all_checkpoints(run.checkpoints)
            if checkpoints:
                checkpoints[-1].check_can_be_continued()
            run.clear_stop_request()
            run.discard_result()
            run.records.truncate_to_epoch(checkpoints[-1].epochs_done if checkpoints else 0)
    except filelock.Timeout:
        raise UserError(
            f"run.name: {run.path.name!r} is still being written by a worker of an earlier driver; "
            "try again when it has ended"
        ) from None


@contextlib.contextmanager
def as_user_error(run: RunDirectory) -> Iterator[None]:
    """In its body an error of the storage is a `UserError`: nothing has started."""
    try:
        yield
    except OSError as error:
        why = describe_os_error(error)
        raise UserError(f"run.storage: {run.path} cannot be written ({why}); make room, or change --storage") from None
