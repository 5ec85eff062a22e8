"""Writing checkpoints: aside and renamed when whole, so that one exists whole or not at all; and deleting old ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch.optim import Optimizer

from vae_ray.checkpoints.loading import (
    EXPERIMENT,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    TRAINING_STATE,
    WEIGHTS,
    Checkpoint,
    Progress,
    all_checkpoints,
    checkpoint_name,
    read_checkpoint,
    sealed,
)
from vae_ray.config.experiment import Experiment
from vae_ray.models.vae import VAE
from vae_ray.storage.atomic import atomic_remove_directory, sync_directory, write_synced
from vae_ray.storage.reading import read_bytes
from vae_ray.storage.retry import describe_os_error, retry_io
from vae_ray.version import VERSION


class NotSaved(Exception):
    """A checkpoint could not be written; the earlier ones are intact."""


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

    With `step` it is one inside the epoch, `directory/epoch=NNNN-step=NNNNNN`. While the storage is away it waits;
    raises `NotSaved` if there is no room or no storage in the end, and leaves then what was there before.
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
        "written_by": f"vae_ray {VERSION}",
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
    try:
        retry_io(lambda: _write_whole(final, contents), where=directory)
    except OSError as error:
        why = describe_os_error(error, where=directory, needed_bytes=sum(map(len, contents.values())))
        raise NotSaved(f"{final}: the checkpoint could not be written ({why})") from error
    return read_checkpoint(final)


def _write_whole(final: Path, contents: dict[str, bytes]) -> None:
    partial = final.with_name(f".partial-{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # without its parents: where they are missing the storage is away
        for name, content in contents.items():
            write_synced(partial / name, content)
        atomic_remove_directory(final)  # an orphan of an attempt that this run repeats
        os.replace(partial, final)
        sync_directory(final.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # it holds the space that others need
        raise


def copy_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint's own files, each compared with its checksum, into a new `directory`."""
    directory.mkdir(parents=True)
    for name in checkpoint.files:
        write_synced(directory / name, checkpoint.read(name))
    write_synced(directory / MANIFEST, read_bytes(checkpoint.path / MANIFEST, follow_links=False))


def prune_checkpoints(directory: Path, *, num_best: int) -> None:
    """Delete all but the last and the `num_best` best checkpoints, and what killed writers left.

    Of those inside epochs only one that is newer than all others is of use.
    """
    checkpoints = all_checkpoints(directory)
    whole = [checkpoint for checkpoint in checkpoints if checkpoint.step is None]
    by_score = sorted(whole, key=lambda checkpoint: (checkpoint.score, checkpoint.epoch))
    kept = {checkpoint.path for checkpoint in [*by_score[:num_best], *whole[-1:], *checkpoints[-1:]]}
    for checkpoint in checkpoints:
        if checkpoint.path not in kept:
            atomic_remove_directory(checkpoint.path)
    for partial in directory.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)
