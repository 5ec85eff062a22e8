"""The checkpoints of a run's directory, in the order of training: all of them, those of whole epochs, the best."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vae_ray.checkpoints.loading import Checkpoint, read_checkpoint
from vae_ray.errors import CorruptFile, UserError

NAME = re.compile(r"epoch=(\d{1,15})(?:-step=(\d{1,15}))?")


def checkpoint_name(epoch: int, step: int | None = None) -> str:
    """The directory name after an epoch (1-based), or after `step` steps of it."""
    return f"epoch={epoch:04d}" if step is None else f"epoch={epoch:04d}-step={step:06d}"


def own_checkpoint(path: Path) -> Checkpoint:
    """A run's own checkpoint: a directory, not a link, which could point out of the run."""
    if path.is_symlink():
        raise CorruptFile(f"{path}: is a link, which could point out of the run")
    return read_checkpoint(path)


def checkpoint_directories(directory: Path) -> list[Path]:
    """The directories under `directory` that are named as checkpoints, in the order of training."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{directory}: cannot be read now ({error.strerror}); try again") from None
    matches = [match for name in names if (match := NAME.fullmatch(name))]
    # a whole epoch comes after its steps
    return [directory / match[0] for match in sorted(matches, key=lambda m: (int(m[1]), int(m[2] or 2**60), m[0]))]


def all_checkpoints(directory: Path) -> list[Checkpoint]:
    """All checkpoints under `directory` in the order of training, with those inside epochs.

    Incomplete and damaged ones are left out. Raises `UserError` for a newer format and for what cannot be read now.
    """
    checkpoints = []
    for path in checkpoint_directories(directory):
        try:
            checkpoints.append(own_checkpoint(path))
        except CorruptFile:
            continue
        except UserError:
            if not _is_gone(path):
                raise
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.position)


def _is_gone(path: Path) -> bool:
    """Whether another process has deleted `path` since it was listed."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints of whole epochs under `directory`, by epoch: those with metrics, of which one is the best."""
    return [checkpoint for checkpoint in all_checkpoints(directory) if checkpoint.step is None]


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The one of the lowest score; the earlier epoch on a tie."""
    return min(checkpoints, key=lambda checkpoint: (checkpoint.score, checkpoint.epoch))
