"""What a run's best model does with test images: for the page of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vae_ray.data.batches import Loader
from vae_ray.data.splits import Splits
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.inference import TrainedVAE
from vae_ray.parallel.group import SingleProcess, shards_of
from vae_ray.report.pictures import data_uri
from vae_ray.run_files.image_grids import png_bytes, to_uint8

MOST_IMAGES = 2000
"""Of the map: t-SNE of as many takes some seconds of a core, and a browser draws their points twice."""
THUMBNAIL_BYTES, THUMBNAIL_PIXELS = 1_500, 64
"""Limits of one image of the map, so that all of them take at most 4 MB of the page as text."""
NUM_PAIRS = 8
"""Reconstructions in each of three groups."""

Vectors = NDArray[np.float64]


class Pair(NamedTuple):
    """A test image and its reconstruction as data URIs, and the squared error, summed over pixels and channels."""

    image: str
    reconstruction: str
    squared_error: float


class Examination(NamedTuple):
    """The model's numbers over the test split, and what it does with N images from all over it."""

    evaluation: Evaluation
    failures: list[str]
    latent_names: list[str]
    """Of each latent dimension, or channel of a spatial latent: `z[3]`; `group 2, z[3]` where there are several."""
    codes: Vectors
    """Posterior means, `(N, latent_dim)`."""
    labels: dict[str, NDArray[np.generic]]
    """`(N,)` by name; none where the data set has none."""
    names: dict[str, list[str]]
    """What the values 0, 1, ... of a label mean, where that is known."""
    squared_errors: Vectors
    """`(N,)`, summed over pixels and channels."""
    thumbnails: list[str]
    """Data URIs of the images."""
    pairs: dict[str, list[Pair]]
    """Images with the smallest, the middle and the largest squared errors."""


@torch.inference_mode()
def examine(model: TrainedVAE) -> Examination:
    """One pass over the test split, and one over at most `MOST_IMAGES` images of it; raises `UserError` without it."""
    evaluation, failures = model.evaluate("test"), model.failures()
    splits = Splits.open(model.experiment)
    loader = splits.loader("test", model.experiment, shards_of(SingleProcess(model.device)))
    indices = loader.spread(MOST_IMAGES)
    codes, errors, thumbnails = [], [], []
    for part in indices.split(model.experiment.training.evaluation_batch_size):
        x, z, reconstructions = _passed(model, loader, part)
        codes.append(z.double().cpu().numpy())
        errors.append((x - reconstructions).square().flatten(1).double().sum(1).cpu().numpy())
        thumbnails += _data_uris(x)
    squared_errors = np.concatenate(errors)
    return Examination(
        evaluation,
        failures,
        _latent_names(model.model.latent_shapes),
        np.concatenate(codes),
        {name: values.numpy() for name, values in loader.labels(indices).items()},
        splits.dataset.description.names,
        squared_errors,
        thumbnails,
        _pairs(model, loader, indices, squared_errors),
    )


def _passed(model: TrainedVAE, loader: Loader, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, their posterior means, and the reconstructions from those."""
    name = model.model.condition_on
    labels = None if name is None else loader.labels(indices)[name]
    x = loader.images(indices)
    z = model.encode(x, labels)
    return x, z, model.decode(z, labels)


def _pairs(model: TrainedVAE, loader: Loader, indices: Tensor, errors: Vectors) -> dict[str, list[Pair]]:
    order = np.argsort(errors, kind="stable")
    middle = max(0, (len(order) - NUM_PAIRS) // 2)
    places = {
        "smallest": order[:NUM_PAIRS],
        "middle": order[middle : middle + NUM_PAIRS],
        "largest": order[-NUM_PAIRS:],
    }
    pairs = {}
    for name, chosen in places.items():
        x, _, reconstructions = _passed(model, loader, indices[torch.from_numpy(chosen.copy())])
        triples = zip(_data_uris(x), _data_uris(reconstructions), errors[chosen], strict=True)
        pairs[name] = [Pair(image, output, float(error)) for image, output, error in triples]
    return pairs


def _data_uris(images: Tensor) -> list[str]:
    """Images `(n, C, H, W)` in [0, 1] as small pictures."""
    factor = THUMBNAIL_PIXELS / max(images.shape[2:])
    if factor < 1:
        size = [max(1, round(length * factor)) for length in images.shape[2:]]
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    pictures = [Image.fromarray(pixels) for pixels in to_uint8(images)]
    return [data_uri(png_bytes(picture), limit=THUMBNAIL_BYTES) or "" for picture in pictures]


def _latent_names(shapes: Sequence[tuple[int, ...]]) -> list[str]:
    groups = [f"group {number}, " if len(shapes) > 1 else "" for number in range(1, len(shapes) + 1)]
    return [f"{group}z[{d}]" for group, shape in zip(groups, shapes, strict=True) for d in range(shape[0])]
