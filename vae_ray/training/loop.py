"""The loop: one epoch of optimisation. A plain function over state and batches.

Nothing here knows of Ray, of files or of splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vae_ray.data.batches import Batch
from vae_ray.errors import Diverged
from vae_ray.evaluation.elbo import autocast
from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.dropout import dropout_layers, dropout_masks
from vae_ray.models.noise import latent_noise
from vae_ray.models.vae import repeated
from vae_ray.objectives.base import Losses
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import WorkerGroup, broadcast_buffers
from vae_ray.training.optimization import apply_gradients, gradients_of
from vae_ray.training.state import TrainState

NOISE = "training noise"


class StepSettings(NamedTuple):
    """What may change from step to step."""

    lr: float
    objective: dict[str, float]
    """Scheduled values of the objective, such as beta."""


@dataclass(frozen=True)
class EpochSettings:
    """What is the same in every step of an epoch."""

    seed: int
    epoch: int
    """From 1; part of the noise's address."""
    num_data: int
    """Images in the training split."""
    grad_clip: float | None = None
    precision: str = "float32"


def _diverge(index: int, losses: Losses) -> None:
    raise Diverged(f"step {index + 1}: the loss or its gradient is not finite")


@torch.enable_grad()  # whatever a user's callback has set
def train_epoch(
    state: TrainState,
    batches: Iterable[Batch],
    group: WorkerGroup,
    *,
    epoch: EpochSettings,
    step_settings: Callable[[int], StepSettings],
    sums: TermSums,
    first_step: int = 0,
    on_nonfinite: Callable[[int, Losses], None] = _diverge,
    after_step: Callable[[int], None] = lambda num_done: None,
    computing: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext(),
) -> None:
    """Optimise over `batches`, adding the terms of every example to `sums` as they were before its update. Collective.

    `batches` are those of the epoch from `first_step` on. `step_settings(i)` gives the settings of the epoch's i-th
    step; `after_step(n)` is called when n of them are done. If the loss on any worker, or the gradient, is not finite,
    all workers call `on_nonfinite(i, losses)` instead of the update, with their own losses; if it returns, the batch is
    skipped and not counted. `computing(i)` is entered around the model's passes of a step.
    """
    model, objective = state.model, state.objective
    model.train()
    sets, dropouts = objective.parameter_sets(model), dropout_layers(model)
    for index, (x, rows, global_size, labels) in enumerate(batches, first_step):
        lr, settings = step_settings(index)
        num_samples = objective.num_samples
        noise = latent_noise(
            *(model.latent_shapes, rows, epoch.seed, NOISE, epoch.epoch, index),
            num_samples=num_samples,
            device=x.device,
        )
        masks = dropout_masks(
            *(dropouts, rows, epoch.seed, epoch.epoch, index), num_samples=num_samples, device=x.device
        )
        with computing(index):
            with autocast(epoch.precision, x.device), masks:
                output = model(x, noise, num_samples, model.condition(labels))
            batch = GlobalBatch(global_size, rows, epoch.num_data, group)
            model.likelihood.fit(output.params.detach(), repeated(x, num_samples), batch)
            losses = objective.losses(output, x, model.likelihood, settings, batch)
            # the mean over the global batch: shards add up to it, whatever their sizes
            gradients = gradients_of(losses.loss, sets, divide_by=global_size, group=group)
        if apply_gradients(state.optimizers, gradients, lr=lr, grad_clip=epoch.grad_clip):
            sums.add(losses.terms)
            objective.update(losses, batch)
            broadcast_buffers(group, model)
            broadcast_buffers(group, objective)
            if state.averaged is not None:
                state.averaged.update(model)
        else:
            on_nonfinite(index, losses)
        after_step(index + 1)
