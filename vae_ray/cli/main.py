"""The command line: arguments in, one of `commands`, one answer out. Light until a command runs.

Exit codes: 0 done, 1 failed, 2 a mistake that the user can put right (one line on stderr), 130 interrupted. With
`--json` stdout carries exactly one JSON object; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vae_ray import signals
from vae_ray.cli import commands
from vae_ray.errors import Stopped, TrainingFailed, UserError, one_line

FLAGS = {
    "train": ("--name", "--storage", "--resume", "--dry-run", "--trust-code", "--json", "--help"),
    "resume": ("--trust-code", "--json", "--help"),
    "sweep": (
        *(
            "--name",
            "--storage",
            "--resume",
            "--trust-code",
            "--json",
            "--help",
            "--search",
            "--num-trials",
            "--max-concurrent",
        ),
        *("--max-concurrent", "--workers-per-trial", "--scheduler", "--searcher", "--metric"),
    ),
}
"""Commands that take the Experiment's keys, with their own flags; for `did you mean`."""
AXES = "likelihood|objective"
"""Sections that are an axis: `--likelihood gaussian` is short for `--likelihood.name gaussian`."""
DESCRIPTION = "Train variational autoencoders on Ray: on a laptop, in local processes and on a cluster."


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """A process of this command line: `main`, after whose answer a late signal changes the exit code no more."""
    code = main(argv)
    for each in signals.SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        overrides, rest = _take_overrides(arguments)
        options = _parse(rest)
        takes_overrides = options.job if options.command == "submit" else options.command
        if overrides and takes_overrides not in FLAGS:
            raise UserError(f"--{next(iter(overrides))}: only {', '.join(FLAGS)} take the Experiment's keys")
        options.overrides = overrides
        # libraries print to stdout as they please; ours is for the answer alone
        with contextlib.redirect_stdout(sys.stderr), signals.sigterm_as_ctrl_c():
            answer = options.run(options)
    except UserError as error:
        return _fail(error, code=2)
    except TrainingFailed as error:
        return _fail(error, code=1)
    except Stopped as error:
        return _fail(error, code=130)
    except KeyboardInterrupt:
        return _fail(
            "interrupted; continue with: vae-ray resume RUN (sweeps: the same command with --resume)", code=130
        )
    print(json.dumps(answer, indent=2) if options.json else _readable(answer))
    return int(options.exit_code)


def _fail(error: Exception | str, *, code: int) -> int:
    print("vae-ray: " + one_line(error), file=sys.stderr)
    return code


def _take_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split `--section.field VALUE`, `--section.field=VALUE` and `--likelihood NAME` from the other arguments."""
    overrides: dict[str, str] = {}
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        match = re.fullmatch(rf"--([A-Za-z_][\w-]*\.[\w.-]*|{AXES})(?:=(.*))?", argument, re.DOTALL)
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


Command = Callable[..., argparse.ArgumentParser]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="vae-ray", description=DESCRIPTION, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], dict[str, Any]], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            run.__name__,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawTextHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
        sub.set_defaults(run=run, exit_code=0)
        if run.__name__ in FLAGS and arguments[:1] == [run.__name__] and {"-h", "--help"} & set(arguments):
            sub.epilog = _field_help()
        return sub

    _add_train(command)
    _add_resume(command)
    _add_sweep(command)
    _add_model_commands(command)
    _add_cluster_commands(command)
    command(commands.presets, "list the experiments that ship with the package")
    options, unknown = parser.parse_known_args(arguments)
    if options.command == "submit":
        options.arguments, options.inner = unknown, _parse([options.job, *unknown])
        return options
    if unknown:
        _refuse_unknown(unknown[0], flags=FLAGS.get(options.command))
    return options


def _with_experiment(sub: argparse.ArgumentParser, *, what: str) -> argparse.ArgumentParser:
    sub.add_argument("experiment", metavar="PRESET|FILE.yaml", help="a preset's name or an experiment file")
    sub.add_argument("--name", help=f"the {what}'s directory inside the storage (run.name)")
    sub.add_argument("--storage", metavar="DIR", help="the directory of all runs (run.storage)")
    sub.add_argument("--resume", action="store_true", help=f"continue the {what} of that name")
    _with_trust(sub)
    return sub


def _with_trust(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--trust-code", action="store_true", help="run code that a file which is read names (MODULE:NAME)")


def _add_train(command: Command) -> None:
    train = command(commands.train, "train a VAE: in this process, or data-parallel on Ray workers (--workers.num N)")
    _with_experiment(train, what="run")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the experiment, start nothing")


def _add_resume(command: Command) -> None:
    resume = command(commands.resume, "continue a run from its directory alone; --training.epochs N extends it")
    resume.add_argument("run_dir", metavar="RUN", help="the run's directory or URI")
    _with_trust(resume)


def _add_sweep(command: Command) -> None:
    sweep = command(commands.sweep, "try many variations of an experiment with Ray Tune and keep the best")
    _with_experiment(sweep, what="sweep")
    sweep.add_argument("--search", metavar="FILE|NAME", help="what to vary: a YAML file, default, beta or optimization")
    for flag, text in {
        "--num-trials": "how many variations (default 16; grid: all)",
        "--max-concurrent": "trials at once (default: what resources allow)",
        "--workers-per-trial": "data-parallel workers of each trial (default 1)",
    }.items():
        sweep.add_argument(flag, type=int, metavar="N", help=text)
    sweep.add_argument("--scheduler", metavar="NAME", help="asha stops bad trials early (default), none, or pbt")
    sweep.add_argument("--searcher", default="random", metavar="NAME", help="random (default), grid or optuna")
    sweep.add_argument(
        "--metric",
        default="val/nelbo",
        help="what trials are compared by; two for a Pareto front, as in\nval/distortion,val/rate (default val/nelbo)",
    )
    report = command(commands.report, "write a sweep's leaderboard and HTML report again from its files")
    report.add_argument("sweep_dir", metavar="SWEEP_DIR", help="the sweep's directory")


def _with_model(sub: argparse.ArgumentParser, *, out: bool = True) -> argparse.ArgumentParser:
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the directory of a run or a sweep")
    _with_trust(sub)
    if out:
        sub.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="where to write the picture")
    return sub


def _add_model_commands(command: Command) -> None:
    generate = _with_model(command(commands.generate, "new images, decoded from z ~ N(0, I)"))
    generate.add_argument("--num", type=int, default=64, help="how many (default 64)")
    generate.add_argument("--seed", type=int, default=0, help="seed of z (default 0)")

    reconstruct = _with_model(command(commands.reconstruct, "test images and their reconstructions"))
    reconstruct.add_argument("--num", type=int, default=32, help="how many (default 32)")

    interpolate = _with_model(command(commands.interpolate, "paths in latent space between pairs of test images"))
    interpolate.add_argument("--steps", type=int, default=10, help="images along a path, ends included (default 10)")
    interpolate.add_argument("--method", default="linear", help="linear or spherical (default linear)")
    interpolate.add_argument("--num", type=int, default=8, help="how many pairs (default 8)")

    traverse = _with_model(command(commands.traverse, "what each latent dimension does to an image"))
    traverse.add_argument("--steps", type=int, default=11, help="images along a dimension (default 11)")
    traverse.add_argument("--num", type=int, default=10, help="dimensions, most informative first (default 10)")

    evaluate = _with_model(command(commands.evaluate, "exact metrics of a whole split, in nats"), out=False)
    evaluate.add_argument("--split", default="test", choices=("train", "val", "test"), help="default test")


def _add_cluster_commands(command: Command) -> None:
    submit = command(commands.submit, "run train, sweep or evaluate as a job of a Ray cluster, and follow it")
    submit.usage = "vae-ray submit {train,sweep,evaluate} ARGUMENT ... [--address URL] [--no-follow] [...]"
    submit.add_argument(
        "job", choices=("train", "sweep", "evaluate"), help="the command, followed by its own arguments"
    )
    submit.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the log on stderr until the job ends and exit with its code (default), or return at once",
    )
    submit.add_argument("--working-dir", type=Path, metavar="DIR", help="a directory that the job runs in a copy of")
    submit.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="an environment variable of the job; repeatable"
    )
    doctor = command(commands.doctor, "check a machine or cluster and report problems")
    doctor.add_argument(
        "--storage", metavar="DIR|URI", help="where runs would be stored (default for this machine: runs)"
    )
    addresses = {
        submit: "the cluster's dashboard, http://HOST:8265 (default $RAY_ADDRESS, else this machine's)",
        doctor: "the cluster's dashboard, http://HOST:8265, or auto on its head node\n"
        "(default $RAY_ADDRESS, else this machine is examined)",
    }
    for sub, text in addresses.items():
        sub.add_argument("--address", metavar="ADDRESS", help=text)
        sub.add_argument("--python", default="python", metavar="COMMAND", help="the cluster's Python (default python)")


def _refuse_unknown(argument: str, *, flags: Sequence[str] | None) -> NoReturn:
    from vae_ray.config.experiment import Experiment

    near = difflib.get_close_matches(argument, flags or (), n=1, cutoff=0.75)
    if near:
        raise UserError(f"argument {argument!r} is not known; did you mean {near[0]!r}?")
    if flags and argument.startswith("--"):
        Experiment().with_overrides({argument[2:].partition("=")[0]: ""})  # names the nearest key
    raise UserError(f"argument {argument!r} is not known; see vae-ray --help")


def _field_help() -> str:
    from vae_ray.config.experiment import field_docs

    lines = ["the Experiment's keys, as --SECTION.FIELD VALUE (presets set some of them):"]
    for doc in field_docs():
        shown = ",".join(map(str, doc.default)) if isinstance(doc.default, tuple) else doc.default
        shown = "null" if doc.default is None else shown
        of_entry = f"{doc.entry}: " if doc.entry else ""
        lines.append(f"  --{doc.key.replace('_', '-')} {doc.type}\n      {of_entry}{doc.description} [{shown}]")
    return "\n".join(lines)


def _readable(answer: dict[str, Any]) -> str:
    text = answer.get("text")
    if isinstance(text, str):
        return text.rstrip()
    width = max(map(len, answer), default=0)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in answer.items())
