"""Evaluation on Ray: actors that hold the model observe the pieces of a split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayError
from ray.util import ActorPool
from torch import Tensor

from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.data.splits import Splits
from vae_ray.distributed.connection import connected, on_connected_cluster
from vae_ray.distributed.failures import first_cause
from vae_ray.distributed.resources import worker_resources
from vae_ray.errors import TrainingFailed, UserError
from vae_ray.evaluation.observations import Arrays, Observation, Observer, observe, observe_here
from vae_ray.models.vae import build_vae
from vae_ray.parallel.group import SingleProcess, shards_of
from vae_ray.training.cpu_settings import cpu_settings

MAX_FAILURES = 3
"""How often an actor whose process or node died starts again, and repeats its piece."""


class Common(NamedTuple):
    """What every actor is given; sent to each node once."""

    experiment: dict[str, Any]
    image_shape: tuple[int, int, int]
    weights: Mapping[str, Tensor]
    split: str
    observers: Sequence[Observer]
    code: dict[str, bytes]
    """The user's own modules, by path."""
    device: torch.device


def on_ray(num_workers: int) -> Callable[[Observation], list[Arrays]]:
    """What observes a split by `num_workers` actors of Ray; 0: by this process, without Ray."""
    return functools.partial(_observe_on_ray, num_workers=num_workers) if num_workers else observe_here


def _observe_on_ray(whole: Observation, *, num_workers: int) -> list[Arrays]:
    """The arrays of the pieces, in order.

    Raises `UserError` if Ray cannot be reached or has no room for the actors, an actor's own `UserError`, and
    `TrainingFailed` for any other failure.
    """
    with connected():
        experiment, device = on_connected_cluster(whole.experiment.with_overrides({"workers.num": num_workers}))
        resources = worker_resources(experiment.workers, uses_gpu=device.type == "cuda")
        kind = ray.remote(_Observer).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_restarts=MAX_FAILURES,
            max_task_retries=MAX_FAILURES,
        )
        weights = {name: tensor.cpu() for name, tensor in whole.model.state_dict().items()}
        code = user_code.collect(experiment.user_code())
        shape = whole.model.image_shape
        common = ray.put(Common(experiment.to_dict(), shape, weights, whole.split, whole.observers, code, device))
        pool = ActorPool([kind.remote(common) for _ in range(min(num_workers, len(whole.rows)))])
        found: dict[int, Arrays] = {}
        num_done = 0
        try:
            numbered = list(enumerate(whole.rows))
            for number, arrays in pool.map_unordered(lambda actor, piece: actor.observe.remote(*piece), numbered):
                found[number] = arrays
                num_done += whole.rows[number].stop - whole.rows[number].start
                whole.progress(num_done, whole.rows[-1].stop)
        except RayError as error:
            cause = getattr(error, "cause", None) or error  # of a RayTaskError
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            raise TrainingFailed(f"the workers could not finish: {first_cause([cause])}") from error
        return [found[number] for number in range(len(found))]


class _Observer:
    """An actor: one model, and the images of one split as its node has them."""

    def __init__(self, common: Common) -> None:
        user_code.install(common.code)
        experiment = Experiment.from_dict(common.experiment)
        self.precision, self.observers = experiment.training.precision, common.observers
        self.settings = cpu_settings(num_threads=experiment.workers.num_threads, device=common.device)
        self.settings.__enter__()  # for the life of this process
        self.model = build_vae(experiment, common.image_shape, seed=0)
        self.model.load_state_dict(common.weights)
        self.model.to(common.device)
        self.loader = Splits.open(experiment).loader(common.split, experiment, shards_of(SingleProcess(common.device)))

    def observe(self, number: int, rows: slice) -> tuple[int, Arrays]:
        return number, observe(self.model, self.loader, rows, self.observers, precision=self.precision)
