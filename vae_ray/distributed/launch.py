"""An Experiment on a Ray Train worker group, and what each of its workers does."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.distributed.group import RayWorkers
from vae_ray.distributed.node_watch import NodeWatch
from vae_ray.distributed.resources import worker_resources
from vae_ray.errors import Diverged, Stopped, TrainingFailed, UserError
from vae_ray.storage.locations import is_uri, join_location, open_filesystem
from vae_ray.training.fit import EpochResult, fit_epochs

AGREED: dict[str, type[Exception]] = {kind.__name__: kind for kind in (Diverged, Stopped, UserError)}
"""What ends a run on all its workers together; to go on from the last checkpoint would end the same way."""
RAY_STATE = ".ray"
ELASTIC_LOOK_SECONDS = 15.0
"""How often a run with a range of workers looks whether the cluster has grown."""
ELASTIC_START_SECONDS = 15
"""How long it waits for workers that do not come before it counts again what the cluster has room for."""
POINTER = "checkpoint.json"


def fit(experiment: Experiment, location: str, device: torch.device, *, callbacks: Sequence[UserCallback] = ()) -> None:
    """Train `experiment` in the run's directory or URI on `workers.num` Ray workers; Ray must be connected.

    Lost workers are replaced, going on from the last checkpoint, `workers.max_failures` times. `callbacks` are Ray
    Train's and see every epoch's report. Raises `TrainingFailed` with the worker's own error if the group could not
    finish, and `Stopped` if it was told to.
    """
    workers = experiment.workers
    if workers.min < workers.max:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ELASTIC_START_SECONDS))
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what fails is raised below, once
    with ray_state(location) as storage:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "experiment": experiment.to_dict(),
                "location": location,
                "user_code": user_code.collect(experiment.user_code()),
            },
            scaling_config=_scaling(experiment, device),
            torch_config=TorchConfig(backend="nccl" if device.type == "cuda" else "gloo"),
            run_config=RunConfig(
                name=f"{experiment.run.name}-{secrets.token_hex(4)}",
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                failure_config=FailureConfig(max_failures=workers.max_failures),
                callbacks=list(callbacks),
                **storage,
            ),
        )
        try:
            with NodeWatch(experiment.workers, uses_gpu=device.type == "cuda"):
                outcome = _result_of(trainer).return_value
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
    if outcome is not None:
        kind, message = outcome
        raise AGREED[kind](message)


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


def _scaling(experiment: Experiment, device: torch.device) -> ScalingConfig:
    workers, uses_gpu = experiment.workers, device.type == "cuda"
    return ScalingConfig(
        num_workers=workers.num,
        use_gpu=uses_gpu,
        resources_per_worker=worker_resources(workers, uses_gpu=uses_gpu),
        elastic_resize_monitor_interval_s=ELASTIC_LOOK_SECONDS,
    )


@contextlib.contextmanager
def ray_state(location: str, name: str = RAY_STATE) -> Iterator[dict[str, Any]]:
    """Where Ray keeps its own state of one start, as arguments of its `RunConfig`; deleted before and afterwards.

    Ray's state of a killed run may be torn, and its controller may outlive the driver by seconds and go on
    writing. So each start is a run of its own to Ray; what is complete, our manifests say.
    """
    clear_state(location, name)
    if is_uri(location):
        filesystem, path = open_filesystem(join_location(location, name), key="run.storage")
        yield {"storage_path": path, "storage_filesystem": filesystem}
    else:
        yield {"storage_path": join_location(location, name)}
    clear_state(location, name)


def clear_state(location: str, name: str = RAY_STATE) -> None:
    """Delete Ray's own state in the directory or URI of a run."""
    if is_uri(location):
        filesystem, path = open_filesystem(join_location(location, name), key="run.storage")
        with contextlib.suppress(OSError):  # there is none; or deleted by whoever starts next
            filesystem.delete_dir(path)
    else:
        shutil.rmtree(join_location(location, name), ignore_errors=True)


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


def _train_worker(config: dict[str, Any]) -> tuple[str, str] | None:
    """What each Ray Train worker runs: our loop, with a report to Ray after every epoch.

    An error on which all workers agree is returned by its kind and message: for one that is raised Ray starts them
    anew.
    """
    user_code.install(config["user_code"])
    experiment, location = Experiment.from_dict(config["experiment"]), str(config["location"])

    def report(result: EpochResult) -> None:
        # A barrier for all ranks. Ray is given a pointer under the checkpoint's own name: rank 0 has written and
        # synced the checkpoint itself already.
        with tempfile.TemporaryDirectory() as directory:
            if group.rank == 0:
                Path(directory, POINTER).write_text(json.dumps({"checkpoint": str(result.checkpoint)}))
            ray.train.report(
                result.record,
                checkpoint=Checkpoint.from_directory(directory) if group.rank == 0 else None,
                checkpoint_dir_name=result.checkpoint.name,
            )

    with contextlib.closing(RayWorkers()) as group:
        try:
            for result in fit_epochs(experiment, location, group, keep_warnings=True):
                report(result)
        except tuple(AGREED.values()) as error:
            return type(error).__name__, str(error)
    return None
