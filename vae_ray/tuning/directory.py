"""The files of a sweep, and the journal from which it is resumed.

The journal is append-only, one JSON object a line: what was proposed, which trial ASHA compared at which epoch, and how
each trial ended. With the trials' own run directories it is all that `--resume` and the leaderboard read; Tune's state
is deleted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vae_ray.checkpoints.finding import BEST
from vae_ray.config.sections.run import NAME_PATTERN
from vae_ray.errors import CorruptFile, UserError, one_line
from vae_ray.run_files.run_directory import SWEEP_FILE, TRIALS, RunDirectory
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.locations import split_location
from vae_ray.storage.reading import format_yaml, parse_yaml, read_bytes, short_repr
from vae_ray.storage.records import CHECKSUM_KEY, append_records, checksum, read_records, verify
from vae_ray.storage.synced import SyncedDirectory


class SweepDirectory(SyncedDirectory):
    """Paths of one sweep, and the few ways in which its files are read and written."""

    @property
    def name(self) -> str:
        """The sweep's name."""
        return split_location(self.location)[1]

    @property
    def description_file(self) -> Path:
        """The base experiment, the search space and how it is searched."""
        return self.path / SWEEP_FILE

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

    def trial(self, name: str) -> RunDirectory:
        """The run directory of a trial; raises `CorruptFile` for a name, or a link, that leads out of the sweep."""
        run = RunDirectory(self.path / TRIALS / name)
        if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name) or run.path.is_symlink():
            raise CorruptFile(f"{self.path}: trial {short_repr(name)} would lie outside of the sweep")
        return run

    def description(self) -> dict[str, Any]:
        """The sweep as it was started; raises `UserError` if there is none or it is damaged."""
        try:
            content = verify(parse_yaml(read_bytes(self.description_file)))
        except FileNotFoundError:
            raise UserError(f"sweep {self.path}: no such sweep, it has no {self.description_file.name}") from None
        except (OSError, ValueError, TypeError) as error:  # TypeError: keys of several types cannot be sorted
            raise UserError(f"{self.description_file}: cannot be read: {one_line(error)}") from None
        needed = {"experiment", "search", "metrics", "num_trials", "scheduler", "searcher"}
        if not needed <= content.keys():
            raise CorruptFile(f"{self.description_file}: damaged, it does not describe a sweep")
        return content

    def write_description(self, content: dict[str, Any]) -> None:
        """Write the sweep as it is started, with its checksum as the first key."""
        atomic_write(self.description_file, format_yaml({CHECKSUM_KEY: checksum(content), **content}).encode())
        self.push(self.description_file)

    def write_summary(self, summary: dict[str, Any]) -> None:
        atomic_write(self.summary_file, (json.dumps(summary, indent=2) + "\n").encode())

    def journal(self) -> list[dict[str, Any]]:
        """The journal's entries, oldest first."""
        return read_records(self.journal_file)

    def append_to_journal(self, *entries: dict[str, Any]) -> None:
        """Add entries so that they survive a kill and a power cut."""
        append_records(self.journal_file, entries)
        self.push(self.journal_file)
