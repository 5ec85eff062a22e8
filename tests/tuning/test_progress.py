"""System: what a sweep shows, on a terminal and without one."""

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.tuning.trials import record_of
from vae_ray.tuning import progress
from vae_ray.tuning.progress import MAX_RUNNING_ROWS, NUM_BEST, SweepView
from vae_ray.tuning.records import FAILURES, TrialRecord

METRIC = "val/nelbo"
EPOCHS = 4
HOSTILE = "data:key:value [bold]loud[/bold] [/] [link=x] \\[red] 0x1F"
# Rich takes back the lines of its last frame, one by one, before it draws the next.
FRAME_TAKEN_BACK = re.compile(r"(?:\x1b\[1A\x1b\[2K)+")


def view_on(
    console: Console, *, num_trials: int, records: list[TrialRecord] | None = None, repeats: int = 1
) -> SweepView:
    return SweepView(
        "mine",
        metric=METRIC,
        num_trials=num_trials,
        epochs=EPOCHS,
        records=records or [],
        repeats=repeats,
        console=console,
    )


def file_console() -> tuple[Console, io.StringIO]:
    """Not a terminal, and narrow: no line may be broken."""
    written = io.StringIO()
    return Console(file=written, width=40, highlight=False), written


def terminal(height: int = 60) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    # its own environment: under CI, Rich would see no terminal
    return Console(file=written, force_terminal=True, width=100, height=height, _environ={}), written


def shown(written: io.StringIO) -> str:
    """What was written without what moves the cursor and colours the text."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())


def run_epochs(view: SweepView, name: str, num: int, *, best: float = 30.0, **overrides: Any) -> None:
    for epoch in range(1, num + 1):
        view.epoch(name, overrides, {"epoch": epoch, METRIC: best + num - epoch})


def earlier(name: str, state: str, *, epochs: int, nelbo: float = 50.0) -> TrialRecord:
    """A trial of an earlier start; the view reads the experiment of its checkpoint."""
    return record_of(name, {METRIC: nelbo} if epochs else None, state=state, epoch=max(1, epochs))


# --- off a terminal -------------------------------------------------------------------------------------


def test_with_repeats_the_best_is_the_mean_of_a_configuration_of_which_every_seed_has_a_value() -> None:
    console, written = file_console()
    with view_on(console, num_trials=6, repeats=2) as view:
        for name, best in (("0000", 20.0), ("0000-1", 31.0), ("0001", 25.0), ("0001-1", 25.5), ("0002", 1.0)):
            run_epochs(view, name, 4, best=best)
            view.ended(name, "finished", "", 4)
        run_epochs(view, "0002-1", 1, best=1.0)
        view.ended("0002-1", "diverged", "the loss is not finite", 1)
    assert written.getvalue().splitlines()[-1] == (
        "sweep mine: 6 of 6 trials ended (5 finished, 1 diverged) · best val/nelbo 25.25 (mean of configuration 0001)"
    )


def test_off_a_terminal_every_end_is_one_line_and_the_sweep_another() -> None:
    console, written = file_console()
    with view_on(console, num_trials=4) as view:
        run_epochs(view, "0000", 4, best=30.5, **{"optim.lr": 0.001, "model.latent_dim": 20})
        view.ended("0000", "finished", "", 4)
        run_epochs(view, "0001", 2, best=41.25)
        view.warned("0001", "disk full: 5 bytes needed, 0 free; training goes on")
        view.ended("0001", "stopped", "", 2)
        run_epochs(view, "0002", 1, best=3.0)
        view.ended("0002", "diverged", "epoch 2: the loss is not finite; try a smaller --optim.lr", 1)
        view.ended("0003", "killed", "its process died", 0)
    assert written.getvalue().splitlines() == [
        "trial 0000  finished  val/nelbo 30.50  lr=0.001  latent_dim=20",
        "trial 0001  disk full: 5 bytes needed, 0 free; training goes on",
        "trial 0001  stopped after epoch 2  val/nelbo 41.25",
        "trial 0002  diverged after epoch 1  epoch 2: the loss is not finite; try a smaller --optim.lr",
        "trial 0003  killed after epoch 0  its process died",
        "sweep mine: 4 of 4 trials ended (1 finished, 1 stopped, 1 diverged, 1 killed) · "
        "best val/nelbo 30.50 (trial 0000)",
    ]


@pytest.mark.parametrize("make_console", [file_console, terminal], ids=["file", "terminal"])
def test_markup_in_a_reason_is_text(make_console: Any) -> None:
    console, written = make_console()
    with view_on(console, num_trials=2) as view:
        run_epochs(view, "0000", 1, **{"model.network.hidden": "[400, 100]"})
        view.ended("0000", "failed", f"ValueError: {HOSTILE}", 1)
    assert f"ValueError: {HOSTILE}" in shown(written)
    assert "hidden=[400, 100]" in shown(written)


def test_quiet_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    arguments: dict[str, Any] = {"metric": METRIC, "num_trials": 2, "epochs": EPOCHS, "records": []}
    for quiet in (True, False):
        with SweepView("mine", **arguments, quiet=quiet) as view:
            run_epochs(view, "0000", 1)
            view.ended("0000", "failed", "a reason", 1)
        out, err = capfd.readouterr()
        assert out == ""
        assert bool(err) != quiet


def test_the_whole_sweep_is_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "STATUS_SECONDS", 0.0)
    console, written = file_console()
    with view_on(console, num_trials=3) as view:
        run_epochs(view, "0000", 2)
    first, second, last = written.getvalue().splitlines()
    pattern = r"sweep mine: 0 of 3 trials ended · 1 running · best val/nelbo 3[01]\.00 \(trial 0000\)"
    pattern += r" · at most 0:00:\d\d left"
    assert re.fullmatch(pattern, first)
    assert re.fullmatch(pattern, second)
    assert last.startswith("sweep mine: 0 of 3")


# --- the numbers ----------------------------------------------------------------------------------------


def last_status(view_records: list[TrialRecord], ends: list[tuple[str, str, int]], *, num_trials: int) -> str:
    console, written = file_console()
    with view_on(console, num_trials=num_trials, records=view_records) as view:
        for name, state, epochs in ends:
            run_epochs(view, name, epochs)
            view.ended(name, state, "", epochs)
    return written.getvalue().splitlines()[-1]


ends = st.lists(st.tuples(st.sampled_from(["finished", "stopped", *FAILURES]), st.integers(0, EPOCHS)), min_size=1)


@given(ends, st.data())
def test_no_time_is_left_when_all_trials_have_ended(outcomes: list[tuple[str, int]], data: st.DataObject) -> None:
    """However they ended and however many an earlier driver had seen end."""
    whole = [
        (f"{n:04d}", state, EPOCHS if state == "finished" else epochs) for n, (state, epochs) in enumerate(outcomes)
    ]
    num_before = data.draw(st.integers(0, len(whole)))
    before = [earlier(name, state, epochs=epochs) for name, state, epochs in whole[:num_before]]
    status = last_status(before, whole[num_before:], num_trials=len(whole))
    assert f"{len(whole)} of {len(whole)} trials ended" in status
    assert "left" not in status
    assert "running" not in status


def test_what_earlier_drivers_saw_is_counted_and_can_be_the_best() -> None:
    records = [
        earlier("0000", "finished", epochs=4, nelbo=12.5),
        earlier("0001", "diverged", epochs=0),
        earlier("0002", "pending", epochs=3),
        earlier("0003", "pending", epochs=0),
    ]
    status = last_status(records, [("0002", "finished", 4)], num_trials=4)
    assert "3 of 4 trials ended (2 finished, 1 diverged)" in status
    assert "best val/nelbo 12.50 (trial 0000)" in status


def test_a_failed_trial_is_not_the_best() -> None:
    console, written = file_console()
    failed = earlier("0009", "failed", epochs=2, nelbo=0.5)
    with view_on(console, num_trials=3, records=[failed]) as view:
        run_epochs(view, "0000", 2, best=1.0)
        view.ended("0000", "diverged", "why", 2)
        run_epochs(view, "0001", 4, best=20.0)
        view.ended("0001", "finished", "", 4)
    assert written.getvalue().endswith("best val/nelbo 20.00 (trial 0001)\n")


# --- on a terminal --------------------------------------------------------------------------------------


def test_a_hundred_trials_fit_a_screen() -> None:
    console, written = terminal()
    overrides = {
        "optim.lr": 0.001234,
        "objective.beta": 0.5678,
        "model.network.hidden": "[400, 100]",
        "model.latent_dim": 20,
    }
    with view_on(console, num_trials=100) as view:
        for number in range(100):
            run_epochs(view, f"{number:04d}", 1, best=100.0 - number, **overrides)
    heights = [taken.count("\x1b[1A") for taken in FRAME_TAKEN_BACK.findall(written.getvalue())]
    # the running, the best, the header, and a status that may take two lines
    assert MAX_RUNNING_ROWS + NUM_BEST < max(heights) <= MAX_RUNNING_ROWS + NUM_BEST + 3
    *frames, _, status = shown(written).splitlines()
    frame = frames[-MAX_RUNNING_ROWS - NUM_BEST - 1 :]
    assert status.startswith("sweep mine: 0 of 100 trials ended · 100 running")
    assert [line.split()[0] for line in frame if line[0].isdigit()][:MAX_RUNNING_ROWS] == [
        f"{n:04d}" for n in range(MAX_RUNNING_ROWS)
    ]
    assert [line.split()[:2] for line in frame if "best  " in line] == [["0099", "best"]]
    assert max(map(len, frame)) <= 100


def test_a_terminal_is_left_with_one_line_a_trial_and_a_cursor() -> None:
    console, written = terminal()
    with view_on(console, num_trials=2) as view:
        run_epochs(view, "0000", 4)
        view.ended("0000", "finished", "", 4)
    text = written.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert shown(written).count("trial 0000  finished  val/nelbo 30.00") == 1
