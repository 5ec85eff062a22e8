"""The dashboard of a cluster, to which jobs are submitted: whether it answers, and whether it requires a token.

Every failure is one line within seconds: Ray's own clients wait indefinitely for an address that does not answer.
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

from vae_ray.errors import UserError, one_line

DEFAULT_URL = "http://127.0.0.1:8265"
PROBE_SECONDS = 4.0
TOKEN_ADVICE = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the head node"


@dataclass(frozen=True)
class Dashboard:
    """The URL of a dashboard that answers; `is_open` if it requires no token."""

    url: str
    is_open: bool


def find_dashboard(address: str | None) -> Dashboard:
    """The dashboard at `address`, else at $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS or this machine's usual port (`auto`).

    Raises `UserError` within seconds if none answers there.
    """
    api_server = os.environ.get("RAY_API_SERVER_ADDRESS")
    given = address or api_server or os.environ.get("RAY_ADDRESS") or "auto"
    if given == "auto":
        given = api_server or DEFAULT_URL
    scheme, _, rest = given.rpartition("://")
    url = f"{scheme or 'http'}://{rest.rstrip('/')}"
    host = urlsplit(url).hostname
    usual_url = f"http://{host or 'HOST'}:8265"
    if scheme not in ("", "http", "https") or not host:
        raise UserError(f"address: got {given!r}, should be a dashboard's; for example --address {usual_url}")
    try:
        is_open = answers_without_token(url)
    except OSError as error:
        raise UserError(
            f"address: no Ray dashboard answers at {url} ({describe_error(error)}); is the cluster up, and is that its "
            f"dashboard's address, for example --address {usual_url}?"
        ) from None
    return Dashboard(url, is_open)


def answers_without_token(url: str) -> bool:
    """Whether the dashboard at `url` requires no token; raises `OSError` if no dashboard answers."""
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
        raise OSError(f"another server answers there: {describe_error(error)}") from None
    raise OSError("another server answers there")


def job_client(dashboard: Dashboard) -> JobSubmissionClient:
    """Ray's client of that dashboard; raises `UserError` if the token is missing or wrong."""
    for name in ("dashboard_sdk", "job.sdk"):  # they log every package and connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        with _only_address(dashboard.url):
            return JobSubmissionClient(dashboard.url)
    except AuthenticationError as error:
        if "failed" in str(error).partition(":")[0]:
            raise UserError(f"address: {dashboard.url} refuses this token; {TOKEN_ADVICE}") from None
        raise UserError(f"address: {dashboard.url} requires a token; none is set here: {TOKEN_ADVICE}") from None
    except (RuntimeError, OSError) as error:
        raise UserError(f"address: {dashboard.url} cannot be used ({describe_error(error)})") from None


def cluster_nodes(dashboard: Dashboard) -> list[dict[str, Any]]:
    """The nodes of the cluster, with the keys of `ray.nodes()` that `distributed.resources` reads."""
    with _only_address(dashboard.url):
        nodes = list_nodes(dashboard.url, limit=10_000, timeout=10)
    return [
        {"Alive": node.state == "ALIVE", "Resources": node.resources_total, "Labels": node.labels or {}}
        for node in nodes
    ]


@contextlib.contextmanager
def _only_address(url: str) -> Iterator[None]:
    """Set the variable that Ray's clients prefer to their own `address` argument."""
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def describe_error(error: Exception) -> str:
    """The error's message on one line of at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text)[:200] or type(error).__name__
