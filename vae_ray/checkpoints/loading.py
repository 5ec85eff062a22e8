"""Checkpoints: complete, safe packages of a moment of training, written aside and renamed when whole.

    checkpoints/epoch=0007/                 after epoch 7, with its metrics
    checkpoints/epoch=0008-step=000412/     412 steps into epoch 8: for --resume alone, never the best
        manifest.json           format, epoch, image shape, metrics; size and SHA-256 of the other files and of itself
        experiment.json         the resolved experiment
        weights.safetensors     the model
        training_state.pt       optimizer and progress: tensors and plain values, read with weights_only=True

Nothing that is read here can run code. A directory without a matching manifest is not a checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from vae_ray.checkpoints.safe_loading import (
    HEADER_BYTES,
    check_weights_header,
    load_optimizer,
    training_state_from,
    weights_from,
)
from vae_ray.config.experiment import Experiment
from vae_ray.errors import CorruptFile, UserError
from vae_ray.models.vae import VAE, build_vae
from vae_ray.storage.reading import MOST_BYTES, parse_json, read_bytes, shown

FORMAT = "vae_ray checkpoint"
FORMAT_VERSION = 2
"""1: whole epochs only, no progress in the training state; still read."""
MANIFEST, EXPERIMENT, WEIGHTS, TRAINING_STATE = (
    "manifest.json",
    "experiment.json",
    "weights.safetensors",
    "training_state.pt",
)

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""Errors of a file that is not there or is none; any other may pass, as a storage that is away for a while."""
MOST_PIXELS = 1 << 26


class Progress(NamedTuple):
    """What of training is neither weights, nor optimizer, nor a function of epoch and step."""

    lr_factor: float = 1.0
    """What every rollback has left of the learning rate (`training.rollback_lr_factor`)."""
    num_nonfinite: int = 0
    """Batches skipped, or rollbacks, so far."""
    term_sums: Tensor | None = None
    """`(workers, 4)`, float64: each worker's `TermSums` of an epoch that has not ended."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest was read; its files are checked when they are read."""

    path: Path
    epoch: int
    image_shape: tuple[int, int, int]
    metrics: dict[str, float]
    selection_metric: str
    files: dict[str, dict[str, Any]]
    step: int | None = None
    """How many steps of `epoch` are done, where it has not ended; its metrics are then no more than its `seconds`."""
    contents: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """Files that are already in memory; see `in_memory`."""

    @property
    def epochs_done(self) -> int:
        """Whole epochs behind this checkpoint."""
        return self.epoch if self.step is None else self.epoch - 1

    @property
    def position(self) -> tuple[int, int]:
        """`(epochs done, steps done of the next)`: the order of checkpoints."""
        return self.epochs_done, self.step or 0

    @property
    def score(self) -> float:
        """The value of the selection metric in nats; lower is better."""
        return self.metrics[self.selection_metric]

    def read(self, name: str, *, most_bytes: int | None = None) -> bytes:
        """The bytes of one file, of at most `most_bytes`; raises `CorruptFile` if they are not those written.

        Its size is compared with the manifest's before anything is read.
        """
        if name in self.contents:
            return self.contents[name]
        expected, file = self.files[name], self.path / name
        try:
            found = os.lstat(file).st_size
            if stat.S_ISREG(os.lstat(file).st_mode) and found != expected["bytes"]:
                raise CorruptFile(
                    f"{file}: truncated or changed, expected {expected['bytes']} bytes, found {found}; "
                    "use another checkpoint of the run"
                )
            most_bytes = expected["bytes"] if most_bytes is None else min(most_bytes, expected["bytes"])
            content = read_bytes(file, most_bytes=most_bytes, follow_links=False)
        except OSError as error:
            message = f"{file}: cannot be read ({error.strerror}); the checkpoint is incomplete"
            raise (CorruptFile if error.errno in ABSENT else UserError)(message) from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected["sha256"]:
            raise CorruptFile(
                f"{file}: damaged or tampered with, expected sha256 {expected['sha256'][:16]}…, "
                f"found {digest[:16]}…; use another checkpoint of the run"
            )
        return content

    def verify(self) -> Checkpoint:
        """The same with all files in memory; raises `CorruptFile` naming one that is not what was written.

        What is in memory can be given to workers that do not see the directory.
        """
        num_bytes = _num_bytes(self._empty_model())
        most = {EXPERIMENT: MOST_BYTES, WEIGHTS: num_bytes + HEADER_BYTES, TRAINING_STATE: _most_state_bytes(num_bytes)}
        return replace(self, contents={name: self.read(name, most_bytes=limit) for name, limit in most.items()})

    def experiment(self) -> Experiment:
        """The experiment that produced this checkpoint."""
        file, content = self.path / EXPERIMENT, self.read(EXPERIMENT, most_bytes=MOST_BYTES)
        try:
            return Experiment.from_dict(parse_json(content), origin=str(file))
        except ValueError as error:  # of which UnicodeDecodeError is one
            raise CorruptFile(f"{file}: is not JSON ({error})") from None
        except UserError as error:
            message = str(error) if str(error).startswith(str(file)) else f"{file}: {error}"
            raise CorruptFile(message) from None

    def load_into(self, model: VAE, optimizer: Optimizer | None = None) -> Progress:
        """Restore the weights and, for training to go on, the optimizer's state; returns the progress saved with it."""
        weights, num_bytes = model.state_dict(), _num_bytes(model)
        try:
            content = self.read(WEIGHTS, most_bytes=num_bytes + HEADER_BYTES)
            model.load_state_dict(weights_from(content, weights))
        except ValueError as error:
            raise CorruptFile(f"{self.path / WEIGHTS}: {error}") from None
        progress = Progress()
        if optimizer is not None:
            content = self.read(TRAINING_STATE, most_bytes=_most_state_bytes(num_bytes))
            try:
                state = training_state_from(content)
                load_optimizer(optimizer, state.get("optimizer"))
                progress = _progress_from(state.get("progress", {}))
            except (ValueError, TypeError) as error:
                raise CorruptFile(
                    f"{self.path / TRAINING_STATE}: is not this model's training state: {error}"
                ) from None
        return progress

    def build_model(self) -> VAE:
        """The model with the checkpoint's weights, on the CPU; built once its weights are known to fit it."""
        empty = self._empty_model()
        content = self.read(WEIGHTS, most_bytes=_num_bytes(empty) + HEADER_BYTES)
        try:
            check_weights_header(content, empty.state_dict())
        except ValueError as error:
            raise CorruptFile(f"{self.path / WEIGHTS}: {error}") from None
        model = build_vae(self.experiment().model, self.image_shape, seed=0)
        self.load_into(model)
        return model

    def _empty_model(self) -> VAE:
        """The model that experiment.json describes, without memory for its weights."""
        try:
            with torch.device("meta"):
                return VAE(self.experiment().model, self.image_shape)
        except (RuntimeError, OverflowError, MemoryError) as error:  # more numbers than there can be
            reason = " ".join(str(error).split())[:200]
            raise CorruptFile(f"{self.path / EXPERIMENT}: describes no possible network ({reason})") from None


def _num_bytes(model: VAE) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _most_state_bytes(num_bytes: int) -> int:
    """What an optimizer of a model of `num_bytes` can need: two moments a weight, and the zip's entries."""
    return 4 * num_bytes + 16 * HEADER_BYTES


def checkpoint_name(epoch: int, step: int | None = None) -> str:
    """The directory name after an epoch (1-based), or after `step` steps of it."""
    return f"epoch={epoch:04d}" if step is None else f"epoch={epoch:04d}-step={step:06d}"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in directory `path`; raises `CorruptFile` if its manifest is missing or unusable.

    One of a newer format is a `UserError`, and so is a file that cannot be read now but perhaps later.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that no file system allows
        raise UserError(f"checkpoint {path}: no such directory; give a run directory or RUN/checkpoints/epoch=NNNN")
    file = path / MANIFEST
    try:
        manifest = parse_json(read_bytes(file, follow_links=False))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {shown(manifest['format'])}")
        if _whole(manifest["format_version"], most=10**6) > FORMAT_VERSION:
            raise UserError(
                f"{path}: checkpoint format {manifest['format_version']} is newer than this vae_ray reads "
                f"({FORMAT_VERSION}); install the one that wrote it, {shown(manifest.get('written_by', 'unknown'))}, "
                "or a newer one"
            )
        if sealed(manifest) != manifest:
            raise ValueError("its content is not what was written")
        return _checked(path, manifest)
    except FileNotFoundError:
        raise CorruptFile(f"checkpoint {path}: has no {MANIFEST}, so it is incomplete or not a checkpoint") from None
    except OSError as error:
        kind = CorruptFile if error.errno in ABSENT else UserError
        raise kind(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{file}: damaged ({type(error).__name__}: {shown(str(error))})") from None


def _checked(path: Path, manifest: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a manifest whose every value is of its type and in its range; raises as `read_checkpoint`."""
    channels, height, width = (_whole(n, least=1, most=MOST_PIXELS) for n in manifest["image_shape"])
    if channels * height * width > MOST_PIXELS:
        raise ValueError(f"image_shape {manifest['image_shape']}")
    files = manifest["files"]
    for name in (EXPERIMENT, WEIGHTS, TRAINING_STATE):
        if not {"bytes", "sha256"} <= files.get(name, {}).keys():
            raise ValueError(f"{name} not listed")
        _whole(files[name]["bytes"])
        if not isinstance(files[name]["sha256"], str):
            raise ValueError(f"{name} has no checksum")
    if len(files) > 3:
        raise ValueError(f"lists other files: {sorted(files)}")
    metrics = {str(key): _number(value) for key, value in manifest["metrics"].items()}
    step = manifest.get("step")
    if step is None and manifest["selection_metric"] not in metrics:
        raise ValueError(f"{manifest['selection_metric']} not listed")
    return Checkpoint(
        path=path,
        epoch=_whole(manifest["epoch"], least=1),
        image_shape=(channels, height, width),
        metrics=metrics,
        selection_metric=manifest["selection_metric"],
        files=files,
        step=None if step is None else _whole(step, least=1),
    )


def _whole(value: Any, *, least: int = 0, most: int = 2**60) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{shown(value)} is no whole number from {least} to {most}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{shown(value)} is no number")
    return float(value)


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints of whole epochs under `directory`, by epoch: those that have metrics and can be the best."""
    return [checkpoint for checkpoint in all_checkpoints(directory) if checkpoint.step is None]


def all_checkpoints(directory: Path) -> list[Checkpoint]:
    """All checkpoints under `directory` with a readable manifest, inside epochs too, in the order of training."""
    found = []
    for path in sorted(directory.glob("epoch=*")):
        try:
            found.append(own_checkpoint(path))
        except UserError:  # incomplete: not a checkpoint, whatever its name
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.position)


def _progress_from(values: Any) -> Progress:
    """The progress as it was read, if it has the right types; raises `ValueError` or `TypeError` otherwise."""
    progress = Progress(**values)
    lr_factor, num_nonfinite, sums = float(progress.lr_factor), int(progress.num_nonfinite), progress.term_sums
    if sums is not None and (not isinstance(sums, Tensor) or sums.dtype != torch.float64 or sums.shape[1:] != (4,)):
        raise ValueError("term_sums should be a float64 tensor of shape (workers, 4)")
    return Progress(lr_factor, num_nonfinite, sums)


def own_checkpoint(path: Path) -> Checkpoint:
    """A run's own checkpoint: a directory of its own, and not a link to somebody else's."""
    if path.is_symlink():
        raise CorruptFile(f"{path}: is a link, which could point out of the run")
    return read_checkpoint(path)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of its own content: it decides which checkpoint is newest and best."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return {**content, "sha256": hashlib.sha256(canonical).hexdigest()}


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The one of lowest score; the earlier epoch on a tie."""
    return min(checkpoints, key=lambda checkpoint: (checkpoint.score, checkpoint.epoch))
