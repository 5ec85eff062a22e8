"""What each command of the command line does: one call, and its answer as plain data. Its docstring is its help.

Light until a command runs: torch and ray are imported inside the functions.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vae_ray import signals
from vae_ray.cli.data import experiment_of
from vae_ray.cli.pictures import load_model
from vae_ray.errors import UserError

if TYPE_CHECKING:
    from vae_ray.config.experiment import Experiment
    from vae_ray.runs.results import TrainResult
    from vae_ray.tuning.summary import SweepResult


PROGRESS_SECONDS = 10.0
NUM_SHOWN = 5
"""Configurations of a sweep's answer; the others are on the leaderboard."""


def _read_experiment(options: argparse.Namespace) -> Experiment:
    """The preset or file of the command, without its overrides."""
    from vae_ray.config.experiment import Experiment, preset_names
    from vae_ray.config.user_code import check_trusted

    name = options.experiment
    looks_like_file = name.endswith((".yaml", ".yml")) or "/" in name or os.path.isfile(name)
    if os.path.isdir(name) and name not in preset_names():
        raise UserError(f"experiment {name!r}: is a directory; for images there, use images --data.root {name}")
    if name in preset_names() or not looks_like_file:
        return Experiment.preset(name)
    experiment = Experiment.from_file(name)
    check_trusted(experiment.user_code(), origin=name, trust_code=options.trust_code)
    return experiment


def _experiment(options: argparse.Namespace) -> Experiment:
    """The experiment of the command."""
    place = {"run.name": options.name, "run.storage": options.storage}
    given = {key: value for key, value in place.items() if value is not None}
    return _read_experiment(options).with_overrides({**options.overrides, **given})


def train(options: argparse.Namespace) -> dict[str, Any]:
    """train a VAE: in this process, or data-parallel on Ray workers (--workers.num N)"""
    experiment = _experiment(options)  # before torch is imported: a typing mistake is answered at once
    if options.resume and options.name is not None and (stored := _find_run(options)) is not None:
        _compare_with_stored(stored, options)
        return resume(options)  # its own experiment; only the place may differ
    if options.dry_run:
        with signals.deferred():
            from vae_ray.runs.preflight import preflight, with_absolute_paths

        experiment = with_absolute_paths(experiment)
        for line in preflight(experiment).warnings:
            sys.stderr.write(f"vae-ray: {line}\n")
        return {"experiment": experiment.to_dict()} if options.json else {"text": experiment.to_yaml()}
    with signals.deferred():
        from vae_ray.runs.train import train as run_training

    return _train_answer(run_training(experiment, resume=options.resume, quiet=False), options)


def _find_run(options: argparse.Namespace) -> Experiment | None:
    """The experiment of the run that `--name` and `--storage` mean, if there is one; its place is `options.run_dir`."""
    from vae_ray.config.experiment import Experiment
    from vae_ray.storage.locations import absolute, join_location

    with signals.deferred():
        from vae_ray.runs.train import stored_experiment

    storage = options.storage or options.overrides.get("run.storage", Experiment().run.storage)
    options.run_dir = join_location(absolute(storage, key="run.storage"), options.name)
    try:
        return stored_experiment(options.run_dir)
    except UserError:
        return None


def _compare_with_stored(stored: Experiment, options: argparse.Namespace) -> None:
    """Raise `UserError` if the run has other data than the preset or file; print in what else it differs from that."""
    from vae_ray.config.experiment import differing_fields

    named = _read_experiment(options)
    if stored.data.source != named.data.source:
        raise UserError(
            f"run.name: {options.name!r} is a run of {stored.data.source}, not of {named.data.source}; continue it "
            f"with: vae-ray resume {options.run_dir}, or choose another --name"
        )
    if differences := differing_fields(named, stored, content_only=True):
        sys.stderr.write(
            f"vae-ray: {options.name} continues as it began, unlike {options.experiment}: {'; '.join(differences)}\n"
        )


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """continue a run from its directory alone; --training.epochs N extends it"""
    with signals.deferred():
        from vae_ray.runs.train import resume as resume_run

    result = resume_run(options.run_dir, options.overrides, trust_code=options.trust_code, quiet=False)
    return _train_answer(result, options)


def _train_answer(trained: TrainResult, options: argparse.Namespace) -> dict[str, Any]:
    from vae_ray.run_files.progress import format_nats

    result = trained.to_dict()
    if options.json:
        return result
    metrics = result["metrics"]
    terms = [f"{key} {format_nats(value)}" for key, value in metrics.items() if key.endswith("/nelbo")]
    return {
        "best checkpoint": result["best_checkpoint"],
        "last checkpoint": result["last_checkpoint"],
        "images": f"{result['run_dir']}/images",
        "TensorBoard": f"tensorboard --logdir {result['run_dir']}/tensorboard",
        "nats per image": f"{', '.join(terms)}  (best epoch {result['best_epoch']} of {result['epochs']})",
        **({"stopped early": "the selection metric had not improved"} if result["stopped_early"] else {}),
        "time": f"{result['seconds']['total']:.1f} s, of which {result['seconds']['training']:.1f} s training",
        **_warnings(result["warnings"]),
    }


def _warnings(lines: Sequence[str], label: str = "warning") -> dict[str, str]:
    """Lines of an answer; each needs a label of its own."""
    return {label if number == 1 else f"{label} {number}": line for number, line in enumerate(lines, 1)}


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """try many variations of an experiment with Ray Tune and keep the best"""
    experiment = _experiment(options)
    with signals.deferred():
        from vae_ray.tuning.sweep import sweep as run_sweep

    result = run_sweep(
        experiment,
        search=options.search,
        num_trials=options.num_trials,
        repeats=options.repeats,
        evaluate=options.evaluate,
        evaluate_best=options.evaluate_best,
        max_concurrent=options.max_concurrent,
        workers_per_trial=options.workers_per_trial,
        scheduler=options.scheduler,
        searcher=options.searcher,
        metric=options.metric,
        resume=options.resume,
        quiet=False,
    )
    if not result.best:
        options.exit_code = 1
    return result.to_dict() if options.json else _readable_sweep(result)


def report(options: argparse.Namespace) -> dict[str, Any]:
    """write the HTML report of a run; of a sweep, its leaderboard and HTML report, again from its files"""
    from vae_ray.run_files.run_directory import SWEEP_FILE
    from vae_ray.storage.directory import open_directory
    from vae_ray.storage.locations import absolute

    if open_directory(absolute(options.directory, key="report"), key="report").read(SWEEP_FILE) is None:
        return _report_of_run(options)
    for key in options.overrides:
        raise UserError(f"--{key}: only the report of a run takes it; {options.directory} is a sweep")
    with signals.deferred():
        from vae_ray.tuning.sweep import rebuild_report

    result = rebuild_report(options.directory, trust_code=options.trust_code)
    return result.to_dict() if options.json else _readable_sweep(result)


def _report_of_run(options: argparse.Namespace) -> dict[str, Any]:
    with signals.deferred():
        from vae_ray.report.run_page import write_run_report

    result = write_run_report(options.directory, trust_code=options.trust_code, data=options.overrides)
    answer = result.to_dict()
    return answer if options.json else {"report": answer["report"], **_warnings(result.warnings)}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """runs, and the best trials of sweeps, side by side: a table here, --out for a page"""
    from vae_ray.storage.locations import local_path

    out = None if options.out is None else local_path(options.out, key="--out")
    if out is not None and out.suffix.lower() != ".html":
        raise UserError(f"--out: got {options.out!r}, should end in .html")
    with signals.deferred():
        from vae_ray.report.compared_runs import compared_runs
        from vae_ray.report.comparison_page import comparison, comparison_text, write_comparison

    runs = compared_runs(options.runs)
    if out is not None:
        write_comparison(runs, out)
    if options.json:
        return {**comparison(runs), "out": None if out is None else str(out)}
    return {"text": comparison_text(runs) + (f"\n\npage  {out}" if out else "")}


def _readable_sweep(result: SweepResult) -> dict[str, Any]:
    from vae_ray.evaluation.table import with_unit
    from vae_ray.run_files.progress import format_nats
    from vae_ray.tuning.metrics import without_siblings

    states = ", ".join(f"{number} {state}" for state, number in result.states.items())
    answer = {"trials": f"{result.num_trials} ({states})"}
    for row in result.configurations[:NUM_SHOWN]:
        answer[f"{'–' if row['rank'] is None else row['rank']}. {row['configuration']}"] = _of_configuration(
            row, result
        )
    answer |= _warnings(result.verdict, "verdict")
    for name, values in itertools.islice(result.evaluations.items(), NUM_SHOWN):
        shown = result.metrics if result.configurations else ()  # above, with the intervals
        keys = [key for key in without_siblings(values, result.metrics) if key not in shown]
        if keys:
            answer[f"evaluated {name}"] = "  ".join(f"{key} {with_unit(key, values[key])}" for key in keys)
    if result.best:
        settings = _settings(result.best["overrides"])
        metrics = result.best["metrics"]
        terms = [f"{key} {format_nats(value)}" for key, value in metrics.items() if key.endswith("/nelbo")]
        answer |= {
            "best trial": f"{result.best['trial']}  {settings}",
            **({"seed": str(result.best["seed"])} if "seed" in result.best else {}),
            **_ranking(result),
            "nats per image": ", ".join(terms),
            "checkpoint": result.best["checkpoint"],
            **_warnings(result.best["warnings"]),
        }
    else:
        what = "every trial failed" if result.num_failed == result.num_trials else "no trial has a rank"
        answer["best trial"] = f"none: {what}; the report says why"
    return answer | {"leaderboard": str(result.leaderboard), "report": str(result.report)}


def _ranking(result: SweepResult) -> dict[str, str]:
    """Of a metric of evaluations, the winner's value and which are better."""
    from vae_ray.evaluation.table import with_unit
    from vae_ray.tuning.metrics import better, is_evaluated

    evaluated = [metric for metric in result.metrics if is_evaluated(metric)]
    return {key: f"{with_unit(key, result.best['metrics'][key])}, {better([key])}" for key in evaluated}


def _of_configuration(row: dict[str, Any], result: SweepResult) -> str:
    """Means, intervals and values by seed of a row of the leaderboard, and what was searched."""
    from vae_ray.tuning.metrics import value_text

    parts = [] if row["state"] == "complete" else [row["state"]]
    for metric in result.metrics:
        seeds = [value for key, value in row.items() if key.startswith(f"{metric}_seed_")]
        values = " ".join(value_text(metric, value) for value in seeds)
        ends = [
            value_text(metric, row[f"{metric}_{end}"]) for end in ("low", "high") if row[f"{metric}_{end}"] is not None
        ]
        interval = f"95 % {' to '.join(ends)}, " if ends else ""
        if row[metric] is not None:
            parts.append(f"{metric} {value_text(metric, row[metric])} ({interval}by seed {values})")
    searched = result.best.get("overrides", {})
    return "  ".join([*parts, _settings({key: row[key] for key in searched})])


def _settings(overrides: Mapping[str, Any]) -> str:
    return "  ".join(f"{key}={value}" for key, value in overrides.items())


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """metrics of a whole split: likelihood, latent space, ...; kept in RUN/evaluations"""
    num_workers = _num_workers(options.overrides.pop("workers.num", "0"))
    model = load_model(options)
    from vae_ray.evaluation.store import keep, owner_of
    from vae_ray.evaluation.table import with_unit

    found = model.evaluate(
        options.split,
        options.metrics,
        num_samples=options.num_samples,
        num_images=options.num_images,
        features=options.features,
        progress=print_progress(),
        **on_ray_workers(num_workers),
    )
    owner, file = owner_of(options.checkpoint), None
    try:
        file = owner and keep(found, model.checkpoint, owner)
    except OSError as error:
        sys.stderr.write(f"vae-ray: {owner}: the evaluation could not be written there ({error.strerror})\n")
    if options.json:
        return {"checkpoint": str(model.checkpoint.path), **found.to_dict(), "file": file}
    numbers = {key: with_unit(key, value, found.standard_errors.get(key)) for key, value in found.items()}
    labels = {key: str(value) for key, value in found.labels.items()}
    return {**numbers, **labels, **_warnings(found.warnings), **({"file": file} if file else {})}


def diagnose(options: argparse.Namespace) -> dict[str, Any]:
    """what is wrong with a trained model, in plain words, and what to try"""
    model = load_model(options)
    from vae_ray.evaluation.diagnosis.evidence import history_of
    from vae_ray.evaluation.store import owner_of

    owner = owner_of(options.checkpoint)
    diagnosis = model.diagnose(history_of(owner) if owner else ())
    answer = {"checkpoint": str(model.checkpoint.path), **diagnosis.to_dict()}
    return answer if options.json else {"text": str(diagnosis)}


def _num_workers(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"--workers.num: got {text!r}, should be a whole number; 0 means in this process")
    return int(text)


def on_ray_workers(num_workers: int) -> dict[str, Any]:
    """How `TrainedVAE.evaluate` and `write_codes` run on so many Ray workers."""
    if not num_workers:
        return {}
    with signals.deferred():
        from vae_ray.distributed.evaluation import on_ray

    return {"run": on_ray(num_workers)}


def print_progress() -> Callable[[int, int], None]:
    """A function that writes a line to stderr every ten seconds."""
    last = time.monotonic()

    def report(num_done: int, num_images: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            sys.stderr.write(f"vae-ray: {num_done:,} of {num_images:,} images\n")

    return report


def encode(options: argparse.Namespace) -> dict[str, Any]:
    """codes of all images as Parquet; the same command continues where it was killed"""
    num_workers = _num_workers(options.overrides.pop("workers.num", "0"))
    model = load_model(options)
    from vae_ray.data.cache import open_dataset
    from vae_ray.run_files.progress import preparation_view

    with preparation_view(quiet=False) as progress:
        open_dataset(model.experiment.data, progress=progress)
    found = model.write_codes(
        options.codes, what=options.what, split=options.split, progress=print_progress(), **on_ray_workers(num_workers)
    )
    if options.json:
        return {"checkpoint": str(model.checkpoint.path), **found._asdict()}
    by_split = ", ".join(f"{num:,} {split}" for split, num in found.num_images.items())
    earlier = f"{found.num_found:,} of them by an earlier call"
    return {
        "codes": found.out,
        "images": f"{by_split}{f'; {earlier}' if found.num_found else ''}",
        "columns": ", ".join(found.columns),
        "checkpoint": str(model.checkpoint.path),
    }


def fit_prior(options: argparse.Namespace) -> dict[str, Any]:
    """fit a prior to the codes of the training images; generate and evaluate take it by --prior"""
    model = load_model(options)
    fitted = model.fit_prior(options.kind, components=options.components, seed=options.seed, name=options.name)
    found = fitted.record["held_out"]
    if options.json:
        return {**fitted.record, "name": fitted.name, "prior": fitted.location}
    nats = {key: f"{value:.2f} ± {found['standard_errors'][key]:.2f}" for key, value in found["nats"].items()}
    settings = ", ".join(f"{key} {value}" for key, value in fitted.record["settings"].items())
    return {
        "prior": fitted.location,
        "fit": f"{fitted.record['kind']} ({settings}) to {fitted.record['num_codes']:,} codes of training images",
        "log density": f"{nats['fitted']} nats per test image, under the model's own prior {nats['own']}",
        "gain": f"{nats['gain']} nats",
        "use it by": f"--prior {fitted.name}, of generate and evaluate",
        **_warnings(["it is worse than the model's own prior, which is to be preferred"] * (found["nats"]["gain"] < 0)),
    }


def presets(options: argparse.Namespace) -> dict[str, Any]:
    """list the experiments that ship with the package"""
    from vae_ray.config.experiment import PRESET_DIR, preset_names

    texts = {}
    for name in preset_names():
        lines = (PRESET_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        texts[name] = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    return texts


def submit(options: argparse.Namespace) -> dict[str, Any]:
    """run train, sweep, evaluate or data prepare as a job of a Ray cluster, and follow it"""
    inner = options.inner
    inner.overrides = options.overrides
    experiment = _experiment(inner) if options.job in ("train", "sweep") else None  # a mistake is answered at once
    if options.job == "data":
        experiment_of(inner)
    for setting in options.env:
        if not setting.partition("=")[0].isidentifier() or "=" not in setting:
            raise UserError(f"--env: got {setting!r}, should be KEY=VALUE")
    with signals.deferred():
        from vae_ray.cluster import submission
        from vae_ray.config.user_code import source_files
        from vae_ray.storage.locations import local_path

    workers, code = None, {}
    if experiment is None:
        for key, place, flag in _places_of(inner):
            submission.check_place(key, place, flag=flag)
        submission.check_places(options.overrides)
    else:
        submission.check_places(experiment.flat())
        workers = experiment.workers
        if options.job == "sweep":
            workers = workers.model_copy(update={"num": inner.workers_per_trial or 1})
        # a module's file, or the directory of a package
        code = {
            name.partition("/")[0]: file.parents[name.count("/")] / name.partition("/")[0]
            for name, file in source_files(experiment.user_code()).items()
        }
    given = {key: getattr(inner, key, None) for key in ("experiment", "search")}
    paths = {text: local_path(text, key=key) for key, text in given.items() if text}
    names = {text: f"submitted-{n}-{path.name}" for n, (text, path) in enumerate(paths.items()) if os.path.isfile(path)}
    arguments = [_renamed(argument, names) for argument in options.arguments]
    try:
        job = submission.submit(
            [options.job, *arguments, *(f"--{key}={value}" for key, value in options.overrides.items())],
            address=options.address,
            files={**code, **{name: paths[text] for text, name in names.items()}},
            working_dir=options.working_dir,
            workers=workers,
            environment=dict(setting.split("=", 1) for setting in options.env),
            python=options.python,
            follow=options.follow,
        )
        options.exit_code = job.command_exit_code if options.follow else 0
    except submission.Detached as detached:
        sys.stderr.write(f"vae-ray: {detached}\n")
        job, options.exit_code = detached.job, 130
    return asdict(job)


def _places_of(inner: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Arguments of `evaluate` or `data prepare` that are places: key, value, and how an example begins."""
    if inner.command == "evaluate":
        return [("CHECKPOINT", inner.checkpoint, "evaluate")]
    if inner.action != "prepare" or inner.out is None:
        raise UserError("submit: of vae-ray data a job can prepare images; for example data prepare ROOT --out OUT")
    root = [] if inner.root is None else [("ROOT", inner.root, "data prepare")]
    return [*root, ("--out", inner.out, "--out")]


def _renamed(argument: str, names: dict[str, str]) -> str:
    """The argument of the job for `PATH` or `--flag=PATH`, where a path in `names` has another name there."""
    flag, separator, value = argument.partition("=")
    return f"{flag}={names[value]}" if separator and value in names else names.get(argument, argument)


def doctor(options: argparse.Namespace) -> dict[str, Any]:
    """check a machine or cluster and report problems"""
    with signals.deferred():
        from vae_ray.cluster.doctor import examine

    diagnosis = examine(options.address, storage=options.storage, python=options.python)
    options.exit_code = 0 if diagnosis.is_healthy else 1
    return diagnosis.to_dict() if options.json else {"text": "\n".join(map(str, diagnosis.findings))}
