"""A conditional VAE from the data to the pictures: images of the class that is asked for, and refusals without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from vae_ray import Experiment, TrainedVAE, UserError, train
from vae_ray.cli.main import main
from vae_ray.models.vae import build_vae
from vae_ray.runs.train import resume


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedVAE:
    # a standard prior: the code 0 is in its middle
    model = {"model.condition": "label", "model.prior": "standard", "likelihood": "bernoulli"}
    overrides = {**model, "training.epochs": 15, "training.global_batch_size": 64, "workers.num": 0}
    place = {"run.storage": str(tmp_path_factory.mktemp("runs")), "run.name": "conditional"}
    return TrainedVAE.load(train(Experiment.preset("digits").with_overrides({**overrides, **place})).run_dir)


def classes_of(images: torch.Tensor, model: TrainedVAE) -> np.ndarray:
    """The classes that the nearest of 1,000 test digits have."""
    x, labels = model.test_examples(1000)
    assert labels is not None
    classes: np.ndarray = KNeighborsClassifier(1).fit(x.flatten(1).numpy(), labels.numpy()).predict(images.flatten(1))
    return classes


def test_images_have_the_label_that_is_asked_for(trained: TrainedVAE) -> None:
    for label in (0, 4, 7):
        assert np.mean(classes_of(trained.generate(100, label=label), trained) == label) > 0.9
    in_turn = classes_of(trained.generate(200), trained)
    assert np.mean(in_turn == np.arange(200) % 10) > 0.9


def test_the_number_of_classes_is_in_the_experiment(trained: TrainedVAE) -> None:
    assert trained.experiment.model.num_classes == 10


def test_the_same_code_is_another_image_for_another_label(trained: TrainedVAE) -> None:
    z = torch.zeros(10, trained.latent_dim)
    assert classes_of(trained.decode(z, torch.arange(10)), trained).tolist() == list(range(10))


def test_a_path_leads_from_one_image_and_label_to_the_other(trained: TrainedVAE) -> None:
    images, labels = trained.test_examples(6)
    assert labels is not None
    path = trained.interpolate(images[:3], images[3:], labels[:3], labels[3:], steps=5)
    torch.testing.assert_close(path[:, 0], trained.reconstruct(images[:3], labels[:3]))
    torch.testing.assert_close(path[:, -1], trained.reconstruct(images[3:], labels[3:]))


@pytest.mark.parametrize("prior", ["standard", "flow", "mixture", "vamp"])
def test_a_path_of_a_conditional_hierarchy_leads_from_one_label_to_the_other(trained: TrainedVAE, prior: str) -> None:
    network = {"name": "ladder", "kind": "conv", "channels": [8, 10], "latent_groups": [1, 2]}
    model = {"condition": "label", "num_classes": 10, "network": network, "latent_dim": 3, "prior": {"name": prior}}
    experiment = Experiment.from_dict({**trained.experiment.to_dict(), "model": model})
    ladder = TrainedVAE(build_vae(experiment, trained.image_shape, seed=4), experiment, trained.checkpoint)
    images, labels = trained.test_examples(6)
    assert labels is not None
    path = ladder.interpolate(images[:3], images[3:], labels[:3], labels[3:], steps=4)
    # there and back in float32
    torch.testing.assert_close(path[:, 0], ladder.reconstruct(images[:3], labels[:3]), rtol=0, atol=2e-5)
    torch.testing.assert_close(path[:, -1], ladder.reconstruct(images[3:], labels[3:]), rtol=0, atol=2e-5)
    assert not torch.allclose(ladder.generate(4, label=1), ladder.generate(4, label=2))
    assert ladder.traverse(images, labels, steps=3).images.shape == (9, 3, *trained.image_shape)


@pytest.mark.parametrize("labels", [None, 10, -1, 2.0, [1, 2], True, "seven"])
def test_labels_that_do_not_fit_are_refused(trained: TrainedVAE, labels: object) -> None:
    images = trained.test_images(3)
    with pytest.raises(UserError, match=r"labels: .* should be the class of each image, 0 to 9, or one for all"):
        trained.reconstruct(images, labels)


@pytest.mark.parametrize("codes", [3.0, None, [[1.0, 2.0]]])
def test_codes_that_do_not_fit_are_refused_with_labels_too(trained: TrainedVAE, codes: object) -> None:
    with pytest.raises(UserError, match=r"^z: got "):
        trained.decode(codes, 3)


def test_more_images_than_there_are_are_refused(trained: TrainedVAE) -> None:
    with pytest.raises(UserError, match=r"num_images: got 360, the split 'test' has 359; leave it out"):
        trained.evaluate(num_images=360)
    found = trained.evaluate("test", "nll", num_samples=7, num_images=5)
    assert found.labels.items() >= {"num_samples": 7, "num_images": 5}.items()


def test_a_model_without_labels_refuses_them(tmp_path: Path) -> None:
    overrides = {"training.epochs": 1, "workers.num": 0, "run.storage": str(tmp_path)}
    model = TrainedVAE.load(train(Experiment.preset("digits").with_overrides(overrides)).run_dir)
    with pytest.raises(UserError, match=r"^label: got 3, but this model is not conditional; train one with"):
        model.generate(2, label=3)


def test_pictures_on_the_command_line(trained: TrainedVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(trained.checkpoint.path), str(tmp_path / "out.png")
    for arguments in (["generate", "--label", "7"], ["generate"], ["reconstruct"], ["interpolate"], ["traverse"]):
        assert main([arguments[0], run, "--out", out, *arguments[1:]]) == 0
    assert main(["generate", run, "--out", out, "--label", "10"]) == 2
    assert capsys.readouterr().err == "vae-ray: --label: got 10, should be a class, 0 to 9\n"
    assert main(["reconstruct", run, "--out", out, "--label", "3"]) == 2
    assert "--label: got '3', but test images have labels; leave it out, or add --images" in capsys.readouterr().err
    np.save(tmp_path / "own.npy", np.zeros((2, 8, 8), dtype=np.uint8))
    own = ["reconstruct", run, "--out", out, "--images", str(tmp_path / "own.npy")]
    for given, refused in (([], "none, but this model is conditional on 'label';"), (["--label", "x"], "'x',")):
        assert main([*own, *given]) == 2
        assert f"--label: got {refused} should be a class, 0 to 9" in capsys.readouterr().err
    assert main([*own, "--label", "3"]) == 0


def arrays(path: Path, labels: list[int] | None) -> str:
    """24 dark or bright images of 8x8, in a file with train and test; the labels of both, or none."""
    pixels = (np.arange(24)[:, None, None] % 2 * 150 + np.arange(64).reshape(8, 8)).astype(np.uint8)
    pixels[:, 0, 0] = np.arange(24)  # no two are equal
    label = (
        {} if labels is None else {f"{split}_labels": np.array(labels[:n]) for split, n in (("train", 16), ("test", 8))}
    )
    np.savez(path, train_images=pixels[:16], test_images=pixels[16:], **label)
    return str(path)


@pytest.fixture(scope="module")
def on_arrays(tmp_path_factory: pytest.TempPathFactory) -> TrainedVAE:
    root = tmp_path_factory.mktemp("arrays")
    content = {
        "data": {"source": "arrays", "root": arrays(root / "own.npz", [0, 1] * 12), "image_size": None},
        "model": {"network": {"name": "mlp", "hidden": [8]}, "latent_dim": 2, "condition": "label"},
        "training": {"epochs": 1, "global_batch_size": 8},
        "workers": {"num": 0},
        "run": {"storage": str(root / "runs"), "name": "own"},
    }
    return TrainedVAE.load(train(Experiment.from_dict(content)).run_dir)


def test_other_labels_of_the_same_images_are_another_run_s(
    on_arrays: TrainedVAE, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, run = on_arrays.checkpoint.path, on_arrays.checkpoint.path.parents[1]
    TrainedVAE.load(path).evaluate("test")
    assert "than the run had" not in caplog.text
    swapped = arrays(tmp_path / "swapped.npz", [1, 0] * 12)
    TrainedVAE.load(path, data={"data.root": swapped}).evaluate("test")
    assert "swapped has other labels (test label) than the run had" in caplog.text
    with pytest.raises(
        UserError, match=r"has other labels \((test label, train label|train label, test label)\) than the run"
    ):
        resume(run, {"data.root": swapped, "training.epochs": 2})


@pytest.mark.parametrize("labels", [None, [0, 2] * 12, [0, -1] * 12])
def test_labels_that_the_model_does_not_know_are_refused(
    on_arrays: TrainedVAE, tmp_path: Path, labels: list[int] | None
) -> None:
    root = arrays(tmp_path / "others.npz", labels)
    model = TrainedVAE.load(on_arrays.checkpoint.path, data={"data.root": root})
    for use in (lambda: model.evaluate("test"), lambda: model.test_examples(3)):
        with pytest.raises(
            UserError, match=r"data.source: not all test images have a 'label' from 0 to 1, on which this"
        ):
            use()


def test_the_aggregated_posterior_of_one_prior_is_asked_for_in_vain(on_arrays: TrainedVAE) -> None:
    with pytest.raises(UserError, match=r"need one prior for all images, this model is conditional; leave them out"):
        on_arrays.evaluate("test", "aggregated-posterior")


def test_a_name_that_is_a_number_is_a_name(
    on_arrays: TrainedVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedVAE, "target_names", {"label": ["1", "2"]})
    path = str(on_arrays.checkpoint.path)
    assert main(["generate", path, "--label", "2", "--out", str(tmp_path / "named.png")]) == 0
    monkeypatch.setattr(TrainedVAE, "target_names", {})
    assert main(["generate", path, "--label", "1", "--out", str(tmp_path / "numbered.png")]) == 0
    assert (tmp_path / "named.png").read_bytes() == (tmp_path / "numbered.png").read_bytes()
