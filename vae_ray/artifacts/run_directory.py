"""The files of a run, each with its one name. README, "What a run leaves behind", shows the same layout."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from vae_ray.artifacts.durable_files import replace_durably
from vae_ray.artifacts.seals import append_sealed, read_sealed, replace_lines, replace_sealed, sealed_lines
from vae_ray.config import Experiment
from vae_ray.errors import Damaged, UserError
from vae_ray.reading import parse_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run, and the few ways in which its files are read and written."""

    path: Path

    @property
    def experiment_file(self) -> Path:
        """The resolved experiment, without the name: that is the directory's, so the file can be run again."""
        return self.path / "experiment.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """The result, once the run has finished."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def progress_file(self) -> Path:
        """How far the current epoch is; only for the live view."""
        return self.path / ".progress.json"

    def lock(self, role: str) -> filelock.BaseFileLock:
        """The lock of "driver" or "writer"; released by the system even if its holder is killed."""
        return filelock.FileLock(self.path / f".{role}.lock")

    def experiment(self) -> Experiment:
        """The experiment as it was started."""
        return Experiment.from_file(self.experiment_file)

    def write_experiment(self, experiment: Experiment) -> None:
        nameless = experiment.with_overrides({"run.name": None})
        header = f"# What the run {self.path.name!r} was; repeat it with: vae-ray train {self.experiment_file.name}\n"
        replace_durably(self.experiment_file, (header + nameless.to_yaml()).encode())

    def history(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, oldest first, without one that a kill cut short.

        Lines that are not what was written are left out with a warning.
        """
        return [line for line in sealed_lines(self.metrics_file) if type(line.get("epoch")) is int]

    def append_metrics(self, line: dict[str, Any]) -> None:
        append_sealed(self.metrics_file, [line])

    def forget_after(self, epoch: int) -> None:
        """Drop metrics and pictures of epochs that will be computed again; warns of lines that are missing before."""
        kept = [line for line in self.history() if line["epoch"] <= epoch]
        if missing := sorted(set(range(1, epoch + 1)) - {line["epoch"] for line in kept}):
            logger.warning("%s: has no line of epoch %s", self.metrics_file, ", ".join(map(str, missing)))
        replace_lines(self.metrics_file, kept)
        for picture in self.images.glob("*/epoch=*.png"):
            if int(picture.stem.partition("=")[2]) > epoch:
                picture.unlink()

    def summary(self) -> dict[str, Any]:
        """The finished run's summary; empty if it has not finished."""
        try:
            content: dict[str, Any] = parse_json(read_sealed(self.summary_file))
            if not isinstance(content, dict):
                raise ValueError("is no object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, Damaged) as error:
            reason = str(error).removeprefix(f"{self.summary_file}: damaged, ")
            raise Damaged(f"{self.summary_file}: damaged ({reason}); delete it and use --resume") from None
        return content

    def write_summary(self, summary: dict[str, Any]) -> None:
        replace_sealed(self.summary_file, (json.dumps(summary, indent=2) + "\n").encode())

    def refuse_links(self) -> None:
        """Raise `UserError` if the run, or a directory in it, is a link: what is written there could land anywhere."""
        for path in (self.path, self.checkpoints, self.images, self.tensorboard):
            if path.is_symlink():
                raise UserError(f"{path}: is a link, which could point out of the storage; should be a directory")
