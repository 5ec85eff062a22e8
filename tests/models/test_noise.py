"""Truth: noise is standard normal, and a row's noise does not depend on who draws it, with which other rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vae_ray.models.noise import BLOCK_ROWS, latent_noise, num_elements

SHAPES = ((3,), (2, 4))
NUM_ROWS = 3 * BLOCK_ROWS + 17


def noise(start: int, stop: int, *address: str | int, num_samples: int = 1, seed: int = 1) -> tuple[torch.Tensor, ...]:
    return latent_noise(SHAPES, slice(start, stop), seed, *(address or ("test", 2)), num_samples=num_samples)


@given(st.integers(0, NUM_ROWS), st.integers(0, NUM_ROWS), st.integers(1, 3))
def test_rows_have_the_same_noise_in_every_slice(first: int, last: int, num_samples: int) -> None:
    start, stop = sorted((first, last))
    whole = noise(0, NUM_ROWS, num_samples=num_samples)
    for part, group in zip(noise(start, stop, num_samples=num_samples), whole, strict=True):
        assert part.shape == (num_samples * (stop - start), *group.shape[1:])
        rows = group.unflatten(0, (num_samples, NUM_ROWS))[:, start:stop]
        assert torch.equal(part, rows.flatten(0, 1))


def test_the_first_of_several_samples_is_the_only_one_of_one() -> None:
    for one, several in zip(noise(5, 200), noise(5, 200, num_samples=4), strict=True):
        assert torch.equal(several[:195], one)
        assert not torch.equal(several[195 : 2 * 195], one)


def test_no_two_numbers_of_groups_samples_steps_epochs_and_seeds_are_equal() -> None:
    addresses = [("noise", epoch, step) for epoch in (1, 2) for step in (0, 1)]
    draws = [noise(0, 70, *address, num_samples=2, seed=seed) for address in addresses for seed in (1, 2)]
    values = torch.cat([group.flatten() for draw in draws for group in draw]).double()
    # 12,320 float32 normals: about 5 pairs collide by chance, as 24 bits are drawn for each
    assert len(values.unique()) > len(values) - 40
    assert len(values) == 8 * 2 * 70 * num_elements(SHAPES)


def test_noise_is_standard_normal() -> None:
    n = 100_000
    (eps,) = latent_noise(((2,),), slice(0, n), 4, "moments")
    eps = eps.double()
    # five standard errors of mean, variance and fourth moment (variances 1, 2 and 96)
    for k, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert bool(((eps**k).mean(0) - expected).abs().max() < 5 * (variance / n) ** 0.5)
    assert abs(float((eps[:, 0] * eps[:, 1]).mean())) < 5 / n**0.5
    # rows of neighbouring blocks are independent of each other
    assert abs(float((eps[:-BLOCK_ROWS] * eps[BLOCK_ROWS:]).mean())) < 5 / (2 * n) ** 0.5


@pytest.mark.parametrize("start", [0, 1, BLOCK_ROWS, 100])
def test_no_rows_have_noise_of_no_rows(start: int) -> None:
    assert [group.shape for group in noise(start, start, num_samples=2)] == [(0, 3), (0, 2, 4)]
