"""The files of a run, each with its one name. README, "What a run leaves behind", shows the same layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from vae_ray.artifacts.durable_files import replace_durably
from vae_ray.artifacts.patient_files import append_whole
from vae_ray.config import Experiment
from vae_ray.errors import UserError


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
    def nonfinite(self) -> Path:
        """Batches whose loss or gradient was not finite."""
        return self.path / "nonfinite"

    @property
    def progress_file(self) -> Path:
        """How far the current epoch is; only for the live view."""
        return self.path / ".progress.json"

    @property
    def stop_file(self) -> Path:
        """Tells whoever trains here to write a checkpoint and stop; removed at the next start."""
        return self.path / ".stop"

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
        """The lines of `metrics.jsonl`, oldest first; a line cut short by a kill ends the list."""
        lines: list[dict[str, Any]] = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    break
        return lines

    def append_metrics(self, *lines: dict[str, Any]) -> None:
        """Add whole lines or, where the storage does not take them, nothing; raises `OSError`."""
        append_whole(self.metrics_file, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def forget_after(self, epoch: int) -> None:
        """Drop metrics and pictures of epochs that will be computed again."""
        kept = "".join(json.dumps(line) + "\n" for line in self.history() if line["epoch"] <= epoch).encode()
        if not self.metrics_file.exists() or self.metrics_file.read_bytes() != kept:
            replace_durably(self.metrics_file, kept)
        for picture in self.images.glob("*/epoch=*.png"):
            if int(picture.stem.partition("=")[2]) > epoch:
                picture.unlink()

    def summary(self) -> dict[str, Any]:
        """The finished run's summary; empty if it has not finished."""
        if not self.summary_file.exists():
            return {}
        try:
            content: dict[str, Any] = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.summary_file}: damaged ({error}); delete it and use --resume") from None
        return content

    def write_summary(self, summary: dict[str, Any]) -> None:
        replace_durably(self.summary_file, (json.dumps(summary, indent=2) + "\n").encode())
