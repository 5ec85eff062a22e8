"""System: every metric of the table on real runs, beside what its functions give for the run's own pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vae_ray import Experiment, TrainedVAE, TrainResult, UserError, train
from vae_ray.cli.commands import evaluate
from vae_ray.cli.main import COMMANDS
from vae_ray.data.splits import Splits
from vae_ray.evaluation import samples
from vae_ray.evaluation.disentanglement import disentanglement_metrics
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.evaluation.features import FeatureSpace
from vae_ray.evaluation.representation import (
    Labelled,
    linear_probe_accuracy,
    neighbour_accuracy,
    principal_components,
)
from vae_ray.evaluation.table import METRICS


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    """A feature space of a user: the means of the four quarters."""
    halves = images.unflatten(2, (2, -1)).unflatten(4, (2, -1))
    return halves.mean((1, 3, 5)).flatten(1)


HERE = f"{__name__}:mean_colours"


@pytest.fixture(scope="module")
def model(trained_run: TrainResult) -> TrainedVAE:
    return TrainedVAE.load(trained_run.run_dir)


@pytest.fixture(scope="module")
def everything(model: TrainedVAE) -> Evaluation:
    return model.evaluate("test", "all", num_samples=20, features=HERE)


def test_all_names_what_is_missing_and_computes_the_others(everything: Evaluation) -> None:
    (missing, *_) = everything.warnings
    assert missing.startswith("metrics: disentanglement needs images with two known factors or more, these have 1")
    found = {key.removeprefix("test/").partition("[")[0] for key in everything}
    assert {
        "nelbo",
        "nll",
        "active_units",
        "mutual_information",
        "mse",
        "psnr",
        "ssim",
        "fid",
        "kid",
        "recall",
    } <= found
    assert all(np.isfinite(value) for value in everything.values())


def test_reconstructions_are_those_of_the_model(model: TrainedVAE, everything: Evaluation) -> None:
    images = model.test_images(359)
    squared = (model.reconstruct(images) - images).square().flatten(1).mean(1)
    assert everything["test/mse"] == pytest.approx(float(squared.mean()), rel=1e-5)
    assert everything["test/psnr"] == pytest.approx(float((-10 * squared.log10()).mean()), rel=1e-5)
    assert everything.standard_errors["test/mse"] == pytest.approx(float(squared.std()) / 359**0.5, rel=1e-5)


def test_sets_are_compared_in_the_space_that_is_named(model: TrainedVAE, everything: Evaluation) -> None:
    fid, floor = [key for key in everything if key.startswith("test/fid")]
    assert fid.startswith(f"test/fid[{HERE}, code ")
    real = FeatureSpace("", "", mean_colours, torch.device("cpu"))(model.test_images(359))
    generated = everything.arrays["generated_features"]
    assert everything[fid] == pytest.approx(samples.frechet_distance(real, generated), rel=1e-9)
    np.testing.assert_array_equal(everything.arrays["features"], real)
    splits = Splits.open(model.experiment)  # the training images are as a perfect model's, and as many
    training = splits.train.gather(splits.train_indices[torch.arange(359) * len(splits.train_indices) // 359]) / 255
    assert floor.startswith("test/fid_of_training_images[")
    assert everything[floor] == pytest.approx(samples.frechet_distance(real, mean_colours(training).double().numpy()))
    assert everything[floor] < everything[fid]


def test_codes_are_probed_for_labels_beside_as_many_principal_components(model: TrainedVAE) -> None:
    found = model.evaluate("test", "representation")
    splits = Splits.open(model.experiment)
    images = splits.train.gather(splits.train_indices)
    train = Labelled(model.encode(images).numpy(), splits.train.columns["label"][splits.train_indices].numpy())
    test = Labelled(model.encode(model.test_images(359)).numpy(), model.targets()["label"].numpy())
    assert found["test/neighbours[label]"] == pytest.approx(neighbour_accuracy(train, test), abs=1e-12)
    assert found["test/linear_probe[label]"] == pytest.approx(linear_probe_accuracy(train, test), abs=3 / 359)
    pixels = images.flatten(1).numpy() / 255, model.test_images(359).flatten(1).numpy()
    pca = principal_components(*pixels, num=model.latent_dim)
    expected = neighbour_accuracy(train._replace(codes=pca[0]), test._replace(codes=pca[1]))
    assert found["test/neighbours[label, pca of pixels]"] == pytest.approx(expected, abs=3 / 359)
    assert set(found.arrays) == {"codes", "small_pixels", "label:label"}
    with pytest.raises(UserError, match="representation is not measured on the images that it is fitted to"):
        model.evaluate("train", "representation")


def test_a_space_that_does_not_exist_is_one_line_before_anything_is_computed(model: TrainedVAE) -> None:
    with pytest.raises(UserError, match=r"^features: got 'inception', should be classifier, torchvision:"):
        model.evaluate("test", "fid", features="inception")


def test_a_space_that_nothing_is_measured_in_is_a_mistake(model: TrainedVAE) -> None:
    with pytest.raises(UserError, match=r"^features: got 'mine:f', which no metric of these uses; add one of fid, kid"):
        model.evaluate("test", "elbo", features="mine:f")


def constant(images: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(images), 4)


def test_what_these_images_do_not_allow_is_a_warning_beside_the_other_numbers(model: TrainedVAE) -> None:
    found = model.evaluate("test", "elbo,kid", num_images=2, features=HERE)
    assert found["test/nelbo"] > 0
    assert found.warnings == [
        "kid: got 2 real and 2 generated images, should be at least 20 of each; try more --num-images"
    ]
    with pytest.raises(UserError, match="fid: the features of all images are the same"):
        model.evaluate("test", "fid", features=f"{__name__}:constant")
    (warning,) = model.evaluate("test", "active-units", num_images=1).warnings
    assert warning == "active-units: one image has no variance; try more --num-images"


def test_disentanglement_is_that_of_the_codes_and_factors(tmp_path: Path) -> None:
    experiment = Experiment.from_dict(
        {
            "data": {"source": "sprites", "image_size": 32, "stride": [1, 3, 40, 8, 8]},
            "model": {"network": {"name": "mlp", "hidden": [32]}, "latent_dim": 4},
            "training": {"epochs": 1, "global_batch_size": 32},
            "workers": {"num": 0},
            "run": {"storage": str(tmp_path), "name": "sprites"},
        }
    )
    vae = TrainedVAE.load(train(experiment).run_dir)
    found = vae.evaluate("train", "disentanglement")
    targets = vae.targets("train")
    factors = np.stack([targets[name].numpy() for name in targets if not targets[name].is_floating_point()], axis=1)
    codes = vae.encode(torch.from_numpy(pixels_of(vae, len(factors)))).numpy()
    expected = disentanglement_metrics(codes, factors, seed=0)
    assert found["train/mig_ceiling"] == pytest.approx(expected["mig_ceiling"], rel=1e-12)
    assert found["train/mig_locatello"] == pytest.approx(expected["mig_locatello"], abs=1e-6)
    assert 0 <= found["train/mig_chen"] <= 1


def pixels_of(vae: TrainedVAE, num: int) -> np.ndarray:
    loader = vae._evaluation_loader("train", None)
    assert len(loader.indices) == num
    return loader.images(loader.indices).numpy()


def test_every_metric_has_a_row_in_the_docs_and_is_named_by_the_help() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    help_text = COMMANDS[evaluate]["--metrics"]["help"]
    assert [name for name in METRICS if f"| `{name}` |" not in page or name not in help_text] == []
