"""A loss or gradient that is not finite: what to do about it, and the batch, kept for analysis.

    nonfinite/epoch=0002-step=000017.safetensors    the global batch of epoch 2 whose update would have been the 17th

holds plain tensors, and the settings of the step in its header:

    from safetensors import safe_open

    with safe_open(file, "pt") as batch:
        batch.get_tensor("pixels")      # (N, C, H, W), uint8: the images, in their order
        batch.get_tensor("indices")     # (N,), int64: which of the training images they are
        batch.get_tensor("eps.0")       # (k * N, *shape), float32: the noise of z, of each latent group
        batch.metadata()                # epoch, step, lr, beta or the objective's other settings

The first `MAX_FILES` batches of a run are kept.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import safetensors.torch
import torch

from vae_ray.checkpoints.listing import checkpoint_name
from vae_ray.config.experiment import Experiment
from vae_ray.config.sections.training import RollBackOnNonfinite, SkipNonfinite
from vae_ray.data.batches import Loader
from vae_ray.errors import Diverged
from vae_ray.models.noise import latent_noise
from vae_ray.objectives.base import Losses
from vae_ray.parallel.group import WorkerGroup
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.atomic import atomic_write
from vae_ray.training.loop import NOISE, StepSettings
from vae_ray.training.state import TrainState

logger = logging.getLogger(__name__)

MAX_FILES = 10
"""Batches kept in `nonfinite/`."""
GRADIENT = "gradient"
LARGE_WEIGHT = 1e4
"""A weight of the objective from which on it is the likeliest cause."""


class RollBack(Exception):
    """Training is to continue from the last checkpoint; raised on all ranks."""


def nonfinite_term(losses: Losses, group: WorkerGroup) -> str:
    """The first of a step's terms that is not finite on some worker, `GRADIENT` if all are. Collective.

    In the order in which they enter the loss: distortion, rate, the objective's own terms, loss.
    """
    sums = {name: values.detach().sum() for name, values in losses.terms.items()}
    sums["loss"] = sums["loss"] + sum(loss.detach() for loss in losses.loss.values())
    names = sorted(sums, key=lambda name: (name == "loss", name not in ("distortion", "rate")))
    flags = [not math.isfinite(sums[name]) for name in names]
    counts = group.sum(torch.tensor(flags, dtype=torch.float64, device=group.device)).tolist()
    return next((name for name, count in zip(names, counts, strict=True) if count), GRADIENT)


def advice(experiment: Experiment, state: TrainState, term: str) -> str:
    """What to try, that the experiment does not have yet, against a `term` (or `GRADIENT`) that is not finite."""
    flat, optim = experiment.flat(), experiment.optim
    weights = {
        key: value
        for key, value in flat.items()
        if key.startswith("objective.") and isinstance(value, int | float) and abs(value) >= LARGE_WEIGHT
    }
    scale = flat.get("likelihood.scale")
    if weights:
        key = max(weights, key=lambda key: abs(weights[key]))
        return f"try a smaller --{key} than {weights[key]:g}"
    if isinstance(scale, float) and scale < 0.01 and term in ("distortion", GRADIENT):
        return f"try a larger --likelihood.scale than {scale:g}"
    if not any(optimizer.state for optimizer in state.optimizers.values()):  # so that the learning rate is no cause
        culprits = "--run.initial-weights" if experiment.run.initial_weights else "--model.network and --likelihood"
        return f"no update was made before: look at {culprits}"
    tries = [f"a smaller --optim.lr than {optim.lr:g}"]
    if optim.grad_clip is None:
        tries.append("--optim.grad-clip 100")
    elif optim.warmup_steps == 0:
        tries.append("--optim.warmup-steps 100")
    if experiment.training.precision != "float32":
        tries.append("--training.precision float32")
    return f"try {' or '.join(tries)}"


def apply_policy(
    experiment: Experiment, state: TrainState, what: str, *, advice: str, can_skip: bool, returns_to: str | None
) -> None:
    """Return if the batch is to be skipped, else raise `RollBack` or `Diverged`; the same on all ranks.

    `returns_to` names, on rank 0, where a rollback leads; the other ranks say nothing.
    """
    policy, num_before = experiment.training.nonfinite, state.progress.num_nonfinite
    rolls_back = isinstance(policy, RollBackOnNonfinite)
    if not isinstance(policy, SkipNonfinite | RollBackOnNonfinite) or not (can_skip or rolls_back):
        raise Diverged(f"{what}; {advice}")
    if num_before >= policy.limit:
        raise Diverged(f"{what}; {num_before} times before (training.nonfinite.limit); {advice}")
    state.progress.num_nonfinite = num_before + 1
    if returns_to is not None:
        action = "skipped"
        if isinstance(policy, RollBackOnNonfinite):
            action = f"returning to {returns_to}"
            action += " with a smaller learning rate" if policy.lr_factor < 1 else " with the same learning rate"
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
    """Write the global batch of a step (1-based), unless `MAX_FILES` are kept; on any rank. Raises `OSError`."""
    file.parent.mkdir(exist_ok=True)
    if not file.exists() and len(list(file.parent.glob("*.safetensors"))) >= MAX_FILES:
        return
    indices = next(loader.steps(epoch, global_batch_size=global_batch_size, first_step=step - 1)).clone()
    shapes, num_samples = state.model.latent_shapes, state.objective.num_samples
    address = (NOISE, epoch, step - 1)
    noise = latent_noise(shapes, slice(0, len(indices)), loader.seed, *address, num_samples=num_samples)
    content = safetensors.torch.save(
        {
            "pixels": loader.split.gather(indices),
            "indices": indices,
            **{f"labels.{name}": values[indices] for name, values in loader.split.columns.items()},
            **{f"eps.{group}": eps.contiguous() for group, eps in enumerate(noise)},
        },
        metadata={
            "epoch": str(epoch),
            "step": str(step),
            "lr": repr(settings.lr),
            **{name: repr(value) for name, value in settings.objective.items()},
        },
    )
    atomic_write(file, content)
