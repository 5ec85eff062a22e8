"""Exact evaluation of one split, the same during training and afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import nn

from vae_ray.config.experiment import Experiment
from vae_ray.data.batches import Batch, evaluation_batches
from vae_ray.data.splits import Splits
from vae_ray.evaluation.metrics import TermSums, labelled
from vae_ray.models.likelihoods import LIKELIHOODS, Likelihood
from vae_ray.models.vae import VAE
from vae_ray.objectives.elbo import beta_weighted_loss, elbo_terms
from vae_ray.parallel.group import WorkerGroup, shards_of


def evaluate_split(
    model: VAE, experiment: Experiment, splits: Splits, split: str, group: WorkerGroup
) -> dict[str, float]:
    """`{"test/nelbo": ..., "test/distortion": ..., ...}` in nats for `split` "train", "val" or "test".

    Every image once over the whole group, one sampled z each with noise that depends on `run.seed` alone.
    `model` is the unwrapped one. All ranks must call it.
    """
    pixels, indices = splits.select(split)
    sums = TermSums(group.device)
    batches = evaluation_batches(
        pixels,
        indices,
        seed=experiment.run.seed,
        batch_size=experiment.training.evaluation_batch_size,
        latent_dim=experiment.model.latent_dim,
        shards=shards_of(group),
    )
    evaluate(
        model,
        batches,
        likelihood=LIKELIHOODS[experiment.model.likelihood](experiment.model),
        beta=experiment.objective.beta,
        sums=sums,
        precision=experiment.training.precision,
    )
    return labelled(split, sums.reduced(group))


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which the model runs forward, for `training.precision`."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    likelihood: Likelihood,
    beta: float,
    sums: TermSums,
    precision: str = "float32",
) -> None:
    """Add the terms of every example to `sums`: one sampled z each, over the unwrapped model."""
    model.eval()
    for x, eps, _ in batches:
        with autocast(precision, x.device):
            forward = model(x, eps)
        terms = elbo_terms(forward, x, likelihood)
        sums.add(terms, beta_weighted_loss(terms, beta))
