"""Whether runs can be stored in a directory or at a URI, by this machine and by every node of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vae_ray.cluster.checks import Finding
from vae_ray.distributed.nodes import check_shared_storage, on_every_node
from vae_ray.errors import UserError
from vae_ray.storage.locations import check_writable, directory_of, is_uri


def check_storage(storage: str, *, num_nodes: int = 1) -> Finding:
    """Check `storage` from here, and from every node if there are several; Ray must then be connected."""
    try:
        if is_uri(storage):
            check_writable(storage)
            place, failed = storage, _nodes_that_cannot_write(storage) if num_nodes > 1 else ""
            if failed:
                return Finding("error", "storage", f"not all nodes can write to {storage} ({failed})")
        else:
            with _created(directory_of(storage)) as path:
                place = str(path)
                check_writable(place)
                if num_nodes > 1:
                    check_shared_storage(path)
    except UserError as error:
        return Finding("error", "storage", str(error).removeprefix("run.storage: "))
    except OSError as error:
        return Finding("error", "storage", f"{storage} cannot be written ({error.strerror})", "--storage DIR|URI")
    return Finding("ok", "storage", f"{place} is writable{' from every node' if num_nodes > 1 else ''}")


def _nodes_that_cannot_write(uri: str) -> str:
    """Each node writes to an object store itself, with its own network and credentials."""
    failed = [answer for answer in on_every_node(check_writable, uri) if answer.error is not None]
    return "; ".join(f"{answer.address}: {str(answer.error).removeprefix('UserError: ')}" for answer in failed)


@contextlib.contextmanager
def _created(path: Path) -> Iterator[Path]:
    """The directory; it and its parents are removed on exit if they did not exist before."""
    new = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        for directory in new:
            with contextlib.suppress(OSError):
                directory.rmdir()
