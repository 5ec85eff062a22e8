"""A small convolutional classifier, trained on the labels of a data set, whose hidden layer is a feature space.

For images that no published network was trained for. Always the same budget: the accuracy says how good it became.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_ray.data.batches import scaled
from vae_ray.data.dataset import Split
from vae_ray.errors import UserError
from vae_ray.seeds import generator, stream

logger = logging.getLogger(__name__)

Selection = tuple[Split, Tensor]
"""A split, and the indices of images in it."""

LABEL = "label"
NUM_FEATURES = 128
SMALLEST_SIDE = 8
"""Pixels at which feature maps are no longer halved."""
BATCH_SIZE = 100
LEARNING_RATE, MOMENTUM = 0.1, 0.9
"""The learning rate falls linearly to 0."""
MOST_STEPS = 600
MOST_PIXELS = 60_000_000
"""Of all images of all steps, one channel: large images have fewer steps, so that the time is about the same."""
MOST_TEST_IMAGES = 10_000


class Classifier(nn.Module):
    """Images `(N, C, H, W)` in [0, 1] to logits `(N, num_classes)`: 3 x 3 convolutions, then two linear layers."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        while len(layers) < 4 or max(height, width) > SMALLEST_SIDE:
            stride, num_out = (2 if max(height, width) > SMALLEST_SIDE else 1), (64 if layers else 32)
            layers += [nn.Conv2d(channels, num_out, 3, stride, padding=1), nn.ReLU()]
            channels, height, width = num_out, -(-height // stride), -(-width // stride)
        hidden = nn.Linear(channels * height * width, NUM_FEATURES)
        self.features, self.hidden = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU()), hidden
        self.output = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x))


def train_classifier(train: Selection, test: Selection, *, seed: int, device: torch.device) -> tuple[Classifier, float]:
    """The classifier after its budget of training, and its accuracy on (at most 10,000 of) the test images.

    The same to the bit at every call with one seed, machine and number of threads; another machine may round otherwise.
    About 15 s of one core with MNIST, or less. Raises `UserError` if the images have no labels of two classes or more.
    """
    train, test = (_with_labels(*selection) for selection in (train, test))
    split = train[0]
    num_classes = 1 + int(max(split.columns[LABEL][indices].max() for split, indices in (train, test)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "classifier"))
        network = Classifier(split.image_shape, num_classes).to(device)
    num_pixels = split.image_shape[1] * split.image_shape[2]
    num_steps = max(1, min(MOST_STEPS, MOST_PIXELS // (BATCH_SIZE * num_pixels)))
    velocities = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for step, (x, labels) in enumerate(itertools.islice(_batches(*train, seed), num_steps)):
        loss = F.cross_entropy(network(x.to(device)), labels.to(device))
        _descend(network, torch.autograd.grad(loss, list(network.parameters())), velocities, 1 - step / num_steps)
    network.eval().requires_grad_(False)
    accuracy = _normalise_and_test(network, *test, seed, device)
    logger.info("feature space: a classifier trained for %d steps; test accuracy %.3f", num_steps, accuracy)
    return network, accuracy


@torch.no_grad()
def _descend(network: Classifier, gradients: Sequence[Tensor], velocities: Sequence[Tensor], decay: float) -> None:
    """A step of SGD with momentum; torch.optim's steps load a compiler first, which takes seconds."""
    for parameter, gradient, velocity in zip(network.parameters(), gradients, velocities, strict=True):
        parameter.sub_(velocity.mul_(MOMENTUM).add_(gradient), alpha=LEARNING_RATE * decay)


def _batches(split: Split, indices: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [0, 1] and labels, shuffled again and again."""
    for epoch in itertools.count():
        order = torch.randperm(len(indices), generator=generator(seed, "classifier", epoch))
        for batch in indices[order].split(BATCH_SIZE):
            yield scaled(split.gather(batch)), split.columns[LABEL][batch]


def _normalise_and_test(network: Classifier, split: Split, indices: Tensor, seed: int, device: torch.device) -> float:
    """Give the features a mean square of 1, and return the accuracy."""
    order = torch.randperm(len(indices), generator=generator(seed, "classifier", "test"))
    indices = indices[order[:MOST_TEST_IMAGES]]
    batches = (scaled(split.gather(batch)).to(device) for batch in indices.split(BATCH_SIZE))
    features = torch.cat([network.features(batch) for batch in batches])
    accuracy = (network.output(features).argmax(1).cpu() == split.columns[LABEL][indices]).double().mean()
    # their scale is arbitrary, and KID's kernel is not: ReLU(W / s) = ReLU(W) / s, and the logits stay
    scale = features.double().square().mean().sqrt().clamp(min=1e-6).float()
    for parameter in (network.hidden.weight, network.hidden.bias):
        parameter.div_(scale)
    network.output.weight.mul_(scale)
    return float(accuracy)


def _with_labels(split: Split, indices: Tensor) -> Selection:
    """The images that have a label; raises `UserError` if these are of fewer than two classes."""
    labels = split.columns.get(LABEL, torch.full((len(split),), -1))[indices]
    indices = indices[labels >= 0]
    if len(labels[labels >= 0].unique()) < 2:
        raise UserError(
            f"features: got 'classifier', but the {split.name} images have no labels of two classes or more; try "
            "torchvision:NETWORK:FILE or package.module:function"
        )
    return split, indices
