"""A data set that two hosts decode into a directory that both see, and directories that only one of them sees."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cluster.ray_nodes import RayNodes, succeeded

pytestmark = pytest.mark.cluster

NUM_IMAGES = 320
DRIVER = """
import json, platform, sys, time
from pathlib import Path
from vae_ray.config.sections.data import ImagesData
from vae_ray.data.sources import plan_of
from vae_ray.data.sources.folder import Folder
from vae_ray.distributed.connection import connected
from vae_ray.distributed.preparation import prepare_on_cluster
from vae_ray.errors import UserError

class Noting(Folder):  # of the driver's own module: pickled by value
    def __init__(self, root, notes):
        super().__init__(root)
        self.notes = notes

    def read(self, part, rules):
        if part.num > 1:  # not the image that is read in advance
            time.sleep(0.2)
            Path(self.notes, f"decoded-{platform.node()}-{part.payload[0].entry.name}").touch()
        return Folder.read(self, part, rules)

def prepared(root, out):
    try:
        plan = plan_of(ImagesData(source="folder", root=root, image_size=8), Noting(root, shared))
        description = prepare_on_cluster(plan, out)
    except UserError as error:
        return str(error)
    return {split: description.num_images(split) for split in description.shards}

shared = sys.argv[1]
cases = (f"{shared}/photos", f"{shared}/out"), ("/tmp/photos", f"{shared}/out2"), (f"{shared}/photos", "/tmp/out")
print("begin")
with connected():
    print(json.dumps([prepared(*case) for case in cases]))
print("end")
"""


@pytest.fixture(scope="module")
def answers(two_nodes: RayNodes) -> Any:
    """What a job on the first host has printed, and who has decoded how many parts."""
    shared, (first, _) = two_nodes.network.shared / "images", two_nodes.nodes
    (shared / "photos").mkdir(parents=True)
    generator = np.random.default_rng(5)
    for number in range(NUM_IMAGES):
        pixels = generator.integers(256, size=(9, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(shared / "photos" / f"{number:03d}.png")
    succeeded(first.run("cp", "-r", str(shared / "photos"), "/tmp/photos"))
    (shared / "driver.py").write_text(DRIVER)
    job = succeeded(two_nodes.submit("python", str(shared / "driver.py"), str(shared)))
    lines = job.stdout.splitlines()
    (answer,) = lines[lines.index("begin") + 1 : lines.index("end")]  # Ray itself prints nothing
    return json.loads(answer), Counter(file.name.split("-")[1] for file in shared.glob("decoded-*"))


def test_two_hosts_decode_into_a_directory_that_both_see(answers: Any, two_nodes: RayNodes) -> None:
    (described, _, _), decoded = answers
    assert sum(described.values()) == NUM_IMAGES
    assert decoded.keys() == {"h1", "h2"}
    assert sum(decoded.values()) == NUM_IMAGES / 32
    assert list(two_nodes.network.shared.glob("images/out/*part-*")) == []


def test_a_directory_that_one_host_does_not_see_is_one_clear_line(answers: Any, two_nodes: RayNodes) -> None:
    (_, source, out), _ = answers
    address = two_nodes.nodes[1].address
    assert source == (
        f"data.root: not all nodes of the cluster can read photos (folder of 320 .png): {address} cannot read it "
        "(000.png: cannot be read (No such file or directory)); try a directory that all nodes see, or a URI"
    )
    assert out == (
        f"--out: got '/tmp/out', which not all nodes of the cluster share: {address} does not see what this process "
        "writes there; try a directory that all nodes see and may write to, or a URI, for example s3://BUCKET/images"
    )
    assert not (two_nodes.network.shared / "images" / "out2" / "dataset.json").exists()
