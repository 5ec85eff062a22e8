"""An Experiment on a Ray Train worker group, and what each of its workers does."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from vae_ray.config import Experiment
from vae_ray.distributed.group import RayWorkers
from vae_ray.errors import Diverged, Stopped, TrainingFailed, UserError
from vae_ray.training.fit import EpochResult, fit_epochs

RAY_STATE = ".ray"
POINTER = "checkpoint.json"


def fit(
    experiment: Experiment, run_path: Path, device: torch.device, *, callbacks: Sequence[UserCallback] = ()
) -> None:
    """Train `experiment` in `run_path` on `workers.num` Ray workers; Ray must be connected.

    `callbacks` are Ray Train's and see every epoch's report.
    Raises `TrainingFailed` with the worker's own error if the group could not finish, and `Stopped` if it was told to.
    """
    # Ray's state of a killed run may be torn, and its controller may outlive the driver by seconds and go on
    # writing. So each start is a run of its own to Ray; what is complete, our manifests say.
    ray_storage = run_path / RAY_STATE
    shutil.rmtree(ray_storage, ignore_errors=True)
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
            name=f"{run_path.name}-{secrets.token_hex(4)}",
            storage_path=str(ray_storage),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=list(callbacks),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what fails is raised below, once
    try:
        stopped = _result_of(trainer).return_value
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    shutil.rmtree(ray_storage, ignore_errors=True)
    if stopped:
        raise Stopped(stopped)


def _result_of(trainer: TorchTrainer) -> Any:
    """Ray's result of the fit. In the main thread Ray would take SIGINT for itself, so it runs in another."""
    if threading.current_thread() is not threading.main_thread():
        return trainer.fit()
    outcome: Future[Any] = Future()

    def fit_now() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    # a daemon: if this thread is interrupted, the process must not wait for the other
    threading.Thread(target=fit_now, name="ray-train-fit", daemon=True).start()
    return outcome.result()


def _cause(error: ray.train.TrainingFailedError) -> Exception:
    """The first worker's own error, as our type where it was one; else Ray's text on one line."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "__cause__", None) or failure
        for kind in (Diverged, TrainingFailed, UserError):
            if isinstance(cause, kind):
                return kind(str(cause))
    lines = [line for line in str(error).splitlines() if line.strip()]
    return TrainingFailed(f"the workers could not finish: {lines[-1].strip() if lines else type(error).__name__}")


def _train_worker(config: dict[str, Any]) -> str | None:
    """What each Ray Train worker runs: our loop, with a report to Ray after every epoch.

    Returns why it stopped before the last epoch, if it was told to.
    """
    experiment, run_path = Experiment.from_dict(config["experiment"]), Path(config["run_path"])

    def report(result: EpochResult) -> None:
        # A barrier for all ranks. Ray is given a pointer under the checkpoint's own name: rank 0 has written and
        # synced the checkpoint itself already.
        with tempfile.TemporaryDirectory() as directory:
            if group.rank == 0:
                Path(directory, POINTER).write_text(json.dumps({"checkpoint": str(result.checkpoint)}))
            ray.train.report(
                result.line,
                checkpoint=Checkpoint.from_directory(directory) if group.rank == 0 else None,
                checkpoint_dir_name=result.checkpoint.name,
            )

    with contextlib.closing(RayWorkers()) as group:
        try:
            for result in fit_epochs(experiment, run_path, group):
                report(result)
        except Stopped as stopped:
            return str(stopped)
    return None
