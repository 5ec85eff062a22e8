"""The loop that users come from: the notebook's VAE with torchvision transforms, a DataLoader, Adam and sigmoid + BCE.

An independent implementation that shares no code with vae_ray; the benchmarks compare against it.
"""

from __future__ import annotations

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
