"""The files of a run, each with its one name. README, "What a run leaves behind", shows the same layout."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from vae_ray.config.experiment import Experiment
from vae_ray.errors import CorruptFile, UserError
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.checksums import append_sealed, read_sealed, replace_lines, replace_sealed, sealed_lines
from vae_ray.storage.locations import is_uri, join_location
from vae_ray.storage.mirror import Mirror, copy_path, is_small_file, working_copy
from vae_ray.storage.reading import parse_json

logger = logging.getLogger(__name__)

WRITER_LOCK_SECONDS = 60.0
"""How long a writer waits for a dying predecessor to let go of the run directory."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run, and the few ways in which its files are read and written."""

    path: Path
    mirror: Mirror | None = field(default=None, compare=False)
    """Where the storage is a URI: `path` is this machine's copy."""

    @classmethod
    def at(cls, location: str | Path, *, role: str) -> RunDirectory:
        """The run at a directory or URI; of a URI, with a copy for this process and its `role` ("driver", "writer").

        Raises `UserError` for a URI that no file system serves.
        """
        if not is_uri(location):
            return cls(Path(location))
        path = copy_path(str(location), role)
        return cls(path, Mirror(path, str(location)))

    @property
    def location(self) -> str:
        """The directory or URI by which everyone else finds this run."""
        return str(self.path) if self.mirror is None else self.mirror.uri

    def public_path(self, path: Path) -> Path | str:
        """Where everyone else finds the file or directory `path` of this run."""
        return path if self.mirror is None else join_location(self.mirror.uri, *path.relative_to(self.path).parts)

    def pull(self, checkpoint: Path | None = None) -> None:
        """Bring the copy of a URI up to date, with the weights of `checkpoint` only; nothing to do for a directory."""
        if self.mirror is None:
            return
        whole = f"{checkpoint.relative_to(self.path).as_posix()}/" if checkpoint is not None else "\0"
        try:
            self.mirror.pull(lambda name: is_small_file(name) or name.startswith(whole))
        except OSError as error:
            raise UserError(f"{self.location}: cannot be read ({' '.join(str(error).split())[:200]})") from None

    @contextlib.contextmanager
    def open_for_writing(self) -> Iterator[None]:
        """Let this process alone write the run, for the body; of a URI in a copy, whose last part is sent at the end.

        Raises `filelock.Timeout` if a dying predecessor does not let go, and `TrainingFailed` if a copy cannot be sent.
        """
        with contextlib.ExitStack() as stack:
            if self.mirror is not None:
                stack.enter_context(working_copy(self.mirror))
                self.mirror.delete_incomplete(self.checkpoints.name)
                stack.callback(self.mirror.close)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            stack.enter_context(self.lock("writer").acquire(timeout=WRITER_LOCK_SECONDS))
            yield

    def push_soon(self) -> None:
        """Have all that is new copied to where everyone sees it, without waiting; nothing to do for a directory."""
        if self.mirror is not None:
            self.mirror.push_soon()

    def push(self, *files: Path) -> None:
        """Copy just these files to where everyone sees them; nothing to do for a directory."""
        if self.mirror is not None:
            self.mirror.push([file.relative_to(self.path).as_posix() for file in files])

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
    def attempts_file(self) -> Path:
        """One JSON object for each time that workers began or went on with the run."""
        return self.path / "attempts.jsonl"

    @property
    def warnings_file(self) -> Path:
        """One JSON object for each warning of a Ray worker or trial; there is none without a warning."""
        return self.path / "warnings.jsonl"

    def request_stop(self) -> None:
        """Ask whoever trains here to write a checkpoint and stop; raises `OSError`."""
        if self.mirror is not None:
            self.mirror.write(self.stop_file.name, b"stop")
        else:
            self.stop_file.touch()

    def stop_is_requested(self) -> bool:
        """Whether someone asked for it; of a run at a URI as it was at most a second ago."""
        if self.mirror is None:
            return self.stop_file.exists()
        return self.mirror.seen_remotely(self.stop_file.name)

    def clear_stop_request(self) -> None:
        """Let the next start begin without a request."""
        self.stop_file.unlink(missing_ok=True)
        if self.mirror is not None:
            self.mirror.delete(self.stop_file.name)

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
        """Tells whoever trains here to write a checkpoint and stop; removed at the next start.

        Of a run at a URI it lies there, not in anyone's copy.
        """
        return self.path / ".stop"

    def lock(self, role: str) -> filelock.BaseFileLock:
        """The lock of "driver" or "writer"; released by the system even if its holder is killed."""
        return filelock.FileLock(self.path / f".{role}.lock")

    def experiment(self) -> Experiment:
        """The experiment as it was started; raises `UserError` that names the file."""
        try:
            return Experiment.from_file(self.experiment_file)
        except UserError as error:
            message = str(error).removeprefix(f"{self.experiment_file}: ")
            raise UserError(f"{self.experiment_file}: {message}") from None

    def write_experiment(self, experiment: Experiment) -> None:
        nameless = experiment.with_overrides({"run.name": None})
        header = f"# What the run {self.path.name!r} was; repeat it with: vae-ray train {self.experiment_file.name}\n"
        atomic_write(self.experiment_file, (header + nameless.to_yaml()).encode())

    def history(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, oldest first, without one that a kill cut short.

        Lines that are not what was written are left out with a warning.
        """
        return [line for line in sealed_lines(self.metrics_file) if type(line.get("epoch")) is int]

    def append_metrics(self, *lines: dict[str, Any]) -> None:
        """Add whole lines or, where the storage does not take them, nothing; raises `OSError`."""
        append_sealed(self.metrics_file, lines)

    def attempts(self) -> list[dict[str, Any]]:
        """The lines of `attempts.jsonl`, oldest first."""
        return sealed_lines(self.attempts_file)

    def warnings(self) -> list[str]:
        """What Ray workers or a trial have warned of, oldest first."""
        return [str(line.get("warning")) for line in sealed_lines(self.warnings_file)]

    def append_attempt(self, **attempt: Any) -> None:
        """Write down that workers begin: `started_at`, `num_workers`, `nodes` and `pids` by rank, and from where on.

        That is `epochs_done` and `steps_done`. To it comes what is known of the attempt before: the epoch and step
        that it had reached.
        """
        try:
            reached = json.loads(self.progress_file.read_text(encoding="utf-8"))
            attempt |= {"last_epoch": int(reached["epoch"]), "last_step": int(reached["step"])}
        except (OSError, ValueError, KeyError, TypeError):  # it ended between epochs, or there was none
            pass
        self.progress_file.unlink(missing_ok=True)
        append_sealed(self.attempts_file, [attempt])

    def truncate_to_epoch(self, epoch: int) -> None:
        """Drop metrics and pictures of epochs that will be computed again; warns of lines that are missing before."""
        kept = [line for line in self.history() if line["epoch"] <= epoch]
        if missing := sorted(set(range(1, epoch + 1)) - {line["epoch"] for line in kept}):
            logger.warning("%s: has no line of epoch %s", self.metrics_file, ", ".join(map(str, missing)))
        content = "".join(json.dumps(line) + "\n" for line in kept).encode()
        # none is made: before experiment.yaml is there it would look like somebody else's
        if self.metrics_file.exists() and self.metrics_file.read_bytes() != content:
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
        except (OSError, ValueError, CorruptFile) as error:
            reason = str(error).removeprefix(f"{self.summary_file}: damaged, ")
            raise CorruptFile(f"{self.summary_file}: damaged ({reason}); delete it and use --resume") from None
        return content

    def write_summary(self, summary: dict[str, Any]) -> None:
        replace_sealed(self.summary_file, (json.dumps(summary, indent=2) + "\n").encode())

    def refuse_links(self) -> None:
        """Raise `UserError` if the run, or a directory in it, is a link: what is written there could land anywhere."""
        for path in (self.path, self.checkpoints, self.images, self.tensorboard):
            if path.is_symlink():
                raise UserError(f"{path}: is a link, which could point out of the storage; should be a directory")
