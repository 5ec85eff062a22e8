"""Contract: what the handlers of signals do to this process, without a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from vae_ray import signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in signals.SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("which", signals.SIGNALS, ids=lambda each: each.name)
def test_a_signal_while_ray_starts_arrives_when_it_has_started(which: signal.Signals) -> None:
    """An interrupted ray.init left threads that crashed (exit code 139), and processes."""
    events = []

    def start_ray() -> None:
        with signals.all_as_ctrl_c(), signals.deferred_while_ray_starts():
            signal.raise_signal(which)
            events.append("started")

    with pytest.raises(KeyboardInterrupt):
        start_ray()
    assert events == ["started"]


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
def test_a_process_that_ignores_ctrl_c_still_ends_at_other_signals(which: signal.Signals) -> None:
    """A script's `vae-ray ... &` ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt), signals.all_as_ctrl_c():
        signal.raise_signal(which)


def test_the_exit_that_ray_makes_of_a_sigterm_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), signals.deferred_while_ray_starts():
        raise SystemExit(15)


def test_a_handler_that_ray_sets_does_not_stay() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.all_as_ctrl_c():
        ours = signal.getsignal(signal.SIGTERM)
        with signals.deferred_while_ray_starts():
            signal.signal(signal.SIGTERM, lambda number, frame: None)
        assert signal.getsignal(signal.SIGTERM) is ours
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_ray_starts_does_not_hear_the_end_of_the_terminal() -> None:
    with signals.deferred_while_ray_starts():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(signals.SIGNALS) == {signal.SIGHUP}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(signals.SIGNALS)


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.all_as_ctrl_c():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.raise_signal(signal.SIGHUP)
