"""`train`: an Experiment becomes a finished run directory.

The driver's part: everything that can be refused is refused here, before a worker starts. Then the same `fit`
runs in this process (`workers.num` 0) or in Ray Train workers, and the result is summed up.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock
import torch

from vae_ray import signals
from vae_ray.checkpoints.loading import all_checkpoints
from vae_ray.checkpoints.quarantine import quarantine_corrupt_checkpoints
from vae_ray.config.experiment import Experiment, differing_fields
from vae_ray.data.splits import Splits
from vae_ray.errors import TrainingFailed, UserError
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.progress import ProgressView
from vae_ray.run_files.run_directory import WRITER_LOCK_SECONDS, RunDirectory
from vae_ray.runs.results import TrainResult, result_from, summarise
from vae_ray.storage.lease import lease
from vae_ray.storage.locations import absolute, check_writable, join_location
from vae_ray.storage.mirror import Mirror, working_copy
from vae_ray.storage.retry import describe_os_error
from vae_ray.training.fit import fit

logger = logging.getLogger(__name__)

# Fields that say where, by whom and how carefully a run is computed, not what it computes; they may differ on resume.
PLACE_FIELDS = (
    *("run.name", "run.storage", "data.root", "data.download", "data.cache_dir"),
    *("run.checkpoint_every_steps", "training.nonfinite", "training.nonfinite_limit", "training.rollback_lr_factor"),
)
PLACE_SECTIONS = ("workers.",)


def train(experiment: Experiment, *, resume: bool = False, quiet: bool = True) -> TrainResult:
    """Train `experiment` and return its result; `quiet=False` shows progress on stderr.

    With `resume` a run of that name goes on from its newest complete checkpoint (a finished one is returned
    as it is). Raises `UserError`, before anything starts, for what the user can put right, `TrainingFailed` for
    a run that could not finish, and `Stopped` after a signal or a file `.stop` in the run's directory.
    """
    started_at = time.time()
    if resume and experiment.run.name is None:
        raise UserError("run.name: --resume needs the name of a run; for example --name my-run --resume")
    experiment = with_absolute_paths(experiment)
    preflight(experiment)
    with open_run(experiment, resume=resume) as run:
        if resume and (summary := run.summary()):
            return result_from(summary, run.history())
        with as_user_error(run):
            done_before, seconds_before = discard_stale_results(run)
        with _execution(experiment) as (device, execute):
            with as_user_error(run):
                run.write_experiment(experiment)
            run.push(run.experiment_file)
            view = contextlib.nullcontext() if quiet else ProgressView(run, experiment)
            with signals.stopping(run), view:
                execute(experiment, run.location, device)
            run.pull()
            result = summarise(
                run,
                experiment,
                device=device,
                started_at=started_at,
                done_before=done_before,
                seconds_before=seconds_before,
            )
        try:
            run.write_summary(result.to_dict())
        except OSError as error:
            raise TrainingFailed(
                f"{run.summary_file}: could not be written ({describe_os_error(error)}); make room and use --resume"
            ) from error
        run.push(run.summary_file)
        return result


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """The experiment with a name and with absolute paths: workers have working directories of their own."""
    overrides: dict[str, Any] = {}
    if experiment.data.root is not None:
        overrides["data.root"] = absolute(experiment.data.root)
    if experiment.data.cache_dir is not None:
        overrides["data.cache_dir"] = experiment.data.cache_dir.expanduser().absolute()
    if experiment.run.name is None:
        overrides["run.name"] = f"{experiment.data.source}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
    return experiment.with_overrides(overrides)


def preflight(experiment: Experiment) -> None:
    """Check, without starting anything, all that can be known beforehand.

    Raises `UserError` for a storage that cannot be written, data that cannot be read or is too small, and
    workers, CPUs or GPUs that do not exist.
    """
    check_writable(experiment.run.storage)
    num_training = len(Splits.open(experiment).train_indices)
    batch = experiment.training.global_batch_size
    if batch > num_training:
        raise UserError(
            f"training.global_batch_size: got {batch}, should be at most the {num_training} training images; "
            f"for example --training.global-batch-size {min(64, num_training)}"
        )
    if experiment.workers.max > batch:
        raise UserError(
            f"workers.num: got {experiment.workers.max}, should be at most training.global_batch_size ({batch}), "
            f"so that every worker has an image; for example --workers.num {batch}"
        )
    if experiment.workers.num == 0:
        _local_device(experiment)
    else:
        from vae_ray import distributed  # here, because a run without workers needs no Ray

        distributed.check_local_resources(experiment)


Execute = Callable[[Experiment, str, torch.device], None]


@contextlib.contextmanager
def _execution(experiment: Experiment) -> Iterator[tuple[torch.device, Execute]]:
    """The device, and the function that trains in a run's directory: here, or on Ray while connected to it."""
    if experiment.workers.num == 0:
        yield (
            _local_device(experiment),
            lambda experiment, location, device: fit(experiment, location, SingleProcess(device)),
        )
    else:
        from vae_ray import distributed

        with distributed.connection(experiment) as device:
            yield device, distributed.fit


def _local_device(experiment: Experiment) -> torch.device:
    wanted = experiment.workers.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("workers.device: got 'cuda', but this machine has no GPU; for example --workers.device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def run_location(experiment: Experiment) -> str:
    """The directory or URI of the (named) run."""
    return join_location(absolute(experiment.run.storage), str(experiment.run.name))


@contextlib.contextmanager
def open_run(experiment: Experiment, *, resume: bool) -> Iterator[RunDirectory]:
    """The run's directory, held by this process alone; refused if the name is taken by something else."""
    check_writable(experiment.run.storage)
    run = RunDirectory.at(run_location(experiment), role="driver")

    def refuse_other_uses() -> None:
        _refuse_other_uses(run, experiment, resume=resume)

    with exclusive_run(run.path, run.mirror, name=str(experiment.run.name), before=refuse_other_uses):
        yield run


@contextlib.contextmanager
def exclusive_run(path: Path, mirror: Mirror | None, *, name: str, before: Callable[[], None]) -> Iterator[None]:
    """Hold the directory of a run or sweep for the body, once `before` had nothing against it.

    Raises `UserError` if another driver holds it: by a lock, or where the storage is a URI by a lease.
    """
    if mirror is not None:
        with lease(mirror, name=name), working_copy(mirror):
            before()
            yield
        return
    before()  # so that nothing is made where something is refused
    path.mkdir(parents=True, exist_ok=True)
    lock = path / ".driver.lock"
    try:
        with filelock.FileLock(lock).acquire(blocking=False):
            before()  # another may have come and gone
            yield
    except filelock.Timeout as error:
        if Path(error.lock_file) != lock:
            raise
        raise UserError(f"run.name: {name!r} is running right now; choose another --name") from None


def _refuse_other_uses(run: RunDirectory, experiment: Experiment, *, resume: bool) -> None:
    name, storage = experiment.run.name, absolute(experiment.run.storage)
    run.refuse_links()
    if not run.experiment_file.exists():
        if is_taken(run.path):
            raise UserError(f"run.name: {name!r} is already used in {storage} by something else; choose another --name")
        return
    difference = differing_fields(*_comparable(run.experiment(), experiment))
    if not resume:
        what = f"a different experiment ({'; '.join(difference)})" if difference else "this experiment"
        raise UserError(
            f"run.name: {name!r} is already used in {storage} by {what}; add --resume to go on with it, "
            "or choose another --name"
        )
    if difference:
        raise UserError(f"run {name!r}: cannot be resumed with a different experiment: {'; '.join(difference)}")


def is_taken(path: Path) -> bool:
    """Whether something lies there that is not ours; what a kill leaves at the start of a run begins with a dot."""
    return path.is_file() or (path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()))


def discard_stale_results(run: RunDirectory) -> tuple[int, float]:
    """How many epochs the newest checkpoint has behind it, and for how many seconds it had trained the next.

    Once nobody writes; lines and pictures of later epochs are dropped.
    The workers of a killed driver live on for seconds and may finish another epoch.
    """
    try:
        with run.lock("writer").acquire(timeout=WRITER_LOCK_SECONDS):
            run.clear_stop_request()
            if run.mirror is None:  # a copy has no weights; the writer's will
                quarantine_corrupt_checkpoints(run)
            found = all_checkpoints(run.checkpoints)
            newest = found[-1] if found else None
            done = newest.epochs_done if newest else 0
            run.truncate_to_epoch(done)
            return done, newest.metrics["seconds"] if newest and newest.step is not None else 0.0
    except filelock.Timeout:
        raise UserError(
            f"run.name: {run.path.name!r} is still being written by a worker of an earlier driver; "
            "try again when it has ended"
        ) from None


@contextlib.contextmanager
def as_user_error(run: RunDirectory) -> Iterator[None]:
    """In its body what the storage does not take is the user's to put right: nothing has started."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.storage: {run.path} cannot be written ({describe_os_error(error)}); make room, or change --storage"
        ) from None


def _comparable(old: Experiment, new: Experiment) -> tuple[Experiment, Experiment]:
    """Both with the old one's place, so that only what they compute is compared."""
    place = {key: value for key, value in old.flat().items() if key in PLACE_FIELDS or key.startswith(PLACE_SECTIONS)}
    return old, new.with_overrides(place)
