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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.distributed.failures import first_cause
from vae_ray.distributed.group import RayWorkers
from vae_ray.distributed.node_watch import watched_nodes
from vae_ray.distributed.resources import worker_resources
from vae_ray.errors import Diverged, Stopped, TrainingFailed, UserError, WorkersFailed
from vae_ray.storage.filesystems import open_filesystem
from vae_ray.storage.locations import is_uri, join_location
from vae_ray.training.fit import EpochResult, fit_epochs

RETURNED: dict[str, type[Exception]] = {kind.__name__: kind for kind in (Diverged, Stopped, UserError)}
"""Errors that all workers raise together. A restart from the last checkpoint would end the same way, so that workers
return them: Ray restarts the group after an error that is raised."""
RAY_STATE = ".ray"
ELASTIC_RESIZE_SECONDS = 15.0
"""How often a run with a range of workers checks whether the cluster has grown."""
ELASTIC_START_SECONDS = "15"
"""How long it waits for workers that do not start before it counts again how many fit."""


def fit(experiment: Experiment, location: str, device: torch.device, *, callbacks: Sequence[UserCallback] = ()) -> None:
    """Train `experiment` in the run's directory or URI on `workers.num` Ray workers; Ray must be connected.

    Lost workers restart from the last checkpoint, `workers.max_failures` times. `callbacks` are Ray Train's and get
    every epoch's report. Raises a worker's own error, `WorkersFailed` with the cause if the group could not finish, and
    `Stopped` after a request to stop.
    """
    workers, uses_gpu = experiment.workers, device.type == "cuda"
    if workers.min < workers.max:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ELASTIC_START_SECONDS)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # a failure is raised below, once
    with ray_state(location) as storage:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "experiment": experiment.to_dict(),
                "location": location,
                "user_code": user_code.collect(experiment.user_code()),
            },
            scaling_config=ScalingConfig(
                num_workers=workers.num,
                use_gpu=uses_gpu,
                resources_per_worker=worker_resources(workers, uses_gpu=uses_gpu),
                elastic_resize_monitor_interval_s=ELASTIC_RESIZE_SECONDS,
            ),
            torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
            run_config=RunConfig(
                name=f"{experiment.run.name}-{secrets.token_hex(4)}",
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                failure_config=FailureConfig(max_failures=workers.max_failures),
                callbacks=list(callbacks),
                **storage,
            ),
        )
        try:
            with watched_nodes(workers, uses_gpu=uses_gpu):
                error = _in_thread(trainer.fit).return_value
        except (ray.train.TrainingFailedError, RayError) as failure:  # RayError: of the controller's own process
            raise _cause(failure) from failure
    if error is not None:
        kind, message = error
        raise RETURNED[kind](message)


def _in_thread(function: Callable[[], Any]) -> Any:
    """The result of `function`, outside of the main thread: there Ray would take SIGINT for itself."""
    if threading.current_thread() is not threading.main_thread():
        return function()
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    # a daemon: if this thread is interrupted, the process must not wait for the other
    threading.Thread(target=run, name="ray-train-fit", daemon=True).start()
    return outcome.result()


@contextlib.contextmanager
def ray_state(location: str, name: str = RAY_STATE) -> Iterator[dict[str, Any]]:
    """Where Ray keeps its own state of one start, as arguments of its `RunConfig`; deleted before and afterwards.

    A killed run may leave a torn state, and its controller may write for seconds after the driver's end. So each start
    is a new run to Ray; our manifests decide what is complete.
    """
    clear_state(location, name)
    path, filesystem = join_location(location, name), None
    if is_uri(location):
        filesystem, path = open_filesystem(path, key="run.storage")
    yield {"storage_path": path, "storage_filesystem": filesystem}
    clear_state(location, name)


def clear_state(location: str, name: str = RAY_STATE) -> None:
    """Delete Ray's own state in the directory or URI of a run."""
    path = join_location(location, name)
    if is_uri(location):
        filesystem, path = open_filesystem(path, key="run.storage")
        with contextlib.suppress(OSError):  # there is none, or the next start deletes it
            filesystem.delete_dir(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _cause(error: Exception) -> Exception:
    """A worker's own error, as our type where it was one; else `WorkersFailed` with the cause on one line."""
    failures = [failure.__cause__ or failure for failure in (getattr(error, "worker_failures", None) or {}).values()]
    for failure in failures:
        for kind in (Diverged, TrainingFailed, UserError):
            if isinstance(failure, kind):
                return kind(str(failure))
    return WorkersFailed(first_cause(failures or [error]))


def _train_worker(config: dict[str, Any]) -> tuple[str, str] | None:
    """Run our loop in a Ray Train worker, with a report to Ray after every epoch; return an error of `RETURNED`."""
    user_code.install(config["user_code"])
    experiment, location = Experiment.from_dict(config["experiment"]), str(config["location"])
    with contextlib.closing(RayWorkers()) as group:
        try:
            for result in fit_epochs(experiment, location, group, keep_warnings=True):
                _report(result, is_first=group.rank == 0)
        except tuple(RETURNED.values()) as error:
            return type(error).__name__, str(error)
    return None


def _report(result: EpochResult, *, is_first: bool) -> None:
    """Report an epoch to Ray: a barrier for all ranks.

    The checkpoint that Ray gets is a pointer under the name of ours, which rank 0 has already written and synced.
    """
    with tempfile.TemporaryDirectory() as directory:
        pointer = None
        if is_first:
            Path(directory, "checkpoint.json").write_text(json.dumps({"checkpoint": str(result.checkpoint)}))
            pointer = Checkpoint.from_directory(directory)
        ray.train.report(result.record, checkpoint=pointer, checkpoint_dir_name=result.checkpoint.name)
