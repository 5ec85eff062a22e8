"""An Experiment on a Ray Train worker group, and what each of its workers does."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from vae_ray.config import Experiment
from vae_ray.distributed.group import RayWorkers
from vae_ray.errors import TrainingFailed, UserError
from vae_ray.training.fit import fit as fit_worker

RAY_STATE_FILE = "checkpoint_manager_snapshot.json"


def fit(experiment: Experiment, run_path: Path, device: torch.device) -> None:
    """Train `experiment` in `run_path` on `workers.num` Ray workers; Ray must be connected.

    Ray Train gets the run directory as its own, so that the checkpoints it knows are those that users see.
    Raises `TrainingFailed` with the worker's own error if the group could not finish.
    """
    # Our manifests say which checkpoints are complete. Ray's record of a killed run may be torn, and would
    # then keep the new one from starting.
    (run_path / RAY_STATE_FILE).unlink(missing_ok=True)
    workers = experiment.workers
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"experiment": experiment.to_dict(), "run_path": str(run_path)},
        scaling_config=ScalingConfig(
            num_workers=workers.num,
            use_gpu=device.type == "cuda",
            resources_per_worker={
                "CPU": workers.cpus,
                **({"GPU": workers.gpus} if device.type == "cuda" else {}),
            },
        ),
        torch_config=TorchConfig(backend="nccl" if device.type == "cuda" else "gloo"),
        run_config=RunConfig(
            name=run_path.name,
            storage_path=str(run_path.parent),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what fails is raised below, once
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error


def _cause(error: ray.train.TrainingFailedError) -> Exception:
    """The first worker's own error, as our type where it was one; else Ray's text on one line."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "__cause__", None) or failure
        for kind in (TrainingFailed, UserError):
            if isinstance(cause, kind):
                return kind(str(cause))
    lines = [line for line in str(error).splitlines() if line.strip()]
    return TrainingFailed(f"the workers could not finish: {lines[-1].strip() if lines else type(error).__name__}")


def _train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: our loop, with a report to Ray after every epoch."""
    experiment, run_path = Experiment.from_dict(config["experiment"]), Path(config["run_path"])
    filesystem = pyarrow.fs.LocalFileSystem()

    def report(line: dict[str, Any], checkpoint: Path) -> None:
        # A barrier for all ranks. The checkpoint lies in Ray's storage already: rank 0 has written and synced it.
        is_writer = group.rank == 0
        ray.train.report(
            line,
            checkpoint=Checkpoint(str(checkpoint), filesystem=filesystem) if is_writer else None,
            checkpoint_dir_name=f"{checkpoint.parent.name}/{checkpoint.name}",
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    with contextlib.closing(RayWorkers()) as group:
        fit_worker(experiment, run_path, group, after_epoch=report)
