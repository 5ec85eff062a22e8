"""A loss or gradient that is not finite: what to do about it, and the batch, kept for analysis.

    nonfinite/epoch=0002-step=000017.safetensors    the global batch of epoch 2 whose update would have been the 17th

holds plain tensors, and the settings of the step in its header:

    from safetensors import safe_open

    with safe_open(file, "pt") as batch:
        batch.get_tensor("pixels")      # (N, C, H, W), uint8: the images, in their order
        batch.get_tensor("indices")     # (N,), int64: which of the training images they are
        batch.get_tensor("eps.0")       # (k * N, *shape), float32: the noise of z, of each latent group
        batch.metadata()                # epoch, step, lr, beta or the objective's other settings
"""

from __future__ import annotations

import logging
from pathlib import Path

import safetensors.torch

from vae_ray.checkpoints.listing import checkpoint_name
from vae_ray.config.fields import Section
from vae_ray.config.sections import RollBackOnNonfinite, SkipNonfinite
from vae_ray.data.batches import Loader
from vae_ray.errors import Diverged
from vae_ray.models.noise import latent_noise
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.atomic import atomic_write
from vae_ray.training.loop import NOISE, StepSettings
from vae_ray.training.state import TrainState

logger = logging.getLogger(__name__)

ADVICE = "try a smaller --optim.lr or --optim.grad-clip 100"


class RollBack(Exception):
    """Training is to continue from the last checkpoint; raised on all ranks."""


def apply_policy(policy: Section, state: TrainState, what: str, *, can_skip: bool, is_rank_0: bool) -> None:
    """Return if the batch is to be skipped, else raise `RollBack` or `Diverged`; the same on all ranks."""
    num_before = state.progress.num_nonfinite
    rolls_back = isinstance(policy, RollBackOnNonfinite)
    if not isinstance(policy, SkipNonfinite | RollBackOnNonfinite) or not (can_skip or rolls_back):
        raise Diverged(f"{what}; {ADVICE}")
    if num_before >= policy.limit:
        raise Diverged(f"{what}; {num_before} times before (training.nonfinite.limit); {ADVICE}")
    state.progress.num_nonfinite = num_before + 1
    if is_rank_0:
        action = "returning to the last checkpoint with a smaller learning rate" if rolls_back else "skipped"
        logger.warning("%s: %s (%d of at most %d times)", what, action, num_before + 1, policy.limit)
    if rolls_back:
        raise RollBack


def batch_file(run: RunDirectory, *, epoch: int, step: int) -> Path:
    """Where the batch of a step (1-based) is kept."""
    return run.nonfinite / f"{checkpoint_name(epoch, step)}.safetensors"


def save_batch(
    file: Path,
    loader: Loader,
    state: TrainState,
    *,
    epoch: int,
    step: int,
    global_batch_size: int,
    settings: StepSettings,
) -> None:
    """Write the global batch of a step (1-based); can be called on any rank. Raises `OSError`."""
    indices = loader.order(epoch)[(step - 1) * global_batch_size : step * global_batch_size].clone()
    shapes, num_samples = state.model.latent_shapes, state.objective.num_samples
    address = (NOISE, epoch, step - 1)
    noise = latent_noise(shapes, slice(0, len(indices)), loader.seed, *address, num_samples=num_samples)
    content = safetensors.torch.save(
        {
            "pixels": loader.pixels.index_select(0, indices),
            "indices": indices,
            **{f"eps.{group}": eps.contiguous() for group, eps in enumerate(noise)},
        },
        metadata={
            "epoch": str(epoch),
            "step": str(step),
            "lr": repr(settings.lr),
            **{name: repr(value) for name, value in settings.objective.items()},
        },
    )
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, content)
