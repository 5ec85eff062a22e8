"""What a run has come to: summed up from its own files, for Python, `--json` and people."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vae_ray.checkpoints.loading import best_checkpoint, complete_checkpoints
from vae_ray.config.experiment import Experiment
from vae_ray.errors import UserError
from vae_ray.inference import TrainedVAE
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.locations import is_uri
from vae_ray.version import VERSION


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to; `to_dict` is the object that `vae-ray train --json` prints."""

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


def summarise(
    run: RunDirectory,
    experiment: Experiment,
    *,
    device: torch.device,
    started_at: float,
    done_before: int,
    seconds_before: float,
) -> TrainResult:
    """The result of a finished run, from its own files; evaluates the test split where no epoch did.

    `done_before` epochs, and `seconds_before` of the next, were trained by earlier calls.
    """
    checkpoints = complete_checkpoints(run.checkpoints)
    best = best_checkpoint(checkpoints)
    metrics = {key: value for key, value in best.metrics.items() if "/" in key}
    if "test/nelbo" not in metrics:
        metrics |= TrainedVAE.load(run.public_path(best.path), device=device).evaluate("test")
    # where the storage did not take the attempts, what was asked for stands for what was had
    last_attempt = [{"num_workers": experiment.workers.max, "nodes": []}, *run.attempts()][-1]
    history = run.history()
    mine = [line for line in history if line["epoch"] > done_before]
    train_seconds = sum(line["seconds"] for line in history)  # of the lines that survived
    num_images = sum(line["images_per_second"] * line["seconds"] for line in history)
    return TrainResult(
        run_dir=run.public_path(run.path),
        best_checkpoint=run.public_path(best.path),
        last_checkpoint=run.public_path(checkpoints[-1].path),
        best_epoch=best.epoch,
        num_workers=last_attempt["num_workers"] if experiment.workers.max else 0,
        nodes=last_attempt["nodes"],
        device=device.type,
        epochs=checkpoints[-1].epoch,
        metrics=metrics,
        images_per_second=num_images / train_seconds if train_seconds else 0.0,
        seconds={
            "startup": (mine[0]["started_at"] + seconds_before if mine else time.time()) - started_at,
            "training": sum(line["seconds"] for line in mine) - seconds_before,
            "total": time.time() - started_at,
        },
        versions=versions(),
        experiment=experiment.to_dict(),
        history=history,
    )


def result_from(summary: dict[str, Any], history: list[dict[str, Any]]) -> TrainResult:
    """The result of a run that has finished, from its summary; raises `UserError` if that is not one."""
    try:
        keys = ("run_dir", "best_checkpoint", "last_checkpoint")
        paths = {key: summary[key] if is_uri(summary[key]) else Path(summary[key]) for key in keys}
        return TrainResult(**{**summary, **paths, "history": history})
    except (KeyError, TypeError) as error:
        raise UserError(f"summary.json: damaged ({error}); delete it and use --resume") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    packages = ("torch", "torchvision", "ray", "pyarrow", "safetensors")
    return {
        "python": platform.python_version(),
        "vae_ray": VERSION,  # a package that travelled with a job has no metadata
        **{name: importlib.metadata.version(name) for name in packages},
    }
