"""The command line: arguments in, one call, one answer out. No logic, and light until a command runs.

Exit codes: 0 done, 1 failed, 2 a mistake that the user can put right (one line on stderr), 130 interrupted. With
`--json` stdout carries exactly one JSON object; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vae_ray.errors import TrainingFailed, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vae_ray.config import Experiment
    from vae_ray.trained import TrainedVAE
    from vae_ray.tuning.conclusion import SweepResult


FLAGS = {
    "train": ("--name", "--storage", "--resume", "--dry-run", "--json", "--help"),
    "sweep": (
        *("--name", "--storage", "--resume", "--json", "--help", "--search", "--num-trials", "--max-concurrent"),
        *("--workers-per-trial", "--scheduler", "--searcher", "--metric"),
    ),
}
"""Commands that take the Experiment's keys, with their own flags; for `did you mean`."""
DESCRIPTION = "Train variational autoencoders on Ray: on a laptop, in local processes and on a cluster."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        overrides, rest = _take_overrides(arguments)
        options = _parse(rest)
        if overrides and options.command not in FLAGS:
            raise UserError(f"--{next(iter(overrides))}: only {' and '.join(FLAGS)} take the Experiment's keys")
        options.overrides = overrides
        # libraries print to stdout as they please; ours is for the answer alone
        with contextlib.redirect_stdout(sys.stderr):
            answer = options.run(options)
    except UserError as error:
        return _fail(error, code=2)
    except TrainingFailed as error:
        return _fail(error, code=1)
    except KeyboardInterrupt:
        return _fail("interrupted; go on with --resume and the same --name", code=130)
    print(json.dumps(answer, indent=2) if options.json else _readable(answer))
    return int(options.exit_code)


def _fail(error: Exception | str, *, code: int) -> int:
    print("vae-ray: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _take_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split `--section.field VALUE` and `--section.field=VALUE` from the other arguments."""
    overrides: dict[str, str] = {}
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        match = re.fullmatch(r"--([A-Za-z_][\w-]*\.[\w.-]*)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        key, value = match.groups()
        value = next(remaining, None) if value is None else value
        if value is None:
            raise UserError(f"--{key}: needs a value")
        overrides[key] = value
    return overrides, rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="vae-ray", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], dict[str, Any]], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawTextHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
        sub.set_defaults(run=run, exit_code=0)
        return sub

    def with_experiment(sub: argparse.ArgumentParser, *, what: str) -> None:
        sub.add_argument("experiment", metavar="PRESET|FILE.yaml", help="a preset's name or an experiment file")
        sub.add_argument("--name", help=f"the {what}'s directory inside the storage (run.name)")
        sub.add_argument("--storage", metavar="DIR", help="the directory of all runs (run.storage)")
        sub.add_argument("--resume", action="store_true", help=f"go on with the {what} of that name")
        if arguments[:1] == [what.replace("run", "train")] and {"-h", "--help"} & set(arguments):
            sub.epilog = _field_help()

    train = command("train", _train, "train a VAE; with Ray workers, or in this process with --workers.num 0")
    with_experiment(train, what="run")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the experiment, start nothing")

    sweep = command("sweep", _sweep, "try many variations of an experiment with Ray Tune and keep the best")
    with_experiment(sweep, what="sweep")
    sweep.add_argument("--search", metavar="FILE|NAME", help="what to vary: a YAML file, default, beta or optimization")
    sweep.add_argument("--num-trials", type=int, metavar="N", help="how many variations (default 16; grid: all)")
    sweep.add_argument("--max-concurrent", type=int, metavar="N", help="trials at once (default: what resources allow)")
    sweep.add_argument(
        "--workers-per-trial", type=int, metavar="N", help="data-parallel workers of each trial (default 1)"
    )
    sweep.add_argument("--scheduler", metavar="NAME", help="asha stops bad trials early (default), none, or pbt")
    sweep.add_argument("--searcher", default="random", metavar="NAME", help="random (default), grid or optuna")
    sweep.add_argument(
        "--metric",
        default="val/nelbo",
        help="what trials are compared by; two for a Pareto front, as in\nval/distortion,val/rate (default val/nelbo)",
    )

    report = command("report", _report, "write a sweep's leaderboard and HTML report again from its files")
    report.add_argument("sweep_dir", metavar="SWEEP_DIR", help="the sweep's directory")

    def with_model(sub: argparse.ArgumentParser, *, out: bool = True) -> None:
        sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run directory for its best one")
        if out:
            sub.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="where to write the picture")

    generate = command("generate", _generate, "new images, decoded from z ~ N(0, I)")
    with_model(generate)
    generate.add_argument("--num", type=int, default=64, help="how many (default 64)")
    generate.add_argument("--seed", type=int, default=0, help="seed of z (default 0)")

    reconstruct = command("reconstruct", _reconstruct, "test images and their reconstructions")
    with_model(reconstruct)
    reconstruct.add_argument("--num", type=int, default=32, help="how many (default 32)")

    interpolate = command("interpolate", _interpolate, "paths in latent space between pairs of test images")
    with_model(interpolate)
    interpolate.add_argument("--steps", type=int, default=10, help="images along a path, ends included (default 10)")
    interpolate.add_argument("--method", default="linear", help="linear or spherical (default linear)")
    interpolate.add_argument("--num", type=int, default=8, help="how many pairs (default 8)")

    traverse = command("traverse", _traverse, "what each latent dimension does to an image")
    with_model(traverse)
    traverse.add_argument("--steps", type=int, default=11, help="images along a dimension (default 11)")
    traverse.add_argument("--num", type=int, default=10, help="dimensions, most informative first (default 10)")

    evaluate = command("evaluate", _evaluate, "exact metrics of a whole split, in nats")
    with_model(evaluate, out=False)
    evaluate.add_argument("--split", default="test", choices=("train", "val", "test"), help="default test")

    command("presets", _presets, "list the experiments that ship with the package")

    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_unknown(unknown[0], flags=FLAGS.get(options.command))
    return options


def _refuse_unknown(argument: str, *, flags: Sequence[str] | None) -> NoReturn:
    from vae_ray.config import Experiment

    near = difflib.get_close_matches(argument, flags or (), n=1, cutoff=0.75)
    if near:
        raise UserError(f"argument {argument!r} is not known; did you mean {near[0]!r}?")
    if flags and argument.startswith("--"):
        Experiment().with_overrides({argument[2:].partition("=")[0]: ""})  # names the nearest key
    raise UserError(f"argument {argument!r} is not known; see vae-ray --help")


def _field_help() -> str:
    from vae_ray.config import field_docs

    lines = ["the Experiment's keys, as --SECTION.FIELD VALUE (presets set some of them):"]
    for key, type_name, default, description in field_docs():
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "null" if default is None else shown
        lines.append(f"  --{key.replace('_', '-')} {type_name}\n      {description} [{shown}]")
    return "\n".join(lines)


def _readable(answer: dict[str, Any]) -> str:
    text = answer.get("text")
    if isinstance(text, str):
        return text.rstrip()
    width = max(map(len, answer), default=0)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in answer.items())


def _experiment(options: argparse.Namespace) -> Experiment:
    from vae_ray.config import Experiment, preset_names

    name = options.experiment
    looks_like_file = name.endswith((".yaml", ".yml")) or "/" in name or os.path.isfile(name)
    if name in preset_names() or not looks_like_file:
        experiment = Experiment.preset(name)
    else:
        experiment = Experiment.from_file(name)
    given = {"run.name": options.name, "run.storage": options.storage}
    return experiment.with_overrides(
        {**options.overrides, **{key: value for key, value in given.items() if value is not None}}
    )


def _train(options: argparse.Namespace) -> dict[str, Any]:
    experiment = _experiment(options)  # before torch is imported: a typing mistake is answered at once
    from vae_ray.runs import preflight, resolved, train

    if options.dry_run:
        experiment = resolved(experiment)
        preflight(experiment)
        return {"experiment": experiment.to_dict()} if options.json else {"text": experiment.to_yaml()}
    result = train(experiment, resume=options.resume, quiet=False).to_dict()
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
        "time": f"{result['seconds']['total']:.1f} s, of which {result['seconds']['training']:.1f} s training",
    }


def _sweep(options: argparse.Namespace) -> dict[str, Any]:
    experiment = _experiment(options)
    from vae_ray.tuning.sweep import sweep

    result = sweep(
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


def _report(options: argparse.Namespace) -> dict[str, Any]:
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
    from vae_ray.trained import TrainedVAE

    return TrainedVAE.load(options.checkpoint)


def _write(picture: Image, options: argparse.Namespace, model: TrainedVAE) -> dict[str, Any]:
    from vae_ray.artifacts.image_grids import png_bytes

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


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    from vae_ray.artifacts.image_grids import square_grid

    model = _load(options)
    images = model.generate(options.num, seed=options.seed)
    return _write(square_grid(images, title=_title(model, "samples, z ~ N(0, I)")), options, model)


def _test_images(model: TrainedVAE, num: int) -> Any:
    if num < 1:
        raise UserError(f"--num: got {num}, should be at least 1")
    return model.test_images(num)


def _reconstruct(options: argparse.Namespace) -> dict[str, Any]:
    from vae_ray.artifacts.image_grids import pairs_grid

    model = _load(options)
    images = _test_images(model, options.num)
    title = _title(model, "test images, z = posterior mean")
    return _write(pairs_grid(images, model.reconstruct(images), title=title), options, model)


def _interpolate(options: argparse.Namespace) -> dict[str, Any]:
    from vae_ray.artifacts.image_grids import grid

    model = _load(options)
    images = _test_images(model, 2 * options.num)
    start, end = images[0::2], images[1::2]
    paths = model.interpolate(start[: len(end)], end, steps=options.steps, method=options.method)
    title = _title(model, f"{options.method} interpolation between pairs of test images")
    return _write(grid(list(paths), title=title), options, model)


def _traverse(options: argparse.Namespace) -> dict[str, Any]:
    from vae_ray.artifacts.image_grids import grid

    model = _load(options)
    if options.num < 1:
        raise UserError(f"--num: got {options.num}, should be at least 1")
    traversal = model.traverse(model.test_images(1000), num_dimensions=options.num, steps=options.steps)
    title = _title(model, "one latent dimension at a time, -3 to 3")
    return _write(grid(list(traversal.images), title=title, row_labels=traversal.row_labels()), options, model)


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    model = _load(options)
    metrics = model.evaluate(options.split)
    labels = model.labels(options.split)
    if options.json:
        return {"checkpoint": str(model.checkpoint.path), "metrics": metrics, "labels": labels}
    numbers = {key: f"{value:.3f} nats" for key, value in metrics.items()}
    return {**numbers, **{key: str(value) for key, value in labels.items()}}


def _presets(options: argparse.Namespace) -> dict[str, Any]:
    from vae_ray.config import PRESET_DIR, preset_names

    texts = {}
    for name in preset_names():
        lines = (PRESET_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        texts[name] = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    return texts
