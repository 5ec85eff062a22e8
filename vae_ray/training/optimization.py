"""Optimizers by name, and the step that applies a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from vae_ray.config import OptimConfig
from vae_ray.schedules import scheduled

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer with torch's fused kernel: one pass over memory for all parameters."""
    return OPTIMIZERS[config.optimizer](list(parameters), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: OptimConfig, *, step: int, num_steps: int) -> float:
    """The learning rate of `step` (0-based) in a run of `num_steps`."""
    return scheduled(config.lr, config.schedule, step=step, num_steps=num_steps, warmup_steps=config.warmup_steps)


def apply_gradient(optimizer: Optimizer, *, lr: float, grad_clip: float | None) -> None:
    """One update with the gradients of the global mean that backward left on the parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(group["params"], grad_clip)
    optimizer.step()
