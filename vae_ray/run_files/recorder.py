"""Everything rank 0 writes about an epoch, besides its checkpoint: metrics, pictures, TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vae_ray.config.experiment import Experiment, is_place_key
from vae_ray.models.noise import latent_noise
from vae_ray.models.traversal import traverse
from vae_ray.models.vae import VAE
from vae_ray.run_files.event_file import EventFile
from vae_ray.run_files.image_grids import grid, pairs_grid, png_bytes, square_grid
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.retry import describe_os_error, retry_io

logger = logging.getLogger(__name__)

NUM_SAMPLES = 64
NUM_RECONSTRUCTIONS = 32
PROGRESS_SECONDS = 0.5


class Recorder:
    """Writes a run's files as it trains; use as a context manager, on rank 0 only.

    `first_epoch` is the first that will be recorded: what a killed attempt left of it or later is dropped.
    `test_images` `(n, C, H, W)` in [0, 1] are those shown beside their reconstructions.
    """

    def __init__(
        self,
        run: RunDirectory,
        experiment: Experiment,
        *,
        first_epoch: int,
        test_images: Tensor,
    ) -> None:
        self.run, self.experiment = run, experiment
        self.test_images = test_images
        self._next_progress = 0.0
        self._last_metrics: dict[str, float] = {}
        self._unwritten: list[dict[str, Any]] = []
        self._is_failing = False
        self.begin_at(first_epoch)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._going_on("metrics and TensorBoard events"):
            if self._unwritten:
                self._write_metrics()
            self.events.flush()
        with self._going_on("hyperparameters for TensorBoard"):
            if self._last_metrics:
                self._hparams()
        with contextlib.suppress(OSError):
            self.run.progress_file.unlink(missing_ok=True)

    def begin_at(self, epoch: int) -> None:
        """Drop what has been recorded of `epoch` and later, and go on there."""
        self.run.truncate_to_epoch(epoch - 1)
        self._unwritten = [line for line in self._unwritten if line["epoch"] < epoch]
        self.events = EventFile(self.run.tensorboard, purge_step=epoch)

    def epoch(self, line: dict[str, Any], model: VAE) -> None:
        """Record one epoch: its line of metrics, and the pictures of `model` as it now is.

        A storage that is full does not end the run: metrics are written later, pictures are not.
        """
        epoch = line["epoch"]
        self._last_metrics = {key: value for key, value in line.items() if key.endswith("/nelbo")}
        self._unwritten.append(line)
        for key, value in line.items():
            if key != "epoch":
                self.events.add_scalar(key, value, epoch)
        with self._going_on("metrics"):
            self._write_metrics()
        for name, picture in self._pictures(model, epoch).items():
            content = png_bytes(picture)
            self.events.add_png(
                name,
                content,
                width=picture.width,
                height=picture.height,
                channels=len(picture.getbands()),
                step=epoch,
            )
            with self._going_on("pictures"):
                directory = self.run.images / name
                self.run.images.mkdir(exist_ok=True)
                directory.mkdir(exist_ok=True)
                (directory / f"epoch={epoch:04d}.png").write_bytes(content)
        with self._going_on("TensorBoard events"):
            self.events.flush()
            self._is_failing = False

    def _write_metrics(self) -> None:
        retry_io(lambda: self.run.append_metrics(*self._unwritten), where=self.run.metrics_file)
        self._unwritten = []

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """In its body an error of the storage is a warning: the first of a row of them."""
        try:
            yield
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "%s: %s could not be written (%s); training continues",
                    self.run.path,
                    what,
                    describe_os_error(error),
                )
            self._is_failing = True

    @torch.inference_mode()
    def _pictures(self, model: VAE, epoch: int) -> dict[str, Image.Image]:
        model.eval()
        x = self.test_images.to(next(model.parameters()).device)
        # The same noise every epoch and in every run of these latent shapes: differences between two grids are
        # differences between two models.
        noise = latent_noise(model.latent_shapes, slice(0, NUM_SAMPLES), 0, "sample grid", device=x.device)
        samples, reconstructions = model.generate(noise), model.reconstruct(x)
        traversal = traverse(model, x)
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
            if not is_place_key(key)
        }
        metrics = {f"final/{key}": value for key, value in self._last_metrics.items()}
        page = EventFile(self.run.tensorboard / "hparams")
        page.add_hparams(values, metrics)
        page.flush()

    def progress_is_due(self) -> bool:
        """Whether it is time to say how far the epoch is; cheap enough to ask every step."""
        return time.monotonic() >= self._next_progress

    def progress(self, **state: Any) -> None:
        """Leave a note of how far the epoch is, for the live view."""
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        partial = self.run.progress_file.with_suffix(".partial")
        with contextlib.suppress(OSError):  # nothing depends on it
            partial.write_text(json.dumps(state))
            os.replace(partial, self.run.progress_file)
