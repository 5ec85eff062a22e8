"""`reproduce`: the stages of an entry become kept outcomes; what earlier calls finished is not done again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from vae_ray.errors import TrainingFailed
from vae_ray.evaluation.observations import Progress, Run, no_progress, observe_here
from vae_ray.machine import cpu_model, num_local_cpus
from vae_ray.reproduction.measurement import Measured, is_finished, measure, placed
from vae_ray.reproduction.outcome import Outcome, keep_outcome, obtain
from vae_ray.reproduction.registry import Entry, Stage
from vae_ray.runs.results import versions


def num_unfinished(entry: Entry, stages: Sequence[Stage], seeds: Sequence[int], place: Mapping[str, Any]) -> int:
    """How many runs of the stages still need training or an evaluation."""
    runs = [(stage, run, seed) for stage in stages for run in entry.runs for seed in seeds]
    return sum(not is_finished(placed(entry.experiment(*each), place), each[0]) for each in runs)


def reproduce(
    entry: Entry,
    stages: Sequence[Stage],
    seeds: Sequence[int],
    *,
    place: Mapping[str, Any],
    results: str,
    progress: Progress = no_progress,
    run: Run = observe_here,
) -> list[Outcome]:
    """Train, evaluate and compare each stage, and keep its outcome in the directory or URI `results`.

    Args:
        entry: of the registry.
        stages: of the entry, in their order.
        seeds: values of `run.seed`; each makes all runs of the entry.
        place: overrides of place fields, as `{"data.root": "/data", "run.storage": ...}`.
        results: where outcomes are kept.
        progress: of evaluations.
        run: who evaluates: this process, or Ray workers.

    Raises:
        UserError: a run's directory is of another experiment, or what `train` and `evaluate` refuse.
        TrainingFailed, Stopped: as `train`; the same call continues.
    """
    outcomes = []
    for stage in stages:
        by_seed = []
        for seed in seeds:
            experiments = {name: placed(entry.experiment(stage, name, seed), place) for name in entry.runs}
            by_seed.append(
                {name: measure(each, stage, progress=progress, run=run) for name, each in experiments.items()}
            )
        outcome = _outcome(entry, stage, list(seeds), by_seed)
        try:
            keep_outcome(outcome, entry, results)
        except OSError as error:
            raise TrainingFailed(
                f"{results}: the result could not be written ({error.strerror}); make room, and repeat the command: "
                "it trains and evaluates nothing again"
            ) from None
        outcomes.append(outcome)
    return outcomes


def _outcome(entry: Entry, stage: Stage, seeds: list[int], by_seed: Sequence[Mapping[str, Measured]]) -> Outcome:
    number = entry.stages.index(stage) + 1
    options = [f"--stages {number}"] * (len(entry.stages) > 1) + [f"--seeds {len(seeds)}"] * (len(seeds) > 1)
    of_first = by_seed[0].items()
    epochs = entry.experiment(stage, next(iter(entry.runs)), seeds[0]).training.epochs
    installed = versions()
    return Outcome(
        entry=entry.name,
        stage=number,
        seeds=seeds,
        obtained=[obtain(target, by_seed) for target in stage.targets],
        labels={f"{run} {split}".strip(): labels for run, each in of_first for split, labels in each.labels.items()},
        warnings=[f"{run}: {line}" if run else line for run, each in of_first for line in each.warnings],
        training_seconds=sum(each.training_seconds(epochs) for runs in by_seed for each in runs.values()),
        command=" ".join(["vae-ray reproduce", entry.name, *options]),
        machine={
            "cpu": cpu_model(),
            "cores": num_local_cpus(),
            **{name: installed[name] for name in ("python", "torch", "vae_ray")},
        },
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )
