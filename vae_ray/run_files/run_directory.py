"""The files of a run, each with its one name. README, "What a run leaves behind", shows the same layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from vae_ray.config.experiment import Experiment
from vae_ray.errors import UserError
from vae_ray.run_files.run_records import RunRecords
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.background import BackgroundSync
from vae_ray.storage.mirror import Mirror
from vae_ray.storage.synced import SyncedDirectory

WRITER_LOCK_SECONDS = 60.0
"""How long a writer waits until one that was killed has released the run directory."""
CHECKPOINTS = "checkpoints"
SWEEP_FILE, TRIALS = "sweep.yaml", "trials"
"""In the directory of a sweep: what it is, and the directory of its trials' run directories."""


class RunDirectory(SyncedDirectory):
    """One run: its paths, its records, and who may write them."""

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        super().__init__(path, mirror)
        self.experiment_file = path / "experiment.yaml"
        """The experiment without `auto` and without the name: that is the directory's, so the file can be run again."""
        self.records = RunRecords(path)
        self.checkpoints = path / CHECKPOINTS
        self.images = path / "images"
        self.tensorboard = path / "tensorboard"
        self.nonfinite = path / "nonfinite"
        """Batches whose loss or gradient was not finite."""
        self.stop_file = path / ".stop"
        """Asks for a checkpoint and the end of training; removed at the next start. At a URI it is in no copy."""
        self._background: BackgroundSync | None = None

    def lock(self, role: str) -> filelock.BaseFileLock:
        """The lock of "driver" or "writer"; the system releases it when its holder dies."""
        return filelock.FileLock(self.path / f".{role}.lock")

    @contextlib.contextmanager
    def open_for_writing(self) -> Iterator[None]:
        """Let this process alone write the run for the body; at a URI, in a copy whose last part is sent at the end.

        Raises `filelock.Timeout` if another writer does not release the run, and `TrainingFailed` if the copy cannot be
        sent.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.working_copy())
            if self.mirror is not None:
                self.mirror.delete_incomplete(self.checkpoints.name)
                self._background = BackgroundSync(self.mirror, watched=self.stop_file.name)
                stack.callback(self._background.close)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            stack.enter_context(self.lock("writer").acquire(timeout=WRITER_LOCK_SECONDS))
            yield

    def push_soon(self) -> None:
        """Have all that has changed copied to the URI, without waiting; the writer only."""
        if self._background is not None:
            self._background.push_soon()

    def request_stop(self) -> None:
        """Ask the writer to write a checkpoint and stop; raises `OSError`."""
        if self.mirror is not None:
            self.mirror.remote.write(self.stop_file.name, b"stop")
        else:
            self.stop_file.touch()

    def stop_is_requested(self) -> bool:
        """Whether the writer should stop; at a URI as of at most a second ago."""
        return self.stop_file.exists() if self._background is None else self._background.sees_watched()

    def clear_stop_request(self) -> None:
        """Let the next start begin without a request."""
        self._delete(self.stop_file)

    def discard_result(self) -> None:
        """Delete the summary: the run is extended, so that it has not finished until it has a new one."""
        self._delete(self.records.summary_file)

    def _delete(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        if self.mirror is not None:
            self.mirror.remote.delete(file.name)

    def experiment(self) -> Experiment:
        """The experiment as it was started; raises `UserError` that names the file."""
        try:
            return Experiment.from_file(self.experiment_file)
        except UserError as error:
            message = str(error).removeprefix(f"{self.experiment_file}: ")
            raise UserError(f"{self.experiment_file}: {message}") from None

    def write_experiment(self, experiment: Experiment) -> None:
        """Write the experiment, with a comment on how to repeat it."""
        nameless = experiment.with_overrides({"run.name": None})
        header = f"# What the run {self.path.name!r} was; repeat it with: vae-ray train {self.experiment_file.name}\n"
        atomic_write(self.experiment_file, (header + nameless.to_yaml()).encode())

    def refuse_links(self) -> None:
        """Raise `UserError` if the run, or a directory in it, is a link: what is written there could land anywhere."""
        for path in (self.path, self.checkpoints, self.images, self.tensorboard):
            if path.is_symlink():
                target = path.resolve()
                raise UserError(f"{path}: is a link, which could point out of the storage; name its target {target}")
