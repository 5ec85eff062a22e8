"""The files of a sweep, and the journal from which it can always be taken up again.

The journal is ours and append-only, one JSON object a line: what was proposed, and how each trial ended. With the
trials' own run directories it is all that `--resume` and the leaderboard read; Tune's state is thrown away.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vae_ray.checkpoints.finding import BEST
from vae_ray.config.sections import NAME_PATTERN
from vae_ray.errors import CorruptFile, UserError
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.checksums import append_sealed, read_sealed, replace_sealed, sealed_lines
from vae_ray.storage.locations import directory_of, is_uri, join_location
from vae_ray.storage.mirror import Mirror, copy_path, is_small_file
from vae_ray.storage.reading import parse_json, parse_yaml, read_bytes, shown

TRIALS = "trials"
"""Directory of the trials' run directories inside a sweep's."""


@dataclass(frozen=True)
class SweepDirectory:
    """Paths of one sweep, and the few ways in which its files are read and written."""

    path: Path
    mirror: Mirror | None = field(default=None, compare=False)
    """Where the storage is a URI: `path` is this process's copy."""

    @classmethod
    def at(cls, location: str) -> SweepDirectory:
        """The sweep at a directory or URI; raises `UserError` for a URI that no file system serves."""
        if not is_uri(location):
            return cls(directory_of(location))
        path = copy_path(location, "driver")
        return cls(path, Mirror(path, location))

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name if self.mirror is None else self.mirror.path_of().rpartition("/")[2]

    @property
    def location(self) -> str:
        """The directory or URI by which everyone else finds this sweep."""
        return str(self.path) if self.mirror is None else self.mirror.uri

    def public_path(self, path: Path) -> Path | str:
        """Where everyone else finds the file or directory `path` of this sweep."""
        return path if self.mirror is None else join_location(self.mirror.uri, *path.relative_to(self.path).parts)

    def pull(self, whole: Path | None = None) -> None:
        """Bring the copy of a URI up to date, with models only inside `whole`; nothing to do for a directory."""
        if self.mirror is not None:
            prefix = "\0" if whole is None else f"{whole.relative_to(self.path).as_posix()}/"
            self.mirror.pull(lambda name: is_small_file(name) or name.startswith(prefix))

    def push(self, *files: Path) -> None:
        """Copy these files to where everyone sees them, all that changed without any named; not for a directory."""
        if self.mirror is not None:
            self.mirror.push([file.relative_to(self.path).as_posix() for file in files] or None)

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

    def trial(self, name: str) -> RunDirectory:
        """The run directory of a trial; raises `CorruptFile` for a name, or a link, that leads out of the sweep."""
        run = RunDirectory(self.path / TRIALS / name)
        if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name) or run.path.is_symlink():
            raise CorruptFile(f"{self.path}: trial {shown(name)} would lie outside of the sweep")
        return run

    def description(self) -> dict[str, Any]:
        """The sweep as it was started; raises `UserError` if there is none or it is damaged."""
        try:
            content = parse_yaml(read_sealed(self.description_file))
        except FileNotFoundError:
            raise UserError(f"sweep {self.path}: no such sweep, it has no {self.description_file.name}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.description_file}: cannot be read: {' '.join(str(error).split())}") from None
        needed = {"experiment", "search", "metrics", "num_trials", "scheduler", "searcher"}
        if not isinstance(content, dict) or not needed <= content.keys():
            raise CorruptFile(f"{self.description_file}: damaged, it does not describe a sweep")
        return content

    def write_description(self, content: dict[str, Any]) -> None:
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
        replace_sealed(self.description_file, text.encode())
        self.push(self.description_file)

    def write_summary(self, summary: dict[str, Any]) -> None:
        atomic_write(self.summary_file, (json.dumps(summary, indent=2) + "\n").encode())

    def journal(self) -> list[dict[str, Any]]:
        """The journal's entries, oldest first."""
        return sealed_lines(self.journal_file)

    def append_to_journal(self, *entries: dict[str, Any]) -> None:
        """Add entries so that they survive a kill and a power cut."""
        append_sealed(self.journal_file, entries)
        self.push(self.journal_file)


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that grows line by line; a line cut short by a kill is not one."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in read_bytes(file).splitlines():
            with contextlib.suppress(ValueError):
                lines.append(parse_json(line))
    return lines
