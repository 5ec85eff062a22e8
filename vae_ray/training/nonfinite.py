"""A batch whose loss or gradient is not finite, kept for whoever wants to know why.

    nonfinite/epoch=0002-step=000017.safetensors    the global batch of epoch 2 whose update would have been the 17th

holds plain tensors, and in its header what else was known:

    from safetensors import safe_open

    with safe_open(file, "pt") as batch:
        batch.get_tensor("pixels")      # (N, C, H, W), uint8: the images, in their order
        batch.get_tensor("indices")     # (N,), int64: which of the training images they are
        batch.get_tensor("eps")         # (N, latent_dim), float32: the noise that z was drawn with
        batch.metadata()                # epoch, step, lr, beta, and the address of the noise in `seeds.stream`

With the run's last checkpoint, `checkpoint.build_model()(pixels.float() / 255, eps)` is nearly what the step saw.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from vae_ray.checkpoints.loading import checkpoint_name
from vae_ray.config.experiment import Experiment
from vae_ray.data.batches import training_noise, training_order
from vae_ray.data.splits import Splits
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.seeds import generator
from vae_ray.storage.atomic import atomic_write
from vae_ray.training.loop import StepSettings


class RollBack(Exception):
    """Training is to go on from the last checkpoint; raised on all ranks."""


def batch_file(run: RunDirectory, *, epoch: int, step: int) -> Path:
    """Where the batch of a step (1-based) is kept."""
    return run.nonfinite / f"{checkpoint_name(epoch, step)}.safetensors"


def save_batch(
    file: Path, experiment: Experiment, splits: Splits, *, epoch: int, step: int, settings: StepSettings
) -> None:
    """Write the global batch of a step (1-based); any rank can, whoever computed which part."""
    seed, size = experiment.run.seed, experiment.training.global_batch_size
    order = training_order(splits.train_indices, seed=seed, epoch=epoch)
    indices = order[(step - 1) * size : step * size].clone()
    address = (*training_noise(epoch), step - 1)
    eps = torch.randn(len(indices), experiment.model.latent_dim, generator=generator(seed, *address))
    content = safetensors.torch.save(
        {"pixels": splits.train.pixels.index_select(0, indices), "indices": indices, "eps": eps},
        metadata={
            "epoch": str(epoch),
            "step": str(step),
            "lr": repr(settings.lr),
            "beta": repr(settings.beta),
            "noise": "/".join(map(str, (seed, *address))),
        },
    )
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, content)
