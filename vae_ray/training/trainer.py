"""The trainer: a model, its data and its state on one worker, trained an epoch at a time.

Methods are collective: all ranks call them with equal arguments. Rank 0 alone reads and writes the run directory.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from vae_ray.checkpoints.finding import find_checkpoint
from vae_ray.checkpoints.listing import all_checkpoints
from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.data.batches import Loader
from vae_ray.data.splits import Splits
from vae_ray.errors import CorruptFile, Diverged, Stopped, UserError
from vae_ray.evaluation.elbo import evaluate_split
from vae_ray.evaluation.metrics import TermSums, labelled
from vae_ray.models.initialization import INITIALIZATIONS
from vae_ray.models.vae import VAE, build_vae
from vae_ray.objectives import build_objective
from vae_ray.objectives.base import Losses
from vae_ray.parallel.group import WorkerGroup, raise_on_all_ranks, shards_of
from vae_ray.run_files.recorder import Recorder
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.seeds import generator, stream
from vae_ray.storage.retry import describe_os_error
from vae_ray.training.checkpointing import Checkpointing, selection_metric
from vae_ray.training.loop import EpochSettings, StepSettings, train_epoch
from vae_ray.training.nonfinite import GRADIENT, advice, apply_policy, batch_file, nonfinite_term, save_batch
from vae_ray.training.optimization import learning_rate
from vae_ray.training.state import TrainState
from vae_ray.training.stop_requests import StopRequests

logger = logging.getLogger(__name__)


class Trainer:
    """One worker's part of a run, restored to where the run stopped."""

    def __init__(self, experiment: Experiment, run: RunDirectory, group: WorkerGroup) -> None:
        self.experiment, self.run, self.group = experiment, run, group
        self.splits = raise_on_all_ranks(group, lambda: Splits.open(experiment))
        self._check_equal_images()
        self.checkpointing = Checkpointing(experiment, run, group, fingerprints=self.splits.fingerprints)
        self.steps_per_epoch = math.ceil(len(self.splits.train_indices) / experiment.training.global_batch_size)
        self._stop_requests = StopRequests(run, group)
        self.restore()

    def _check_equal_images(self) -> None:
        """Raise `UserError` if the nodes of the workers have different images. Collective."""
        by_node = dict(self.group.all_gather((self.group.node, self.splits.fingerprints)))
        first, *others = by_node
        for other in others:
            if by_node[other] != by_node[first]:
                raise UserError(f"data.root: nodes {first} and {other} have different images; should be the same files")

    def restore(self) -> None:
        """Return to the newest checkpoint; without one, to the beginning."""
        newest = self.checkpointing.newest()
        model = self._initial_model(is_replaced=newest is not None).to(self.group.device)
        seed = stream(self.experiment.run.seed, "objective")
        objective = raise_on_all_ranks(self.group, lambda: build_objective(self.experiment.objective, seed=seed))
        self.state = TrainState.begin(self.experiment, model, objective.to(self.group.device))
        self.epochs_done = self.steps_done = 0
        self.seconds_before = 0.0
        """Training time of the epoch that has begun, before its checkpoint."""
        if newest is not None:
            self.checkpointing.restore(newest, self.state)
            self.epochs_done, self.steps_done = newest.position
            self.seconds_before = newest.metrics["seconds"] if self.steps_done else 0.0

    def roll_back(self) -> None:
        """Return to the newest checkpoint, with a smaller learning rate from there on."""
        before = self.state.progress
        self.restore()
        self.state.progress.num_nonfinite = before.num_nonfinite
        self.state.progress.lr_factor = before.lr_factor * self.experiment.training.nonfinite.lr_factor  # type: ignore[union-attr]

    def _initial_model(self, *, is_replaced: bool) -> VAE:
        """The model before the first step; without its weights where a checkpoint's replace them."""
        experiment, image_shape = self.experiment, self.splits.train.image_shape
        seed = experiment.run.seed
        build = raise_on_all_ranks
        model = build(self.group, lambda: build_vae(experiment, image_shape, seed=stream(seed, "weights")))
        if is_replaced:
            return model
        if (initialize := INITIALIZATIONS[experiment.model.initialization]) is not None:
            initialize(model, self.splits.mean_training_image(), generator(seed, "initialization"))
        loader, label = self.loader("train"), model.condition_on
        model.prior.start_at(lambda num, classes: loader.drawn(num, label, classes).cpu())
        if experiment.run.initial_weights is not None:
            model.load_state_dict(self._initial_weights(model))
        return model

    def _initial_weights(self, model: VAE) -> dict[str, torch.Tensor]:
        location = str(self.experiment.run.initial_weights)
        return self.group.broadcast(
            raise_on_all_ranks(self.group, lambda: initial_weights(location, model) if self.group.rank == 0 else {})
        )

    def loader(self, split: str) -> Loader:
        """The images of "train", "val" or "test", and which of them this worker computes."""
        return self.splits.loader(split, self.experiment, shards_of(self.group))

    def run_epoch(self, recorder: Recorder | None) -> dict[str, Any]:
        """Train the rest of the next epoch and evaluate it; its record, the same on every rank.

        Raises `RollBack`, `Diverged` or `Stopped` on all ranks.
        """
        epoch, first_step = self.epochs_done + 1, self.epochs_done * self.steps_per_epoch
        sums = TermSums(self.state.terms, self.group.device)
        if self.state.term_sums is not None:
            sums.restore(self.state.term_sums, self.group)
            self.state.term_sums = None
        seconds_before, self.seconds_before = self.seconds_before, 0.0
        # an epoch that is resumed counts as begun earlier, by the time that it had been trained
        started_at, started = time.time() - seconds_before, time.perf_counter() - seconds_before

        def after_step(num_done: int) -> None:
            self.steps_done = num_done
            self._report_progress(recorder, sums, started)
            self._save_or_stop(sums, started)

        training = self.experiment.training
        loader = self.loader("train")
        train_epoch(
            self.state,
            loader.training(epoch, global_batch_size=training.global_batch_size, first_step=self.steps_done),
            self.group,
            epoch=EpochSettings(
                seed=loader.seed,
                epoch=epoch,
                num_data=len(loader.indices),
                grad_clip=self.experiment.optim.grad_clip,
                precision=training.precision,
            ),
            step_settings=lambda index: self._step_settings(first_step + index),
            sums=sums,
            first_step=self.steps_done,
            on_nonfinite=lambda index, losses: self._nonfinite_step(loader, index, losses),
            after_step=after_step,
            computing=lambda index: self._failures_named(f"step {index + 1}"),
        )
        means, num_images = sums.reduced(self.group)  # waits for the device and for all ranks
        if num_images == 0:
            raise Diverged(
                f"epoch {epoch}: every batch was skipped, so that nothing was learned; "
                f"{advice(self.experiment, self.state, GRADIENT)}"
            )
        seconds = time.perf_counter() - started
        record = {"epoch": epoch, **labelled("train", means), **self._evaluations(epoch)}
        self._check_finite(record)
        self._note_best(record)
        self.epochs_done, self.steps_done = epoch, 0
        last = self._step_settings(epoch * self.steps_per_epoch - 1)
        return {
            **record,
            **last.objective,
            "lr": last.lr,
            "num_images": num_images,
            "num_skipped": len(loader.indices) - num_images,
            "images_per_second": len(loader.indices) / seconds,
            "seconds": seconds,
            "started_at": started_at,
        }

    def _report_progress(self, recorder: Recorder | None, sums: TermSums, started: float) -> None:
        if recorder is None or not recorder.progress_is_due():
            return
        training, num_done = self.experiment.training, self.steps_done
        recorder.progress(
            epoch=self.epochs_done + 1,
            step=num_done,
            done=(num_done / self.steps_per_epoch + self.epochs_done) / training.epochs,
            images_per_second=num_done * training.global_batch_size / (time.perf_counter() - started),
            **labelled("train", sums.means()),
        )

    def _save_or_stop(self, sums: TermSums, started: float) -> None:
        """After a step: write a checkpoint where one is due or requested; raise `Stopped` where that is requested."""
        requests = self._stop_requests.after_step()
        every = self.experiment.run.checkpoint_every_steps
        num_steps = self.epochs_done * self.steps_per_epoch + self.steps_done
        is_due = every is not None and every > 0 and num_steps % every == 0 and self.steps_done < self.steps_per_epoch
        if is_due or any(requests):
            self.state.term_sums = sums.gathered(self.group)
            if self.group.rank == 0:
                seconds = time.perf_counter() - started
                self.checkpointing.save_inside_epoch(self.state, self.epochs_done + 1, self.steps_done, seconds=seconds)
            self.state.term_sums = None
        if requests.stop:
            raise self._stopped()

    def stop_if_requested(self) -> None:
        """Raise `Stopped` between two epochs, if that is asked for."""
        if self._stop_requests.ask().stop:
            raise self._stopped()

    def _stopped(self) -> Stopped:
        done = f"epoch {self.epochs_done} of {self.experiment.training.epochs}"
        if self.steps_done:
            done = f"step {self.steps_done} of {self.steps_per_epoch} of epoch {self.epochs_done + 1}"
        return Stopped(f"stopped after {done}; continue with: vae-ray resume {self.run.location}")

    def _nonfinite_step(self, loader: Loader, index: int, losses: Losses) -> None:
        """Handle a step (0-based) whose update was not made: one of its terms, or the gradient, is not finite."""
        epoch, step = self.epochs_done + 1, index + 1
        term = nonfinite_term(losses, self.group)
        file = batch_file(self.run, epoch=epoch, step=step)
        if self.group.rank == 0:
            settings = self._step_settings(self.epochs_done * self.steps_per_epoch + index)
            size = self.experiment.training.global_batch_size
            try:
                save_batch(file, loader, self.state, epoch=epoch, step=step, global_batch_size=size, settings=settings)
            except OSError as error:
                logger.warning("%s: could not be written (%s)", file, describe_os_error(error))
        kept = self.group.broadcast(f"the batch is in {file}" if file.exists() else f"{file.parent} has earlier ones")
        what = f"epoch {epoch}, step {step} of {self.steps_per_epoch}: the {term} is not finite; {kept}"
        self._apply_policy(what, term, can_skip=True)

    def _check_finite(self, record: dict[str, Any]) -> None:
        """Apply the policy if the epoch's metrics or the state (equal on all ranks) are not finite."""
        if all(map(math.isfinite, record.values())) and self.state.is_finite():
            return
        what = (
            f"epoch {record['epoch']}: the metrics, weights or optimizer's state are not finite (training distortion "
            f"{record['train/distortion']:.4g}, rate {record['train/rate']:.4g} nats)"
        )
        self._apply_policy(what, GRADIENT, can_skip=False)

    def _apply_policy(self, what: str, term: str, *, can_skip: bool) -> None:
        returns_to = None
        if self.group.rank == 0:
            newest = all_checkpoints(self.run.checkpoints)[-1:]
            returns_to = f"checkpoint {newest[0].path.name}" if newest else "the initial weights"
        hint = advice(self.experiment, self.state, term)
        apply_policy(self.experiment, self.state, what, advice=hint, can_skip=can_skip, returns_to=returns_to)

    def _step_settings(self, step: int) -> StepSettings:
        """The settings of a step (0-based) of the run."""
        epochs, optim = self.experiment.training.epochs, self.experiment.optim
        lr = learning_rate(optim, step=step, num_steps=epochs * self.steps_per_epoch, epochs=epochs)
        return StepSettings(
            lr=self.state.progress.lr_factor * lr,
            objective=self.state.objective.settings(step / self.steps_per_epoch, step),
        )

    def _evaluations(self, epoch: int) -> dict[str, float]:
        training = self.experiment.training
        splits = ["val"] if self.splits.num_validation else []
        every = training.test_every_epochs
        if every and (epoch % every == 0 or epoch == training.epochs):
            splits.append("test")
        metrics: dict[str, float] = {}
        for split in splits:
            with self._failures_named(f"the evaluation of {split!r}"):
                metrics |= evaluate_split(
                    self.state.evaluated_model,
                    self.loader(split),
                    split,
                    self.group,
                    batch_size=training.evaluation_batch_size,
                    precision=training.precision,
                )
        return metrics

    def _failures_named(self, where: str) -> AbstractContextManager[None]:
        """In its body an error of the user's model or objective is `TrainingFailed` that names it and the line."""
        model, others = self.experiment.model, (self.experiment.likelihood.name, self.experiment.objective.name)
        own = [name for name in (model.network.name, model.prior.name, *others) if ":" in name]
        return user_code.failures_named(own, where=f"epoch {self.epochs_done + 1}, {where}")

    def _note_best(self, record: dict[str, Any]) -> None:
        progress, value = self.state.progress, record[selection_metric(self.experiment)]
        if progress.best_value is None or value < progress.best_value:
            progress.best_value, progress.best_epoch = value, record["epoch"]

    def is_finished(self) -> bool:
        """Whether all epochs are done, or the selection metric has not improved for `training.patience_epochs`."""
        training = self.experiment.training
        patience = training.patience_epochs
        has_waited = patience is not None and self.epochs_done - self.state.progress.best_epoch >= patience
        return self.epochs_done >= training.epochs or (has_waited and self.epochs_done > 0)


def initial_weights(location: str, model: VAE) -> dict[str, torch.Tensor]:
    """The weights of `run.initial_weights`, which must have the names and shapes of `model`'s; raises `UserError`."""
    checkpoint = find_checkpoint(location)
    try:
        return checkpoint.weights(model.state_dict(), averaged=checkpoint.has_averaged_weights)
    except CorruptFile as error:
        raise UserError(
            f"run.initial_weights: {error}; the model must have the network and sizes of {location}"
        ) from None
