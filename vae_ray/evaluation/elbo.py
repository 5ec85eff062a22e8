"""Exact evaluation of the ELBO on one split, the same during training and afterwards."""

from __future__ import annotations

import contextlib

import torch

from vae_ray.data.batches import Loader
from vae_ray.evaluation.metrics import ELBO_TERMS, TermSums, bits_per_dim, labelled
from vae_ray.models.noise import EVALUATION_NOISE, latent_noise
from vae_ray.models.vae import VAE
from vae_ray.objectives.base import elbo_terms
from vae_ray.parallel.group import WorkerGroup


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which the model runs forward, for `training.precision`."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@torch.inference_mode()
def evaluate_split(
    model: VAE, loader: Loader, split: str, group: WorkerGroup, *, batch_size: int, precision: str = "float32"
) -> dict[str, float]:
    """`{"test/nelbo": ..., "test/distortion": ..., "test/rate": ...}` in nats per image of the split in `loader`.

    Of a model with several latent groups also the rate of each, "test/rate_group_1", ..., from the top.
    Every image once over the whole group, with one sampled z each. The noise depends on the seed and on the image's
    position in the split: neither on the epoch, nor on the batch size, nor on the number of workers. Collective.
    A likelihood over 256 levels has "test/bits_per_dim" too; densities have none.
    """
    model.eval()
    num_groups = len(model.latent_shapes)
    by_group = [f"rate_group_{number}" for number in range(1, num_groups + 1)] if num_groups > 1 else []
    sums = TermSums((*ELBO_TERMS, *by_group), group.device)
    for x, rows, _, labels in loader.evaluation(batch_size=batch_size):
        noise = latent_noise(model.latent_shapes, rows, loader.seed, EVALUATION_NOISE, device=x.device)
        with autocast(precision, x.device):
            output = model(x, noise, condition=model.condition(labels))
        distortion, rate = elbo_terms(output, x, model.likelihood)
        rates = {term: output.groups[number].rate() for number, term in enumerate(by_group)}
        sums.add({"distortion": distortion[0], "rate": rate[0], **rates})
    means = sums.reduced(group).values
    if model.likelihood.support == "256 levels":
        means["bits_per_dim"] = bits_per_dim(means["nelbo"], model.image_shape)
    return labelled(split, means)
