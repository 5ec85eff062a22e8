"""Gradients that add up over CPU workers: one sum at the end of each backward pass.

DistributedDataParallel does the same and overlaps sums with products, for which a CPU worker has no second engine. And
it starts torch's compiler, which takes each worker some four seconds of its processor before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def sum_after_backward(parameters: Iterable[nn.Parameter], add_up: Callable[[Tensor], None]) -> None:
    """Have every backward pass end with `add_up` of all gradients, in place, as one contiguous vector.

    Afterwards each parameter's `grad` is a view of that vector. Every pass must reach every parameter.
    """
    _SumAfterBackward(list(parameters), add_up)


class _SumAfterBackward:
    def __init__(self, parameters: list[nn.Parameter], add_up: Callable[[Tensor], None]) -> None:
        self._parameters, self._add_up = parameters, add_up
        self._vector = torch.empty(sum(parameter.numel() for parameter in parameters))
        parts = self._vector.split([parameter.numel() for parameter in parameters])
        self._views = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        self._num_ready = 0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, parameter: Tensor) -> None:
        self._num_ready += 1
        if self._num_ready < len(self._parameters):
            return
        self._num_ready = 0
        gradients = [each.grad.reshape(-1) for each in self._parameters if each.grad is not None]
        torch.cat(gradients, out=self._vector)
        self._add_up(self._vector)
        for each, view in zip(self._parameters, self._views, strict=True):
            each.grad = view
