"""A user's own code, named by import path (`package.module:name`): loaded, checked, and carried to other processes.

A path is followed when it comes from the command line or from Python. One that was read from a file (a checkpoint's or
a run's experiment) needs the user's trust: reading never runs code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vae_ray.errors import TrainingFailed, UserError, one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")
Files = dict[str, bytes]
"""Relative path and content of a user's source files; plain data that travels to workers."""
FAILURES = (Exception, SystemExit)
"""What is an error in a user's code; `sys.exit()` there must not end the command as if all were done."""


def load(path: str, *, key: str) -> Callable[..., Any]:
    """What `package.module:name` names; modules are looked up in the working directory too.

    Raises `UserError`, naming `key`, if it cannot be imported or is no callable.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        function: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: got {path!r}, there is no module {error.name!r} in {here} or on PYTHONPATH") from None
    except AttributeError:
        raise UserError(f"{key}: got {path!r}, the module {module_name!r} has no {attribute!r}") from None
    except FAILURES as error:
        raise UserError(f"{key}: got {path!r}, importing it fails ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise UserError(f"{key}: got {path!r}, a {type(function).__name__}; should be a function or a class")
    return function


def call(path: str, settings: Mapping[str, Any], *, key: str, **arguments: Any) -> Any:
    """Call the user's function with the framework's `arguments` and the user's keyword `settings`.

    Raises `UserError`, naming the setting, for one that the function does not take, and for an error in the function.
    """
    function = load(path, key=key)
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in [] if takes_any else settings:
        if name not in parameters or name in arguments:
            own = [each for each in parameters if each not in arguments]
            allowed = f"it takes {', '.join(own)}" if own else "it takes no settings"
            section = key.removesuffix(".source")
            raise UserError(f"{section}.{name}: {path} has no setting {name!r}; {allowed}")
    with errors_named(path, key=key):
        return function(**arguments, **settings)


@contextlib.contextmanager
def errors_named(path: str, *, key: str) -> Iterator[None]:
    """In its body an error of the user's function is a `UserError` that names it and the line."""
    try:
        yield
    except UserError:
        raise
    except FAILURES as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename == __file__:
            raise UserError(f"{key}: {path} cannot be called ({one_line(error)[:200]})") from error
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(f"{key}: {path} fails in {last.filename}, line {last.lineno} ({reason})") from error


@contextlib.contextmanager
def failures_named(paths: Sequence[str], *, where: str) -> Iterator[None]:
    """In its body, a part of training that calls the code of `paths`, an error is `TrainingFailed` that names the line.

    A collective that fails keeps its error: another worker's failure is the cause.
    """
    try:
        yield
    except FAILURES as error:
        frames, collectives = traceback.extract_tb(error.__traceback__), Path(__file__).parents[1] / "distributed"
        is_collective = any(Path(frame.filename).parent == collectives for frame in frames)
        if not paths or is_collective or isinstance(error, (UserError, TrainingFailed)):
            raise
        names = {str(file): name for name, file in source_files(paths).items()}
        lines = [f" ({names[frame.filename]}, line {frame.lineno})" for frame in frames if frame.filename in names]
        reason = f"{type(error).__name__}: {one_line(error)[:200]}{lines[-1] if lines else ''}"
        message = f"{' or '.join(paths)} raised {reason} in {where}; correct the code and resume"
        logger.error("%s", message, exc_info=error)
        raise TrainingFailed(message) from error


def check_trusted(paths: Iterable[str], *, origin: str, trust_code: bool) -> None:
    """Raise `UserError` if `origin`, a file that was read, names code that the user does not trust."""
    paths = list(paths)
    if paths and not trust_code:
        raise UserError(
            f"{origin}: names its own code ({', '.join(paths)}), which is run only if you trust it; add --trust-code "
            "(in Python trust_code=True)"
        )


def collect(paths: Iterable[str]) -> Files:
    """The content of `source_files`, to be installed in other processes."""
    return {name: file.read_bytes() for name, file in source_files(paths).items()}


def source_files(paths: Iterable[str]) -> dict[str, Path]:
    """The source files of the modules that `paths` name, by relative path: a module's own file, or all of a package."""
    files: dict[str, Path] = {}
    for path in paths:
        load(path, key="user code")
        module = sys.modules[path.partition(":")[0].partition(".")[0]]
        file = Path(module.__file__ or "")
        if "site-packages" in file.parts or "dist-packages" in file.parts:
            continue  # installed: the other processes have it too
        if file.name == "__init__.py":
            root = file.parent
            sources = [source for source in sorted(root.rglob("*.py")) if "__pycache__" not in source.parts]
            files |= {source.relative_to(root.parent).as_posix(): source for source in sources}
        elif file.is_file():
            files[file.name] = file
    return files


def install(files: Files) -> None:
    """Make collected files importable in this process."""
    if files:
        directory = Path(tempfile.mkdtemp(prefix="vae_ray-code-"))
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        sys.path.insert(0, str(directory))
        importlib.invalidate_caches()


def expect(value: Any, kind: type[T], *, key: str, path: str) -> T:
    """`value`, if it is a `kind`; raises `UserError` otherwise."""
    if not isinstance(value, kind):
        raise UserError(
            f"{key}: {path} returned a {type(value).__name__}, should return a {kind.__module__}.{kind.__name__}"
        )
    return value


def digest(function: Callable[..., Any]) -> str:
    """A short hash of the file of the module in which `function` is defined."""
    file = getattr(inspect.getmodule(function), "__file__", None) or ""  # a partial has no module
    content = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return hashlib.sha256(content).hexdigest()[:16]
