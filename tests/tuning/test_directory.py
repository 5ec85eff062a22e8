"""The files of a sweep; tests/storage/test_records.py tests the format of the journal."""

from pathlib import Path

import pytest

from vae_ray import UserError
from vae_ray.tuning.directory import SweepDirectory

PROPOSED = {"trial": "0007", "event": "proposed", "overrides": {"optim.lr": 0.001, "model.network.hidden": "[16, 8]"}}
ENDED = {"trial": "0007", "event": "ended", "epoch": 3, "state": "failed", "reason": 'ValueError: "ünlucky" {3}\n'}


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    return SweepDirectory(tmp_path)


# --- journal --------------------------------------------------------------------------------------------


def test_a_journal_is_empty_at_first_and_grows(directory: SweepDirectory) -> None:
    assert directory.journal() == []
    directory.append_to_journal(PROPOSED)
    directory.append_to_journal(ENDED)
    assert directory.journal() == [PROPOSED, ENDED]


# --- description ----------------------------------------------------------------------------------------

DESCRIPTION = {
    "experiment": {"optim": {"lr": 1e-05, "grad_clip": None}, "run": {"name": "1e3", "storage": "/a: b"}},
    "search": {"model.network.hidden": {"choice": [[16], [400, 100]]}, "optim.lr": {"loguniform": [1e-05, 0.1]}},
    "metrics": ["val/nelbo"],
    "num_trials": 7,
    "scheduler": "asha",
    "searcher": "random",
}


def test_a_description_is_read_as_it_was_written(directory: SweepDirectory) -> None:
    directory.write_description({"other": 1})
    directory.write_description(DESCRIPTION)
    assert directory.description() == DESCRIPTION
    assert [file.name for file in directory.path.glob("[!.]*")] == ["sweep.yaml"]


def error_of(directory: SweepDirectory) -> str:
    with pytest.raises(UserError) as caught:
        directory.description()
    return str(caught.value)


def test_a_directory_that_is_no_sweep_is_named(directory: SweepDirectory) -> None:
    assert error_of(directory) == f"sweep {directory.path}: no such sweep, it has no sweep.yaml"
    assert "no/such: no such sweep" in error_of(SweepDirectory(directory.path / "no/such"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not an object"),
        (b"- experiment\n- search\n- metrics\n", "not an object"),
        (b"experiment: {}\nsearch: {}\n", "damaged, it does not describe a sweep"),
        (b"experiment: {}\nsearch: {}\nmetrics: [val/nelbo]\n", "damaged, it does not describe a sweep"),
        (b"experiment: {optim: {lr: 0.1}", "cannot be read"),
        (b"experiment: \xff\xfe", "cannot be read"),
        (b"experiment: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
    ids=["empty", "a list", "no metrics", "cut after a line", "torn", "not text", "code"],
)
def test_a_damaged_description_is_named(content: bytes, part: str, directory: SweepDirectory) -> None:
    directory.description_file.write_bytes(content)
    message = error_of(directory)
    assert message.startswith(f"{directory.description_file}: ")
    assert part in message
    assert "\n" not in message


def test_a_description_that_is_a_directory_is_named(directory: SweepDirectory) -> None:
    directory.description_file.mkdir()
    assert "sweep.yaml: cannot be read" in error_of(directory)
