"""An S3 API server on loopback, in a process of its own that can be stopped and killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import pyarrow.fs

BUCKET = "models"


@dataclass
class ObjectStore:
    """moto's server, with one bucket; `environment` is that of its clients."""

    port: int = field(default_factory=lambda: _free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "something",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # no other machine is asked for credentials
        }

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/runs"

    def start(self) -> None:
        """Start it and make the bucket; `environment` must be that of this process."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/moto-api/", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.1)
        filesystem().create_dir(BUCKET)

    def pause(self) -> None:
        """Keep the connections and do not answer, as a network that is down."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.resume()
            self.process.kill()
            self.process.wait()

    def names(self, run: str) -> set[str]:
        """All objects of a run."""
        selector = pyarrow.fs.FileSelector(f"{BUCKET}/runs/{run}", recursive=True, allow_not_found=True)
        files = filesystem().get_file_info(selector)
        return {f.path.partition(f"/{run}/")[2] for f in files if f.type == pyarrow.fs.FileType.File}


def filesystem() -> pyarrow.fs.FileSystem:
    """The store as pyarrow sees it; only `from_uri` looks at AWS_ENDPOINT_URL."""
    return pyarrow.fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true")[0]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
