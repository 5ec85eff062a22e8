"""When a run's checkpoints are written and read, and what is in them. `checkpoints/` is the format."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from vae_ray.checkpoints.listing import all_checkpoints
from vae_ray.checkpoints.loading import TRAINING_STATE, Checkpoint
from vae_ray.checkpoints.quarantine import load_newest
from vae_ray.checkpoints.saving import NotSaved, prune_checkpoints, save_checkpoint
from vae_ray.config.experiment import Experiment
from vae_ray.data.cache import name_of
from vae_ray.errors import CorruptFile, TrainingFailed, UserError
from vae_ray.parallel.group import WorkerGroup, raise_on_all_ranks
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.training.state import TrainState

logger = logging.getLogger(__name__)


def selection_metric(experiment: Experiment) -> str:
    """The metric by which checkpoints are compared: never the loss, so that beta cannot bias it."""
    return "val/nelbo" if experiment.data.num_validation else "train/nelbo"


class Checkpointing:
    """Saves and restores a run's training state. Rank 0 alone reads and writes files.

    `fingerprints` are those of the images (`Splits.fingerprints`).
    """

    def __init__(
        self, experiment: Experiment, run: RunDirectory, group: WorkerGroup, *, fingerprints: Mapping[str, str]
    ) -> None:
        self._experiment, self._run, self._group, self._fingerprints = experiment, run, group, fingerprints

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint with all its files, read once, by rank 0. Collective."""

        def read() -> Checkpoint | None:
            return load_newest(self._run.checkpoints, pull=self._run.pull) if self._group.rank == 0 else None

        return self._group.broadcast(raise_on_all_ranks(self._group, read))

    def restore(self, checkpoint: Checkpoint, state: TrainState) -> None:
        """Bring a new state to where the checkpoint was written; raises `UserError` for other images than its run's."""
        checkpoint.check_images(name_of(self._experiment.data), state.model.image_shape, self._fingerprints)
        state.model.load_state_dict(checkpoint.weights(state.model.state_dict()))
        if state.averaged is not None:
            averaged = checkpoint.has_averaged_weights  # without, training continues with an average from here on
            model = state.averaged.model
            model.load_state_dict(checkpoint.weights(model.state_dict(), averaged=averaged))
        try:
            state.load(checkpoint.training_state(), checkpoint.scalars)
        except ValueError as error:
            raise CorruptFile(f"{checkpoint.path / TRAINING_STATE}: is not this model's ({error})") from None

    def save_epoch(self, state: TrainState, epoch: int, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """Write the checkpoint of an epoch that has ended; rank 0 only.

        Raises `TrainingFailed` if that is impossible for the last one; before it, it warns and training continues.
        """
        try:
            self._save(state, epoch, None, metrics)
        except NotSaved as error:
            if is_last:
                raise TrainingFailed(f"{error}; the run has ended: make room and resume it") from error
            logger.warning("%s; training continues, %s", error, self._kept())

    def save_inside_epoch(self, state: TrainState, epoch: int, step: int, *, seconds: float) -> None:
        """Write a checkpoint after `step` steps of `epoch`, or warn; rank 0 only.

        A state that is not finite is not saved: the next step reports it, and no one could continue from it.
        """
        if state.is_finite():
            try:
                self._save(state, epoch, step, {"seconds": seconds})
            except NotSaved as error:
                logger.warning("%s; %s", error, self._kept())

    def _kept(self) -> str:
        kept = all_checkpoints(self._run.checkpoints)
        return f"{kept[-1].path.name} is intact" if kept else "there is no checkpoint before it"

    def _save(self, state: TrainState, epoch: int, step: int | None, metrics: Mapping[str, Any]) -> None:
        averaged = state.averaged.model.state_dict() if state.averaged is not None else None
        save_checkpoint(
            self._run.checkpoints,
            epoch=epoch,
            step=step,
            experiment=self._experiment,
            image_shape=state.model.image_shape,
            weights=state.model.state_dict(),
            averaged_weights=averaged,
            training_state=state.tensors(),
            scalars=state.scalars(),
            metrics=metrics,
            selection_metric=selection_metric(self._experiment),
            fingerprints=self._fingerprints,
        )
        self.prune()

    def prune(self) -> None:
        """Delete the checkpoints that are no longer kept, also those that a kill left undeleted; rank 0 only."""
        with contextlib.suppress(OSError, UserError):  # the storage is away: next time
            prune_checkpoints(self._run.checkpoints, num_best=self._experiment.run.checkpoints_kept)
        self._run.push_soon()
