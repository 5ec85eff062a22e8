"""Exact evaluation of one split, the same during training and afterwards."""

from __future__ import annotations

from vae_ray.config import Experiment
from vae_ray.data.batches import evaluation_batches
from vae_ray.data.splits import Splits
from vae_ray.likelihoods import LIKELIHOODS
from vae_ray.models.vae import VAE
from vae_ray.training.group import WorkerGroup, shards_of
from vae_ray.training.loop import evaluate
from vae_ray.training.metrics import TermSums, labelled


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
