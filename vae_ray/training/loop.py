"""The loop: one epoch of optimisation, and one exact evaluation. Plain functions over model and batches.

Nothing here knows of Ray, of files or of splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from vae_ray.data.batches import Batch
from vae_ray.errors import Diverged
from vae_ray.evaluation.elbo import autocast
from vae_ray.evaluation.metrics import TermSums
from vae_ray.models.likelihoods import Likelihood
from vae_ray.objectives.elbo import beta_weighted_loss, elbo_terms
from vae_ray.training.optimization import apply_gradient


class StepSettings(NamedTuple):
    """What may change from step to step."""

    lr: float
    beta: float


def _diverge(index: int) -> None:
    raise Diverged(f"step {index + 1}: the loss or its gradient is not finite")


def train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    *,
    likelihood: Likelihood,
    settings: Callable[[int], StepSettings],
    sums: TermSums,
    grad_clip: float | None = None,
    precision: str = "float32",
    first_step: int = 0,
    on_nonfinite: Callable[[int], None] = _diverge,
    after_step: Callable[[int], None] = lambda num_done: None,
) -> None:
    """Optimise over `batches`, adding the terms of every example to `sums` as they were before its update.

    `batches` are those of the epoch from `first_step` on. `settings(i)` gives lr and beta of the epoch's i-th batch;
    `after_step(n)` is told how many are done. `model` comes from `WorkerGroup.wrap`: after backward its gradients are
    the sum over all workers. If the loss on any worker, or the gradient, is not finite, all workers call
    `on_nonfinite(i)` instead of the update; if it returns, the batch is skipped and its terms are not counted.
    """
    model.train()
    for index, (x, eps, global_size) in enumerate(batches, first_step):
        lr, beta = settings(index)
        with autocast(precision, x.device):
            forward = model(x, eps)
        terms = elbo_terms(forward, x, likelihood)
        loss_sum = beta_weighted_loss(terms, beta)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = None
        # The mean over the global batch: shards add up to it, whatever their sizes.
        loss = loss_sum / global_size
        # Times 1, or NaN where the loss is not finite: that poisons the sum of gradients, so all workers know. (As an
        # argument of backward() it would be checked with sympy, whose import takes longer than a short run.)
        (loss * (1 + 0 * loss.detach())).backward()
        if apply_gradient(optimizer, lr=lr, grad_clip=grad_clip):
            sums.add(terms, loss_sum)
        else:
            on_nonfinite(index)
        after_step(index + 1)
