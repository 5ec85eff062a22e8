"""The files of a sweep, and the journal from which it can always be taken up again.

The journal is ours and append-only, one JSON object a line: what was proposed, and how each trial ended. With the
trials' own run directories it is all that `--resume` and the leaderboard read; Tune's state is thrown away.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import yaml

from vae_ray.artifacts.durable_files import replace_durably
from vae_ray.artifacts.run_directory import RunDirectory
from vae_ray.errors import UserError
from vae_ray.trained import BEST


@dataclass(frozen=True)
class SweepDirectory:
    """Paths of one sweep, and the few ways in which its files are read and written."""

    path: Path

    @property
    def description_file(self) -> Path:
        """The base experiment, the search space and how it is searched."""
        return self.path / "sweep.yaml"

    @property
    def journal_file(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def leaderboard_csv(self) -> Path:
        return self.path / "leaderboard.csv"

    @property
    def leaderboard_parquet(self) -> Path:
        return self.path / "leaderboard.parquet"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def best(self) -> Path:
        """A complete checkpoint of the winner."""
        return self.path / BEST

    @property
    def tune_state(self) -> Path:
        """What Tune keeps for itself while it runs; a new one at every start."""
        return self.path / ".tune"

    def trial(self, name: str) -> RunDirectory:
        """The run directory of a trial."""
        return RunDirectory(self.path / "trials" / name)

    def lock(self) -> filelock.BaseFileLock:
        """Held by the driver of the sweep; released by the system even if it is killed."""
        return filelock.FileLock(self.path / ".driver.lock")

    def description(self) -> dict[str, Any]:
        """The sweep as it was started; raises `UserError` if there is none or it is damaged."""
        try:
            content = yaml.safe_load(self.description_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"sweep {self.path}: no such sweep, it has no {self.description_file.name}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{self.description_file}: cannot be read: {' '.join(str(error).split())}") from None
        needed = {"experiment", "search", "metrics", "num_trials", "scheduler", "searcher"}
        if not isinstance(content, dict) or not needed <= content.keys():
            raise UserError(f"{self.description_file}: damaged, it does not describe a sweep")
        return content

    def write_description(self, content: dict[str, Any]) -> None:
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
        replace_durably(self.description_file, text.encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        replace_durably(self.summary_file, (json.dumps(summary, indent=2) + "\n").encode())

    def journal(self) -> list[dict[str, Any]]:
        """The journal's entries, oldest first."""
        return json_lines(self.journal_file)

    def append_to_journal(self, *entries: dict[str, Any]) -> None:
        """Add entries so that they survive a kill and a power cut."""
        with self.journal_file.open("a+b") as stream:
            if stream.tell() and not self._ends_with_newline():
                stream.write(b"\n")  # after a line that a kill cut short
            stream.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
            stream.flush()
            os.fsync(stream.fileno())

    def _ends_with_newline(self) -> bool:
        with self.journal_file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that grows line by line; a line cut short by a kill is not one."""
    lines = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines
