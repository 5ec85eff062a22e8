"""`train` and `resume`: an Experiment becomes a finished run directory.

The driver's part: everything that can be refused is refused here, before a worker starts. Then the same `fit`
runs in this process (`workers.num` 0) or in Ray Train workers, and the result is built from the run's files.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vae_ray import signals
from vae_ray.checkpoints.listing import own_checkpoint
from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.config.sections.run import NAME_PATTERN, NAME_RULE
from vae_ray.errors import CorruptFile, TrainingFailed, UserError, WorkersFailed, one_line
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.progress import ProgressView, preparation_view
from vae_ray.run_files.run_directory import SWEEP_FILE, RunDirectory
from vae_ray.runs.exclusive import as_user_error, discard_stale_results, open_run, run_location
from vae_ray.runs.memory import is_out_of_memory
from vae_ray.runs.preflight import local_device, preflight, with_absolute_paths
from vae_ray.runs.results import TrainResult, result_from, summarise
from vae_ray.storage.locations import absolute, is_uri, split_location
from vae_ray.storage.retry import describe_os_error
from vae_ray.training.checkpointing import selection_metric
from vae_ray.training.fit import fit

logger = logging.getLogger(__name__)


def train(experiment: Experiment, *, resume: bool = False, quiet: bool = True) -> TrainResult:
    """Train an experiment, in this process or on Ray workers.

    Args:
        experiment: what to train.
        resume: continue the run of that name from its newest checkpoint; a finished one is returned as it is. The
            content must be the run's own (a larger `training.epochs` extends it); the function `resume` takes it from
            the run itself.
        quiet: `False` shows progress on stderr.

    Returns:
        The result; its metrics are those of the best checkpoint, in nats per image.

    Raises:
        UserError: something the user can put right; nothing was started.
        TrainingFailed: the run started and could not finish; its last checkpoint is kept.
        Stopped: a signal, or a file `.stop` in the run's directory, ended it after a checkpoint.
    """
    started_at = time.time()
    if resume and experiment.run.name is None:
        raise UserError("run.name: --resume needs the name of a run; for example --name my-run --resume")
    with preparation_view(quiet=quiet) as progress:
        checked = preflight(with_absolute_paths(experiment), progress=progress)
    requested = checked.requested
    with open_run(requested, checked.splits, resume=resume) as run:
        if resume and (summary := run.records.summary()):
            if run.experiment().training.epochs < requested.training.epochs:
                if summary.get("stopped_early"):
                    raise UserError(
                        f"training.epochs: the run stopped early, {selection_metric(requested)} had not improved for "
                        f"{requested.training.patience_epochs} epochs (training.patience_epochs); start another run "
                        f"with --run.initial-weights {run.location}"
                    )
                _warn_of_stretched_schedule(requested)
            elif _has_intact_result(run, result := result_from(summary, run)):
                logger.warning("%s: has finished; --training.epochs N extends it", run.location)
                return result
        num_attempts = len(run.records.attempts())
        with as_user_error(run):
            discard_stale_results(run)
        for line in checked.warnings:
            logger.warning("%s", line)
        with _execution(checked.experiment) as (resolved, device, execute):
            with as_user_error(run):
                run.write_experiment(requested)
            run.push(run.experiment_file)
            images = checked.splits.dataset.describe()
            view = contextlib.nullcontext() if quiet else contextlib.closing(ProgressView(run, resolved, images=images))
            with signals.stopping(run), view:
                execute(resolved, run.location, device)
            run.pull()
            result = summarise(
                run, requested, resolved, device=device, started_at=started_at, num_attempts=num_attempts
            )
        try:
            run.records.write_summary(result.to_dict())
        except OSError as error:
            raise TrainingFailed(
                f"{run.records.summary_file}: could not be written ({describe_os_error(error)}); make room and "
                f"continue with: vae-ray resume {run.location}"
            ) from error
        run.push(run.records.summary_file)
        return result


def resume(
    location: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    trust_code: bool = False,
    quiet: bool = True,
) -> TrainResult:
    """Continue a run from its directory or URI alone.

    Args:
        location: the run's directory or URI.
        overrides: place fields (`workers.*`, `data.root`, ...) and a larger `training.epochs`, by dotted keys.
        trust_code: whether code that the run's experiment names (a user's own network, ...) may be run.
        quiet: `False` shows progress on stderr.

    Raises:
        UserError: there is no such run, or an override would change what it computes. Others as `train`.
    """
    experiment, overrides = stored_experiment(location), dict(overrides or {})
    named_again = set(map(str, overrides.values()))  # by the caller, who may
    paths = [path for path in experiment.user_code() if path not in named_again]
    user_code.check_trusted(paths, origin=str(location), trust_code=trust_code)
    resumed = experiment.with_overrides(overrides)
    if run_location(resumed) != run_location(experiment):
        raise UserError(
            f"run.name, run.storage: the run is {run_location(experiment)}; move that directory to resume it "
            f"elsewhere, or start another run with --run.initial-weights {location}"
        )
    _refuse_trials(location)
    return train(resumed, resume=True, quiet=quiet)


def stored_experiment(location: str | Path) -> Experiment:
    """The experiment of the run at a directory or URI, with its name and storage; raises `UserError`."""
    absolute_location = absolute(location, key="run")
    run = RunDirectory.at(absolute_location, role="reader")
    with run.working_copy():
        if not run.experiment_file.is_file():
            if (run.path / SWEEP_FILE).is_file():
                raise UserError(f"run {location}: is a sweep; continue it with its vae-ray sweep command and --resume")
            raise UserError(f"run {location}: there is no run, it has no {run.experiment_file.name}")
        storage, name = split_location(absolute_location)
        if re.fullmatch(NAME_PATTERN, name) is None:
            raise UserError(
                f"run {location}: {name!r} cannot be the name of a run; rename the directory to {NAME_RULE}"
            )
        return run.experiment().with_overrides({"run.storage": storage, "run.name": name})


def _refuse_trials(location: str | Path) -> None:
    """Raise `UserError` for a sweep's trial: with other epochs it would not compare with the others."""
    sweep = split_location(split_location(absolute(location, key="run"))[0])[0]
    if not is_uri(sweep) and (Path(sweep) / SWEEP_FILE).is_file():
        raise UserError(
            f"run {location}: is a trial of the sweep {sweep}; continue the sweep with its vae-ray sweep command and "
            f"--resume, or start a run from the trial's weights with --run.initial-weights {location}"
        )


def _has_intact_result(run: RunDirectory, result: TrainResult) -> bool:
    """Whether the best checkpoint of a finished run is intact; warns of a damaged one."""
    path = run.checkpoints / str(result.best_checkpoint).rpartition("/")[2]
    run.pull(path)
    try:
        own_checkpoint(path).in_memory()
    except CorruptFile as error:
        logger.warning("%s; training again from the newest intact checkpoint", error)
        return False
    return True


def _warn_of_stretched_schedule(experiment: Experiment) -> None:
    if experiment.optim.schedule.name not in ("constant", "step"):
        logger.warning(
            "optim.schedule: %s is computed over training.epochs (%d) and has decayed further in the epochs before",
            experiment.optim.schedule.name,
            experiment.training.epochs,
        )


Execute = Callable[[Experiment, str, torch.device], None]


def _fit_here(experiment: Experiment, location: str, device: torch.device) -> None:
    try:
        fit(experiment, location, SingleProcess(device))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingFailed(
            f"out of memory ({one_line(error)[:200]}); a smaller training.global_batch_size, "
            "training.evaluation_batch_size or model needs less"
        ) from error


@contextlib.contextmanager
def _execution(experiment: Experiment) -> Iterator[tuple[Experiment, torch.device, Execute]]:
    """The experiment without `auto`, the device, and the function that trains: here, or on Ray."""
    if experiment.workers.num == 0:
        yield experiment, local_device(experiment), _fit_here
        return
    from vae_ray.distributed.connection import connect  # here, because a run without workers needs no Ray
    from vae_ray.distributed.launch import fit as fit_on_ray

    def execute(e: Experiment, location: str, device: torch.device) -> None:
        try:
            fit_on_ray(e, location, device)
        except WorkersFailed as error:
            message = f"the workers could not finish: {error}; continue with: vae-ray resume {location}"
            raise TrainingFailed(message) from error

    with connect(experiment) as (resolved, device):
        yield resolved, device, execute
