"""Evaluation on Ray: actors that hold the model observe pieces of splits.

Plain actors and no Ray Data: images lie prepared on every node, so that a piece is a few numbers that are sent, and
what comes back is small; there is nothing to read, to shuffle or to spill for it. An actor gets its next piece when the
driver has taken the last one's arrays: as many are in memory as there are actors.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
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
from vae_ray.evaluation.observations import Arrays, Observation, Observer, Piece, Run, observe, observe_here
from vae_ray.models.priors import Prior
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
    observers: Mapping[str, Sequence[Observer]]
    fitted_prior: Prior | None
    code: dict[str, bytes]
    """The user's own modules, by path."""
    device: torch.device


def on_ray(num_workers: int) -> Run:
    """What observes splits by `num_workers` actors of Ray; 0: by this process, without Ray."""
    return functools.partial(_observe_on_ray, num_workers=num_workers) if num_workers else observe_here


def _observe_on_ray(whole: Observation, *, num_workers: int) -> Iterator[tuple[int, Arrays]]:
    """Number and arrays of each piece, as they are done.

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
        prior = None if whole.fitted_prior is None else copy.deepcopy(whole.fitted_prior).cpu()
        shape = whole.model.image_shape
        common = ray.put(Common(experiment.to_dict(), shape, weights, whole.observers, prior, code, device))
        pool = ActorPool([kind.remote() for _ in range(min(num_workers, len(whole.pieces)))])
        numbered = list(enumerate(whole.pieces))
        try:
            yield from pool.map_unordered(lambda actor, piece: actor.observe.remote([common], *piece), numbered)
        except RayError as error:
            cause = getattr(error, "cause", None) or error  # of a RayTaskError
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            raise TrainingFailed(f"the workers could not finish: {first_cause([cause])}") from error


class _Observer:
    """An actor: one model, and the images as its node has them."""

    def __init__(self) -> None:
        self.is_open = False

    def observe(self, common: list[ray.ObjectRef[Common]], number: int, piece: Piece) -> tuple[int, Arrays]:
        """The arrays of a piece. What every actor is given comes with each, for one that has started again."""
        if not self.is_open:
            self._open(ray.get(common[0]))
        loader, observers = self.loader(piece.split), self.observers[piece.split]
        return number, observe(self.model, loader, piece.rows, observers, precision=self.precision)

    def _open(self, common: Common) -> None:
        user_code.install(common.code)
        experiment = Experiment.from_dict(common.experiment)
        self.precision, self.observers = experiment.training.precision, common.observers
        self.settings = cpu_settings(num_threads=experiment.workers.num_threads, device=common.device)
        self.settings.__enter__()  # for the life of this process
        model = build_vae(experiment, common.image_shape, seed=0)
        self.model = model if common.fitted_prior is None else model.with_prior(common.fitted_prior)
        self.model.load_state_dict(common.weights)
        self.model.to(common.device)
        splits, shards = Splits.open(experiment), shards_of(SingleProcess(common.device))
        self.loader = functools.cache(lambda split: splits.loader(split, experiment, shards))
        self.is_open = True
