"""The upload of a job: this package, the files that its arguments name, and optionally a working directory.

One zip file with fixed times, so that equal content has an equal name on the cluster and is uploaded once.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pathspec

from vae_ray.errors import UserError

LIMIT_BYTES = 512 * 2**20
"""Ray's own limit for a package."""
PACKAGE = Path(__file__).parents[1]
EXCLUDED = (
    *(".git", ".venv", "venv", "__pycache__", "*.pyc", "*.egg-info", ".ipynb_checkpoints"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "node_modules"),
    *("/data", "/datasets", "/runs", "/results", "/build", "/dist"),
)
"""As in a .gitignore: data and results at the top, but not code of the same name further down (`vae_ray/data`)."""
IGNORE_FILES = (".gitignore", ".rayignore")


@dataclass(frozen=True)
class Upload:
    """The files of a working directory on the cluster, by their path there."""

    files: Mapping[str, Path]

    @property
    def num_bytes(self) -> int:
        """The total size, uncompressed."""
        return sum(file.stat().st_size for file in self.files.values())

    def largest(self, count: int = 3) -> list[tuple[str, int]]:
        """The largest top-level entries, with their bytes."""
        sizes: Counter[str] = Counter()
        for name, file in self.files.items():
            sizes[name.partition("/")[0] + ("/" if "/" in name else "")] += file.stat().st_size
        return sizes.most_common(count)

    def check_size(self) -> None:
        """Raise `UserError` with the largest entries if the upload is larger than Ray allows."""
        total = self.num_bytes
        if total > LIMIT_BYTES:
            largest = ", ".join(f"{name} {mebibytes(size)}" for name, size in self.largest())
            raise UserError(
                f"working directory: got {mebibytes(total)}, should be at most {mebibytes(LIMIT_BYTES)}; the largest "
                f"are {largest}: name them in a .rayignore file there, or leave --working-dir out"
            )

    def write(self, archive: Path) -> None:
        """Write the zip file."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for name, file in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name)  # of 1980: the same content is the same archive
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (0o755 if os.access(file, os.X_OK) else 0o644) << 16
                target.writestr(entry, file.read_bytes())


def collect(*, working_dir: Path | None = None, named: Mapping[str, Path] | None = None) -> Upload:
    """This package, the `named` files (name on the cluster: local path), and the files of `working_dir`.

    Files that a `.gitignore` or `.rayignore` of `working_dir` ignores are left out.
    """
    files: dict[str, Path] = {}
    if working_dir is not None:
        if not working_dir.is_dir():
            raise UserError(f"--working-dir: got '{working_dir}', which is not a directory")
        files.update((file.relative_to(working_dir).as_posix(), file) for file in _files(working_dir))
    # the version that has checked the arguments replaces a `vae_ray` of the working directory
    files = {name: file for name, file in files.items() if not name.startswith("vae_ray/")}
    files.update((f"vae_ray/{file.relative_to(PACKAGE).as_posix()}", file) for file in _files(PACKAGE, top=False))
    return Upload({**files, **(named or {})})


def _files(root: Path, *, top: bool = True) -> Iterator[Path]:
    """The regular files below `root` that no pattern excludes; `top`: whether `root` is the top of the upload."""
    excluded = [pattern for pattern in EXCLUDED if top or not pattern.startswith("/")]
    specs = [(root, pathspec.GitIgnoreSpec.from_lines(excluded))]
    for directory, directories, names in os.walk(root):
        here = Path(directory)
        specs = [(base, spec) for base, spec in specs if here.is_relative_to(base)]
        for name in IGNORE_FILES:
            if name in names:
                lines = (here / name).read_text(encoding="utf-8", errors="replace").splitlines()
                specs.append((here, pathspec.GitIgnoreSpec.from_lines(lines)))

        def is_excluded(path: Path, mark: str = "", specs: list[tuple[Path, pathspec.GitIgnoreSpec]] = specs) -> bool:
            return any(spec.match_file(path.relative_to(base).as_posix() + mark) for base, spec in specs)

        directories[:] = sorted(name for name in directories if not is_excluded(here / name, "/"))
        for name in sorted(names):
            if (here / name).is_file() and not is_excluded(here / name):
                yield here / name


def mebibytes(size: int) -> str:
    """`size`, in bytes, as text."""
    return f"{size / 2**20:.1f} MiB"
