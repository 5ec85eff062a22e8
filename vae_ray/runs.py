"""`train`: an Experiment becomes a finished run directory.

The driver's part: everything that can be refused is refused here, before a worker starts. Then the same `fit`
runs in this process (`workers.num` 0) or in Ray Train workers, and the result is summed up.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import filelock
import torch

from vae_ray.artifacts.progress import ProgressView
from vae_ray.artifacts.run_directory import RunDirectory
from vae_ray.config import Experiment, differing_fields
from vae_ray.data.splits import Splits
from vae_ray.errors import UserError
from vae_ray.trained import TrainedVAE
from vae_ray.training.checkpoints import best_checkpoint, complete_checkpoints
from vae_ray.training.damage import set_aside_damaged
from vae_ray.training.fit import WRITER_LOCK_SECONDS, fit
from vae_ray.training.group import Solo

logger = logging.getLogger(__name__)

# Fields that say where and by whom a run is computed, not what it computes; they may differ on resume.
PLACE_FIELDS = ("run.name", "run.storage", "data.root", "data.download", "data.cache_dir")
PLACE_SECTIONS = ("workers.",)


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to; `to_dict` is the object that `vae-ray train --json` prints."""

    run_dir: Path
    best_checkpoint: Path
    last_checkpoint: Path
    best_epoch: int
    num_workers: int
    device: str
    epochs: int
    metrics: dict[str, float]
    """Metrics of the best checkpoint, in nats: `train/nelbo`, `val/nelbo` if there is a validation split, ..."""
    images_per_second: float
    """Training images over training time, all workers and epochs together."""
    seconds: dict[str, float]
    """`startup` until the first step, `training` in the loop, `total`; of this call."""
    versions: dict[str, str]
    experiment: dict[str, Any]
    history: list[dict[str, Any]]
    """The lines of `metrics.jsonl`, one an epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; without the history, which `metrics.jsonl` holds."""
        fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        del fields["history"]
        return fields


def train(experiment: Experiment, *, resume: bool = False, quiet: bool = True) -> TrainResult:
    """Train `experiment` and return its result; `quiet=False` shows progress on stderr.

    With `resume` a run of that name goes on from its newest complete checkpoint (a finished one is returned
    as it is). Raises `UserError`, before anything starts, for what the user can put right, and
    `TrainingFailed` for a run that could not finish.
    """
    started_at = time.time()
    if resume and experiment.run.name is None:
        raise UserError("run.name: --resume needs the name of a run; for example --name my-run --resume")
    experiment = resolved(experiment)
    preflight(experiment)
    with opened_run(experiment, resume=resume) as run:
        if resume and (summary := run.summary()):
            return _result_from(summary, run.history())
        done_before = _settle(run)
        with _execution(experiment) as (device, execute):
            run.write_experiment(experiment)
            with contextlib.nullcontext() if quiet else ProgressView(run, experiment):
                execute(experiment, run.path, device)
            result = summarise(run, experiment, device=device, started_at=started_at, done_before=done_before)
        run.write_summary(result.to_dict())
        return result


def resolved(experiment: Experiment) -> Experiment:
    """The experiment with a name and with absolute paths: workers have working directories of their own."""
    overrides = {
        f"data.{key}": path.expanduser().absolute()
        for key in ("root", "cache_dir")
        if (path := getattr(experiment.data, key)) is not None
    }
    if experiment.run.name is None:
        overrides["run.name"] = f"{experiment.data.source}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
    return experiment.with_overrides(overrides)


def preflight(experiment: Experiment) -> None:
    """Check, without starting anything, all that can be known beforehand.

    Raises `UserError` for a storage that cannot be written, data that cannot be read or is too small, and
    workers, CPUs or GPUs that do not exist.
    """
    storage_directory(experiment)
    num_training = len(Splits.open(experiment).train_indices)
    batch = experiment.training.global_batch_size
    if batch > num_training:
        raise UserError(
            f"training.global_batch_size: got {batch}, should be at most the {num_training} training images; "
            f"for example --training.global-batch-size {min(64, num_training)}"
        )
    if experiment.workers.num > batch:
        raise UserError(
            f"workers.num: got {experiment.workers.num}, should be at most training.global_batch_size ({batch}), "
            f"so that every worker has an image; for example --workers.num {batch}"
        )
    if experiment.workers.num == 0:
        _local_device(experiment)
    else:
        from vae_ray import distributed  # here, because a run without workers needs no Ray

        distributed.check_local_resources(experiment)


Execute = Callable[[Experiment, Path, torch.device], None]


@contextlib.contextmanager
def _execution(experiment: Experiment) -> Iterator[tuple[torch.device, Execute]]:
    """The device, and the function that trains in a run's directory: here, or on Ray while connected to it."""
    if experiment.workers.num == 0:
        yield _local_device(experiment), lambda experiment, path, device: fit(experiment, path, Solo(device))
    else:
        from vae_ray import distributed

        with distributed.connection(experiment) as device:
            yield device, distributed.fit


def _local_device(experiment: Experiment) -> torch.device:
    wanted = experiment.workers.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("workers.device: got 'cuda', but this machine has no GPU; for example --workers.device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def storage_directory(experiment: Experiment) -> Path:
    """The directory `run.storage`, made if need be and known to be writable; raises `UserError` otherwise."""
    text = experiment.run.storage
    url = urlparse(text)
    if len(url.scheme) > 1 and url.scheme != "file":
        raise UserError(
            f"run.storage: got {text!r}, {url.scheme}:// is not supported; should be a directory that all "
            "workers see, for example --storage runs"
        )
    directory = Path(url.path if url.scheme == "file" else text).expanduser().absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".vae_ray-probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"run.storage: got {text!r}, cannot be written ({error.strerror}); try --storage DIR") from None
    return directory


@contextlib.contextmanager
def opened_run(experiment: Experiment, *, resume: bool) -> Iterator[RunDirectory]:
    """The run's directory, locked for this process; refused if the name is taken by something else."""
    run = RunDirectory(storage_directory(experiment) / str(experiment.run.name))
    name = experiment.run.name
    run.refuse_links()
    existed = run.experiment_file.exists()
    if not existed and is_taken(run.path):
        raise UserError(
            f"run.name: {name!r} is already used in {run.path.parent} by something else; choose another --name"
        )
    if existed and not resume:
        difference = differing_fields(*_comparable(run.experiment(), experiment))
        what = f"a different experiment ({'; '.join(difference)})" if difference else "this experiment"
        raise UserError(
            f"run.name: {name!r} is already used in {run.path.parent} by {what}; add --resume to go on with it, "
            "or choose another --name"
        )
    if existed and (difference := differing_fields(*_comparable(run.experiment(), experiment))):
        raise UserError(f"run {name!r}: cannot be resumed with a different experiment: {'; '.join(difference)}")
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        with run.lock("driver").acquire(blocking=False):
            yield run
    except filelock.Timeout as error:
        if Path(error.lock_file) != run.path / ".driver.lock":
            raise
        raise UserError(f"run.name: {name!r} is being trained right now; choose another --name") from None


def is_taken(path: Path) -> bool:
    """Whether something lies there that is not ours; what a kill leaves at the start of a run begins with a dot."""
    return path.is_file() or (path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()))


def _settle(run: RunDirectory) -> int:
    """The last epoch with a complete checkpoint, once nobody writes; lines and pictures after it are dropped.

    The workers of a killed driver live on for seconds and may finish another epoch.
    """
    try:
        with run.lock("writer").acquire(timeout=WRITER_LOCK_SECONDS):
            set_aside_damaged(run.checkpoints)
            done = max((found.epoch for found in complete_checkpoints(run.checkpoints)), default=0)
            run.forget_after(done)
            return done
    except filelock.Timeout:
        raise UserError(
            f"run.name: {run.path.name!r} is still being written by a worker of an earlier driver; "
            "try again when it has ended"
        ) from None


def _comparable(old: Experiment, new: Experiment) -> tuple[Experiment, Experiment]:
    """Both with the old one's place, so that only what they compute is compared."""
    place = {key: value for key, value in old.flat().items() if key in PLACE_FIELDS or key.startswith(PLACE_SECTIONS)}
    return old, new.with_overrides(place)


def summarise(
    run: RunDirectory, experiment: Experiment, *, device: torch.device, started_at: float, done_before: int
) -> TrainResult:
    """The result of a finished run, from its own files; evaluates the test split where no epoch did."""
    checkpoints = complete_checkpoints(run.checkpoints)
    best = best_checkpoint(checkpoints)
    metrics = {key: value for key, value in best.metrics.items() if "/" in key}
    if "test/nelbo" not in metrics:
        metrics |= TrainedVAE.load(best.path, device=device).evaluate("test")
    history = run.history()
    mine = [line for line in history if line["epoch"] > done_before]
    train_seconds = sum(line["seconds"] for line in history)  # of the lines that survived
    num_images = sum(line["images_per_second"] * line["seconds"] for line in history)
    return TrainResult(
        run_dir=run.path,
        best_checkpoint=best.path,
        last_checkpoint=checkpoints[-1].path,
        best_epoch=best.epoch,
        num_workers=experiment.workers.num,
        device=device.type,
        epochs=checkpoints[-1].epoch,
        metrics=metrics,
        images_per_second=num_images / train_seconds if train_seconds else 0.0,
        seconds={
            "startup": (mine[0]["started_at"] if mine else time.time()) - started_at,
            "training": sum(line["seconds"] for line in mine),
            "total": time.time() - started_at,
        },
        versions=versions(),
        experiment=experiment.to_dict(),
        history=history,
    )


def _result_from(summary: dict[str, Any], history: list[dict[str, Any]]) -> TrainResult:
    try:
        paths = {key: Path(summary[key]) for key in ("run_dir", "best_checkpoint", "last_checkpoint")}
        return TrainResult(**{**summary, **paths, "history": history})
    except (KeyError, TypeError) as error:
        raise UserError(f"summary.json: damaged ({error}); delete it and use --resume") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    packages = ("vae_ray", "torch", "torchvision", "ray", "pyarrow", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
