"""What a data set holds, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ray.config.sections.data import DataConfig, UserData
from vae_ray.data.cache import open_dataset
from vae_ray.data.dataset import Split


def open_split(config: DataConfig | UserData, name: str) -> Split:
    """A split of the data set of an experiment's section `data`."""
    return open_dataset(config).splits[name]


def pixels_of(split: Split) -> NDArray[np.uint8]:
    """All images, `(N, C, H, W)`."""
    return split.first(len(split)).numpy()


def labels_of(split: Split) -> NDArray[Any]:
    """The column "label", `(N,)`."""
    return split.columns["label"].numpy()
