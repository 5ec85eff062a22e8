"""Damaged checkpoints of a run: found, named in a warning, and never in the way of the good ones.

Nothing is deleted here: a damaged checkpoint is renamed, so that someone can look at it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vae_ray.artifacts.durable_files import sync_directory, unused_name
from vae_ray.errors import Damaged
from vae_ray.training.checkpoints import Checkpoint, own_checkpoint

logger = logging.getLogger(__name__)


def set_aside_damaged(directory: Path) -> None:
    """Read every checkpoint under `directory` whole, and rename those that are not what was written.

    `epoch=0007` becomes `.damaged-epoch=0007`, with a warning; the run then goes on from the newest good one. Only
    rank 0, and while nobody writes. Raises `UserError` for what another time, or a newer vae_ray, may read.
    """
    for path in sorted(directory.glob("epoch=*")):
        try:
            own_checkpoint(path).verify()
        except Damaged as error:
            aside = unused_name(directory / f".damaged-{path.name}")
            os.replace(path, aside)
            sync_directory(directory)
            logger.warning("%s; set aside as %s", error, aside.name)


def best_whole_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The best one whose files are all what was written; warns of better ones that are not. None if none is."""
    for checkpoint in sorted(checkpoints, key=lambda checkpoint: (checkpoint.score, checkpoint.epoch)):
        try:
            checkpoint.verify()
        except Damaged as error:
            logger.warning("%s; passed over", error)
        else:
            return checkpoint
    return None
