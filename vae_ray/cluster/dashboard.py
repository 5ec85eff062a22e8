"""A cluster as its clients see it: the dashboard, where jobs are submitted, and who may use it.

Known within seconds and in one line: Ray's own clients wait without a limit for an address where nothing answers.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes

from vae_ray.errors import UserError

DEFAULT_URL = "http://127.0.0.1:8265"
PROBE_SECONDS = 4.0
TOKEN_ADVICE = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the head node"


@dataclass(frozen=True)
class Dashboard:
    """Where a dashboard answers, and whether it does without a token."""

    url: str
    is_open: bool


def find_dashboard(address: str | None) -> Dashboard:
    """The dashboard at `address`, else at $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS or this machine's usual port.

    Raises `UserError` within seconds if none answers there.
    """
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "auto"
    scheme, _, rest = given.rpartition("://")
    if scheme not in ("", "http", "https"):
        host = urlsplit(given).hostname or "HOST"
        raise UserError(f"address: got {given!r}, jobs go to the dashboard; for example --address http://{host}:8265")
    url = DEFAULT_URL if given == "auto" else f"{scheme or 'http'}://{rest.rstrip('/')}"
    if not urlsplit(url).hostname:
        raise UserError(f"address: got {given!r}, should be a dashboard's; for example --address {DEFAULT_URL}")
    try:
        is_open = answers_without_token(url)
    except OSError as error:
        raise UserError(
            f"address: no Ray dashboard answers at {url} ({one_line(error)}); is the cluster up, and is that the "
            f"dashboard's address (--address {DEFAULT_URL}), seen from this machine?"
        ) from None
    return Dashboard(url, is_open)


def answers_without_token(url: str) -> bool:
    """Whether the dashboard at `url` tells anyone who asks; `OSError` if there is none."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=PROBE_SECONDS) as response:
            if "ray_version" in json.loads(response.read(65536)):
                return True
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False
        raise OSError(f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason)) from None
    except (http.client.HTTPException, ValueError, TypeError) as error:
        raise OSError(f"what answers there is not Ray: {one_line(error)}") from None
    raise OSError("what answers there is not Ray")


def job_client(dashboard: Dashboard) -> JobSubmissionClient:
    """Ray's client of that dashboard; raises `UserError` if it does not let this process in."""
    for name in ("dashboard_sdk", "job.sdk"):  # they tell of every package and connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        with _only_address(dashboard.url):
            return JobSubmissionClient(dashboard.url)
    except AuthenticationError as error:
        if "failed" in str(error).partition(":")[0]:
            raise UserError(f"address: {dashboard.url} refuses this token; {TOKEN_ADVICE}") from None
        raise UserError(f"address: {dashboard.url} wants a token; {TOKEN_ADVICE}") from None
    except (RuntimeError, OSError) as error:
        raise UserError(f"address: {dashboard.url} cannot be used ({one_line(error)})") from None


def cluster_nodes(dashboard: Dashboard) -> list[dict[str, Any]]:
    """The nodes of the cluster, with the keys of `ray.nodes()` that `autoscaling` reads."""
    with _only_address(dashboard.url):
        nodes = list_nodes(dashboard.url, limit=10_000, timeout=10)
    return [
        {"Alive": found.state == "ALIVE", "Resources": found.resources_total, "Labels": found.labels or {}}
        for found in nodes
    ]


@contextlib.contextmanager
def _only_address(url: str) -> Iterator[None]:
    """Ray's clients prefer this variable to the address that they are given."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def one_line(error: Exception) -> str:
    """What the error says, short."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
