"""Truth: a row's dropout mask depends on its address alone, and training with it on the seed, not on the workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.thread_workers import results_on_threads
from tests.training.small import ALONE, NETWORKS, begin, experiment, record_gradients, run_epoch
from vae_ray import Experiment
from vae_ray.models.dropout import Dropout, dropout_layers, dropout_masks
from vae_ray.models.noise import BLOCK_ROWS, latent_noise
from vae_ray.models.vae import build_vae
from vae_ray.training.state import TrainState

NUM_ROWS, WIDTHS, P = 2 * BLOCK_ROWS + 17, (5, 7), 0.3


def masks(start: int, stop: int, *address: int, seed: int = 1, num_samples: int = 1) -> list[Tensor]:
    """What the layers make of ones."""
    layers = [Dropout(P, width) for width in WIDTHS]
    with dropout_masks(layers, slice(start, stop), seed, *(address or (2, 3)), num_samples=num_samples):
        return [layer(torch.ones(num_samples * (stop - start), layer.width)) for layer in layers]


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (60, 70), (64, 128), (3, NUM_ROWS), (9, 9)])
def test_rows_have_the_same_mask_in_every_slice(start: int, stop: int) -> None:
    for part, whole in zip(masks(start, stop), masks(0, NUM_ROWS), strict=True):
        assert torch.equal(part, whole[start:stop])


def test_the_first_of_several_samples_has_the_mask_of_the_only_one() -> None:
    for one, several in zip(masks(5, 90), masks(5, 90, num_samples=3), strict=True):
        assert torch.equal(several[:85], one)
        assert not torch.equal(several[85:170], one)


def test_seeds_epochs_steps_and_layers_have_masks_of_their_own() -> None:
    drawn = [masks(0, 40)[0], masks(0, 40, seed=2)[0], masks(0, 40, 3, 3)[0], masks(0, 40, 2, 4)[0]]
    drawn.append(masks(0, 40)[1][:, :5])
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])


def test_a_unit_is_dropped_with_probability_p_and_keeps_its_mean() -> None:
    n = 20_000
    (mask, _) = masks(0, n)
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - P))]
    # five standard errors of a frequency
    assert bool(((mask == 0).double().mean(0) - P).abs().max() < 5 * (P * (1 - P) / n) ** 0.5)


def test_whole_channels_of_a_feature_map_are_dropped() -> None:
    layer = Dropout(0.5, 6)
    with dropout_masks([layer], slice(0, 4), 1):
        given = layer(torch.ones(4, 6, 3, 5))
    assert torch.equal(given, given[:, :, :1, :1].expand(4, 6, 3, 5))
    assert set(given.unique().tolist()) == {0.0, 2.0}


def test_nothing_is_dropped_outside_of_the_context_also_after_an_error() -> None:
    layer, x = Dropout(0.5, 6), torch.ones(4, 6)

    def fail_inside() -> None:
        with dropout_masks([layer], slice(0, 4), 1):
            assert not torch.equal(layer(x), x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert torch.equal(layer(x), x)


def test_a_model_without_dropout_has_no_layers_of_it() -> None:
    assert dropout_layers(nn.Sequential(nn.Linear(2, 3), Dropout(0.0, 3))) == []
    assert all(not dropout_layers(build_vae(dropping(name, 0.0), (2, 3, 5), seed=1)) for name in sorted(NETWORKS))


# --- in training ----------------------------------------------------------------------------------------


def dropping(network: str, dropout: float = 0.4) -> Experiment:
    return experiment(model={"network": {**NETWORKS[network], "dropout": dropout}, "latent_dim": 2})


def state(config: Experiment, num_samples: int) -> TrainState:
    begun = begin(config)
    begun.objective.num_samples = num_samples
    return begun


def gradients(state: TrainState, group: Any = ALONE) -> list[Tensor]:
    (recorder,) = record_gradients(state).values()
    run_epoch(state, 1, group)
    return recorder.gradients


CASES = [(network, size, (1, 3)[(i + j) % 2]) for i, network in enumerate(NETWORKS) for j, size in enumerate((2, 3, 5))]
"""Every network with every number of workers, on one and three samples in turn."""


@pytest.mark.parametrize(("network", "size", "k"), CASES)
def test_any_number_of_workers_has_the_gradients_of_one_process(network: str, size: int, k: int) -> None:
    config = dropping(network)
    expected = gradients(state(config, k))
    assert not torch.allclose(expected[0], gradients(state(dropping(network, 0.0), k))[0])
    states = [state(config, k) for _ in range(size)]
    for mine in results_on_threads(size, lambda group: gradients(states[group.rank], group)):
        for gradient, reference in zip(mine, expected, strict=True):
            # float64: sums of other shards, in another order
            scale = float(reference.abs().max())
            torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_first_of_several_samples_of_a_model_is_the_only_one_of_one(network: str) -> None:
    model = build_vae(dropping(network), (2, 3, 5), seed=1).double().train()
    layers, rows = dropout_layers(model), slice(3, 9)
    x = torch.rand(6, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    passes = []
    for k in (1, 5):
        eps = tuple(part.double() for part in latent_noise(model.latent_shapes, rows, 1, "test", num_samples=k))
        with dropout_masks(layers, rows, 1, 2, 3, num_samples=k):
            passes.append(model(x, eps, k))
    one, several = passes
    torch.testing.assert_close(several.params[:6], one.params, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(several.rate()[:6], one.rate(), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(model(x, eps, 5).params, several.params)


def test_a_vamp_prior_encodes_its_inputs_without_dropout() -> None:
    """There are more of them than rows of a mask."""
    network = {**NETWORKS["mlp"], "dropout": 0.5}
    state = begin(experiment(model={"network": network, "latent_dim": 2, "prior": {"name": "vamp", "components": 9}}))
    assert run_epoch(state)["rate"] > 0
