"""Feature spaces, which the user names, for metrics that compare sets of images.

    torchvision:resnet50:FILE           a network of torchvision, weights in safetensors; before its last linear layer
    package.module:function             the user's own: images (n, C, H, W) in [0, 1] -> (n, F)
    classifier                          a small one, trained here on the labels; its hidden layer

Numbers in different spaces have nothing in common, so that a space's name is part of the name of every metric in it.
Nothing is downloaded. Torchvision's Inception has other weights, and another resizing, than the network of published
FIDs.
"""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vae_ray.config import user_code
from vae_ray.errors import UserError, one_line
from vae_ray.evaluation.classifier import Selection, train_classifier
from vae_ray.seeds import generator
from vae_ray.storage.locations import local_path

KEY = "features"
FORMS = "classifier, torchvision:NETWORK:FILE or package.module:function"
BATCH_SIZE = 100
"""Images that a network is given at a time."""


@dataclass(frozen=True)
class FeatureSpace:
    """Images `(N, C, H, W)`, floats in [0, 1], to features: float64 `(N, F)`. A process can send it to another one.

    Raises `UserError` if the user's function fails, or returns anything but N rows of finite numbers.
    """

    name: str
    """For the names of metrics: `fid[classifier, accuracy 0.985]`; says which weights or which code."""
    spec: str
    function: Callable[[Tensor], Any]
    """Of at most `BATCH_SIZE` images on `device`; returns a tensor or an array."""
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> NDArray[np.float64]:
        return np.concatenate([self._of_batch(batch.to(self.device)) for batch in images.float().split(BATCH_SIZE)])

    def _of_batch(self, images: Tensor) -> NDArray[np.float64]:
        with user_code.errors_named(self.spec, key=KEY):
            result = self.function(images)
            features = np.asarray(result.detach().cpu() if isinstance(result, Tensor) else result, dtype=np.float64)
        if features.ndim != 2 or len(features) != len(images) or not features.shape[1]:
            received = f"for {len(images)} images an array of shape {features.shape}"
        elif not np.isfinite(features).all():
            received = "NaN or infinity"
        else:
            return features
        raise UserError(f"{KEY}: {self.spec} returned {received}, should return ({len(images)}, F) finite numbers")


def feature_space(
    spec: str, *, train: Selection, test: Selection, seed: int, device: torch.device | None = None
) -> FeatureSpace:
    """The feature space that `spec` names; `classifier` trains for some seconds.

    Args:
        spec: one of the forms above.
        train: the images with whose labels a classifier is trained.
        test: those that measure its accuracy, and whose shape the other forms are tried with.
        seed: of the classifier.
        device: where features are computed; the CPU by default.

    Raises:
        UserError: there is no such network, file or function, it does not fit the images, or these have no labels.
    """
    device = torch.device("cpu") if device is None else device
    if spec == "classifier":
        classifier, accuracy = train_classifier(train, test, seed=seed, device=device)
        return FeatureSpace(f"classifier, accuracy {accuracy:.3f}", spec, classifier.features, device)
    before, _, after = spec.partition(":")
    if not before or not after:
        raise UserError(f"{KEY}: got {spec!r}, should be {FORMS}")
    if before == "torchvision":
        name, network = _torchvision_network(spec, test[0].image_shape[0])
        space = FeatureSpace(name, spec, network.to(device), device)
    else:
        function = user_code.load(spec, key=KEY)
        space = FeatureSpace(f"{spec}, code {user_code.digest(function)[:8]}", spec, function, device)
    space(torch.rand(2, *test[0].image_shape, generator=generator(seed, "features")))  # before anything else starts
    return space


class _Preprocessed(nn.Module):
    """A network behind the preprocessing that its weights were trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, size: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Grey images as RGB, resized to a square (bilinear, with antialiasing, nothing cut off), normalised."""
        images = images.expand(-1, 3, -1, -1)
        images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network((images - self.mean) / self.std)


def _torchvision_network(spec: str, num_channels: int) -> tuple[str, nn.Module]:
    """The name, and the network without its last linear layer, of `torchvision:NETWORK:FILE`."""
    from torchvision import models

    _, name, file = [*spec.split(":", 2), ""][:3]
    allowed = models.list_models(module=models)
    if name not in allowed:
        close = difflib.get_close_matches(name, allowed) or ["inception_v3", "resnet50", "vgg16"]
        raise UserError(f"{KEY}: got {spec!r}, torchvision has no classifier {name!r}; for example {', '.join(close)}")
    if not file:
        raise UserError(
            f"{KEY}: got {spec!r}, should name a file of weights: torchvision:{name}:FILE; none is downloaded"
        )
    if num_channels not in (1, 3):
        raise UserError(f"{KEY}: got {spec!r}, which takes images of 1 or 3 channels, not {num_channels}")
    path = local_path(file, key=KEY)
    state = _read_weights(path)
    # what torchvision sets too where it downloads the weights, which were trained with other means and deviations
    options = {"transform_input": True, "init_weights": False} if name in ("inception_v3", "googlenet") else {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of how it initialises weights
        network = models.get_model(name, weights=None, **options)
    _remove_last_linear(network, state, spec=spec)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{KEY}: {path} does not hold the weights of {name} ({one_line(error)[:200]})") from None
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    preprocessed = _Preprocessed(network, transforms.crop_size[0], transforms.mean, transforms.std)
    return f"torchvision {name}, weights {digest}", preprocessed.eval().requires_grad_(False)


def _remove_last_linear(network: nn.Module, state: dict[str, Tensor], *, spec: str) -> None:
    """Replace the classifier, which is the last linear layer of all that have one, and drop its weights."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"{KEY}: got {spec!r}, a network whose classifier is no linear layer; try resnet50")
    parent, _, attribute = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    for name in ("weight", "bias"):  # also of a classifier of other classes
        state.pop(f"{linear[-1]}.{name}", None)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. A file of torch.save is a pickle, which no part of this package reads."""
    import safetensors.torch

    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{KEY}: {path} cannot be read ({error.strerror or one_line(error)})") from None
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{KEY}: {path} is no safetensors file ({one_line(error)[:200]}); of a file of torch.save make one with "
            "safetensors.torch.save_file (docs/evaluation.md)"
        ) from None
