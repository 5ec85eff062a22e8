"""What `auto` means: how many workers train, and with how many threads each.

One process without Ray uses a laptop or a single GPU best; several GPUs get a worker each; inside a Ray job, or with
`RAY_ADDRESS` set, the cluster is used: a worker per GPU, or per node where there is none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import torch

from vae_ray.config.experiment import Experiment
from vae_ray.errors import UserError
from vae_ray.machine import num_local_cpus
from vae_ray.models.vae import VAE

SMALL_STEP_FLOPS = 100e6
"""A step below so many operations is faster on one thread than on several (docs/performance.md)."""


def uses_cluster() -> bool:
    """Whether this process is connected to Ray, or will be by RAY_ADDRESS (as in a job)."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def resolve_local(experiment: Experiment, model: VAE) -> Experiment:
    """The experiment with numbers in place of `auto`, where this machine alone computes; `model` may be on meta.

    Raises `UserError` for more CPUs than there are; on Ray workers they are compared with the machine's later.
    """
    workers = experiment.workers
    num_gpus = torch.cuda.device_count() if workers.device != "cpu" else 0
    num = workers.num
    if num == "auto":
        num = num_gpus // workers.gpus if num_gpus // workers.gpus > 1 else 0
    cpus = workers.cpus
    if cpus == "auto":
        max_workers = num[1] if isinstance(num, tuple) else int(num)
        cpus = num_threads(num_local_cpus() // max(1, max_workers), experiment, model)
    elif num == 0 and cpus > num_local_cpus():
        raise UserError(f"workers.cpus: got {cpus}, but this process may use {num_local_cpus()}; leave it at auto")
    return experiment.with_overrides({"workers.num": num, "workers.cpus": cpus})


def with_one_thread_if_small(experiment: Experiment, model: VAE) -> Experiment:
    """The experiment with `workers.cpus` 1 in place of `auto` if a step is too small to be shared out."""
    if experiment.workers.cpus == "auto" and num_threads(2, experiment, model) == 1:
        return experiment.with_overrides({"workers.cpus": 1})
    return experiment


def resolve_on_cluster(experiment: Experiment, nodes: Sequence[Mapping[str, float]]) -> Experiment:
    """The experiment with numbers in place of `auto` on a cluster of `nodes`, each with its total "CPU" and "GPU"."""
    workers = experiment.workers
    gpus = sum(int(node.get("GPU", 0) // workers.gpus) for node in nodes) if workers.device != "cpu" else 0
    with_cpus = [node for node in nodes if node.get("CPU", 0) >= 1]
    num = workers.num
    if num == "auto":
        room = min(gpus or len(with_cpus), experiment.training.global_batch_size)
        num = (1, room) if room > 1 else 1
    cpus: int | str = workers.cpus
    if cpus == "auto":
        max_workers = num[1] if isinstance(num, tuple) else int(num)
        per_node = -(-max_workers // max(1, len(with_cpus)))
        smallest = min((int(node["CPU"]) for node in with_cpus), default=1)
        cpus = max(1, smallest // per_node)
    return experiment.with_overrides({"workers.num": num, "workers.cpus": cpus})


def num_threads(available: int, experiment: Experiment, model: VAE) -> int:
    """torch threads of a worker that has so many cores: one where a step is too small to be shared out.

    Threads wait for each other several times a layer; on a busy machine such a barrier costs more than a small
    product. A function of the experiment alone, so that a resumed run computes as before.
    """
    num_weights = sum(parameter.numel() for parameter in model.network.parameters())
    rows = experiment.training.global_batch_size / max(1, _max_workers(experiment))
    # a product for the forward and two for the backward pass, each a multiplication and an addition a weight and row
    flops = 6 * num_weights * rows
    return 1 if flops < SMALL_STEP_FLOPS else max(1, available)


def _max_workers(experiment: Experiment) -> int:
    num = experiment.workers.num
    return num[1] if isinstance(num, tuple) else int(num) if num != "auto" else 1
