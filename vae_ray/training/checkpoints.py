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

import hashlib
import io
import json
import os
import pickle
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from vae_ray.artifacts.durable_files import sync_directory, write_durably
from vae_ray.config import Experiment
from vae_ray.errors import UserError
from vae_ray.models.vae import VAE, build_vae

FORMAT = "vae_ray checkpoint"
FORMAT_VERSION = 2
"""1: whole epochs only, no progress in the training state; still read."""
MANIFEST, EXPERIMENT, WEIGHTS, TRAINING_STATE = (
    "manifest.json",
    "experiment.json",
    "weights.safetensors",
    "training_state.pt",
)


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

    def read(self, name: str) -> bytes:
        """The bytes of one file; raises `UserError` if they are not those that were written."""
        if name in self.contents:
            return self.contents[name]
        expected, file = self.files[name], self.path / name
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); the checkpoint is incomplete") from None
        if len(content) != expected["bytes"]:
            raise UserError(
                f"{file}: truncated or changed, expected {expected['bytes']} bytes, found {len(content)}; "
                "use another checkpoint of the run"
            )
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected["sha256"]:
            raise UserError(
                f"{file}: damaged or tampered with, expected sha256 {expected['sha256'][:16]}…, "
                f"found {digest[:16]}…; use another checkpoint of the run"
            )
        return content

    def in_memory(self) -> Checkpoint:
        """The same, read and checked whole: it can be given to workers that do not see its directory.

        Raises `UserError` if a file is not what was written.
        """
        return replace(self, contents={name: self.read(name) for name in (EXPERIMENT, WEIGHTS, TRAINING_STATE)})

    def experiment(self) -> Experiment:
        """The experiment that produced this checkpoint."""
        file, content = self.path / EXPERIMENT, self.read(EXPERIMENT)
        try:
            sections = json.loads(content)
        except ValueError as error:  # of which UnicodeDecodeError is one
            raise UserError(f"{file}: is not JSON ({error})") from None
        return Experiment.from_dict(sections, origin=str(file))

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        content = self.read(WEIGHTS)
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise UserError(f"{self.path / WEIGHTS}: is not a safetensors file ({error})") from None

    def load_into(self, model: VAE, optimizer: Optimizer | None = None) -> Progress:
        """Restore the weights and, for training to go on, the optimizer's state; returns the progress saved with it."""
        try:
            model.load_state_dict(self.weights())
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:300]
            raise UserError(f"{self.path / WEIGHTS}: does not fit its experiment.json: {detail}") from None
        progress = Progress()
        if optimizer is not None:
            content = self.read(TRAINING_STATE)
            try:
                state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
                optimizer.load_state_dict(state["optimizer"])
                progress = _checked(Progress(**state.get("progress", {})))
            except (pickle.UnpicklingError, ValueError, KeyError, TypeError, RuntimeError, EOFError) as error:
                detail = " ".join(str(error).split())[:200]
                raise UserError(f"{self.path / TRAINING_STATE}: is not this model's training state: {detail}") from None
        return progress

    def build_model(self) -> VAE:
        """The model with the checkpoint's weights, on the CPU."""
        model = build_vae(self.experiment().model, self.image_shape, seed=0)
        self.load_into(model)
        return model


def checkpoint_name(epoch: int, step: int | None = None) -> str:
    """The directory name after an epoch (1-based), or after `step` steps of it."""
    return f"epoch={epoch:04d}" if step is None else f"epoch={epoch:04d}-step={step:06d}"


def save_checkpoint(
    directory: Path,
    *,
    epoch: int,
    model: VAE,
    optimizer: Optimizer,
    experiment: Experiment,
    metrics: dict[str, float],
    selection_metric: str,
    step: int | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Write `directory/epoch=NNNN` so that it either exists whole or not at all.

    With `step` it is one inside the epoch, `directory/epoch=NNNN-step=NNNNNN`.
    """
    state = io.BytesIO()
    known = {key: value for key, value in (progress or Progress())._asdict().items() if value is not None}
    torch.save({"optimizer": optimizer.state_dict(), "progress": known}, state)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    contents = {
        EXPERIMENT: json.dumps(experiment.to_dict(), indent=2).encode(),
        WEIGHTS: safetensors.torch.save(weights),
        TRAINING_STATE: state.getvalue(),
    }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "epoch": epoch,
        "step": step,
        "image_shape": list(model.image_shape),
        "selection_metric": selection_metric,
        "metrics": metrics,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }
    contents[MANIFEST] = json.dumps(sealed(manifest), indent=2).encode()

    final = directory / checkpoint_name(epoch, step)
    partial = directory / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in contents.items():
        write_durably(partial / name, content)
    shutil.rmtree(final, ignore_errors=True)  # an orphan of an attempt that this run repeats
    os.replace(partial, final)
    sync_directory(directory)
    return read_checkpoint(final)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in directory `path`; raises `UserError` if its manifest is missing or unusable."""
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that no file system allows
        raise UserError(f"checkpoint {path}: no such directory; give a run directory or RUN/checkpoints/epoch=NNNN")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found_format, version = manifest["format"], int(manifest["format_version"])
        if found_format != FORMAT:
            raise ValueError(f"format {found_format!r}")
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path}: checkpoint format {version} is newer than this vae_ray reads ({FORMAT_VERSION}); "
                "install a newer vae_ray"
            )
        if sealed(manifest) != manifest:
            raise ValueError("its content is not what was written")
        channels, height, width = (int(n) for n in manifest["image_shape"])
        for name in (EXPERIMENT, WEIGHTS, TRAINING_STATE):
            if not {"bytes", "sha256"} <= manifest["files"].get(name, {}).keys():
                raise ValueError(f"{name} not listed")
        step = manifest.get("step")
        if step is None and manifest["selection_metric"] not in manifest["metrics"]:
            raise ValueError(f"{manifest['selection_metric']} not listed")
        return Checkpoint(
            path=path,
            epoch=int(manifest["epoch"]),
            image_shape=(channels, height, width),
            metrics=dict(manifest["metrics"]),
            selection_metric=manifest["selection_metric"],
            files=manifest["files"],
            step=None if step is None else int(step),
        )
    except FileNotFoundError:
        raise UserError(f"checkpoint {path}: has no {MANIFEST}, so it is incomplete or not a checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST}: damaged ({type(error).__name__}: {error})") from None


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints of whole epochs under `directory`, by epoch: those that have metrics and can be the best."""
    return [checkpoint for checkpoint in resumable_checkpoints(directory) if checkpoint.step is None]


def resumable_checkpoints(directory: Path) -> list[Checkpoint]:
    """All checkpoints under `directory` with a readable manifest, inside epochs too, in the order of training."""
    found = []
    for path in sorted(directory.glob("epoch=*")):
        try:
            found.append(read_checkpoint(path))
        except UserError:  # incomplete: not a checkpoint, whatever its name
            continue
    return sorted(found, key=lambda checkpoint: checkpoint.position)


def _checked(progress: Progress) -> Progress:
    """The progress as it was read, if it has the right types; raises `ValueError` or `TypeError` otherwise."""
    lr_factor, num_nonfinite, sums = float(progress.lr_factor), int(progress.num_nonfinite), progress.term_sums
    if sums is not None and (not isinstance(sums, Tensor) or sums.dtype != torch.float64 or sums.shape[1:] != (4,)):
        raise ValueError("term_sums should be a float64 tensor of shape (workers, 4)")
    return Progress(lr_factor, num_nonfinite, sums)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of its own content: it decides which checkpoint is newest and best."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return {**content, "sha256": hashlib.sha256(canonical).hexdigest()}


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The one of lowest score; the earlier epoch on a tie."""
    return min(checkpoints, key=lambda checkpoint: (checkpoint.score, checkpoint.epoch))


def prune_checkpoints(directory: Path, *, num_best: int) -> None:
    """Delete all but the last and the `num_best` best checkpoints, and what killed writers left.

    Of those inside epochs only one that is newer than all others is of use.
    """
    checkpoints = resumable_checkpoints(directory)
    whole = [checkpoint for checkpoint in checkpoints if checkpoint.step is None]
    by_score = sorted(whole, key=lambda checkpoint: (checkpoint.score, checkpoint.epoch))
    kept = {checkpoint.path for checkpoint in [*by_score[:num_best], *whole[-1:], *checkpoints[-1:]]}
    for checkpoint in checkpoints:
        if checkpoint.path not in kept:
            shutil.rmtree(checkpoint.path)
    for partial in directory.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)
