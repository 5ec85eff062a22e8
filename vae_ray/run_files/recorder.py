"""What rank 0 writes about each epoch besides its checkpoint: metrics, pictures and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vae_ray.config.experiment import Experiment, is_place_key
from vae_ray.data.cache import name_of
from vae_ray.models.noise import latent_noise
from vae_ray.models.traversal import decode_first_groups, traverse
from vae_ray.models.vae import VAE
from vae_ray.run_files.event_file import EventFile
from vae_ray.run_files.image_grids import grid, pairs_grid, png_bytes, square_grid
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.records import append_records
from vae_ray.storage.retry import describe_os_error, retry_io

logger = logging.getLogger(__name__)

NUM_SAMPLES = 64
NUM_RECONSTRUCTIONS = 32
NUM_IN_A_ROW = 16
TILE_PIXELS = 64
"""Larger images are reduced: pictures of every epoch are stored twice, of 256x256 colour images 7 MB with tiles of
128 pixels, 2 MB with these. `vae-ray generate` and others make larger ones of a checkpoint."""
PROGRESS_SECONDS = 0.5
NOT_CURVES = ("epoch", "num_images", "started_at")
"""Fields of a record that are no curve for TensorBoard."""


class Recorder:
    """Records the epochs of a run until it is closed; on rank 0 only.

    A full disk does not end the run: metrics and scalars are written later, pictures are lost.

    Args:
        run: the run directory, open for writing.
        experiment: what is trained.
        first_epoch: the first epoch to record; records of it and of later epochs are deleted.
        test_images: `(n, C, H, W)` in [0, 1], shown with their reconstructions.
        test_labels: their labels and factors by name, `(n,)`.
    """

    def __init__(
        self,
        run: RunDirectory,
        experiment: Experiment,
        *,
        first_epoch: int,
        test_images: Tensor,
        test_labels: dict[str, Tensor],
    ) -> None:
        self._run, self._experiment = run, experiment
        self._test_images, self._test_labels = test_images, test_labels
        self._unwritten: list[dict[str, Any]] = []
        self._last_nelbo: dict[str, float] = {}
        self._next_progress = 0.0
        self._has_warned = False
        self.begin_at(first_epoch)

    def begin_at(self, epoch: int) -> None:
        """Delete the records of `epoch` and of later epochs, and continue with it."""
        self._run.records.truncate_to_epoch(epoch - 1)
        self._unwritten = [record for record in self._unwritten if record["epoch"] < epoch]
        earlier = self._run.names_in(self._run.tensorboard)
        self._events = EventFile(self._run.tensorboard, earlier=earlier, purge_step=epoch)

    def epoch(self, record: dict[str, Any], model: VAE) -> None:
        """Record an epoch: its metrics, and pictures of the model after it."""
        epoch = record["epoch"]
        self._last_nelbo = {key: value for key, value in record.items() if key.endswith("/nelbo")}
        self._unwritten.append(record)
        with self._warn_on_failure("metrics"):
            self._write_metrics()
        for key, value in record.items():
            if key not in NOT_CURVES:
                self._events.add_scalar(key, value, epoch)
        images, labels = self._test_images, self._test_labels
        for name, picture in _pictures(model, images, labels, name_of(self._experiment.data), epoch).items():
            png = png_bytes(picture)
            self._events.add_png(name, picture, png, epoch)
            with self._warn_on_failure("pictures"):
                directory = self._run.images / name
                self._run.images.mkdir(exist_ok=True)
                directory.mkdir(exist_ok=True)
                (directory / f"epoch={epoch:04d}.png").write_bytes(png)
        with self._warn_on_failure("TensorBoard events"):
            self._events.flush()
            self._has_warned = False

    def progress_is_due(self) -> bool:
        """Whether it is time for `progress`; cheap enough to ask after every step."""
        return time.monotonic() >= self._next_progress

    def progress(self, **state: Any) -> None:
        """Write the position in the epoch, for the live view."""
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        with contextlib.suppress(OSError):  # nothing depends on it
            self._run.records.progress_file.write_text(json.dumps(state))

    def close(self) -> None:
        """Write what has not been written yet."""
        with self._warn_on_failure("metrics and TensorBoard events"):
            if self._unwritten:
                self._write_metrics()
            self._events.flush()
        with self._warn_on_failure("hyperparameters for TensorBoard"):
            if self._last_nelbo:
                self._write_hyperparameters()
        with contextlib.suppress(OSError):
            self._run.records.progress_file.unlink(missing_ok=True)

    def _write_metrics(self) -> None:
        file = self._run.records.metrics_file
        retry_io(lambda: append_records(file, self._unwritten), where=file)
        self._unwritten = []

    def _write_hyperparameters(self) -> None:
        """A row of TensorBoard's HPARAMS page: the fields that decide what is computed, and the last nelbo."""
        values = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in self._experiment.flat().items()
            if not is_place_key(key)
        }
        directory = self._run.tensorboard / "hparams"
        page = EventFile(directory, earlier=self._run.names_in(directory))
        page.add_hparams(values, {f"final/{key}": value for key, value in self._last_nelbo.items()})
        page.flush()

    @contextlib.contextmanager
    def _warn_on_failure(self, what: str) -> Iterator[None]:
        """Make an error of the storage in the body a warning, once until the storage works again."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                why = describe_os_error(error)
                logger.warning("%s: %s could not be written (%s); training continues", self._run.path, what, why)
            self._has_warned = True


@torch.inference_mode()
def _pictures(model: VAE, x: Tensor, labels: dict[str, Tensor], source: str, epoch: int) -> dict[str, Image.Image]:
    """Pictures by kind: samples of the prior, reconstructions of images `x`, and traversals of the latent space.

    Of a model with several latent groups also what each of them holds.
    """
    model.eval()
    x = x.to(next(model.parameters()).device)
    # the same noise in every epoch and in every run of these latent shapes: two grids differ only if their models do
    noise = latent_noise(model.latent_shapes, slice(0, NUM_SAMPLES), 0, "sample grid", device=x.device)
    condition = model.condition(labels)
    samples = model.generate(noise, condition=model.classes_in_turn(NUM_SAMPLES))
    reconstructions, traversal = model.reconstruct(x, condition), traverse(model, x, condition)
    pictures = {
        "samples": square_grid(
            samples, title=f"{source} · samples, z ~ p(z) · epoch {epoch}", largest_tile=TILE_PIXELS
        ),
        "reconstructions": pairs_grid(
            x,
            reconstructions,
            title=f"{source} · test images, z = posterior mean · epoch {epoch}",
            largest_tile=TILE_PIXELS,
        ),
        "traversals": grid(
            list(traversal.images),
            title=f"{source} · {traversal.title()}, -3 to 3 · epoch {epoch}",
            row_labels=traversal.row_labels(),
            largest_tile=TILE_PIXELS,
        ),
    }
    if len(model.latent_shapes) > 1:
        rows = decode_first_groups(model, x, condition, num_shown=NUM_IN_A_ROW)
        pictures["groups"] = grid(
            [x[:NUM_IN_A_ROW], *rows.values()],
            title=f"{source} · first groups as inferred, those below at the mean of their prior · epoch {epoch}",
            row_labels=["test images", *rows],
            largest_tile=TILE_PIXELS,
        )
    return pictures
