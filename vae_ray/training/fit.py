"""What one worker does from start to end: data, model, resume, epochs, records and checkpoints.

The same function runs in this process (`workers.num` 0), in every Ray Train worker and in every trial. It is a
function of the experiment and of the worker's place in its group; it does not know Ray.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vae_ray.artifacts.recorder import NUM_RECONSTRUCTIONS, Recorder
from vae_ray.artifacts.run_directory import RunDirectory
from vae_ray.config import Experiment
from vae_ray.data.batches import training_batches
from vae_ray.data.splits import Splits
from vae_ray.errors import Diverged
from vae_ray.likelihoods import LIKELIHOODS
from vae_ray.models.initialization import INITIALIZATIONS
from vae_ray.models.vae import VAE, build_vae
from vae_ray.schedules import scheduled
from vae_ray.seeds import generator, stream
from vae_ray.training.checkpoints import (
    Checkpoint,
    checkpoint_name,
    complete_checkpoints,
    prune_checkpoints,
    save_checkpoint,
)
from vae_ray.training.damage import set_aside_damaged
from vae_ray.training.evaluation import evaluate_split
from vae_ray.training.group import WorkerGroup, shards_of
from vae_ray.training.host import tuned_host
from vae_ray.training.loop import StepSettings, train_epoch
from vae_ray.training.metrics import TermSums, labelled
from vae_ray.training.optimization import build_optimizer, learning_rate


def selection_metric(experiment: Experiment) -> str:
    """The metric by which checkpoints are compared: never the loss, so that beta cannot bias it."""
    return "val/nelbo" if experiment.data.num_validation else "train/nelbo"


class EpochResult(NamedTuple):
    """What one epoch has come to; the same on every rank."""

    line: dict[str, Any]
    """The epoch's line of `metrics.jsonl`."""
    checkpoint: Path
    """Directory of the epoch's checkpoint, which rank 0 has written and synced."""


def fit(experiment: Experiment, location: str | Path, group: WorkerGroup) -> None:
    """Train to the experiment's last epoch: all of `fit_epochs`."""
    for _ in fit_epochs(experiment, location, group):
        pass


def fit_epochs(experiment: Experiment, location: str | Path, group: WorkerGroup) -> Generator[EpochResult, None, None]:
    """Train epoch by epoch, going on from the run's newest complete checkpoint; yields after each epoch.

    All ranks iterate with equal arguments. Rank 0 writes; the others only compute. Whoever stops early closes the
    generator: that ends the run's files properly and lets go of its directory, and a later call goes on from there.
    """
    run = RunDirectory.at(location, role="writer")
    with contextlib.ExitStack() as stack:
        stack.enter_context(tuned_host(num_threads=experiment.workers.cpus))
        if group.rank == 0:
            stack.enter_context(run.open_for_writing())
            set_aside_damaged(run)
        worker = _Worker(experiment, run, group)
        recorder = stack.enter_context(worker.recorder()) if group.rank == 0 else None
        for epoch in range(worker.epochs_done + 1, experiment.training.epochs + 1):
            line = worker.run_epoch(epoch, recorder)
            if recorder is not None:
                recorder.epoch(line, worker.model)
                worker.save(epoch, line)
                run.publish_soon()
            yield EpochResult(line, run.checkpoints / checkpoint_name(epoch))


class _Worker:
    """One worker's model, optimizer and data, restored to where the run stands."""

    def __init__(self, experiment: Experiment, run: RunDirectory, group: WorkerGroup) -> None:
        self.experiment, self.run, self.group = experiment, run, group
        self.splits = Splits.open(experiment)
        self.likelihood = LIKELIHOODS[experiment.model.likelihood](experiment.model)
        self.model = self._new_model().to(group.device)
        self.optimizer = build_optimizer(experiment.optim, self.model.parameters())
        self.steps_per_epoch = math.ceil(len(self.splits.train_indices) / experiment.training.global_batch_size)
        self.epochs_done = 0
        if (newest := self._newest_checkpoint()) is not None:
            newest.load_into(self.model, self.optimizer)
            self.epochs_done = newest.epoch
        self.parallel = group.wrap(self.model)

    def _new_model(self) -> VAE:
        seed = self.experiment.run.seed
        model = build_vae(self.experiment.model, self.splits.train.image_shape, seed=stream(seed, "weights"))
        initialise = INITIALIZATIONS[self.experiment.model.initialization]
        initialise(model, self.splits.mean_training_image(), generator(seed, "initialization"))
        return model

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that rank 0 sees as newest; the others must not decide for themselves."""
        found = complete_checkpoints(self.run.checkpoints) if self.group.rank == 0 else []
        epoch = torch.tensor([float(found[-1].epoch if found else 0)], device=self.group.device)
        newest = int(self.group.sum(epoch).item())
        by_epoch = {checkpoint.epoch: checkpoint for checkpoint in complete_checkpoints(self.run.checkpoints)}
        return by_epoch[newest] if newest else None

    def recorder(self) -> Recorder:
        images = self.splits.test.pixels[:NUM_RECONSTRUCTIONS].float() / 255
        return Recorder(
            self.run, self.experiment, self.likelihood, first_epoch=self.epochs_done + 1, test_images=images
        )

    def run_epoch(self, epoch: int, recorder: Recorder | None) -> dict[str, Any]:
        """Train and evaluate one epoch; its line of metrics, the same on every rank."""
        training, first_step = self.experiment.training, (epoch - 1) * self.steps_per_epoch
        sums = TermSums(self.group.device)
        started_at, started = time.time(), time.perf_counter()

        def after_step(num_done: int) -> None:
            if recorder is not None and recorder.progress_is_due():
                rate = num_done * training.global_batch_size / (time.perf_counter() - started)
                done = (num_done + first_step) / (training.epochs * self.steps_per_epoch)
                recorder.progress(epoch=epoch, done=done, images_per_second=rate, **labelled("train", sums.means()))

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
            ),
            self.optimizer,
            likelihood=self.likelihood,
            settings=lambda index: self._settings(first_step + index),
            sums=sums,
            grad_clip=self.experiment.optim.grad_clip,
            precision=training.precision,
            after_step=after_step,
        )
        means = sums.reduced(self.group)  # waits for the device and for all ranks
        seconds = time.perf_counter() - started
        evaluations = self._evaluations(epoch)
        weights_are_finite = all(bool(torch.isfinite(p).all()) for p in self.model.parameters())  # equal on all ranks
        if not weights_are_finite or not all(map(math.isfinite, [*means.values(), *evaluations.values()])):
            raise Diverged(
                f"epoch {epoch}: the loss or the weights are not finite (training distortion "
                f"{means['distortion']:.4g}, rate {means['rate']:.4g} nats); try a smaller --optim.lr "
                "or --optim.grad-clip 100"
            )
        last = self._settings(first_step + self.steps_per_epoch - 1)
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

    def _settings(self, step: int) -> StepSettings:
        num_steps = self.experiment.training.epochs * self.steps_per_epoch
        objective = self.experiment.objective
        return StepSettings(
            lr=learning_rate(self.experiment.optim, step=step, num_steps=num_steps),
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

    def save(self, epoch: int, line: dict[str, Any]) -> None:
        """Write the epoch's checkpoint and delete those that are no longer kept; rank 0 only."""
        save_checkpoint(
            self.run.checkpoints,
            epoch=epoch,
            model=self.model,
            optimizer=self.optimizer,
            experiment=self.experiment,
            metrics={key: value for key, value in line.items() if key != "epoch"},
            selection_metric=selection_metric(self.experiment),
        )
        prune_checkpoints(self.run.checkpoints, num_best=self.experiment.run.checkpoints_kept)
