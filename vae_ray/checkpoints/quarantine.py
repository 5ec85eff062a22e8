"""The newest and the best checkpoint whose files are intact.

A damaged checkpoint of a run is renamed, never deleted. What cannot be read at the moment is never taken as damaged.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vae_ray.checkpoints.listing import checkpoint_directories, own_checkpoint
from vae_ray.checkpoints.loading import AVERAGED, EXPERIMENT, WEIGHTS, Checkpoint
from vae_ray.errors import CorruptFile
from vae_ray.storage.atomic import sync_directory, unused_name

logger = logging.getLogger(__name__)


def load_newest(checkpoints_dir: Path, *, pull: Callable[[Path], None] = lambda path: None) -> Checkpoint | None:
    """The newest intact checkpoint with its files in memory, or None; only for the one writer of the run.

    A damaged one is renamed from `epoch=0007` to `.damaged-epoch=0007` with a warning, and the next older one is tried.
    Leftovers of killed writers are deleted. `pull` is called with the directory of each candidate before it is read.
    Raises `UserError` for a newer format and for what cannot be read at the moment.
    """
    for leftover in checkpoints_dir.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(checkpoint_directories(checkpoints_dir)):
        pull(path)
        try:
            return own_checkpoint(path).in_memory()
        except CorruptFile as error:
            aside = unused_name(path.with_name(f".damaged-{path.name}"))
            os.replace(path, aside)
            sync_directory(checkpoints_dir)
            logger.warning("%s; renamed to %s", error, aside.name)
    return None


def best_intact_checkpoint(
    checkpoints: list[Checkpoint], *, fetch: Callable[[Path], None] = lambda path: None
) -> Checkpoint | None:
    """The best one whose weights and experiment are intact, with these in memory; None if there is none.

    Warns of better ones that are damaged. `fetch` is called with the directory of each candidate before it is read.
    """
    for checkpoint in sorted(checkpoints, key=lambda checkpoint: (checkpoint.score, checkpoint.epoch)):
        fetch(checkpoint.path)
        try:
            return checkpoint.in_memory([EXPERIMENT, WEIGHTS, AVERAGED])
        except CorruptFile as error:
            logger.warning("%s; skipped", error)
    return None
