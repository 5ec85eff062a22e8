"""The loop that users come from: the notebook's VAE with torchvision transforms, a DataLoader, Adam and sigmoid + BCE.

An independent implementation that shares no code with vae_ray; the benchmarks compare against it.

    python -m benchmarks.notebook_loop --seed 0        # its own curve: train loss of each epoch, nats per image
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

TO_SIGNED = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])


class NotebookVAE(nn.Module):
    """784-400-100-(20, 20)-100-400-784 with sigmoid outputs; other sizes where a sweep asks for them."""

    def __init__(self, *, num_pixels: int = 784, latent_dim: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(num_pixels, 400), nn.ReLU(), nn.Linear(400, 100), nn.ReLU())
        self.mu, self.logvar = nn.Linear(100, latent_dim), nn.Linear(100, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 100),
            nn.ReLU(),
            nn.Linear(100, 400),
            nn.ReLU(),
            nn.Linear(400, num_pixels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.decoder(z), mu, logvar


def negative_elbo(x: Tensor, mean: Tensor, mu: Tensor, logvar: Tensor, *, beta: float = 1.0) -> Tensor:
    """BCE on grey levels in [0, 1] + beta * KL, in nats, summed over pixels, latent dimensions and the batch."""
    bce = F.binary_cross_entropy(mean, (x + 1) / 2, reduction="sum")
    return bce - beta * 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def loader(root: Path, *, train: bool, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """MNIST with pixels in [-1, 1], decoded and collated image by image as in the notebook."""
    dataset = datasets.MNIST(str(root), train=train, transform=TO_SIGNED)
    return DataLoader(dataset, batch_size=batch_size, shuffle=train)


def epochs(root: Path, *, batch_size: int, seed: int) -> Iterator[tuple[NotebookVAE, float, float]]:
    """Train without end; after each epoch yield the model, its mean train loss in nats and the epoch's seconds."""
    torch.manual_seed(seed)
    model, batches = NotebookVAE(), loader(root, train=True, batch_size=batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while True:
        started, total, count = time.perf_counter(), 0.0, 0
        for images, _ in batches:
            x = images.view(-1, 784)
            loss = negative_elbo(x, *model(x))
            optimizer.zero_grad()
            (loss / len(x)).backward()
            optimizer.step()
            total, count = total + loss.item(), count + len(x)
        yield model, total / count, time.perf_counter() - started


@torch.no_grad()
def test_nelbo(model: NotebookVAE, root: Path) -> float:
    """Negative ELBO of the 10,000 test images with sampled z, nats per image."""
    batches = loader(root, train=False, batch_size=1000)
    total = sum(float(negative_elbo(x.view(-1, 784), *model(x.view(-1, 784)))) for x, _ in batches)
    return total / 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description="Train loss of each epoch, in nats per image.")
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="MNIST in torchvision's layout")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = epochs(options.root, batch_size=64, seed=options.seed)
    for epoch, (_, loss, seconds) in enumerate(itertools.islice(runs, options.epochs), 1):
        print(f"epoch {epoch}: {loss:.2f} nats, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
