"""Ctrl-C, SIGTERM and SIGHUP at a real process: once for a checkpoint, twice for an end at once; nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.signalled import Training
from vae_ray import Experiment
from vae_ray.checkpoints.listing import all_checkpoints

pytestmark = [pytest.mark.faults, pytest.mark.event("signals")]

SAID = "vae-ray: stopping after a checkpoint; once more to stop at once"


@pytest.fixture
def long(quick: Experiment) -> Experiment:
    """Epochs of about a second: a stop falls inside one."""
    return quick.with_overrides(
        {"training.epochs": 300, "training.global_batch_size": 2, "model.network.hidden": (256, 256)}
    )


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM", "SIGHUP", "SIGHUP SIGHUP"])
def test_one_signal_ends_a_run_after_a_checkpoint_inside_the_epoch(
    long: Experiment, tmp_path: Path, which: str
) -> None:
    """A terminal that closes is one signal too: the system and the shell both send it."""
    training = Training(long, tmp_path)
    training.wait_for_epoch(1)
    code, seconds, said = training.ends_after(*(signal.Signals[name] for name in which.split()), pause_seconds=0)
    assert code == 130
    assert seconds < 10
    assert said.count(SAID) == 1
    newest = all_checkpoints(training.run.checkpoints)[-1]
    assert newest.step is not None, said
    done = f"step {newest.step} of 669 of epoch {newest.epoch}"
    assert f"vae-ray: stopped after {done}; continue with: vae-ray resume {training.run.path}" in said


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_two_signals_end_a_run_at_once(long: Experiment, tmp_path: Path, which: signal.Signals) -> None:
    training = Training(long, tmp_path)
    training.wait_for_epoch(1)
    code, seconds, said = training.ends_after(which, which)
    assert code == 130
    assert seconds < 10
    assert "vae-ray resume" in said, "at once, or it had stopped already"


@pytest.mark.parametrize("seconds", [0.4, 0.8, 1.2, 1.6, 2.0])
def test_a_signal_during_the_imports_ends_the_process_at_once(seconds: float, tmp_path: Path) -> None:
    """An import that is interrupted can leave half a module: training then went on, or failed at its first use."""
    command = [sys.executable, "-m", "vae_ray", "train", "digits", "--workers.num=0", "--training.epochs=100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
