"""Optimizers by name, and the step that applies a gradient."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae_ray.config.sections.optim import OptimConfig
from vae_ray.parallel.group import WorkerGroup, add_up_gradients
from vae_ray.training.schedules import rate_factor


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
MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of these optimizers with the shape of the parameter; the rest is the scalar `step`."""


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer with torch's fused kernel: one pass over memory for all parameters."""
    return OPTIMIZERS[config.optimizer](
        list(parameters),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, *, step: int, num_steps: int, epochs: int) -> float:
    """The learning rate of `step` (0-based) in a run of `num_steps` in `epochs`.

    A linear rise over `warmup_steps`, then the schedule. A function of the step alone, so that a resumed run needs no
    schedule state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * rate_factor(config.schedule, min(1.0, progress), epoch=step * epochs / num_steps)


def gradients_of(
    losses: Mapping[str, Tensor], sets: Mapping[str, Sequence[nn.Parameter]], *, divide_by: int, group: WorkerGroup
) -> dict[str, list[Tensor]]:
    """Of each parameter set the gradient of its loss over `divide_by`, added over all workers. Collective.

    A parameter that the pass did not reach has a gradient of zeros.
    """
    gradients = {}
    for position, (name, parameters) in enumerate(sets.items(), start=1):
        loss = losses[name] / divide_by
        # Times 1, or NaN where the loss is not finite: that poisons the sum of gradients, so all workers know. (As an
        # argument of backward() it would be checked with sympy, whose import takes longer than a short run.)
        poisoned = loss * (1 + 0 * loss.detach())
        is_last = position == len(sets)
        own = torch.autograd.grad(poisoned, list(parameters), retain_graph=not is_last, materialize_grads=True)
        gradients[name] = add_up_gradients(group, own)
    return gradients


def apply_gradients(
    optimizers: Mapping[str, Optimizer], gradients: Mapping[str, list[Tensor]], *, lr: float, grad_clip: float | None
) -> bool:
    """One update of every set; waits for the device. `grad_clip` bounds the 2-norm of each set.

    Returns False, and updates nothing, if the squared norm of any set's gradient is not finite: Adam's second moment of
    such an element would stay infinite. All workers hold the same gradients, so they all decide alike.
    """
    norms: dict[str, Tensor] = {}
    parameters = {name: optimizer.param_groups[0]["params"] for name, optimizer in optimizers.items()}
    gradients = {name: laid_out_like(parameters[name], values) for name, values in gradients.items()}
    for name, values in gradients.items():
        if grad_clip is not None:  # which makes the squares of the elements finite too
            norms[name] = nn.utils.get_total_norm(values)
        elif values[0].device.type == "cpu":
            # the cheapest pass over them: 0.1 ms of an MNIST step of 4; isfinite() takes twenty times as long
            norms[name] = torch.stack([torch.dot(value.reshape(-1), value.reshape(-1)) for value in values]).sum()
        else:
            norms[name] = nn.utils.get_total_norm(values).square()
    if not all(math.isfinite(norm.item()) for norm in norms.values()):
        return False
    for name, optimizer in optimizers.items():
        (parameter_group,) = optimizer.param_groups
        for parameter, gradient in zip(parameters[name], gradients[name], strict=True):
            parameter.grad = gradient
        if grad_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters[name], grad_clip, norms[name])
        parameter_group["lr"] = lr
        optimizer.step()
    return True


def laid_out_like(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Each of `values` in the memory layout of its parameter; torch's fused kernels walk through memory, not indices.

    (`torch.autograd.grad` gives a channels-last gradient of a contiguous weight where the feature maps are
    channels-last; `backward` would have copied it.)
    """
    return [
        value if value.stride() == parameter.stride() else torch.empty_like(parameter).copy_(value)
        for parameter, value in zip(parameters, values, strict=True)
    ]
