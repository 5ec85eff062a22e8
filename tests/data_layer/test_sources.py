"""Contract: every source that `data.source` allows can be built, and says what it is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vae_ray import Experiment, UserError
from vae_ray.config.experiment import field_docs
from vae_ray.data.preparation import Plan
from vae_ray.data.rows import Source
from vae_ray.data.sources import build_source, plan_of

(FIELD,) = [field for field in field_docs() if field.key == "data.source"]
NAMES = sorted(set(FIELD.type.strip("{}").split(",")) - {"MODULE:NAME"})
PIXELS = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)


def root_for(name: str, directory: Path) -> Path | None:
    """Images that a source of a user's own can read."""
    if name in ("folder", "auto"):
        for number, image in enumerate(PIXELS):
            Image.fromarray(image).save(directory / f"{number}.png")
        return directory
    if name == "arrays":
        np.save(directory / "images.npy", PIXELS)
        return directory / "images.npy"
    if name == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"image": [image.tolist() for image in PIXELS]}), directory / "images.parquet")
        return directory / "images.parquet"
    return None


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"prepared"}))
def test_every_name_of_a_source_can_be_built(name: str, tmp_path: Path) -> None:
    root = root_for(name, tmp_path)
    data = {"source": name} if root is None else {"source": name, "root": str(root)}
    config = Experiment.from_dict({"data": data}).data
    source: Source = build_source(config, tmp_path / "cache")
    assert source.describe()
    assert isinstance(plan_of(config, source), Plan)
    if root is not None:
        assert source.num_images == 4
        assert source.fingerprint() == build_source(config, tmp_path / "cache").fingerprint()


@pytest.mark.parametrize("name", ["auto", "folder", "arrays", "parquet"])
def test_a_users_own_images_need_a_root_that_exists(name: str, tmp_path: Path) -> None:
    config = Experiment.from_dict({"data": {"source": name}}).data
    with pytest.raises(UserError, match=r"^data\.root: is missing"):
        build_source(config, tmp_path)
    config = Experiment.from_dict({"data": {"source": name, "root": str(tmp_path / "none")}}).data
    with pytest.raises(UserError, match=r"^data\.root: got '.*none', which does not exist"):
        build_source(config, tmp_path)
