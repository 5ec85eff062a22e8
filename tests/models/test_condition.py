"""A conditional VAE: encoder, decoder and prior are given the label, and only the label that they are given matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.test_networks import BATCH, SETTINGS, images, noise
from vae_ray import Experiment, UserError
from vae_ray.data.dataset import Split
from vae_ray.models.networks import NETWORKS
from vae_ray.models.vae import VAE, build_vae
from vae_ray.runs.preflight import preflight

SHAPE, NUM_CLASSES = (3, 8, 11), 5


def conditional(network: str, **model: Any) -> VAE:
    given = {"network": {"name": network, **SETTINGS[network]}, "latent_dim": 4, **model}
    config = Experiment.from_dict({"model": {**given, "condition": "label", "num_classes": NUM_CLASSES}})
    return build_vae(config, SHAPE, seed=1).double().eval()


@pytest.fixture(params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_posterior_and_decoder_depend_on_the_label(network: str) -> None:
    model, x = conditional(network), images(SHAPE).double()
    first, second = (model.one_hot(torch.full((BATCH,), value)) for value in (1, 3))
    for one, other in zip(model.posteriors(x, first), model.posteriors(x, second), strict=True):
        assert one.posterior is not None
        assert other.posterior is not None
        assert not torch.allclose(one.posterior.mean, other.posterior.mean)
    eps = tuple(part.double() for part in noise(model))
    assert not torch.allclose(model.generate(eps, condition=first), model.generate(eps, condition=second))


def test_a_row_depends_on_its_own_label_alone(network: str) -> None:
    model, x = conditional(network), images(SHAPE).double()
    labels = torch.arange(BATCH) % NUM_CLASSES
    mixed = model.reconstruct(x, model.condition({"label": labels, "other": labels + 1}))
    for row in range(BATCH):
        alone = model.reconstruct(x[row : row + 1], model.one_hot(labels[row : row + 1]))
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_each_sample_of_an_image_has_the_label_of_the_image(network: str) -> None:
    model, x = conditional(network), images(SHAPE).double()
    condition = model.one_hot(torch.arange(BATCH) % NUM_CLASSES)
    eps = tuple(part.double() for part in noise(model, 3))
    several = model(x, eps, 3, condition)
    for sample in range(3):
        rows = slice(sample * BATCH, (sample + 1) * BATCH)
        one = model(x, tuple(part[rows] for part in eps), 1, condition)
        torch.testing.assert_close(several.params[rows], one.params, rtol=1e-12, atol=1e-12)


def test_classes_in_turn() -> None:
    model = conditional("mlp")
    rows = model.classes_in_turn(7)
    assert rows is not None
    assert rows.argmax(1).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert rows.sum(1).tolist() == [1.0] * 7


# --- what the data must have ----------------------------------------------------------------------------


def arrays(directory: Path, **columns: Any) -> str:
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(directory / "images.npz", images=pixels, **columns)
    return str(directory / "images.npz")


def on_arrays(root: str, storage: Path, **model: Any) -> Experiment:
    return Experiment.from_dict(
        {
            "data": {"source": "arrays", "root": root, "image_size": None},
            "model": {"network": {"name": "mlp", "hidden": [9]}, "latent_dim": 2, "condition": "label", **model},
            "training": {"global_batch_size": 10},
            "workers": {"num": 0},
            "run": {"storage": str(storage)},
        }
    )


def test_the_number_of_classes_comes_from_the_labels(tmp_path: Path) -> None:
    root = arrays(tmp_path, labels=np.arange(60) % 4)
    assert preflight(on_arrays(root, tmp_path)).requested.model.num_classes == 4
    assert preflight(on_arrays(root, tmp_path, num_classes=6)).requested.model.num_classes == 6


@pytest.mark.parametrize(("labels", "model", "message"), [
    (None, {}, "model.condition: got 'label', but the images have no labels; leave it out"),
    (np.arange(60) % 4, {"condition": "age"}, "model.condition: got 'age', but the images have only label; for example "
     "--model.condition label"),
    (np.arange(60) / 8, {"condition": "labels"}, "model.condition: 'labels' has numbers such as"),
    (np.arange(60) % 4 * 10**6, {}, "model.condition: 'label' has values up to 3000000, should be classes 0, 1, ..."),
    (np.arange(60) % 4, {"num_classes": 3}, "model.num_classes: got 3, but 'label' has 4 classes; leave it out"),
])  # fmt: skip
def test_labels_that_cannot_serve_are_refused(tmp_path: Path, labels: Any, model: dict[str, Any], message: str) -> None:
    root = arrays(tmp_path, **({} if labels is None else {"labels": labels}))
    with pytest.raises(UserError) as refusal:
        preflight(on_arrays(root, tmp_path, **model))
    assert str(refusal.value).startswith(message)


def test_images_without_a_label_are_counted_in_the_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = arrays(tmp_path, labels=np.arange(60) % 4)
    monkeypatch.setattr(Split, "columns", {"label": torch.tensor([0, -1, 2])})
    with pytest.raises(UserError, match=r"model\.condition: 2 of 6 images have no 'label', all should have one"):
        preflight(on_arrays(root, tmp_path))
