"""The command line: arguments in, one of `commands`, one answer out. Light until a command runs.

Exit codes: 0 done, 1 failed, 2 a mistake that the user can put right (one line on stderr), 130 interrupted. With
`--json` stdout carries exactly one JSON object; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from vae_ray import signals
from vae_ray.cli import commands, data, pictures, reproduction
from vae_ray.errors import Stopped, TrainingFailed, UserError, one_line

INTERRUPTED = 130
READER_IS_GONE = 128 + signal.SIGPIPE
"""The exit code that a shell shows for a process whose output has no reader any more, as in `| head -1`."""
AXES = "likelihood|objective"
"""Sections that are an axis: `--likelihood gaussian` is short for `--likelihood.name gaussian`."""
NOT_REPEATED = {"data": "decodes no image", "encode": "encodes no image", "reproduce": "trains no finished run"}
"""What an interrupted command does not do again when it is repeated."""
DESCRIPTION = "Train variational autoencoders on Ray: on a laptop, in local processes and on a cluster."


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """A process of this command line: `main`; after its answer a late signal does not change the exit code."""
    _read_and_write_any_text()
    code = main(argv)
    for each in signals.SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    try:
        sys.stderr.flush()
    except OSError:  # it has no reader any more; the interpreter's own flush would change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    if code == INTERRUPTED:
        # A KeyboardInterrupt that passes through exec(), as in an import that defines a dataclass, makes the
        # interpreter kill itself by SIGINT at its end, although we caught it.
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def _read_and_write_any_text() -> None:
    """Have every character of arguments and file names read, and printed if need be as an escape.

    Where LC_ALL=C and PYTHONUTF8=0 make ASCII the encoding of file names, this process starts again in UTF-8.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable:
        os.environ["PYTHONUTF8"] = "1"  # of Ray's processes too
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for name in ("stdout", "stderr"):
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:  # it was closed before this process began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)


CONTINUE = {
    "data": "the same command, which decodes no image again",
    "encode": "the same command, which encodes no image again",
    "reproduce": "the same command, which trains no finished run again",
    "sweep": "the same command with --resume; before a trial has begun, without",
}
"""What a command that was interrupted is continued by."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_working_directory()
        overrides, rest = _take_overrides(arguments)
        options = _parse(rest)
        command = options.job if options.command == "submit" else options.command
        for key in overrides:
            if command == "data" and not key.startswith("data."):
                raise UserError(f"--{key}: vae-ray data takes the keys --data.KEY, as in --data.image-size 64")
            if command not in (*OVERRIDABLE, "data", "reproduce") and not (
                command in READ_IMAGES and (key.startswith("data.") or (command in ON_WORKERS and key == "workers.num"))
            ):
                raise UserError(
                    f"--{key}: only {', '.join(OVERRIDABLE)} take the Experiment's keys, and {', '.join(READ_IMAGES)} "
                    "those that say where images are: --data.root, --data.cache-dir, --data.download"
                )
        options.overrides = overrides
        # libraries print to stdout as they please; ours is for the answer alone
        with contextlib.redirect_stdout(sys.stderr), signals.all_as_ctrl_c():
            answer = options.run(options)
    except UserError as error:
        return _fail(error, code=2)
    except TrainingFailed as error:
        return _fail(error, code=1)
    except Stopped as error:
        return _fail(error, code=INTERRUPTED)
    except KeyboardInterrupt:
        remedy = CONTINUE.get((arguments or [""])[0], "vae-ray resume RUN; before a run has begun, the same command")
        return _fail(f"interrupted; continue with: {remedy}", code=INTERRUPTED)
    return _print(json.dumps(answer, indent=2) if options.json else _readable(answer)) or int(options.exit_code)


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory was deleted; cd to another one") from None


def _print(text: str) -> int:
    """Print to stdout; 0, or the exit code where that is not possible."""
    try:
        print(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush
        return READER_IS_GONE if isinstance(error, BrokenPipeError) else _fail(f"stdout: {error.strerror}", code=1)
    return 0


def _fail(error: Exception | str, *, code: int) -> int:
    with contextlib.suppress(OSError):  # the terminal is gone
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


def _count(text: str) -> int:
    """The type of an argument that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, should be a whole number, at least 1")
    return int(text)


def _days(text: str) -> int:
    """The type of an argument that is at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, should be a whole number, at least 0")
    return int(text)


Arguments = Mapping[str, Mapping[str, Any]]
"""Flags and positional arguments, with the arguments of `add_argument`."""


def _text(text: str, metavar: str | None = None, **others: Any) -> dict[str, Any]:
    return {"help": text, "metavar": metavar, **others}


def _flag(text: str) -> dict[str, Any]:
    return {"help": text, "action": "store_true"}


def _number(text: str, default: int | None = None) -> dict[str, Any]:
    suffix = "" if default is None else f" (default {default})"
    return {"help": text + suffix, "metavar": "N", "type": _count, "default": default}


TRUST: Arguments = {"--trust-code": _flag("run code that a file which is read names (MODULE:NAME)")}
EXPERIMENT: Arguments = {
    "experiment": _text("a preset's name or an experiment file", "PRESET|FILE.yaml"),
    "--name": _text("the directory of the run or sweep inside the storage (run.name)"),
    "--storage": _text("the directory of all runs (run.storage)", "DIR"),
    "--resume": _flag("continue the run or sweep of that name; start it if there is none"),
    **TRUST,
}
MODEL: Arguments = {"checkpoint": _text("a checkpoint, or the directory of a run or a sweep", "CHECKPOINT"), **TRUST}
LABEL: Arguments = {"--label": _text("the class, or its name, of all images of a conditional VAE", "LABEL")}
PRIOR: Arguments = {"--prior": _text("a prior of fit-prior, by its name, instead of the model's own", "NAME")}
IMAGES: Arguments = {
    "--images": _text(
        "your own images of the model's size instead of test images: a directory of pictures,\na .npy or a .npz file",
        "DIR|FILE",
    ),
    **LABEL,
}
PICTURE: Arguments = {**MODEL, "--out": _text("where to write the picture", "FILE.png", required=True)}
CLUSTER: Arguments = {
    "--address": _text(
        "the cluster's dashboard, http://HOST:8265, or auto on its head node (default $RAY_ADDRESS;\n"
        "without it submit uses this machine's dashboard, and doctor examines this machine)"
    ),
    "--python": _text("the cluster's Python (default python)", "COMMAND", default="python"),
}
COMMANDS: Mapping[Callable[[argparse.Namespace], dict[str, Any]], Arguments] = {
    commands.train: {**EXPERIMENT, "--dry-run": _flag("check everything, print the experiment, start nothing")},
    commands.resume: {"run_dir": _text("the run's directory or URI", "RUN"), **TRUST},
    commands.sweep: {
        **EXPERIMENT,
        "--search": _text("what to vary: a YAML file, default, beta or optimization", "FILE|NAME"),
        "--num-trials": _number("how many configurations (default 16; grid: all)"),
        "--repeats": _number("seeds of each configuration, which is ranked by its mean", 1),
        "--max-concurrent": _number("trials at once (default: what resources allow)"),
        "--workers-per-trial": _number("data-parallel workers of each trial (default 1)"),
        "--scheduler": _text("asha stops bad trials early (default), none (with --repeats), or pbt", "NAME"),
        "--searcher": _text("random (default), grid or optuna", "NAME", default="random"),
        "--metric": _text(
            "what trials are compared by; two for a Pareto front, as in\nval/distortion,val/rate; or one of `vae-ray "
            "evaluate`, as val/mig_locatello (default val/nelbo)",
            default="val/nelbo",
        ),
        "--evaluate": _text(
            "metrics of `vae-ray evaluate` that the best trials are evaluated by at the end,\nas nll,active-units: "
            "columns of the leaderboard",
            "METRICS",
        ),
        "--evaluate-best": _number("how many of the best configurations are evaluated", 5),
    },
    commands.report: {"directory": _text("the directory or URI of a run or a sweep", "DIRECTORY"), **TRUST},
    commands.compare: {
        "runs": _text("directories or URIs of runs and sweeps", "RUN", nargs="+"),
        "--out": _text("where to write the page", "FILE.html"),
    },
    reproduction.reproduce: {
        "name": _text("an entry of the list", "NAME", nargs="?"),
        "--stages": _text("parts of a long training, as in 6 or 1..6 (default: the last, all of it)", "N|N,N|N..N"),
        "--seeds": _number("how many seeds, 0, 1, ..., one after the other (default 1)"),
        "--storage": _text("the directory of all runs; they are in DIR/reproductions (default runs)", "DIR"),
        "--results": _text("where results are kept as JSON (default: STORAGE/reproductions)", "DIR"),
        "--page": _text("write a page of all entries and kept results", "FILE.md"),
        "--dry-run": _flag("check everything, print cost and experiments, start nothing"),
    },
    pictures.generate: {
        **PICTURE,
        "--num": _number("how many", 64),
        "--seed": _text("seed of z (default 0)", type=int, default=0),
        "--temperature": _text("factor of the prior's standard deviation (default 1)", type=float, default=1.0),
        **LABEL,
        **PRIOR,
    },
    pictures.reconstruct: {**PICTURE, **IMAGES, "--num": _number("how many", 32)},
    pictures.interpolate: {
        **PICTURE,
        **IMAGES,
        "--steps": _number("images along a path, ends included", 10),
        "--method": _text("linear or spherical (default linear)", default="linear"),
        "--num": _number("how many pairs", 8),
    },
    pictures.traverse: {
        **PICTURE,
        **IMAGES,
        "--steps": _number("images along a dimension", 11),
        "--num": _number("dimensions, most informative first", 10),
    },
    commands.evaluate: {
        **MODEL,
        "--split": _text("default test", default="test", choices=("train", "val", "test")),
        "--metrics": _text(
            "names with commas, or all: elbo, nll, active-units, rates, aggregated-posterior,\n"
            "reconstruction, fid, kid, precision-recall, representation, disentanglement\n"
            "(default elbo,active-units,rates)",
            "NAMES",
            default="elbo,active-units,rates",
        ),
        "--num-samples": _number("samples of z for each image, of nll", 5000),
        "--features": _text(
            "what fid, kid and precision-recall compare images by: classifier (default; trained here on\n"
            "the labels), torchvision:NETWORK:FILE with weights in safetensors, or package.module:function",
            "SPACE",
            default="classifier",
        ),
        "--num-images": _number("only the first so many images of the split"),
        **PRIOR,
    },
    commands.encode: {
        **MODEL,
        "--out": _text(
            "one file if it ends in .parquet, else a directory of them", "FILE.parquet|DIR", dest="codes", required=True
        ),
        "--what": _text(
            "code: the posterior mean (default), or a sample z by the run's seed; all: the mean,\n"
            "and the columns logvar, z and rate",
            default="mean",
            choices=("mean", "sample", "all"),
        ),
        "--split": _text("default all", default="all", choices=("train", "val", "test", "all")),
    },
    commands.fit_prior: {
        **MODEL,
        "--kind": _text("mixture (of diagonal Gaussians) or flow", choices=("mixture", "flow"), required=True),
        "--components": _number("Gaussians of a mixture (default: as suits codes held out, 1 to 100)"),
        "--seed": _text("seed of the fit (default 0)", type=int, default=0),
        "--name": _text("to use it by (default: the kind)", "NAME"),
    },
    commands.diagnose: MODEL,
    data.data: {
        "action": _text(
            "show: a contact sheet, numbers, and what is wrong with which file\n"
            "prepare: decode once, for runs anywhere: train with --data.root OUT\n"
            "clean: delete prepared images that are not used from the cache",
            "show|prepare|clean",
            choices=("show", "prepare", "clean"),
        ),
        "root": _text("a folder of images, a .zip or .tar of it, arrays, Parquet files (data.root)", "ROOT", nargs="?"),
        "--out": _text("of show: the file of the contact sheet, FILE.png; of prepare: a new directory or URI", "OUT"),
        "--unused-days": _text(
            f"of clean: days since the last use; 0 deletes all (default {data.UNUSED_DAYS})", "N", type=_days
        ),
    },
    commands.submit: {
        "job": _text("the command, followed by its own arguments", choices=("train", "sweep", "evaluate", "data")),
        "--follow": _text(
            "show the log on stderr until the job ends and exit with its code (default), or return at once",
            action=argparse.BooleanOptionalAction,
            default=True,
        ),
        "--working-dir": _text("a directory that the job runs in a copy of", "DIR"),
        "--env": _text("a variable of the job's environment; repeatable", "KEY=VALUE", action="append", default=[]),
        **CLUSTER,
    },
    commands.doctor: {
        "--storage": _text("where runs would be stored (default for this machine: runs)", "DIR|URI"),
        **CLUSTER,
    },
    commands.presets: {},
}
"""The arguments of each command; its docstring is its help."""
OVERRIDABLE = ("train", "resume", "sweep")
"""The commands that take all of the Experiment's keys."""
READ_IMAGES = ("reconstruct", "interpolate", "traverse", "evaluate", "diagnose", "encode", "report", "fit-prior")
"""The commands that read the images of a trained model's run, which may lie elsewhere now."""
ON_WORKERS = ("evaluate", "encode")
"""Those of them that take --workers.num."""


def _name(command: Callable[[argparse.Namespace], dict[str, Any]]) -> str:
    return command.__name__.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def print_help(self, file: object = None) -> NoReturn:
        raise SystemExit(_print(self.format_help().rstrip()))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="vae-ray", description=DESCRIPTION, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, command_arguments in COMMANDS.items():
        name, text, style = _name(command), command.__doc__, argparse.RawTextHelpFormatter
        sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=style)
        sub.set_defaults(run=command, exit_code=0)
        sub.add_argument("--json", **_flag("print exactly one JSON object on stdout"))
        for argument, settings in command_arguments.items():
            sub.add_argument(argument, **settings)
        if name == "submit":
            sub.usage = "vae-ray submit {train,sweep,evaluate,data} ARGUMENT ... [--address URL] [--no-follow] [...]"
        if name in OVERRIDABLE and arguments[:1] == [name] and {"-h", "--help"} & set(arguments):
            sub.epilog = _field_help()
        if name == "reproduce":
            sub.epilog = "where and by whom: --data.root DIR, --workers.num N, ... Exit code 1: outside of a tolerance"
        if name in READ_IMAGES:
            sub.epilog = "where the run's images are now: --data.root DIR, --data.cache-dir DIR, --data.download BOOL"
            sub.epilog += "\non Ray workers: --workers.num N (default 0: in this process)" * (name in ON_WORKERS)
    names = [_name(command) for command in COMMANDS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        from vae_ray.config.keys import did_you_mean

        raise UserError(f"command {arguments[0]!r} does not exist; {did_you_mean(arguments[0], names)}")
    options, unknown = parser.parse_known_args(arguments)
    if options.command == "submit":
        options.arguments, options.inner = unknown, _parse([options.job, *unknown])
    elif unknown:
        _refuse_unknown(unknown[0], options)
    return options


def _refuse_unknown(argument: str, options: argparse.Namespace) -> NoReturn:
    """Raise `UserError` with the nearest of the command's flags or, where it takes them, of the Experiment's keys."""
    from vae_ray.config.experiment import Experiment

    flag = argument.partition("=")[0]
    if options.command in ("train", "sweep") and os.path.exists(argument):
        raise UserError(f"argument {argument!r} does not exist; for images there, use --data.root {argument}")
    if near := difflib.get_close_matches(flag, COMMANDS[options.run], n=1, cutoff=0.75):
        raise UserError(f"argument {argument!r} does not exist; did you mean {near[0]!r}?")
    if owners := [_name(command) for command, arguments in COMMANDS.items() if flag in arguments]:
        raise UserError(f"argument {argument!r} is not one of {options.command}; {', '.join(owners)} has it")
    if options.command in (*OVERRIDABLE, "data") and argument.startswith("--"):
        Experiment().with_overrides({flag[2:]: ""})  # names the nearest key
    raise UserError(f"argument {argument!r} does not exist; see vae-ray --help")


def _field_help() -> str:
    from vae_ray.config.experiment import field_docs

    lines = ["the Experiment's keys, as --SECTION.FIELD VALUE (presets set some of them):"]
    for doc in field_docs():
        default = "null" if doc.default is None else doc.default
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        of_entry = f"{doc.entry}: " if doc.entry else ""
        lines.append(f"  --{doc.key.replace('_', '-')} {doc.type}\n      {of_entry}{doc.description} [{default}]")
    return "\n".join(lines)


def _readable(answer: dict[str, Any]) -> str:
    text = answer.get("text")
    if isinstance(text, str):
        return text.rstrip()
    width = max(map(len, answer), default=0)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in answer.items())
