"""Locations: a directory, or a URI that one of pyarrow's file systems serves (`s3://`, `gs://`, ...).

A location is a plain string, so that it fits into an Experiment, a JSON file and a command line. `parse_location` alone
reads what a user wrote; `local_path` and `absolute` alone expand `~`.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit, urlunsplit

from vae_ray.errors import UserError


def parse_location(location: str | Path) -> str:
    """The path or object store's URI that `location` means: a `file://` URI is a path, percent-decoded.

    Raises `ValueError` for a URI that would mean something else than it says: with a `#`, of another machine, or with
    one slash too few. `~` stays: it may be another machine's.
    """
    text = str(location)
    match = re.match("([A-Za-z][A-Za-z0-9+.-]+):/", text)  # a single letter is a drive
    if match is None:
        return text
    scheme, rest = match[1].lower(), text[len(match[1]) :]
    if "#" in rest:
        raise ValueError("should be a URI without '#', which is written %23 there")
    if scheme != "file":
        if not rest.startswith("://"):
            raise ValueError(f"should begin with {scheme}:// if it is a URI, or with ./ if it is a path")
        return scheme + rest
    if "?" in rest or re.search("%(?![0-9A-Fa-f]{2})", rest):
        raise ValueError("should be a URI in which '?' is written %3F and '%' is written %25")
    parts = urlsplit(scheme + rest)
    path = os.fsdecode(unquote_to_bytes(parts.path))
    if parts.netloc not in ("", "localhost") or "\0" in path:
        raise ValueError("should be file:///PATH, which is a path of this machine")
    return path


def parse_path(location: str | Path) -> str:
    """The path that `location` means; raises `ValueError` if it means none, or an object store."""
    text = parse_location(location)
    if is_uri(text):
        raise ValueError("should be a path of this machine, not a URI")
    return text


def is_uri(location: str | Path) -> bool:
    """Whether a location names an object store; a path does not, with `file://` neither."""
    scheme = str(location).partition("://")[0] if "://" in str(location) else ""
    return len(scheme) > 1 and scheme.lower() != "file"


def local_path(path: str | Path, *, key: str) -> Path:
    """The absolute path that a user wrote, without `~`; raises `UserError`, naming `key`, if there is no such path."""
    try:
        text = os.path.expanduser(parse_path(path))
        os.fsencode(text)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        reason = f"which cannot be a name in the encoding {encoding}; set PYTHONUTF8=1"
        raise UserError(f"{key}: got {str(path)!a}, {reason}") from None
    except ValueError as error:
        raise UserError(f"{key}: got {str(path)!r}, {error}") from None
    if text.startswith("~"):
        user = text.partition("/")[0][1:]
        reason = f"there is no user {user!r} here" if user else "this process has no home directory (set HOME)"
        raise UserError(f"{key}: got {str(path)!r}, but {reason}; write the path without ~")
    try:
        return Path(text).absolute()
    except FileNotFoundError:
        raise UserError(f"{key}: got {str(path)!r}, but the working directory was deleted; cd elsewhere") from None


def absolute(location: str | Path, *, key: str) -> str:
    """The location that a user wrote, independent of the working directory and of `~`; raises `UserError`."""
    try:
        text = parse_location(location)
    except ValueError as error:
        raise UserError(f"{key}: got {str(location)!r}, {error}") from None
    return text if is_uri(text) else str(local_path(location, key=key))


def join_location(location: str | Path, *names: str) -> str:
    """The location below `location`; what follows a `?` in a URI stays at its end."""
    if not is_uri(location):
        return str(Path(location, *names))
    parts = urlsplit(str(location))
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *names])))


def split_location(location: str) -> tuple[str, str]:
    """The location above `location`, and its last name."""
    if not is_uri(location):
        return str(Path(location).parent), Path(location).name
    parts = urlsplit(location)
    above, _, name = parts.path.rstrip("/").rpartition("/")
    return urlunsplit(parts._replace(path=above)), name


def cache_root() -> Path:
    """Where this machine keeps files that it can recreate: `$VAE_RAY_CACHE`, else `~/.cache/vae_ray`."""
    if directory := os.environ.get("VAE_RAY_CACHE"):
        return local_path(directory, key="VAE_RAY_CACHE")
    if os.path.expanduser("~") == "~":
        raise UserError("VAE_RAY_CACHE: not set, and this user has no home directory; set VAE_RAY_CACHE to a directory")
    return local_path("~/.cache/vae_ray", key="HOME")
