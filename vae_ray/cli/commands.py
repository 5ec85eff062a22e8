"""What each command of the command line does: one call, and its answer as plain data.

Light until a command runs: torch and ray are imported inside the functions.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_ray.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vae_ray.config.experiment import Experiment
    from vae_ray.inference import TrainedVAE
    from vae_ray.runs.results import TrainResult
    from vae_ray.tuning.summary import SweepResult


def _experiment(options: argparse.Namespace) -> Experiment:
    from vae_ray.config.experiment import Experiment, preset_names
    from vae_ray.config.user_code import check_trusted

    name = options.experiment
    looks_like_file = name.endswith((".yaml", ".yml")) or "/" in name or os.path.isfile(name)
    if name in preset_names() or not looks_like_file:
        experiment = Experiment.preset(name)
    else:
        experiment = Experiment.from_file(name)
        check_trusted(experiment.user_code(), origin=name, trust_code=options.trust_code)
    given = {"run.name": options.name, "run.storage": options.storage}
    return experiment.with_overrides(
        {**options.overrides, **{key: value for key, value in given.items() if value is not None}}
    )


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train; with `--dry-run` only check."""
    if options.resume and options.name is not None and (location := _existing_run(options)) is not None:
        options.run_dir = location  # its own experiment; of what is given only the place may differ
        return resume(options)
    experiment = _experiment(options)  # before torch is imported: a typing mistake is answered at once
    if options.dry_run:
        from vae_ray.runs.preflight import preflight, with_absolute_paths

        experiment = with_absolute_paths(experiment)
        preflight(experiment)
        return {"experiment": experiment.to_dict()} if options.json else {"text": experiment.to_yaml()}
    from vae_ray.runs.train import train as run_training

    return _train_answer(run_training(experiment, resume=options.resume, quiet=False), options)


def _existing_run(options: argparse.Namespace) -> str | None:
    """The location of the run that `--name` and `--storage` mean; None if there is no run yet."""
    from vae_ray.config.experiment import Experiment
    from vae_ray.run_files.run_directory import RunDirectory
    from vae_ray.storage.locations import absolute, is_uri, join_location

    storage = options.storage or options.overrides.get("run.storage", Experiment().run.storage)
    location = join_location(absolute(storage), options.name)
    if is_uri(location):
        run = RunDirectory.at(location, role="reader")
        return location if run.mirror is not None and run.mirror.remote.read(run.experiment_file.name) else None
    return location if RunDirectory(Path(location)).experiment_file.is_file() else None


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """Continue a run from its directory."""
    from vae_ray.runs.train import resume as resume_run

    result = resume_run(options.run_dir, options.overrides, trust_code=options.trust_code, quiet=False)
    return _train_answer(result, options)


def _train_answer(trained: TrainResult, options: argparse.Namespace) -> dict[str, Any]:
    result = trained.to_dict()
    if options.json:
        return result
    metrics = result["metrics"]
    terms = [f"{key} {value:.2f}" for key, value in metrics.items() if key.endswith("/nelbo")]
    return {
        "best checkpoint": result["best_checkpoint"],
        "last checkpoint": result["last_checkpoint"],
        "images": f"{result['run_dir']}/images",
        "TensorBoard": f"tensorboard --logdir {result['run_dir']}/tensorboard",
        "nats per image": f"{', '.join(terms)}  (best epoch {result['best_epoch']} of {result['epochs']})",
        **({"stopped early": "the selection metric had not improved"} if result["stopped_early"] else {}),
        "time": f"{result['seconds']['total']:.1f} s, of which {result['seconds']['training']:.1f} s training",
    }


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """Try many variations of an experiment."""
    experiment = _experiment(options)
    from vae_ray.tuning.sweep import sweep as run_sweep

    result = run_sweep(
        experiment,
        search=options.search,
        num_trials=options.num_trials,
        max_concurrent=options.max_concurrent,
        workers_per_trial=options.workers_per_trial,
        scheduler=options.scheduler,
        searcher=options.searcher,
        metric=options.metric,
        resume=options.resume,
        quiet=False,
    )
    if result.num_failed == result.num_trials:
        options.exit_code = 1
    return result.to_dict() if options.json else _readable_sweep(result)


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Write a sweep's leaderboard and report again."""
    from vae_ray.tuning.sweep import rebuild_report

    result = rebuild_report(options.sweep_dir)
    return result.to_dict() if options.json else _readable_sweep(result)


def _readable_sweep(result: SweepResult) -> dict[str, Any]:
    states = ", ".join(f"{number} {state}" for state, number in result.states.items())
    answer = {"trials": f"{result.num_trials} ({states})"}
    if result.best:
        settings = "  ".join(f"{key}={value}" for key, value in result.best["overrides"].items())
        terms = [f"{key} {value:.2f}" for key, value in result.best["metrics"].items() if key.endswith("/nelbo")]
        answer |= {
            "best trial": f"{result.best['trial']}  {settings}",
            "nats per image": ", ".join(terms),
            "checkpoint": result.best["checkpoint"],
        }
    else:
        answer["best trial"] = "none: every trial failed; the report says why"
    return answer | {"leaderboard": str(result.leaderboard), "report": str(result.report)}


def _load(options: argparse.Namespace) -> TrainedVAE:
    from vae_ray.inference import TrainedVAE

    return TrainedVAE.load(options.checkpoint, trust_code=options.trust_code)


def _write(picture: Image, options: argparse.Namespace, model: TrainedVAE) -> dict[str, Any]:
    from vae_ray.run_files.image_grids import png_bytes

    try:
        options.out.write_bytes(png_bytes(picture))
    except OSError as error:
        raise UserError(f"--out: got {str(options.out)!r}, cannot be written ({error.strerror})") from None
    return {
        "out": str(options.out),
        "checkpoint": str(model.checkpoint.path),
        "epoch": model.checkpoint.epoch,
    }


def _title(model: TrainedVAE, what: str) -> str:
    return f"{model.experiment.data.source} · {what} · epoch {model.checkpoint.epoch}"


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """New images."""
    from vae_ray.run_files.image_grids import square_grid

    model = _load(options)
    images = model.generate(options.num, seed=options.seed)
    return _write(square_grid(images, title=_title(model, "samples, z ~ N(0, I)")), options, model)


def _test_images(model: TrainedVAE, num: int) -> Any:
    if num < 1:
        raise UserError(f"--num: got {num}, should be at least 1")
    return model.test_images(num)


def reconstruct(options: argparse.Namespace) -> dict[str, Any]:
    """Test images beside their reconstructions."""
    from vae_ray.run_files.image_grids import pairs_grid

    model = _load(options)
    images = _test_images(model, options.num)
    title = _title(model, "test images, z = posterior mean")
    return _write(pairs_grid(images, model.reconstruct(images), title=title), options, model)


def interpolate(options: argparse.Namespace) -> dict[str, Any]:
    """Paths between test images."""
    from vae_ray.run_files.image_grids import grid

    model = _load(options)
    images = _test_images(model, 2 * options.num)
    start, end = images[0::2], images[1::2]
    paths = model.interpolate(start[: len(end)], end, steps=options.steps, method=options.method)
    title = _title(model, f"{options.method} interpolation between pairs of test images")
    return _write(grid(list(paths), title=title), options, model)


def traverse(options: argparse.Namespace) -> dict[str, Any]:
    """What each latent dimension does."""
    from vae_ray.run_files.image_grids import grid

    model = _load(options)
    if options.num < 1:
        raise UserError(f"--num: got {options.num}, should be at least 1")
    traversal = model.traverse(model.test_images(1000), num_dimensions=options.num, steps=options.steps)
    title = _title(model, "one latent dimension at a time, -3 to 3")
    return _write(grid(list(traversal.images), title=title, row_labels=traversal.row_labels()), options, model)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Exact metrics of a whole split."""
    model = _load(options)
    metrics = model.evaluate(options.split)
    labels = model.labels(options.split)
    if options.json:
        return {"checkpoint": str(model.checkpoint.path), "metrics": metrics, "labels": labels}
    numbers = {key: f"{value:.3f} nats" for key, value in metrics.items()}
    return {**numbers, **{key: str(value) for key, value in labels.items()}}


def presets(options: argparse.Namespace) -> dict[str, Any]:
    """The experiments that ship with the package."""
    from vae_ray.config.experiment import PRESET_DIR, preset_names

    texts = {}
    for name in preset_names():
        lines = (PRESET_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        texts[name] = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    return texts


def submit(options: argparse.Namespace) -> dict[str, Any]:
    """Run another command as a job of a cluster."""
    inner = options.inner
    inner.overrides = options.overrides
    experiment = None if options.job == "evaluate" else _experiment(inner)  # a typing mistake is answered at once
    environment = _environment(options.env)
    from vae_ray.cluster import submission
    from vae_ray.cluster.upload import collect
    from vae_ray.config.user_code import source_files

    workers = None
    if experiment is None:
        submission.check_place("CHECKPOINT", inner.checkpoint, flag="evaluate")
    else:
        submission.check_places(experiment)
        workers = experiment.workers
        if options.job == "sweep":
            workers = workers.model_copy(update={"num": inner.workers_per_trial or 1})
    given = (getattr(inner, "experiment", None), getattr(inner, "search", None))
    files = [path for path in given if path is not None and os.path.isfile(path)]
    named = {f"submitted/{number}-{Path(path).name}": Path(path) for number, path in enumerate(files, start=1)}
    names = {str(path): name for name, path in named.items()}
    if experiment is not None:
        named |= source_files(experiment.user_code())
    arguments = [_renamed(argument, names) for argument in options.arguments]
    try:
        job = submission.submit(
            [options.job, *arguments, *(f"--{key}={value}" for key, value in options.overrides.items())],
            address=options.address,
            upload=collect(working_dir=options.working_dir, named=named),
            workers=workers,
            environment=environment,
            python=options.python,
            follow=options.follow,
        )
    except submission.Detached as detached:
        sys.stderr.write(f"vae-ray: {detached}\n")
        job = detached.job
        options.exit_code = 130
    else:
        options.exit_code = job.command_exit_code if options.follow else 0
    return job.to_dict()


def _environment(settings: list[str]) -> dict[str, str]:
    for setting in settings:
        if not setting.partition("=")[0].isidentifier() or "=" not in setting:
            raise UserError(f"--env: got {setting!r}, should be KEY=VALUE")
    return dict(setting.split("=", 1) for setting in settings)


def _renamed(argument: str, names: dict[str, str]) -> str:
    flag, separator, value = argument.partition("=")
    if argument in names:
        return names[argument]
    return f"{flag}={names[value]}" if separator and value in names else argument


def doctor(options: argparse.Namespace) -> dict[str, Any]:
    """What a machine or a cluster can run."""
    from vae_ray.cluster.doctor import examine

    diagnosis = examine(options.address, storage=options.storage, python=options.python)
    options.exit_code = 0 if diagnosis.is_healthy else 1
    return diagnosis.to_dict() if options.json else {"text": "\n".join(map(str, diagnosis.findings))}
