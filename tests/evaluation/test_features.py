"""Feature spaces: what they compute, what their names say, and what is refused before anything else starts."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vae_ray.data.batches import scaled
from vae_ray.data.dataset import Split
from vae_ray.errors import UserError
from vae_ray.evaluation.classifier import Classifier, Selection, train_classifier
from vae_ray.evaluation.features import FeatureSpace, feature_space

CPU = torch.device("cpu")
NETWORK = "shufflenet_v2_x0_5"
"""The smallest of torchvision."""


def bars(num: int, *, seed: int, channels: int = 1, labelled: bool = True) -> Selection:
    """Noisy images of 12 x 10 pixels whose label, 0 to 3, is the place of a bar; one in seven has none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (num,), generator=generator)
    pixels = torch.randint(0, 150, (num, channels, 12, 10), dtype=torch.uint8, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[:, 3 * label : 3 * label + 2] += 100
    labels[::7] = -1
    return Split.in_memory(pixels, {"label": labels} if labelled else {}), torch.arange(num)


def images(num: int, *, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(num, channels, 12, 10, generator=torch.Generator().manual_seed(seed))


def space(spec: str, *, channels: int = 1, labelled: bool = True) -> FeatureSpace:
    train, test = (bars(500, seed=s, channels=channels, labelled=labelled) for s in (0, 1))
    return feature_space(spec, train=train, test=test, seed=3)


# --- the classifier -------------------------------------------------------------------------------------


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_ray.evaluation.classifier.MOST_STEPS", 40)


@pytest.mark.usefixtures("few_steps")
def test_the_classifier_learns_and_its_accuracy_is_in_the_name() -> None:
    train, test = bars(500, seed=0), bars(300, seed=1)
    classifier, accuracy = train_classifier(train, test, seed=3, device=CPU)
    assert accuracy > 0.95
    labels = test[0].columns["label"]
    x, labels = scaled(test[0].gather(test[1][labels >= 0])), labels[labels >= 0]
    assert float((classifier(x).argmax(1) == labels).double().mean()) == accuracy
    assert float(classifier.features(x).square().mean()) == pytest.approx(1, rel=1e-5)  # float32
    found = feature_space("classifier", train=train, test=test, seed=3)
    assert found.name == f"classifier, accuracy {accuracy:.3f}"
    assert np.array_equal(found(x), classifier.features(x).double().numpy())
    assert found(x).shape == (len(x), 128)


@pytest.mark.usefixtures("few_steps")
def test_the_classifier_is_the_same_at_every_call_and_leaves_the_streams_of_others_alone() -> None:
    state = torch.get_rng_state()
    spaces = [
        feature_space("classifier", train=bars(200, seed=0), test=bars(100, seed=1), seed=seed) for seed in (3, 3, 4)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (each(images(5)) for each in spaces)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 5, 40), (2, 1, 3), (3, 65, 33)])
def test_a_classifier_fits_images_of_any_size(shape: tuple[int, int, int]) -> None:
    classifier = Classifier(shape, 7)
    assert classifier(torch.rand(2, *shape)).shape == (2, 7)
    assert classifier.hidden.in_features <= 64 * 8 * 8


def test_a_classifier_without_labels_is_refused() -> None:
    with pytest.raises(UserError, match=r"got 'classifier', but the train images have no labels of two classes"):
        space("classifier", labelled=False)


# --- torchvision ----------------------------------------------------------------------------------------


def torchvision_network() -> nn.Module:
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.get_model(NETWORK, weights=None).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "network.safetensors"
    save_file(torchvision_network().state_dict(), path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_torchvision_are_what_its_classifier_is_given(weights: Path, channels: int) -> None:
    found = space(f"torchvision:{NETWORK}:{weights}", channels=channels)
    network, given = torchvision_network(), []
    network.fc.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    x = images(3, channels=channels)
    rgb = torch.cat([x] * 3, 1) if channels == 1 else x
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        network((F.interpolate(rgb, (224, 224), mode="bilinear", antialias=True) - mean) / std)
    assert np.array_equal(found(x), given[0].double().numpy())
    assert found(x).shape == (3, 1024)
    assert re.fullmatch(f"torchvision {NETWORK}, weights [0-9a-f]{{8}}", found.name)


def test_weights_for_other_classes_will_do(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    state |= {"fc.weight": torch.zeros(7, 1024), "fc.bias": torch.zeros(7)}
    save_file(state, tmp_path / "other.safetensors")
    first, other = (
        space(f"torchvision:{NETWORK}:{weights}"),
        space(f"torchvision:{NETWORK}:{tmp_path}/other.safetensors"),
    )
    assert np.array_equal(first(images(2)), other(images(2)))
    assert first.name != other.name


def test_a_bad_torchvision_space_is_one_line(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "pickle.pth")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused = {
        "torchvision:resnet5:x.pth": "no classifier 'resnet5'; for example resnet50",
        f"torchvision:{NETWORK}": f"should name a file of weights: torchvision:{NETWORK}:FILE",
        f"torchvision:{NETWORK}:{tmp_path}/absent.pth": "absent.pth cannot be read (No such file or directory)",
        f"torchvision:{NETWORK}:{tmp_path}": "cannot be read (Is a directory)",
        f"torchvision:{NETWORK}:{tmp_path}/text.pth": "text.pth is no safetensors file (",
        f"torchvision:{NETWORK}:{tmp_path}/pickle.pth": "make one with safetensors.torch.save_file",
        f"torchvision:{NETWORK}:{tmp_path}/other.safetensors": "other.safetensors does not hold the weights of ",
        f"torchvision:squeezenet1_0:{weights}": "a network whose classifier is no linear layer",
    }
    for spec, message in refused.items():
        with pytest.raises(UserError, match=re.escape(message)) as error:
            space(spec)
        assert str(error.value).startswith("features: ")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="takes images of 1 or 3 channels, not 2"):
        space(f"torchvision:{NETWORK}:{weights}", channels=2)


# --- the user's own -------------------------------------------------------------------------------------

OWN = """
import torch

def halves(images):
    assert images.min() >= 0 and images.max() <= 1
    return images.flatten(2).mean(2) * torch.tensor([0.5])

def as_numpy(images):
    return images.flatten(1).numpy()[:, :3]

def per_image(images):
    return images.flatten(1).sum(1)

def infinite(images):
    return 1 / (0 * images.flatten(1))

def failing(images):
    raise ValueError("no\\nfeatures")

def text(images):
    return "features"

number = 7
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_features.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_features"


def test_features_of_the_users_function(own: str) -> None:
    found = space(f"{own}:halves", channels=2)
    x = images(205, channels=2)
    assert found(x) == pytest.approx(0.5 * x.double().mean((2, 3)).numpy(), rel=1e-6)  # float32
    assert found(x).dtype == np.float64
    assert re.fullmatch(rf"{own}:halves, code [0-9a-f]{{8}}", found.name)
    assert np.array_equal(space(f"{own}:as_numpy")(x[:, :1]), x[:, 0].flatten(1)[:, :3].double().numpy())


def test_a_bad_function_is_one_line(own: str) -> None:
    refused = {
        "": "got '', should be classifier, torchvision:NETWORK:FILE or package.module:function",
        "inception": "got 'inception', should be classifier, torchvision:",
        "own_features:": "should be classifier, torchvision:",
        "no_such_module:f": "there is no module 'no_such_module'",
        f"{own}:absent": "has no 'absent'",
        f"{own}:number": "should be a function",
        f"{own}:per_image": "returned for 2 images an array of shape (2,), should return (2, F) finite numbers",
        f"{own}:infinite": "returned NaN or infinity, should return (2, F) finite numbers",
        f"{own}:failing": "(ValueError: no features)",
        f"{own}:text": "could not convert string to float",
    }
    for spec, message in refused.items():
        with pytest.raises(UserError, match=re.escape(message)) as error:
            space(spec)
        assert str(error.value).startswith("features: ")
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("few_steps")
def test_a_space_travels_to_another_process(own: str, weights: Path) -> None:
    for spec in ("classifier", f"{own}:halves", f"torchvision:{NETWORK}:{weights}"):
        found = space(spec)
        copy = pickle.loads(pickle.dumps(found))
        assert copy.name == found.name
        assert np.array_equal(copy(images(2)), found(images(2)))
