"""Everything about an Experiment that can be refused before something starts."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import torch
from torch import nn

from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.config.fields import MAX_CLASSES, MAX_SAMPLES
from vae_ray.config.sections.data import UserData
from vae_ray.data.cache import Progress, name_of
from vae_ray.data.splits import Splits
from vae_ray.errors import UserError, one_line
from vae_ray.evaluation.metrics import ELBO_TERMS
from vae_ray.models.networks import EncoderDecoder
from vae_ray.models.vae import VAE, build_vae, repeated, shape_vae
from vae_ray.objectives import Objective, build_objective
from vae_ray.objectives.base import Losses
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import SingleProcess
from vae_ray.runs.memory import check_memory, is_out_of_memory, saved_for_backward
from vae_ray.storage.filesystems import check_writable
from vae_ray.storage.locations import absolute
from vae_ray.training import placement
from vae_ray.training.trainer import initial_weights


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """The experiment with a name and with absolute paths: workers have working directories of their own."""
    overrides: dict[str, Any] = {}
    flat = experiment.flat()
    # a user's own source may take a `root` that is no path
    root = [] if isinstance(experiment.data, UserData) else ["data.root"]
    for key in (*root, "data.cache_dir", "run.initial_weights"):
        if flat.get(key) is not None:
            overrides[key] = absolute(flat[key], key=key)
    if experiment.run.name is None:
        overrides["run.name"] = f"{name_of(experiment.data)}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
    return experiment.with_overrides(overrides)


class Checked(NamedTuple):
    """What preflight found to be in order."""

    requested: Experiment
    """What was checked, with the size of the validation split that its images have."""
    experiment: Experiment
    """The same with `auto` resolved, as far as it can be here."""
    splits: Splits
    """The images."""
    warnings: list[str]
    """Each on one line, beginning with the section that it is about."""


def preflight(experiment: Experiment, *, progress: Progress | None = None) -> Checked:
    """Check, without starting anything, all that can be known beforehand; the experiment with `auto` resolved.

    On a cluster most of `workers` is resolved later, once it is connected. Raises `UserError` for a storage that cannot
    be written, data that cannot be read or are too small, a model that cannot be built, a user's code that does not
    fit, and workers, CPUs or GPUs that do not exist.
    """
    check_writable(experiment.run.storage)
    splits = Splits.open(experiment, progress=progress)
    experiment = experiment.with_overrides({"data.num_validation": splits.num_validation})
    requested = experiment = with_num_classes(experiment, splits)
    num_training = len(splits.train_indices)
    batch = experiment.training.global_batch_size
    if batch > num_training:
        raise UserError(
            f"training.global_batch_size: got {batch}, should be at most the {num_training} training images; "
            f"for example --training.global-batch-size {min(64, num_training)}"
        )
    model, image_bytes, num_samples = checked_model(experiment, splits.train.image_shape, num_training=num_training)
    for path in experiment.run.callbacks:
        user_code.call(path, {}, key="run.callbacks")
    warnings = [f"data: {line}" for line in splits.dataset.warnings]
    warnings += mismatch(experiment, model.likelihood.support, splits)
    if placement.uses_cluster() and experiment.workers.num != 0:
        return Checked(requested, placement.with_one_thread_if_small(experiment, model), splits, warnings)
    experiment = placement.resolve_local(experiment, model)
    check_workers(experiment, model)
    check_memory(experiment, model, image_bytes=image_bytes, num_samples=num_samples)
    if experiment.workers.num == 0:
        local_device(experiment)
    else:
        from vae_ray.distributed.connection import check_local_resources  # a run without workers needs no Ray

        check_local_resources(experiment)
    return Checked(requested, experiment, splits, warnings)


NUM_EXAMINED = 256
"""Training images, the first ones, by which images are binary or not."""


def mismatch(experiment: Experiment, support: str, splits: Splits) -> list[str]:
    """A line if nats of the likelihood, of that `support`, on these images do not mean what they seem to."""
    pixels = splits.train.first(NUM_EXAMINED)
    is_binary = experiment.data.binarize != "none" or bool(((pixels == 0) | (pixels == 255)).all())
    name = experiment.likelihood.name
    if support == "binary" and not is_binary:
        return [
            f"likelihood: {name} is for binary images; on grey levels its nats compare only with {name}'s on grey "
            "levels; others: --data.binarize dynamic, --likelihood continuous_bernoulli"
        ]
    if support in ("unit interval", "real") and is_binary:
        return [
            f"likelihood: {name} is a density, which has no bound on images of 0 and 1; its nats compare only with "
            f"{name}'s; for binary images: --likelihood bernoulli"
        ]
    return []


def with_num_classes(experiment: Experiment, splits: Splits) -> Experiment:
    """The experiment of a conditional VAE with the number of classes that its images have.

    Raises `UserError` if they lack the labels of `model.condition`, or not all have one.
    """
    name, given = experiment.model.condition, experiment.model.num_classes
    if name is None:
        return experiment
    every = [split.columns.get(name) for split in splits.dataset.splits.values()]
    if any(values is None for values in every):
        there = ", ".join(sorted(splits.train.columns))
        raise UserError(
            f"model.condition: got {name!r}, but the images have {f'only {there}' if there else 'no labels'}; "
            + (f"for example --model.condition {min(splits.train.columns)}" if there else "leave it out")
        )
    values = torch.cat([values for values in every if values is not None])
    if values.is_floating_point():
        raise UserError(
            f"model.condition: {name!r} has numbers such as {float(values[0]):g}, should be classes 0, 1, ..."
        )
    if num_without := int((values < 0).sum()):
        raise UserError(
            f"model.condition: {num_without} of {len(values)} images have no {name!r}, all should have one; leave them "
            "out of the data, or leave out model.condition"
        )
    least = max(int(values.max()) + 1, len(splits.dataset.description.names.get(name, ())))
    if least > MAX_CLASSES:
        raise UserError(f"model.condition: {name!r} has values up to {least - 1}, should be classes 0, 1, ...")
    if given is not None and given < least:
        raise UserError(f"model.num_classes: got {given}, but {name!r} has {least} classes; leave it out")
    return experiment.with_overrides({"model.num_classes": given or least})


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
            "torch.nn.GroupNorm in the network, or one worker"
        )


LARGEST_CHECKED_ON_CPU = 50_000_000
"""Weights of a model whose shapes are checked by a real pass. A pass on the meta device imports torch's compiler, which
takes three seconds; a real one of a small model takes milliseconds."""
MOST_PIXELS_ON_CPU = 2**20
"""Of all rows of that pass together, in all channels: layers take some hundred times that in memory."""
CHECKED_ROWS = 3
"""Unlike any other dimension that is likely."""


class CheckedModel(NamedTuple):
    """What a pass of a few images found."""

    model: VAE
    """Without memory for its weights where possible."""
    image_bytes: int
    """Memory that one image takes from the forward to the backward pass, at least."""
    num_samples: int
    """Of an image, in the objective."""


def checked_model(experiment: Experiment, image_shape: tuple[int, int, int], *, num_training: int) -> CheckedModel:
    """The model after one pass that checks every shape.

    Raises `UserError` that names the network, prior, likelihood or objective if it does not fit.
    """
    objective = build_objective(experiment.objective)
    if (batch := experiment.training.global_batch_size) < objective.min_images:
        raise UserError(
            f"training.global_batch_size: got {batch}, but {experiment.objective.name} compares the images of a batch, "
            f"should be at least {objective.min_images}; for example --training.global-batch-size 64"
        )
    num_samples = objective.num_samples
    sizes = f"images of shape {image_shape} and model.latent_dim {experiment.model.latent_dim}"
    if num_samples > MAX_SAMPLES:  # a user's own; of ours the field says so
        raise UserError(f"objective.num_samples: got {num_samples}, should be at most {MAX_SAMPLES}")
    with misfit_named("model.network", f"{experiment.model.network.name} does not fit {sizes}"):
        model = shape_vae(experiment, image_shape)
    if experiment.run.initial_weights is not None:
        initial_weights(str(experiment.run.initial_weights), model)
    num_pixels = CHECKED_ROWS * num_samples * math.prod(image_shape)
    is_small = (
        sum(parameter.numel() for parameter in model.parameters()) <= LARGEST_CHECKED_ON_CPU
        and num_pixels <= MOST_PIXELS_ON_CPU
    )
    with torch.device("cpu"):
        checked = build_vae(experiment, image_shape, seed=0) if is_small else model
    is_meta = any(parameter.is_meta for parameter in checked.parameters())  # not a user's own code
    with torch.device("meta" if is_meta else "cpu"), torch.enable_grad():
        image_bytes = _check_pass(checked, experiment, objective, num_training=num_training)
    return CheckedModel(model, image_bytes, num_samples)


def _check_pass(model: VAE, experiment: Experiment, objective: Objective, *, num_training: int) -> int:
    """One pass of three images through `model` on torch's current default device, each part checked by itself.

    Returns the bytes that are kept for the backward pass, for each image.
    """
    config, shape = experiment.model, model.image_shape
    num = CHECKED_ROWS * objective.num_samples
    with misfit_named("objective", f"{experiment.objective.name} fails"):
        sets = objective.parameter_sets(model)
    if next(model.network.parameters(), None) is None or not any(sets.values()):
        raise UserError(f"model.network: {config.network.name} has no weights to train")
    x = torch.zeros(CHECKED_ROWS, *shape)
    latents = tuple(torch.zeros(num, *each) for each in model.latent_shapes)
    condition = model.classes_in_turn(CHECKED_ROWS)
    repeated_condition = None if condition is None else repeated(condition, objective.num_samples)
    named = functools.partial(misfit_named, num_samples=objective.num_samples)
    network = f"{config.network.name} does not fit images of shape {shape} and model.latent_dim {config.latent_dim}"
    with named("model.prior", f"{config.prior.name} is not a distribution of {num} rows"):
        prior = model.prior(num, x) if condition is None else model.prior(num, x, repeated_condition)
        _check_shape("the mean", prior.mean, latents[0].shape)
        _check_shape("a sample", prior.rsample(latents[0]), latents[0].shape)
        _check_shape("log_prob", prior.log_prob(latents[0]), (num,))
    with named("model.network", network):
        if isinstance(model.network, EncoderDecoder):
            num_channels, *sides = model.latent_shapes[0]
            (encoded,) = model.network.bottom_up(x, condition)
            _check_shape("the encoder's output", encoded, (CHECKED_ROWS, 2 * num_channels, *sides))
        with saved_for_backward((CHECKED_ROWS, num)) as saved_by_model:
            output = model(x, latents, objective.num_samples, condition)
        params_shape = (num, model.likelihood.num_params(shape[0]), *shape[1:])
        _check_shape("the decoder's output", output.params, params_shape)
    with named("likelihood", f"{experiment.likelihood.name} does not fit images of shape {shape}"):
        images = x.repeat(objective.num_samples, 1, 1, 1)
        _check_shape("log_prob", model.likelihood.log_prob(output.params, images), (num,))
        _check_shape("the mean", model.likelihood.mean(output.params), images.shape)
    batch = GlobalBatch(CHECKED_ROWS, slice(0, CHECKED_ROWS), num_training, SingleProcess(x.device))
    with named("objective", f"{experiment.objective.name} fails on a batch"):
        with saved_for_backward((CHECKED_ROWS, num)) as saved_by_objective:
            losses = objective.losses(output, x, model.likelihood, objective.settings(0.0, 0), batch)
        if not isinstance(losses, Losses):
            raise TypeError(f"returned a {type(losses).__name__}, should return vae_ray.objectives.base.Losses")
        terms = ("loss", *ELBO_TERMS, *objective.terms)
        for name in [*(sets.keys() - losses.loss.keys()), *(set(terms) - losses.terms.keys())]:
            raise KeyError(f"its Losses have no {name!r}; needs the losses {[*sets]} and the terms {[*terms]}")
        for name in sets:
            _check_shape(f"the loss of {name!r}", losses.loss[name], ())
            if not sets[name] or not losses.loss[name].requires_grad:
                raise ValueError(f"its loss of {name!r} does not depend on any weight")
        for name in terms:
            _check_shape(f"the term {name!r}", losses.terms[name], (CHECKED_ROWS,))
    return sum((saved_by_model | saved_by_objective).values()) // CHECKED_ROWS


@contextlib.contextmanager
def misfit_named(key: str, what: str, *, num_samples: int = 1) -> Iterator[None]:
    """In its body an error (of shapes, of a user's code) is a `UserError` that begins with `key`.

    Memory that a pass with several samples is refused is the samples' fault, whoever asked for the last of it.
    """
    try:
        yield
    except UserError:
        raise
    except user_code.FAILURES as error:
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        if is_out_of_memory(error):
            key = "objective.num_samples" if num_samples > 1 else key
            what = f"got {num_samples}, too many for the memory" if num_samples > 1 else "does not fit into memory"
        raise UserError(f"{key}: {what} ({reason})") from None


def _check_shape(what: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        num = expected[0] if expected else None
        got, should = (
            f"({', '.join('N' if not place and n == num else str(n) for place, n in enumerate(shape))})"
            for shape in (tensor.shape, expected)
        )
        raise ValueError(f"{what} has shape {got}, should be {should}")


def local_device(experiment: Experiment) -> torch.device:
    """The device of a run in this process; raises `UserError` for a GPU that does not exist."""
    device = experiment.workers.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("workers.device: got 'cuda', but this machine has no GPU; for example --workers.device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
