"""Everything about an Experiment that can be refused before something starts."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import torch
from torch import nn

from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.config.sections import MnistData
from vae_ray.data.arrow_store import file_name
from vae_ray.data.splits import Splits
from vae_ray.errors import UserError
from vae_ray.models.noise import num_elements
from vae_ray.models.vae import VAE, build_vae, new_vae
from vae_ray.objectives import build_objective
from vae_ray.storage.locations import absolute, check_writable
from vae_ray.training import placement
from vae_ray.training.trainer import initial_weights


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """The experiment with a name and with absolute paths: workers have working directories of their own."""
    overrides: dict[str, Any] = {}
    if isinstance(experiment.data, MnistData) and experiment.data.root is not None:
        overrides["data.root"] = absolute(experiment.data.root)
    if experiment.data.cache_dir is not None:
        overrides["data.cache_dir"] = experiment.data.cache_dir.expanduser().absolute()
    if experiment.run.initial_weights is not None:
        overrides["run.initial_weights"] = absolute(experiment.run.initial_weights)
    if experiment.run.name is None:
        overrides["run.name"] = f"{file_name(experiment.data)}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
    return experiment.with_overrides(overrides)


def preflight(experiment: Experiment) -> Experiment:
    """Check, without starting anything, all that can be known beforehand; the experiment with `auto` resolved.

    On a cluster `workers` are resolved later, once it is connected. Raises `UserError` for a storage that cannot be
    written, data that cannot be read or are too small, a model that cannot be built, a user's code that does not fit,
    and workers, CPUs or GPUs that do not exist.
    """
    check_writable(experiment.run.storage)
    splits = Splits.open(experiment)
    num_training = len(splits.train_indices)
    batch = experiment.training.global_batch_size
    if batch > num_training:
        raise UserError(
            f"training.global_batch_size: got {batch}, should be at most the {num_training} training images; "
            f"for example --training.global-batch-size {min(64, num_training)}"
        )
    model = checked_model(experiment, splits.train.image_shape)
    for path in experiment.run.callbacks:
        user_code.call(path, {}, key="run.callbacks")
    if placement.uses_cluster() and experiment.workers.num != 0:
        return experiment
    experiment = placement.resolve_local(experiment, model)
    check_workers(experiment, model)
    if experiment.workers.num == 0:
        local_device(experiment)
    else:
        from vae_ray.distributed.connection import check_local_resources  # a run without workers needs no Ray

        check_local_resources(experiment)
    return experiment


def check_workers(experiment: Experiment, model: VAE) -> None:
    """Refuse workers (resolved ones) of which not all have an image, and BatchNorm on more than one."""
    batch = experiment.training.global_batch_size
    if experiment.workers.max > batch:
        raise UserError(
            f"workers.num: got {experiment.workers.max}, should be at most training.global_batch_size ({batch}), "
            f"so that every worker has an image; for example --workers.num {batch}"
        )
    normalization = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if normalization and experiment.workers.max > 1:
        raise UserError(
            f"workers.num: got {experiment.workers.max}, but the network has {type(normalization[0]).__name__}, which "
            "couples the images of one worker's shard, so that the result would depend on the number of workers; use "
            "torch.nn.GroupNorm in the network, or --workers.num 0"
        )


LARGEST_CHECKED_ON_CPU = 50_000_000
"""Weights of a model whose shapes are checked by a real pass. A pass on the meta device imports torch's compiler, which
takes three seconds; a real one of a small model takes milliseconds."""


def checked_model(experiment: Experiment, image_shape: tuple[int, int, int]) -> VAE:
    """The model without memory for its weights, after one pass that checks every shape; raises `UserError`."""
    build_objective(experiment.objective)
    try:
        with torch.device("meta"):
            model = new_vae(experiment, image_shape)
        if experiment.run.initial_weights is not None:
            initial_weights(str(experiment.run.initial_weights), model)
        is_small = sum(parameter.numel() for parameter in model.parameters()) <= LARGEST_CHECKED_ON_CPU
        num = 3  # rows; unlike any other dimension that is likely
        with torch.device("cpu" if is_small else "meta"), torch.inference_mode():
            checked = build_vae(experiment, image_shape, seed=0) if is_small else model
            x = torch.zeros(num, *image_shape)
            params = checked(x, tuple(torch.zeros(num, *shape) for shape in checked.latent_shapes)).params
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, OverflowError, MemoryError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.network: {experiment.model.network.name} does not fit images of shape {image_shape} and "
            f"model.latent_dim {experiment.model.latent_dim} ({type(error).__name__}: {reason})"
        ) from None
    expected = (num, model.likelihood.num_params(image_shape[0]), *image_shape[1:])
    if tuple(params.shape) != expected:
        raise UserError(
            f"model.network: the decoder of {experiment.model.network.name} gives parameters of shape "
            f"(N, {', '.join(map(str, params.shape[1:]))}), should be (N, {', '.join(map(str, expected[1:]))})"
        )
    assert num_elements(model.latent_shapes) > 0
    return model


def local_device(experiment: Experiment) -> torch.device:
    """The device of a run in this process; raises `UserError` for a GPU that does not exist."""
    wanted = experiment.workers.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("workers.device: got 'cuda', but this machine has no GPU; for example --workers.device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
