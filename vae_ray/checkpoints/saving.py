"""Writing checkpoints, so that each exists whole or not at all; and deleting old ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from vae_ray.checkpoints.listing import all_checkpoints, checkpoint_name
from vae_ray.checkpoints.loading import (
    AVERAGED,
    EXPERIMENT,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    TRAINING_STATE,
    WEIGHTS,
    Checkpoint,
    Scalar,
    parse_manifest,
    sealed,
)
from vae_ray.config.experiment import Experiment
from vae_ray.storage.atomic import atomic_remove_directory, replace_directory, sync_directory, write_synced
from vae_ray.storage.retry import describe_os_error, retry_io
from vae_ray.version import VERSION


class NotSaved(Exception):
    """A checkpoint could not be written; the earlier ones are intact."""


def save_checkpoint(
    directory: Path,
    *,
    epoch: int,
    step: int | None = None,
    experiment: Experiment,
    image_shape: tuple[int, int, int],
    weights: Mapping[str, Tensor],
    averaged_weights: Mapping[str, Tensor] | None,
    training_state: Mapping[str, Tensor],
    scalars: Mapping[str, Scalar],
    metrics: Mapping[str, float],
    selection_metric: str,
    fingerprints: Mapping[str, str],
) -> Checkpoint:
    """Write `directory/epoch=NNNN`, or with `step` `directory/epoch=NNNN-step=NNNNNN`, whole or not at all.

    Retries while the storage is away. Tensors may have any dtype, share memory and be on any device.

    Returns:
        The checkpoint as it was written, without reading it back.

    Raises:
        NotSaved: the storage is full or away; the directory has what it had before.
    """
    contents = {
        EXPERIMENT: json.dumps(experiment.to_dict(), indent=2).encode(),
        WEIGHTS: _serialized(weights),
        TRAINING_STATE: _serialized(training_state),
    }
    if averaged_weights is not None:
        contents[AVERAGED] = _serialized(averaged_weights)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written_by": f"vae_ray {VERSION}",
        "epoch": epoch,
        "step": step,
        "image_shape": list(image_shape),
        "selection_metric": selection_metric,
        "metrics": dict(metrics),
        "scalars": dict(scalars),
        "fingerprints": dict(fingerprints),
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }
    contents[MANIFEST] = json.dumps(sealed(manifest), indent=2).encode()
    path = directory / checkpoint_name(epoch, step)
    _write(path, contents)
    return parse_manifest(path, contents[MANIFEST])


def copy_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Replace `directory` atomically by a copy of `checkpoint`, each of whose files is compared with its checksum.

    Raises `CorruptFile` if one is damaged and `NotSaved` if the copy cannot be written; `directory` is then as before.
    """
    _write(directory, {name: checkpoint.read(name) for name in [*checkpoint.files, MANIFEST]})


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file, which stores tensors that share memory one by one."""
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return safetensors.torch.save(owned)


def _write(directory: Path, contents: dict[str, bytes]) -> None:
    try:
        retry_io(lambda: _write_whole(directory, contents), where=directory.parent)
    except OSError as error:
        needed_bytes = sum(map(len, contents.values()))
        why = describe_os_error(error, where=directory.parent, needed_bytes=needed_bytes)
        raise NotSaved(f"{directory}: the checkpoint could not be written ({why})") from error


def _write_whole(directory: Path, contents: dict[str, bytes]) -> None:
    partial = directory.with_name(f".partial-{directory.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # without its parents: where they are missing the storage is away
        for name, content in contents.items():
            write_synced(partial / name, content)
        sync_directory(partial)
        replace_directory(partial, directory)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # it holds space that others need
        raise


def prune_checkpoints(directory: Path, *, num_best: int) -> None:
    """Delete all but the last and the `num_best` best checkpoints, and the leftovers of killed writers.

    A checkpoint inside an epoch is kept only while it is the newest of all.
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
