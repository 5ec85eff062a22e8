"""What a run records as it proceeds: metrics of epochs, starts of workers, warnings, and the summary at its end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from vae_ray.errors import CorruptFile
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.reading import parse_json, read_bytes
from vae_ray.storage.records import append_records, read_records, replace_records, verify, with_checksum

logger = logging.getLogger(__name__)


class RunRecords:
    """The records in the run directory `path`, oldest first. Damaged ones are left out with a warning."""

    def __init__(self, path: Path) -> None:
        self.metrics_file = path / "metrics.jsonl"
        """One record an epoch."""
        self.attempts_file = path / "attempts.jsonl"
        """One record each time that workers start."""
        self.warnings_file = path / "warnings.jsonl"
        """One record for each warning of a Ray worker or trial."""
        self.summary_file = path / "summary.json"
        """The result of a finished run."""
        self.progress_file = path / ".progress.json"
        """The position in the current epoch, for the live view."""
        self._images = path / "images"

    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch."""
        return [record for record in read_records(self.metrics_file) if type(record.get("epoch")) is int]

    def attempts(self) -> list[dict[str, Any]]:
        """The starts of workers; `append_attempt` says what each holds."""
        return read_records(self.attempts_file)

    def warnings(self) -> list[str]:
        """The warnings of Ray workers or of a trial."""
        return [str(record.get("warning")) for record in read_records(self.warnings_file)]

    def append_attempt(self, **attempt: Any) -> None:
        """Record that workers start: `started_at`, `num_workers`, `nodes` and `pids` by rank, and their position.

        The position is `epochs_done` and `steps_done`. `last_epoch` and `last_step`, which the attempt before reached,
        are added if it ended inside an epoch.
        """
        try:
            position = json.loads(self.progress_file.read_text(encoding="utf-8"))
            attempt |= {"last_epoch": int(position["epoch"]), "last_step": int(position["step"])}
        except (OSError, ValueError, KeyError, TypeError):  # it ended between epochs, or there was none
            pass
        self.progress_file.unlink(missing_ok=True)
        append_records(self.attempts_file, [attempt])

    def truncate_to_epoch(self, epoch: int) -> None:
        """Delete metrics and pictures of later epochs, which will be recomputed; warns of epochs without metrics."""
        remaining = [record for record in self.history() if record["epoch"] <= epoch]
        if missing := sorted(set(range(1, epoch + 1)) - {record["epoch"] for record in remaining}):
            logger.warning("%s: has no record of epoch %s", self.metrics_file, ", ".join(map(str, missing)))
        # no empty file: without experiment.yaml the directory would look like someone else's
        if self.metrics_file.exists():
            replace_records(self.metrics_file, remaining)
        for picture in self._images.glob("*/epoch=*.png"):
            if int(picture.stem.partition("=")[2]) > epoch:
                picture.unlink()

    def summary(self) -> dict[str, Any]:
        """The result of the finished run; empty if it has not finished. Raises `CorruptFile`."""
        try:
            return verify(parse_json(read_bytes(self.summary_file)))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, CorruptFile) as error:
            reason = str(error).removeprefix(f"{self.summary_file}: ")
            raise CorruptFile(f"{self.summary_file}: damaged ({reason}); delete it and resume the run") from None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the result; the run has then finished."""
        atomic_write(self.summary_file, (json.dumps(with_checksum(summary), indent=2) + "\n").encode())
