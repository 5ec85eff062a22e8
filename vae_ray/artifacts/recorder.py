"""Everything rank 0 writes about an epoch, besides its checkpoint: metrics, pictures, TensorBoard events."""

from __future__ import annotations

import json
import os
import time
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary
from torch import Tensor

from vae_ray.artifacts.image_grids import grid, pairs_grid, png_bytes, square_grid
from vae_ray.artifacts.run_directory import RunDirectory
from vae_ray.config import Experiment
from vae_ray.likelihoods import Likelihood
from vae_ray.models.vae import VAE
from vae_ray.seeds import generator
from vae_ray.traversal import traverse

NUM_SAMPLES = 64
NUM_RECONSTRUCTIONS = 32
PROGRESS_SECONDS = 0.5
# Fields that do not change what is learnt; TensorBoard shows the first few columns only.
NO_HYPERPARAMETERS = ("data.root", "data.cache_dir", "data.download", "run.name", "run.storage", "workers.")


class Recorder:
    """Writes a run's files as it trains; use as a context manager, on rank 0 only.

    `first_epoch` is the first that will be recorded: what a killed attempt left of it or later is dropped.
    `test_images` `(n, C, H, W)` in [0, 1] are those shown beside their reconstructions.
    """

    def __init__(
        self,
        run: RunDirectory,
        experiment: Experiment,
        likelihood: Likelihood,
        *,
        first_epoch: int,
        test_images: Tensor,
    ) -> None:
        self.run, self.experiment, self.likelihood = run, experiment, likelihood
        self.test_images = test_images
        # The same z every epoch and in every run of this latent_dim: differences between two grids are
        # differences between two models.
        self.z = torch.randn(NUM_SAMPLES, experiment.model.latent_dim, generator=generator(0, "sample grid"))
        run.forget_after(first_epoch - 1)
        self.events = SummaryWriter(str(run.tensorboard), purge_step=first_epoch, flush_secs=10)
        self._next_progress = 0.0
        self._last_metrics: dict[str, float] = {}

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last_metrics:
            self._hparams()
        self.events.close()
        self.run.progress_file.unlink(missing_ok=True)

    def epoch(self, line: dict[str, Any], model: VAE) -> None:
        """Record one epoch: its line of metrics, and the pictures of `model` as it now is."""
        self.run.append_metrics(line)
        epoch = line["epoch"]
        self._last_metrics = {key: value for key, value in line.items() if key.endswith("/nelbo")}
        for key, value in line.items():
            if key != "epoch":
                self.events.add_scalar(key, value, epoch)
        for name, picture in self._pictures(model, epoch).items():
            directory = self.run.images / name
            directory.mkdir(parents=True, exist_ok=True)
            content = png_bytes(picture)
            (directory / f"epoch={epoch:04d}.png").write_bytes(content)
            self._add_png(name, content, picture, epoch)
        self.events.flush()

    def _add_png(self, tag: str, content: bytes, picture: Image.Image, epoch: int) -> None:
        # `add_image` would compress the pixels a second time: half the cost of an epoch of small images.
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=len(picture.getbands()), encoded_image_string=content
        )
        self.events.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), epoch)

    @torch.inference_mode()
    def _pictures(self, model: VAE, epoch: int) -> dict[str, Image.Image]:
        model.eval()
        device = next(model.parameters()).device
        samples = self.likelihood.mean(model.decode(self.z.to(device)))
        x = self.test_images.to(device)
        reconstructions = self.likelihood.mean(model.decode(model.encode(x).mu))
        traversal = traverse(model, self.likelihood, x)
        source = self.experiment.data.source
        return {
            "samples": square_grid(samples, title=f"{source} · samples, z ~ N(0, I) · epoch {epoch}"),
            "reconstructions": pairs_grid(
                x, reconstructions, title=f"{source} · test images, z = posterior mean · epoch {epoch}"
            ),
            "traversals": grid(
                list(traversal.images),
                title=f"{source} · one latent dimension at a time, -3 to 3 · epoch {epoch}",
                row_labels=traversal.row_labels(),
            ),
        }

    def _hparams(self) -> None:
        """What was learnt with, beside the last metrics, for TensorBoard's HPARAMS page."""
        values = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in self.experiment.flat().items()
            if not key.startswith(NO_HYPERPARAMETERS)
        }
        metrics = {f"final/{key}": value for key, value in self._last_metrics.items()}
        self.events.add_hparams(values, metrics, name="hparams")

    def progress_is_due(self) -> bool:
        """Whether it is time to say how far the epoch is; cheap enough to ask every step."""
        return time.monotonic() >= self._next_progress

    def progress(self, **state: Any) -> None:
        """Leave a note of how far the epoch is, for the live view."""
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        partial = self.run.progress_file.with_suffix(".partial")
        partial.write_text(json.dumps(state))
        os.replace(partial, self.run.progress_file)
