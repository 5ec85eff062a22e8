"""Optimizers by name, and the step that applies a gradient."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from vae_ray.config.experiment import OptimConfig
from vae_ray.training.schedules import scheduled


class WithoutCompiler(Optimizer):
    """torch's optimizers as they are, without a start of torch's compiler.

    torch marks these methods for `torch.compile`, and to do so imports it at their first call: 1,600 modules and three
    seconds of a processor, in each process that trains. Nothing is compiled here; below are the methods themselves.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)


class Adam(WithoutCompiler, torch.optim.Adam):
    """Kingma & Ba 2014, arXiv:1412.6980."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class AdamW(WithoutCompiler, torch.optim.AdamW):
    """Loshchilov & Hutter 2017, arXiv:1711.05101."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW}


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer with torch's fused kernel: one pass over memory for all parameters."""
    return OPTIMIZERS[config.optimizer](list(parameters), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: OptimConfig, *, step: int, num_steps: int) -> float:
    """The learning rate of `step` (0-based) in a run of `num_steps`."""
    return scheduled(config.lr, config.schedule, step=step, num_steps=num_steps, warmup_steps=config.warmup_steps)


def apply_gradient(optimizer: Optimizer, *, lr: float, grad_clip: float | None) -> bool:
    """One update with the gradients of the global mean that backward left on the parameters; waits for the device.

    Returns False, and updates nothing, if an element of them (or their sum or norm) is not finite. All workers hold
    the same sum of gradients, so they all decide alike.
    """
    (group,) = optimizer.param_groups
    gradients = [parameter.grad for parameter in group["params"]]
    if grad_clip is None and gradients[0].device.type == "cpu":
        # A sum is finite only if all its elements are, and the cheapest pass over them: 0.1 ms of the notebook's
        # step of 4; their norm takes twice as long, isfinite() twenty times.
        probe = torch.stack([gradient.sum() for gradient in gradients]).sum()
    else:
        probe = nn.utils.get_total_norm(gradients)
    if not math.isfinite(probe.item()):
        return False
    if grad_clip is not None:
        nn.utils.clip_grads_with_norm_(group["params"], grad_clip, probe)
    group["lr"] = lr
    optimizer.step()
    return True
