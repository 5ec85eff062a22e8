"""Gradients after one sum over workers: each parameter's own part of it, in every pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae_ray.parallel.gradient_sum import sum_after_backward


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


def test_every_pass_ends_with_one_sum_of_all_gradients() -> None:
    """Two workers in one process: what the second has is added to what the first has."""
    alone, first, second = network(), network(), network()
    others, calls = list[Tensor](), list[int]()

    def add_up(vector: Tensor) -> None:
        calls.append(vector.numel())
        vector += torch.cat([other.reshape(-1) for other in others])

    sum_after_backward(first.parameters(), add_up)
    for step in range(3):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        for model in (alone, first, second):
            for parameter in model.parameters():
                parameter.grad = None
        alone(x).square().sum().backward()
        second(x[4:]).square().sum().backward()
        others[:] = gradients(second)
        first(x[:4]).square().sum().backward()
        for found, expected in zip(gradients(first), gradients(alone), strict=True):
            torch.testing.assert_close(found, expected)
    assert calls == [39] * 3, "5*4 + 4 + 4*3 + 3 elements, once a pass"


def test_the_shards_of_a_worker_without_images_are_zeros() -> None:
    model, seen = network(), list[Tensor]()
    sum_after_backward(model.parameters(), lambda vector: seen.append(vector.clone()))
    model(torch.empty(0, 5)).square().sum().backward()
    assert torch.equal(seen[0], torch.zeros(39))
