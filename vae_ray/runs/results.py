"""Build the result of a run from its files, for Python, `--json` and the terminal."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vae_ray.checkpoints.listing import best_checkpoint, complete_checkpoints
from vae_ray.config.experiment import Experiment
from vae_ray.errors import UserError
from vae_ray.inference import TrainedVAE
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.version import VERSION


@dataclass(frozen=True)
class TrainResult:
    """The result of a run; `to_dict` is the object that `vae-ray train --json` prints."""

    run_dir: Path | str
    """A path; of a storage that is a URI, the URI. So are the checkpoints."""
    best_checkpoint: Path | str
    last_checkpoint: Path | str
    best_epoch: int
    num_workers: int
    nodes: list[str]
    """Addresses of the machines of the workers that ended it, by rank."""
    device: str
    epochs: int
    """Epochs that were trained."""
    stopped_early: bool
    """Whether the selection metric had not improved for `training.patience_epochs`."""
    metrics: dict[str, float]
    """Metrics of the best checkpoint, in nats: `train/nelbo`, `val/nelbo` if there is a validation split, ..."""
    warnings: list[str]
    """What makes the best checkpoint useless, a line each; usually empty (`TrainedVAE.failures`)."""
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


def summarise(
    run: RunDirectory,
    requested: Experiment,
    resolved: Experiment,
    *,
    device: torch.device,
    started_at: float,
    num_attempts: int,
) -> TrainResult:
    """The result of a finished run, from its own files; evaluates the test split where no epoch did.

    `resolved` is the requested experiment without `auto`. Earlier calls left `num_attempts` records of attempts.
    """
    checkpoints = complete_checkpoints(run.checkpoints)
    best = best_checkpoint(checkpoints)
    metrics = {key: value for key, value in best.metrics.items() if "/" in key}
    here = device if torch.cuda.is_available() else "cpu"  # the driver may be on a node without the workers' GPUs
    model = TrainedVAE.load(run.public_path(best.path), device=here, trust_code=True)  # it was just trained
    if "test/nelbo" not in metrics:
        metrics |= model.evaluate("test", "elbo").metrics
    # where the storage did not take the attempts, what was asked for is reported
    last_attempt = [{"num_workers": resolved.workers.max, "nodes": []}, *run.records.attempts()][-1]
    first_attempt = [*run.records.attempts()[num_attempts:], {"epochs_done": 0, "seconds_before": 0.0}][0]
    seconds_before = first_attempt["seconds_before"]
    history = run.records.history()
    mine = [record for record in history if record["epoch"] > first_attempt["epochs_done"]]
    train_seconds = sum(record["seconds"] for record in history)  # of the records that survived
    num_images = sum(record["images_per_second"] * record["seconds"] for record in history)
    return TrainResult(
        run_dir=run.public_path(run.path),
        best_checkpoint=run.public_path(best.path),
        last_checkpoint=run.public_path(checkpoints[-1].path),
        best_epoch=best.epoch,
        num_workers=last_attempt["num_workers"] if resolved.workers.max else 0,
        nodes=last_attempt["nodes"],
        device=device.type,
        epochs=checkpoints[-1].epoch,
        metrics=metrics,
        warnings=model.failures(),
        images_per_second=num_images / train_seconds if train_seconds else 0.0,
        seconds={
            "startup": (mine[0]["started_at"] + seconds_before if mine else time.time()) - started_at,
            "training": sum(record["seconds"] for record in mine) - seconds_before,
            "total": time.time() - started_at,
        },
        versions=versions(),
        stopped_early=checkpoints[-1].epoch < requested.training.epochs,
        experiment=requested.to_dict(),
        history=history,
    )


def result_from(summary: dict[str, Any], run: RunDirectory) -> TrainResult:
    """The result of a finished run, from its summary, with the paths of where it is now; raises `UserError`."""
    try:
        names = {
            key: str(summary[key]).rstrip("/").rpartition("/")[2] for key in ("best_checkpoint", "last_checkpoint")
        }
        paths = {key: run.public_path(run.checkpoints / name) for key, name in names.items()}
        paths["run_dir"] = run.public_path(run.path)
        since_then = {"stopped_early": False, "warnings": []}  # fields that older summaries lack
        return TrainResult(**{**since_then, **summary, **paths, "history": run.records.history()})
    except (KeyError, TypeError) as error:
        raise UserError(f"summary.json: damaged ({error}); delete it and resume the run") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    packages = ("torch", "torchvision", "ray", "pyarrow", "safetensors")
    return {
        "python": platform.python_version(),
        "vae_ray": VERSION,  # a package that travelled with a job has no metadata
        **{name: importlib.metadata.version(name) for name in packages},
    }
