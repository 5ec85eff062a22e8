"""What is at a location: the file system of a URI, whether it can be written, and a limit on how long it may take."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow.fs

from vae_ray.errors import UserError, one_line
from vae_ray.storage.locations import is_uri, local_path

TIMEOUT_SECONDS = 10.0
"""A storage that does not answer for so long counts as unreachable."""

BUCKET_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")

T = TypeVar("T")


def open_filesystem(uri: str, *, key: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of `uri` and the path in it.

    Raises `UserError`, naming `key`, for a malformed URI, a scheme that pyarrow does not know, and for credentials
    inside one: an Experiment is saved beside the results.
    """
    parts = urlsplit(uri)
    name = "runs" if key == "run.storage" else "images"
    if parts.scheme in BUCKET_SCHEMES and not parts.netloc:
        raise UserError(f"{key}: got {uri!r}, which names no bucket; should be for example s3://BUCKET/{name}")
    if parts.username or parts.password or "secret_key" in parts.query:
        raise UserError(
            f"{key}: the URI contains credentials, which would be saved beside the results; leave them out and set "
            "them in the environment of every node (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    try:
        filesystem, path = with_timeout(lambda: pyarrow.fs.FileSystem.from_uri(uri))  # asks for a bucket's region
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(
            f"{key}: got {uri!r}, which cannot be used ({one_line(error)[:200]}); should be a directory "
            f"that all nodes see, or for example s3://BUCKET/{name} or gs://BUCKET/{name}"
        ) from None
    return filesystem, path.rstrip("/")


def check_writable(location: str, *, key: str = "run.storage") -> None:
    """Raise `UserError`, within seconds, unless this process can write to `location`; leaves no directory there."""
    name = f".vae_ray-probe-{os.getpid()}"
    if not is_uri(location):
        directory = local_path(location, key=key)
        try:
            try:
                _probe_directory(directory, name)
            except FileNotFoundError:  # another process, which probes as well, has just removed it
                _probe_directory(directory, name)
        except OSError as error:
            remedy = "start new runs with another --storage" if key == "run.storage" else "choose another directory"
            raise UserError(
                f"{key}: got {location!r}, cannot be written ({error.strerror}); make it writable, or {remedy}"
            ) from None
        return
    filesystem, path = open_filesystem(location, key=key)

    def write_and_delete() -> None:
        filesystem.create_dir(path)
        with filesystem.open_output_stream(f"{path}/{name}") as stream:
            stream.write(b"vae_ray")
        filesystem.delete_file(f"{path}/{name}")

    try:
        with_timeout(write_and_delete)
    except OSError as error:
        raise UserError(
            f"{key}: got {location!r}, cannot be written ({one_line(error)[:200]}); check the address, that the bucket "
            "exists, and the credentials in the environment"
        ) from None


def _probe_directory(directory: Path, name: str) -> None:
    with removed_if_empty(missing_directories(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"")
        (directory / name).unlink()


def missing_directories(directory: Path) -> list[Path]:
    """`directory` and those above it that do not exist, the lowest first."""
    return [path for path in (directory, *directory.parents) if not os.path.exists(path)]


@contextlib.contextmanager
def removed_if_empty(directories: list[Path]) -> Iterator[None]:
    """After its body remove those of `directories`, the lowest first, that nothing is in."""
    try:
        yield
    finally:
        for path in directories:
            with contextlib.suppress(OSError):
                path.rmdir()


def with_timeout(action: Callable[[], T]) -> T:
    """What `action` returns or raises; raises `TimeoutError` if it takes longer: file systems wait much longer."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    # a daemon, unlike the threads of an executor: the process can end while it waits
    threading.Thread(target=run, name="storage probe", daemon=True).start()
    try:
        return future.result(TIMEOUT_SECONDS)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no answer within {TIMEOUT_SECONDS:.0f} s") from None
