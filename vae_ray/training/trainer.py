"""One worker's model, optimizer and data: restored to where the run stands, trained an epoch at a time, saved.

Everything here happens on all ranks with equal arguments, but what is said to be rank 0's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from typing import Any

import torch
from torch import Tensor

from vae_ray.checkpoints.loading import Checkpoint, Progress, all_checkpoints
from vae_ray.checkpoints.saving import NotSaved, prune_checkpoints, save_checkpoint
from vae_ray.config.experiment import Experiment
from vae_ray.data.batches import training_batches
from vae_ray.data.splits import Splits
from vae_ray.errors import Diverged, Stopped, TrainingFailed
from vae_ray.evaluation.elbo import evaluate_split
from vae_ray.evaluation.metrics import TermSums, labelled
from vae_ray.models.initialization import INITIALIZATIONS
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.vae import VAE, build_vae
from vae_ray.parallel.group import WorkerGroup, raise_on_all_ranks, shards_of
from vae_ray.run_files.recorder import NUM_RECONSTRUCTIONS, Recorder
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.seeds import generator, stream
from vae_ray.storage.retry import describe_os_error
from vae_ray.training.loop import StepSettings, train_epoch
from vae_ray.training.nonfinite import RollBack, batch_file, save_batch
from vae_ray.training.optimization import build_optimizer, learning_rate
from vae_ray.training.schedules import scheduled
from vae_ray.training.stop_requests import StopRequests

logger = logging.getLogger(__name__)


def selection_metric(experiment: Experiment) -> str:
    """The metric by which checkpoints are compared: never the loss, so that beta cannot bias it."""
    return "val/nelbo" if experiment.data.num_validation else "train/nelbo"


class Worker:
    """One worker's model, optimizer and data, restored to where the run stands."""

    def __init__(self, experiment: Experiment, run: RunDirectory, group: WorkerGroup) -> None:
        self.experiment, self.run, self.group = experiment, run, group
        self.splits = raise_on_all_ranks(group, lambda: Splits.open(experiment))
        self.likelihood = LIKELIHOODS[experiment.model.likelihood](experiment.model)
        self.model = self._new_model().to(group.device)
        self.optimizer = build_optimizer(experiment.optim, self.model.parameters())
        self.steps_per_epoch = math.ceil(len(self.splits.train_indices) / experiment.training.global_batch_size)
        self._restore()
        self.parallel = group.wrap(self.model)
        self._interruptions = StopRequests(run, group)

    def _new_model(self) -> VAE:
        seed = self.experiment.run.seed
        model = build_vae(self.experiment.model, self.splits.train.image_shape, seed=stream(seed, "weights"))
        initialise = INITIALIZATIONS[self.experiment.model.initialization]
        initialise(model, self.splits.mean_training_image(), generator(seed, "initialization"))
        return model

    def _restore(self) -> None:
        """Go to where the newest checkpoint is; without one, to the beginning."""
        self.epochs_done = self.steps_done = 0
        self.progress = Progress()
        self._seconds_before = 0.0
        """Training time of the epoch that has begun, before its checkpoint."""
        if (newest := self._newest_checkpoint()) is not None:
            self.progress = newest.load_into(self.model, self.optimizer)
            self.epochs_done, self.steps_done = newest.position
            if self.steps_done:
                self._seconds_before = newest.metrics["seconds"]

    def roll_back(self) -> None:
        """Go back to the newest checkpoint, with a smaller learning rate from there on."""
        num_nonfinite, lr_factor = self.progress.num_nonfinite, self.progress.lr_factor
        self.model.load_state_dict(self._new_model().state_dict())
        self.optimizer.state.clear()
        self._restore()
        lr_factor *= self.experiment.training.rollback_lr_factor
        self.progress = self.progress._replace(num_nonfinite=num_nonfinite, lr_factor=lr_factor)

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint as rank 0 read it; the others must not decide for themselves, nor see the storage."""

        def read() -> Checkpoint | None:
            if self.group.rank != 0 or not (found := all_checkpoints(self.run.checkpoints)):
                return None
            self.run.pull(found[-1].path)
            return found[-1].verify()

        return self.group.broadcast(raise_on_all_ranks(self.group, read))

    def record_attempt(self) -> None:
        """Write down who computes from where on, for people; on rank 0, others return."""
        who = self.group.all_gather((self.group.node, os.getpid()))
        if self.group.rank == 0:
            try:
                self.run.append_attempt(
                    started_at=time.time(),
                    num_workers=self.group.size,
                    nodes=[node for node, _ in who],
                    pids=[pid for _, pid in who],
                    epochs_done=self.epochs_done,
                    steps_done=self.steps_done,
                )
            except OSError as error:
                logger.warning("%s: could not be written (%s)", self.run.attempts_file, describe_os_error(error))

    def recorder(self) -> Recorder:
        """The recorder of what this worker is about to compute; rank 0 only."""
        images = self.splits.test.pixels[:NUM_RECONSTRUCTIONS].float() / 255
        return Recorder(
            self.run, self.experiment, self.likelihood, first_epoch=self.epochs_done + 1, test_images=images
        )

    def run_epoch(self, recorder: Recorder | None) -> dict[str, Any]:
        """Train what is left of the next epoch and evaluate it; its line of metrics, the same on every rank."""
        training, epoch, steps_before = self.experiment.training, self.epochs_done + 1, self.steps_done
        sums, first_step = TermSums(self.group.device), self.epochs_done * self.steps_per_epoch
        if self.progress.term_sums is not None:
            sums.restore(self.progress.term_sums, self.group)
            self.progress = self.progress._replace(term_sums=None)
        seconds_before, self._seconds_before = self._seconds_before, 0.0
        # an epoch that is taken up again counts as begun so much earlier as it had been trained
        started_at, started = time.time() - seconds_before, time.perf_counter() - seconds_before

        def after_step(num_done: int) -> None:
            self.steps_done = num_done
            if recorder is not None and recorder.progress_is_due():
                rate = num_done * training.global_batch_size / (time.perf_counter() - started)
                done = (num_done + first_step) / (training.epochs * self.steps_per_epoch)
                terms = labelled("train", sums.means())
                recorder.progress(epoch=epoch, step=num_done, done=done, images_per_second=rate, **terms)
            interruption = self._interruptions.after_step()
            is_due = self._checkpoint_is_due(first_step + num_done) and num_done < self.steps_per_epoch
            if is_due or any(interruption):
                self.save_inside_epoch(sums.gathered(self.group), seconds=time.perf_counter() - started)
            if interruption.stop:
                raise self._stopped()

        train_epoch(
            self.parallel,
            training_batches(
                self.splits.train.pixels,
                self.splits.train_indices,
                seed=self.experiment.run.seed,
                epoch=epoch,
                global_batch_size=training.global_batch_size,
                latent_dim=self.experiment.model.latent_dim,
                shards=shards_of(self.group),
                first_step=steps_before,
            ),
            self.optimizer,
            likelihood=self.likelihood,
            settings=lambda index: self._settings(first_step + index),
            sums=sums,
            grad_clip=self.experiment.optim.grad_clip,
            precision=training.precision,
            first_step=steps_before,
            on_nonfinite=self._nonfinite_step,
            after_step=after_step,
        )
        means = sums.reduced(self.group)  # waits for the device and for all ranks
        seconds = time.perf_counter() - started
        evaluations = self._evaluations(epoch)
        if not self._weights_are_finite() or not all(map(math.isfinite, [*means.values(), *evaluations.values()])):
            self._nonfinite(
                f"epoch {epoch}: the metrics or the weights are not finite (training distortion "
                f"{means['distortion']:.4g}, rate {means['rate']:.4g} nats)",
                can_skip=False,
            )
        last = self._settings(first_step + self.steps_per_epoch - 1)
        self.epochs_done, self.steps_done = epoch, 0
        return {
            "epoch": epoch,
            **labelled("train", means),
            **evaluations,
            "beta": last.beta,
            "lr": last.lr,
            "images_per_second": len(self.splits.train_indices) / seconds,
            "seconds": seconds,
            "started_at": started_at,
        }

    def _nonfinite_step(self, index: int) -> None:
        """Deal with a step (0-based) whose update was not made, because its loss or gradient is not finite."""
        epoch, step = self.epochs_done + 1, index + 1
        file = batch_file(self.run, epoch=epoch, step=step)
        if self.group.rank == 0:
            settings = self._settings(self.epochs_done * self.steps_per_epoch + index)
            try:
                save_batch(file, self.experiment, self.splits, epoch=epoch, step=step, settings=settings)
            except OSError as error:
                logger.warning("%s: could not be written (%s)", file, describe_os_error(error))
        self._nonfinite(
            f"epoch {epoch}, step {step} of {self.steps_per_epoch}: the loss or its gradient is not finite; "
            f"the batch is in {file}",
            can_skip=True,
        )

    def _nonfinite(self, what: str, *, can_skip: bool) -> None:
        """Return if the batch is to be skipped, else raise `RollBack` or `Diverged`; the same on all ranks."""
        training, num_before = self.experiment.training, self.progress.num_nonfinite
        policy = training.nonfinite if can_skip or training.nonfinite == "rollback" else "stop"
        advice = "try a smaller --optim.lr or --optim.grad-clip 100"
        if policy == "stop":
            raise Diverged(f"{what}; {advice}")
        if num_before >= training.nonfinite_limit:
            raise Diverged(f"{what}; {num_before} times before (training.nonfinite_limit); {advice}")
        self.progress = self.progress._replace(num_nonfinite=num_before + 1)
        if self.group.rank == 0:
            done = "skipped" if policy == "skip" else "going back to the last checkpoint with a smaller learning rate"
            logger.warning("%s: %s (%d of at most %d times)", what, done, num_before + 1, training.nonfinite_limit)
        if policy == "rollback":
            raise RollBack

    def stop_if_requested(self) -> None:
        """Raise `Stopped` between two epochs, if somebody wants that."""
        if self._interruptions.raise_on_all_ranks().stop:
            raise self._stopped()

    def _stopped(self) -> Stopped:
        done = f"epoch {self.epochs_done} of {self.experiment.training.epochs}"
        if self.steps_done:
            done = f"step {self.steps_done} of {self.steps_per_epoch} of epoch {self.epochs_done + 1}"
        return Stopped(f"stopped after {done}; go on with --resume --name {self.experiment.run.name}")

    def _checkpoint_is_due(self, num_steps: int) -> bool:
        every = self.experiment.run.checkpoint_every_steps
        return bool(every and num_steps % every == 0)

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())  # equal on all ranks

    def _settings(self, step: int) -> StepSettings:
        num_steps = self.experiment.training.epochs * self.steps_per_epoch
        objective = self.experiment.objective
        return StepSettings(
            lr=self.progress.lr_factor * learning_rate(self.experiment.optim, step=step, num_steps=num_steps),
            beta=scheduled(objective.beta, objective.beta_schedule, step=step, num_steps=num_steps),
        )

    def _evaluations(self, epoch: int) -> dict[str, float]:
        metrics = self._evaluate("val") if self.experiment.data.num_validation else {}
        every = self.experiment.training.test_every_epochs
        if every and (epoch % every == 0 or epoch == self.experiment.training.epochs):
            metrics |= self._evaluate("test")
        return metrics

    def _evaluate(self, split: str) -> dict[str, float]:
        return evaluate_split(self.model, self.experiment, self.splits, split, self.group)

    def save(self, line: dict[str, Any]) -> None:
        """Write the checkpoint of the epoch that has just ended; rank 0 only.

        Raises `TrainingFailed` if that is impossible for the last one; before it, it warns and training goes on.
        """
        metrics = {key: value for key, value in line.items() if key != "epoch"}
        try:
            self._save(self.epochs_done, None, metrics, self.progress)
        except NotSaved as error:
            if self.epochs_done == self.experiment.training.epochs:
                raise TrainingFailed(f"{error}; the run has ended: make room and go on with --resume") from error
            logger.warning("%s; training goes on, the checkpoint before it is intact", error)

    def save_inside_epoch(self, term_sums: Tensor, *, seconds: float) -> None:
        """Write a checkpoint inside the epoch that has begun, or warn; on rank 0, others return.

        Not of weights that are not finite: the next step would say so, and nobody could go on from there.
        """
        if self.group.rank == 0 and self._weights_are_finite():
            progress = self.progress._replace(term_sums=term_sums.cpu())
            try:
                self._save(self.epochs_done + 1, self.steps_done, {"seconds": seconds}, progress)
            except NotSaved as error:
                logger.warning("%s; the checkpoint before it is intact", error)

    def _save(self, epoch: int, step: int | None, metrics: dict[str, float], progress: Progress) -> None:
        """Write a checkpoint, then prune."""
        save_checkpoint(
            self.run.checkpoints,
            epoch=epoch,
            step=step,
            model=self.model,
            optimizer=self.optimizer,
            experiment=self.experiment,
            metrics=metrics,
            selection_metric=selection_metric(self.experiment),
            progress=progress,
        )
        self.prune()

    def prune(self) -> None:
        """Delete the checkpoints that are no longer kept, also those that a kill left undeleted; rank 0 only."""
        with contextlib.suppress(OSError):  # the storage has just gone away: next time
            prune_checkpoints(self.run.checkpoints, num_best=self.experiment.run.checkpoints_kept)
        self.run.push_soon()
