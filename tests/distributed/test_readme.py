"""The Python examples of the README and of docs/sweeps.md, run as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/sweeps.md")]
EXAMPLES = [example for page in PAGES for example in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)]


@pytest.mark.usefixtures("cluster")
def test_the_python_example_does_what_its_comments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = EXAMPLES[0]
    names: dict[str, Any] = {}
    exec(example, names)

    shapes = dict(re.findall(r"^(\w+) = .*# \(([\d, ]+)\)", example, flags=re.M))
    assert shapes.keys() >= {"images", "new", "codes", "decoded", "path"}
    for name, shape in shapes.items():
        assert tuple(names[name].shape) == tuple(map(int, shape.split(","))), name
    assert names["metrics"]["test/nelbo"] == pytest.approx(names["result"].metrics["test/nelbo"], abs=1e-4)
    assert names["result"].run_dir.parent == tmp_path / "runs"


@pytest.mark.usefixtures("cluster")
def test_the_sweep_example_leaves_a_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(EXAMPLES) == 2
    names: dict[str, Any] = {}
    exec(EXAMPLES[1], names)
    assert names["images"].shape == (64, 1, 8, 8)
    assert names["result"].num_trials == 3
    assert names["result"].sweep_dir.parent == tmp_path / "runs"
