"""Damaged checkpoints of a run: found, named in a warning, and never in the way of the good ones.

Nothing is deleted here: a damaged checkpoint is renamed, so that someone can look at it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vae_ray.checkpoints.loading import Checkpoint, own_checkpoint
from vae_ray.errors import CorruptFile
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.atomic import sync_directory, unused_name

logger = logging.getLogger(__name__)


def quarantine_corrupt_checkpoints(run: RunDirectory) -> None:
    """Read the run's checkpoints whole, and rename those that are not what was written.

    `epoch=0007` becomes `.damaged-epoch=0007`, with a warning; the run then goes on from the newest good one. Only
    rank 0, and while nobody else writes. Of a run at a URI only as far as the newest good one: each is fetched for it.
    Raises `UserError` for what another time, or a newer vae_ray, may read. What killed writers left is deleted.
    """
    for leftover in run.checkpoints.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # newest first: epoch=0008 comes after all of its steps
    for path in sorted(run.checkpoints.glob("epoch=*"), key=lambda path: f"{path.name}~", reverse=True):
        try:
            run.pull(path)
            own_checkpoint(path).verify()
        except CorruptFile as error:
            aside = unused_name(path.with_name(f".damaged-{path.name}"))
            os.replace(path, aside)
            sync_directory(run.checkpoints)
            logger.warning("%s; set aside as %s", error, aside.name)
        else:
            if run.mirror is not None:
                return


def best_intact_checkpoint(
    checkpoints: list[Checkpoint], *, fetch: Callable[[Path], None] = lambda path: None
) -> Checkpoint | None:
    """The best one whose files are all what was written; warns of better ones that are not. None if none is.

    `fetch` is called with the directory of each that is looked at, before it is read.
    """
    for checkpoint in sorted(checkpoints, key=lambda checkpoint: (checkpoint.score, checkpoint.epoch)):
        fetch(checkpoint.path)
        try:
            checkpoint.verify()
        except CorruptFile as error:
            logger.warning("%s; passed over", error)
        else:
            return checkpoint
    return None
