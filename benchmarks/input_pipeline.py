"""Ten epochs over a folder of 50,000 JPEGs: torchvision's ImageFolder and DataLoader against ours with preparation.

    python -m benchmarks.input_pipeline            # the comparison, and the speed of preparation
    python -m benchmarks.input_pipeline --memory   # 3 GiB of pixels under a memory limit of 1.5 GiB (root, cgroup v1)

Both train the same network of one small layer with the same loop, so that what differs is the images' way to it. The
JPEGs are those of ../shared/data/cifar10-jpeg, mirrored and cut until there are enough.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vae_ray.config.sections.data import ImagesData, UserData
from vae_ray.data.batches import Loader, Shards
from vae_ray.data.cache import open_dataset
from vae_ray.data.dataset import Dataset
from vae_ray.data.preparation import prepare
from vae_ray.data.processes import run_tasks
from vae_ray.data.sources import build_source, plan_of

NUM_IMAGES, NUM_EPOCHS, BATCH = 50_000, 10, 128
JPEGS = Path("../shared/data/cifar10-jpeg/train")
CPU = Shards(0, 1, torch.device("cpu"))


def write_jpegs(directory: Path) -> None:
    """50,000 different JPEGs of 32x32 pixels in class folders."""
    files = sorted(JPEGS.glob("*/*.jpg"))
    for number in range(NUM_IMAGES):
        file, variant = files[number % len(files)], number // len(files)
        folder = directory / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as picture:
            changed = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if variant % 2 else picture.copy()
        changed.rotate(variant // 2, Image.Resampling.BILINEAR).save(folder / f"{variant:02d}-{file.name}", quality=90)


class Network:
    """One small layer, and its optimizer."""

    def __init__(self, num_pixels: int) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(num_pixels, 16)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=1e-3)

    def train(self, batches: Iterable[Tensor]) -> int:
        """One epoch; the number of images."""
        num = 0
        for x in batches:
            self.optimizer.zero_grad()
            self.layer(x.flatten(1)).square().mean().backward()
            self.optimizer.step()
            num += len(x)
        return num


def with_torchvision(directory: Path) -> None:
    """Ten epochs, decoded in each by two processes."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    data = ImageFolder(str(directory), transform=ToTensor())
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    network = Network(3 * 32 * 32)
    for _ in range(NUM_EPOCHS):
        assert network.train(x for x, _ in loader) == NUM_IMAGES


def with_ours(directory: Path, cache: Path) -> float:
    """Preparation and ten epochs; the seconds of the preparation."""
    started = time.perf_counter()
    dataset = open_dataset(ImagesData(root=str(directory), cache_dir=cache, test_fraction=1e-9))
    seconds = time.perf_counter() - started
    _train(dataset, NUM_EPOCHS)
    return seconds


def _train(dataset: Dataset, num_epochs: int, *, window_mib: int | None = None) -> int:
    split = dataset.splits["train"]
    window = None if window_mib is None else window_mib << 20
    loader = Loader(split, torch.arange(len(split)), seed=0, shards=CPU, window_bytes=window)
    network, num = Network(int(np.prod(split.image_shape))), 0
    for epoch in range(1, num_epochs + 1):
        num += network.train(batch.x for batch in loader.training(epoch, global_batch_size=BATCH))
    return num


def preparation_seconds(directory: Path, out: Path, *, num_processes: int) -> float:
    """Seconds for decoding all, into a new directory."""
    shutil.rmtree(out, ignore_errors=True)
    config = ImagesData(root=str(directory))
    started = time.perf_counter()
    plan = plan_of(config, build_source(config, out))
    prepare(plan, str(out), run=lambda tasks: run_tasks(tasks, num_processes=num_processes))
    return time.perf_counter() - started


def pillow_seconds(directory: Path) -> float:
    """Seconds of a plain loop that opens and decodes every file."""
    started = time.perf_counter()
    for file in directory.glob("*/*.jpg"):
        with Image.open(file) as picture:
            np.asarray(picture.convert("RGB"))
    return time.perf_counter() - started


def compare() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place, "jpegs")
        write_jpegs(directory)
        pillow_seconds(directory)  # all files are in the page cache from here on
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {NUM_IMAGES:,} JPEGs, {NUM_EPOCHS} epochs")
        seconds = {"torchvision": _timed(lambda: with_torchvision(directory))}
        started = time.perf_counter()
        prepared = with_ours(directory, Path(place, "cache"))
        seconds["vae_ray"] = time.perf_counter() - started
        print(f"torchvision   {seconds['torchvision']:6.1f} s")
        print(f"vae_ray       {seconds['vae_ray']:6.1f} s, of which {prepared:.1f} s preparation")
        print(f"ratio         {seconds['torchvision'] / seconds['vae_ray']:6.1f}")
        plain = pillow_seconds(directory)
        one, two = (preparation_seconds(directory, Path(place, "out"), num_processes=n) for n in (1, 2))
        print(f"Pillow loop   {NUM_IMAGES / plain:8,.0f} images/s")
        print(f"preparation   {NUM_IMAGES / one:8,.0f} images/s on one core, {NUM_IMAGES / two:,.0f} on two")
        print(f"ratio         {one / two:6.2f} of two cores to one, {plain / two:.2f} of two cores to the Pillow loop")


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


# --- more than memory

LIMIT_BYTES = 1536 << 20
PIXELS_BYTES = 3 << 30
IMAGE_SHAPE = (3, 64, 64)
NUM_LARGE = PIXELS_BYTES // int(np.prod(IMAGE_SHAPE))


def noise(*, num: int = NUM_LARGE) -> Iterator[NDArray[np.uint8]]:
    """Random images, which no file system can compress."""
    random = np.random.default_rng(0)
    for start in range(0, num, 1024):
        yield random.integers(0, 256, (min(1024, num - start), *IMAGE_SHAPE), dtype=np.uint8)


def _large_set(cache: str) -> Dataset:
    return open_dataset(UserData(source="benchmarks.input_pipeline:noise", cache_dir=Path(cache), test_fraction=1e-9))


def train_once(cache: str, window_mib: int) -> None:
    """One epoch over the large set; prints images/s and the largest resident memory. `window_mib` 0: as a whole."""
    torch.set_num_threads(1)
    dataset = _large_set(cache)
    started = time.perf_counter()
    num = _train(dataset, 1, window_mib=window_mib or None)
    speed = num / (time.perf_counter() - started)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    anonymous, peak = (int(status[key].split()[0]) >> 10 for key in ("RssAnon", "VmHWM"))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    print(f"{speed:.0f} {anonymous} {peak} {faults}")


def larger_than_memory() -> None:
    with tempfile.TemporaryDirectory(dir=".") as cache:
        _large_set(cache)
        print(
            f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {NUM_LARGE:,} images, {PIXELS_BYTES >> 30} GiB"
        )
        rows = (("all memory, as a whole", 0, False), ("1.5 GiB, in windows", 256, True))
        speeds = []
        for name, window, is_limited in rows:
            command = [sys.executable, "-m", "benchmarks.input_pipeline", "--train", cache, str(window)]
            if not is_limited:
                subprocess.run(command, capture_output=True, check=True)  # into the page cache
            speed, anonymous, peak, faults = _run(command, is_limited=is_limited).split()
            speeds.append(float(speed))
            print(
                f"{name:24s} {float(speed):8,.0f} images/s, {anonymous} MiB anonymous, {peak} MiB resident with mapped "
                f"files, {faults} major faults"
            )
        print(f"ratio                    {speeds[1] / speeds[0]:8.2f}")


def _run(command: list[str], *, is_limited: bool) -> str:
    """The output of a command, in a cgroup of its own with the memory limit."""
    group = Path("/sys/fs/cgroup/memory/vae_ray_benchmark")
    if is_limited:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        script = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        command = ["bash", "-c", script, "bash", *command]
        Path("/proc/sys/vm/drop_caches").write_text("1")  # pages of another cgroup would not count here
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    finally:
        if is_limited:
            group.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="train on more pixels than the memory limit")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train_once(options.train[0], int(options.train[1]))
    elif options.memory:
        larger_than_memory()
    else:
        compare()
