"""kill -9 while images are prepared: the next call completes them, and no process is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.conftest import FORM, Count
from tests.faults.signalled import descendants, is_alive
from vae_ray.config.sections.data import ImagesData
from vae_ray.data.dataset import open_local
from vae_ray.data.preparation import prepare
from vae_ray.data.processes import run_tasks
from vae_ray.data.shards import DATASET_FILE, Description
from vae_ray.data.sources import build_source, plan_of

pytestmark = pytest.mark.faults

NUM_IMAGES, NUM_KILLS = 900, 6 if FORM == "short" else 12
PREPARE = """
import sys
from pathlib import Path
from vae_ray.config.sections.data import ImagesData
from vae_ray.data import processes
from vae_ray.data.preparation import prepare
from vae_ray.data.sources import build_source, plan_of

root, out = sys.argv[1:]
processes.ALONE_SECONDS = 0.1
config = ImagesData(root=root, image_size=32)
print("ready", flush=True)
prepare(plan_of(config, build_source(config, Path(out))), out, run=lambda t: processes.run_tasks(t, num_processes=2))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for number in range(NUM_IMAGES):
        pixels = chance.integers(0, 256, (150, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png", compress_level=1)
    return folder


def prepared(photos: Path, out: Path) -> Description:
    config = ImagesData(root=str(photos), image_size=32)
    plan = plan_of(config, build_source(config, out))
    return prepare(plan, str(out), run=lambda tasks: run_tasks(tasks, num_processes=1))


@pytest.mark.timeout(600)
def test_a_preparation_killed_at_random_moments_is_completed_and_leaves_no_process(
    photos: Path, tmp_path: Path, fault_counts: Count
) -> None:
    whole, chance = prepared(photos, tmp_path / "whole"), random.Random(1)
    assert whole.num_images("train") + whole.num_images("test") == NUM_IMAGES
    num_interrupted = 0
    for number in range(NUM_KILLS):
        out = tmp_path / "out"
        process = subprocess.Popen([sys.executable, "-c", PREPARE, photos, out], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.05, 2.5))
        family = [process.pid, *descendants(process.pid)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        is_complete = (out / DATASET_FILE).exists()
        num_interrupted += not is_complete
        deadline = time.monotonic() + 20
        while any(map(is_alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_alive, family)), f"{number}: processes are left"
        if number % 3 < 2:  # else two kills in a row
            again = prepared(photos, out)
            assert again == whole, number
            dataset = open_local(out, verified=tmp_path / f"verified-{number}")  # compares every checksum
            assert dataset is not None
            assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
            shutil.rmtree(out)
    assert num_interrupted >= NUM_KILLS // 2, "the moments are badly chosen"
    fault_counts("driver killed", tried=NUM_KILLS, survived=NUM_KILLS, note="preparation of images")
