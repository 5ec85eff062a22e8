"""Labels by split of arrays in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vae_ray.data.sources.memory import MemorySource
from vae_ray.errors import UserError


@pytest.mark.parametrize(
    "labels",
    [{"train": {"a": [0, 1, 2]}, "test": {"b": ["x", "y"]}}, {"train": None, "test": ["x", "y"]}],
    ids=["another name", "none in train"],
)
def test_splits_with_different_label_columns_are_refused(labels: dict[str, Any]) -> None:
    images = {"train": np.zeros((3, 5, 4), np.uint8), "test": np.zeros((2, 5, 4), np.uint8)}
    with pytest.raises(UserError, match="labels: got other columns in each split"):
        MemorySource(images, labels)
