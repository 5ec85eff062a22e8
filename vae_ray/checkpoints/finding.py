"""Which checkpoint a path means: a checkpoint's own directory, or the best one of a run or a sweep; it may be a URI."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from vae_ray.checkpoints.listing import complete_checkpoints
from vae_ray.checkpoints.loading import MANIFEST, Checkpoint, read_checkpoint
from vae_ray.checkpoints.quarantine import best_intact_checkpoint
from vae_ray.errors import UserError, one_line
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.filesystems import with_timeout
from vae_ray.storage.locations import absolute, cache_root, is_uri
from vae_ray.storage.mirror import Mirror
from vae_ray.storage.remote import RemoteDirectory

BEST = "best"
"""In a sweep's directory, its winner's checkpoint."""


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, or the best intact one of the run or sweep whose directory `path` is.

    Raises `UserError` if there is none, and `CorruptFile` for a checkpoint that is named itself and is damaged.
    """
    location = absolute(path, key="checkpoint")
    if is_uri(location):
        return _fetched_checkpoint(location)
    return _local_checkpoint(Path(location), fetch=lambda checkpoint: None)


def _local_checkpoint(path: Path, *, fetch: Callable[[Path], None]) -> Checkpoint:
    run = RunDirectory(path)
    if not os.path.isdir(run.checkpoints):
        return read_checkpoint(path / BEST if os.path.isdir(path / BEST) else path)
    best = best_intact_checkpoint(complete_checkpoints(run.checkpoints), fetch=fetch)
    if best is None:
        raise UserError(f"run {path}: has no complete checkpoint yet; continue it with: vae-ray resume {path}")
    return best


def _fetched_checkpoint(uri: str) -> Checkpoint:
    """The same of a URI: manifests first, then the files of the one that is wanted, kept in the cache for next time."""
    copy = cache_root() / "copies" / hashlib.sha256(uri.encode()).hexdigest()[:16] / "reader"
    mirror = Mirror(copy, RemoteDirectory(uri, key="checkpoint"))
    manifests = re.compile(rf"(({BEST}|checkpoints/[^/]+)/)?{MANIFEST}")
    try:
        with_timeout(mirror.remote.list)
        mirror.pull(lambda name: manifests.fullmatch(name) is not None)
        if not copy.exists():
            raise UserError(
                f"checkpoint {uri}: does not exist; give the URI of a run, a sweep or RUN/checkpoints/epoch=NNNN"
            )

        def fetch(checkpoint: Path) -> None:
            folder = checkpoint.relative_to(copy).as_posix()
            mirror.pull(lambda name: folder == "." or name.startswith(f"{folder}/"))

        best = _local_checkpoint(copy, fetch=fetch).path
        fetch(best)
    except OSError as error:
        raise UserError(f"checkpoint {uri}: cannot be read ({one_line(error)[:200]})") from None
    return read_checkpoint(best)
