"""Images per second of one convolutional VAE on a folder of JPEGs: a plain PyTorch loop, Pythae's trainer, and ours.

    python -m benchmarks.conv_throughput --pythae DIR

The same layers (channels 32, 64, 128; dense 256; latent 64), images (32 x 32 colour), batch of 64, Bernoulli
likelihood and Adam. Each trains in a process of its own with one torch thread; reported is the best epoch after the
first one, of all rounds. The plain loop reads by ImageFolder and DataLoader in the same process, as it is mostly
written; Pythae is given all images in memory as float32, as its examples do. DIR is where `pip install --target DIR
--no-deps pythae dill imageio` has put it; without, that row is left out. Pythae is not a dependency of this project.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from vae_ray.config.experiment import Experiment
from vae_ray.runs.train import train

BATCH, LATENT_DIM, SIDE, EPOCHS, LR = 64, 64, 32, 3, 1e-3
SMALLEST = (128, SIDE // 8, SIDE // 8)
NUM_FEATURES = 128 * (SIDE // 8) ** 2


class Encoder(nn.Module):
    """mean and log variance, two layers as in most tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(NUM_FEATURES, 256), nn.ReLU(),
        )  # fmt: skip
        self.mean, self.logvar = nn.Linear(256, LATENT_DIM), nn.Linear(256, LATENT_DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layers(x)
        return self.mean(h), self.logvar(h)


def decoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(LATENT_DIM, 256), nn.ReLU(), nn.Linear(256, NUM_FEATURES), nn.ReLU(), nn.Unflatten(1, SMALLEST),
        nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def plain_epochs(root: Path) -> Iterator[float]:
    """Seconds of each epoch of the loop that users come from."""
    data = datasets.ImageFolder(str(root), transforms.ToTensor())
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    encode, decode = Encoder(), decoder()
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=LR)
    while True:
        started, total = time.perf_counter(), 0.0
        for x, _ in loader:
            mean, logvar = encode(x)
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
            bce = F.binary_cross_entropy(decode(z), x, reduction="sum")
            loss = (bce - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())) / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        yield time.perf_counter() - started


def pythae_epochs(root: Path) -> list[float]:
    """Seconds of each epoch of Pythae's BaseTrainer."""
    from pythae.data.datasets import BaseDataset  # type: ignore[import-not-found]
    from pythae.models import VAE, VAEConfig  # type: ignore[import-not-found]
    from pythae.models.base.base_utils import ModelOutput  # type: ignore[import-not-found]
    from pythae.models.nn import BaseDecoder, BaseEncoder  # type: ignore[import-not-found]
    from pythae.trainers import BaseTrainer, BaseTrainerConfig  # type: ignore[import-not-found]
    from pythae.trainers.training_callbacks import TrainingCallback  # type: ignore[import-not-found]

    class PythaeEncoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encode = Encoder()

        def forward(self, x: Tensor) -> Any:
            mean, logvar = self.encode(x)
            return ModelOutput(embedding=mean, log_covariance=logvar)

    class PythaeDecoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.decode = decoder()

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.decode(z))

    class Clock(TrainingCallback):  # type: ignore[misc]
        times: list[float] = []  # noqa: RUF012

        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    images = datasets.ImageFolder(str(root), transforms.ToTensor())
    x = torch.stack([image for image, _ in images])
    config = VAEConfig(input_dim=(3, SIDE, SIDE), latent_dim=LATENT_DIM, reconstruction_loss="bce")
    clock = Clock()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        BaseTrainer(
            model=VAE(config, PythaeEncoder(), PythaeDecoder()),
            train_dataset=BaseDataset(x, torch.zeros(len(x))),
            training_config=BaseTrainerConfig(
                output_dir=output, num_epochs=EPOCHS, learning_rate=LR, per_device_train_batch_size=BATCH, no_cuda=True
            ),
            callbacks=[clock],
        ).train()
    return [end - start for start, end in itertools.pairwise(clock.times)]


def ours(root: Path) -> float:
    """Images per second of the best epoch after the first."""
    with tempfile.TemporaryDirectory() as storage:
        settings = {
            "data": {"source": "folder", "root": str(root), "num_validation": 0, "image_size": SIDE},
            "model": {"network": {"name": "conv"}, "latent_dim": LATENT_DIM},
            "optim": {"lr": LR},
            "training": {"epochs": EPOCHS, "global_batch_size": BATCH, "test_every_epochs": 0},
            "workers": {"num": 0, "cpus": 1, "device": "cpu"},
            "run": {"storage": storage},
        }
        history = train(Experiment.from_dict(settings)).history
        return max(float(record["images_per_second"]) for record in history[1:])


def measure(name: str, root: Path) -> float:
    """Images per second in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if name == "vae_ray":
        return ours(root)
    num = sum(1 for _ in root.glob("*/*"))
    seconds = list(itertools.islice(plain_epochs(root), EPOCHS)) if name == "plain loop" else pythae_epochs(root)
    return num / min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path("../shared/data/cifar10-jpeg/train"))
    parser.add_argument("--images", type=int, default=6400, help="how many of the folder's images are used")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pythae", type=Path, help="the directory that Pythae is installed in")
    parser.add_argument("--only", help="measure one here; used for each child")
    options = parser.parse_args()
    if options.only:
        print(measure(options.only, options.root))
        return
    with tempfile.TemporaryDirectory() as directory:
        root = link_images(options.root.absolute(), Path(directory), options.images)
        names = ["plain loop", *(["Pythae"] if options.pythae else []), "vae_ray"]
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                speeds[name].append(in_a_child(name, root, options.pythae))
    best = {name: max(values) for name, values in speeds.items()}
    print(f"torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}, {options.images} images, batch {BATCH}")
    for name, values in speeds.items():
        spread = f"({min(values):,.0f} - {max(values):,.0f})"
        print(f"  {name:12} {best[name]:>8,.0f} images/s {spread:>18}  x {best[name] / best['plain loop']:.2f}")


def link_images(root: Path, directory: Path, num: int) -> Path:
    """A folder of links to as many images of each class."""
    classes = sorted(each for each in root.iterdir() if each.is_dir())
    for each in classes:
        (directory / each.name).mkdir()
        for path in sorted(each.iterdir())[: num // len(classes)]:
            (directory / each.name / path.name).symlink_to(path)
    return directory


def in_a_child(name: str, root: Path, pythae: Path | None) -> float:
    command = [sys.executable, "-m", "benchmarks.conv_throughput", "--only", name, "--root", str(root)]
    paths = [str(path) for path in (Path.cwd(), pythae) if path is not None]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(output.stdout.split()[-1])


if __name__ == "__main__":
    main()
