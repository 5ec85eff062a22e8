"""Who drives a run whose storage is a URI: object stores have no locks.

A driver leaves a claim there and renews it every few seconds. Whoever finds the claim of another watches it: one that
is renewed belongs to the living. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

import pyarrow.fs

from vae_ray.errors import UserError
from vae_ray.storage.mirror import FileStat, Mirror, process_lives

PREFIX = ".driver-"
RENEWAL_SECONDS = 5.0
WATCH_SECONDS = 16.0
"""A claim that is not renewed for so long belongs to a driver that is gone."""


@contextlib.contextmanager
def lease(mirror: Mirror, *, name: str) -> Iterator[None]:
    """Hold the run `name` at `mirror.uri` for the body; raises `UserError` if another driver lives.

    A driver that was killed on this machine is known to be dead at once; one elsewhere after `WATCH_SECONDS`.
    """
    own = f"{PREFIX}{secrets.token_hex(8)}"
    claim = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    mirror.write(own, claim)
    stop = threading.Event()

    def renew() -> None:
        count = 0
        while not stop.wait(RENEWAL_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # the next renewal is soon
                mirror.write(own, claim + b" " * (count % 7))  # another size: some stores stamp whole seconds

    renewing = threading.Thread(target=renew, name="lease", daemon=True)
    renewing.start()
    try:
        _wait_for_others(mirror, own, name=name)
        yield
    finally:
        stop.set()
        renewing.join()
        with contextlib.suppress(OSError):
            mirror.delete(own)


def _wait_for_others(mirror: Mirror, own: str, *, name: str) -> None:
    first = {claim: stamp for claim, stamp in _claims(mirror).items() if claim != own and not _is_dead(mirror, claim)}
    deadline = time.monotonic() + WATCH_SECONDS
    watched = dict(first)
    while watched and time.monotonic() < deadline:
        time.sleep(0.5)
        now = _claims(mirror)
        for claim, stamp in list(watched.items()):
            if claim not in now:
                del watched[claim]
            elif now[claim] != stamp:
                raise UserError(
                    f"run.name: {name!r} is running right now by {_holder(mirror, claim)}; choose another --name"
                )
    for claim in _claims(mirror):
        if claim != own and (claim in first or _is_dead(mirror, claim)):
            mirror.delete(claim)


def _claims(mirror: Mirror) -> dict[str, FileStat]:
    selector = pyarrow.fs.FileSelector(mirror.path_of(), allow_not_found=True)
    return {
        info.base_name: FileStat(info.size, info.mtime_ns or 0)
        for info in mirror.filesystem.get_file_info(selector)
        if info.base_name.startswith(PREFIX)
    }


def _read(mirror: Mirror, claim: str) -> dict[str, object]:
    try:
        content = json.loads(mirror.read(claim) or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _holder(mirror: Mirror, claim: str) -> str:
    content = _read(mirror, claim)
    return f"process {content.get('pid')} on {content.get('host')}"


def _is_dead(mirror: Mirror, claim: str) -> bool:
    content = _read(mirror, claim)
    pid = content.get("pid")
    return content.get("host") == socket.gethostname() and isinstance(pid, int) and not process_lives(pid)
