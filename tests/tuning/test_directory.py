"""System: the files of a sweep outlive a kill at any byte."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_ray import UserError
from vae_ray.tuning.directory import SweepDirectory

PROPOSED = {"trial": "0007", "event": "proposed", "overrides": {"optim.lr": 0.001, "model.network.hidden": "[16, 8]"}}
ENDED = {"trial": "0007", "event": "ended", "epoch": 3, "state": "failed", "reason": 'ValueError: "ünlucky" {3}\n'}
NEXT = {"trial": "0008", "event": "proposed", "overrides": {}}

entries = st.fixed_dictionaries({"trial": st.text(), "reason": st.text(), "value": st.none() | st.integers()})


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    return SweepDirectory(tmp_path)


# --- journal --------------------------------------------------------------------------------------------


def test_a_sweep_that_has_not_begun_has_an_empty_journal(directory: SweepDirectory) -> None:
    assert directory.journal() == []
    directory.append_to_journal()
    assert directory.journal() == []


@settings(max_examples=40, deadline=None)  # each waits for the disk
@given(st.lists(st.lists(entries, max_size=3), max_size=4))
def test_the_journal_is_what_was_appended_in_order(batches: list[list[dict[str, Any]]]) -> None:
    """Whatever the texts contain: line ends of all kinds, quotes, other scripts."""
    with tempfile.TemporaryDirectory() as path:
        directory = SweepDirectory(Path(path))
        for batch in batches:
            directory.append_to_journal(*batch)
        assert directory.journal() == [entry for batch in batches for entry in batch]


def test_a_last_line_cut_anywhere_loses_nothing_before_and_nothing_after(directory: SweepDirectory) -> None:
    directory.append_to_journal(PROPOSED)
    start = directory.journal_file.stat().st_size
    directory.append_to_journal(ENDED)
    whole = directory.journal_file.read_bytes()
    for cut in range(start, len(whole)):
        directory.journal_file.write_bytes(whole[:cut])
        left = [PROPOSED] if cut < len(whole) - 1 else [PROPOSED, ENDED]  # only the line's end is missing
        assert directory.journal() == left, cut
        directory.append_to_journal(NEXT)
        assert directory.journal() == [*left, NEXT], cut


@settings(max_examples=40, deadline=None)
@given(st.lists(entries, min_size=2, max_size=4), st.data())
def test_a_cut_in_any_line_loses_only_what_was_written_from_there(
    written: list[dict[str, Any]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as path:
        directory = SweepDirectory(Path(path))
        directory.append_to_journal(*written)
        whole = directory.journal_file.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        directory.journal_file.write_bytes(whole[:cut])
        left = directory.journal()
        assert left == written[: len(left)]
        assert len(left) >= whole[:cut].count(b"\n")
        directory.append_to_journal(NEXT, ENDED)
        assert directory.journal() == [*left, NEXT, ENDED]


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


def what_is_said(directory: SweepDirectory) -> str:
    with pytest.raises(UserError) as caught:
        directory.description()
    return str(caught.value)


def test_a_directory_that_is_no_sweep_is_named(directory: SweepDirectory) -> None:
    assert what_is_said(directory) == f"sweep {directory.path}: no such sweep, it has no sweep.yaml"
    assert "no/such: no such sweep" in what_is_said(SweepDirectory(directory.path / "no/such"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged, it does not describe a sweep"),
        (b"- experiment\n- search\n- metrics\n", "damaged, it does not describe a sweep"),
        (b"experiment: {}\nsearch: {}\n", "damaged, it does not describe a sweep"),
        (b"experiment: {}\nsearch: {}\nmetrics: [val/nelbo]\n", "damaged, it does not describe a sweep"),
        (b"experiment: {optim: {lr: 0.1}", "cannot be read"),
        (b"experiment: \xff\xfe", "cannot be read"),
        (b"experiment: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
    ids=["empty", "a list", "no metrics", "cut after a line", "torn", "not text", "code"],
)
def test_a_damaged_description_is_named(content: bytes, said: str, directory: SweepDirectory) -> None:
    directory.description_file.write_bytes(content)
    message = what_is_said(directory)
    assert message.startswith(f"{directory.description_file}: ")
    assert said in message


def test_what_is_wrong_with_a_description_is_told_in_one_line(directory: SweepDirectory) -> None:
    directory.description_file.write_text("experiment: {optim: {lr: 0.1}")
    assert "\n" not in what_is_said(directory)


def test_a_description_that_is_a_directory_is_named(directory: SweepDirectory) -> None:
    directory.description_file.mkdir()
    assert "sweep.yaml: cannot be read" in what_is_said(directory)
