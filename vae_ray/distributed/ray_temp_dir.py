"""The directory where a Ray that starts on this machine keeps sockets and logs, and why Ray could not use it.

Ray itself answers with another cause, or waits for half a minute first.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ray._common.utils import get_default_ray_temp_dir

from vae_ray.errors import UserError

SOCKET = f"session_2026-11-28_21-55-00_740308_{os.getpid()}/sockets/plasma_store"
"""A socket in the directory, as long as the longest that Ray makes there."""
MAX_SOCKET_BYTES = 107
"""Of the path of a unix socket, on Linux."""
NEEDED_BYTES = 16 << 20
"""For the logs of a session; a short one writes less than 1 MiB."""


def default_temp_dir() -> Path:
    """The directory that a Ray will use which starts here without `--temp-dir`."""
    return Path(get_default_ray_temp_dir())


def temp_dir_problem(path: Path) -> str:
    """Why a Ray that starts here could not use `path`; empty if it can. Creates nothing."""
    if not path.is_absolute():
        return "is not an absolute path"
    if (excess := len(os.fsencode(path / SOCKET)) - MAX_SOCKET_BYTES) > 0:
        return f"is {excess} bytes too long for the paths of Ray's sockets"
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(NEEDED_BYTES))
            file.flush()
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    return ""


def check_temp_dir() -> None:
    """Raise `UserError` if a Ray that starts here could not use its directory."""
    path = default_temp_dir()
    if problem := temp_dir_problem(path):
        variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "RAY_TMPDIR")
        raise UserError(
            f"{variable}: Ray's directory {path} {problem}; set RAY_TMPDIR to a short path where "
            f"{NEEDED_BYTES >> 20} MiB can be written; train with --workers.num 0 needs no Ray"
        )
