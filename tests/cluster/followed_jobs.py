"""Jobs that are followed while nodes join and leave."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from tests.cluster.ray_nodes import REPOSITORY, RayNodes, wait_until
from vae_ray.run_files.run_directory import RunDirectory

EPOCHS = 16
# epochs of half a second or more, saved several times in each
RUN = ["digits", "--training.epochs", str(EPOCHS), "--training.global-batch-size", "16", "--model.prior", "standard"]
RUN += ["--training.test-every-epochs", "0", "--run.checkpoint-every-steps", "20", "--run.seed", "5"]


class Job:
    """A job that was submitted from the client's place and is followed in the background."""

    def __init__(self, cluster: RayNodes, name: str, *options: str) -> None:
        self.cluster, self.name = cluster, name
        storage = cluster.network.shared / "come-and-go"
        self.run, self.log = RunDirectory(storage / name), cluster.network.shared / f"job-{time.monotonic_ns()}.log"
        entrypoint = ["python", "jobs/train.py", *RUN, "--storage", str(storage), "--name", name, *options]
        self.process: subprocess.Popen[Any] = cluster.client.start(
            *cluster.submission(*entrypoint),
            env={**cluster.credentials, "PYTHONUNBUFFERED": "1"},  # the log is read while the job runs
            cwd=REPOSITORY,
            log=self.log,
        )

    @property
    def id(self) -> str:
        """As Ray calls it."""
        return next(word.strip("'") for word in self.log_text().split() if word.startswith("'raysubmit_"))

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_epochs(self, number: int, *, seconds: float = 120) -> None:
        self.wait_until(lambda: len(self.run.records.history()) >= number, f"{number} epochs", seconds=seconds)

    def wait_until(self, condition: Any, what: str, *, seconds: float) -> None:
        def holds_or_ended() -> bool:
            assert self.process.poll() is None or condition(), f"the job ended before: {what}\n{self.log_text()}"
            return bool(condition())

        try:
            wait_until(holds_or_ended, what, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_text()}") from None

    def end(self, *, seconds: float = 240) -> int:
        return int(self.process.wait(timeout=seconds))
