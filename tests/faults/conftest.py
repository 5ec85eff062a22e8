"""The table of faults: what was tried, what was survived, what was lost. `make faults` prints it and fails on a gap.

A test says what it tried with the fixture `fault_counts`, or with `@pytest.mark.event(NAME)` counts as one case.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from tests.data_layer.test_mnist import idx

FORM = os.environ.get("VAE_RAY_FAULTS", "")
"""`full` or `short` where every row of the table is wanted (`make faults`); empty where some tests are run."""


@dataclass
class Row:
    """One event of the table, with what tests have counted."""

    text: str
    needs_ray: bool = False
    tried: int = 0
    survived: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, *, tried: int, survived: int, lost: int, notes: Iterable[str] = ()) -> None:
        """Count more cases."""
        self.tried, self.survived, self.lost = self.tried + tried, self.survived + survived, self.lost + lost
        self.notes += [note for note in notes if note and note not in self.notes]


def rows() -> dict[str, Row]:
    """The events of docs/promises.md, in its order, by the name that tests use."""
    return {
        "worker killed": Row("kill -9 of a worker at any step", needs_ray=True),
        "worker hangs": Row("a worker hangs (SIGSTOP)", needs_ray=True),
        "driver killed": Row("kill -9 of the driver, at any file operation"),
        "inside epochs": Row("checkpoints every N steps"),
        "disk full": Row("disk full during a checkpoint"),
        "damaged file": Row("a flipped byte or a cut in any file"),
        "not finite": Row("NaN or inf in loss or gradient"),
        "storage away": Row("storage goes away in mid-run", needs_ray=True),
        "signals": Row("Ctrl-C / SIGTERM, once or twice"),
        "malicious file": Row("a malicious checkpoint, configuration or sweep state"),
        "bad configuration": Row("an invalid configuration"),
        "cold cache": Row("eight processes ask for the same data"),
        "same name": Row("two runs with one name at the same time"),
        "versions": Row("a checkpoint of another version"),
    }


class Count(Protocol):
    """Adds cases to a row of the table."""

    def __call__(self, event: str, *, tried: int, survived: int, lost: int = 0, note: str = "") -> None: ...


@pytest.fixture
def mnist_raw() -> Callable[[Path], None]:
    """Writes small raw files of MNIST's layout into a directory: 7 training and 5 test images of 6x5 pixels."""

    def write(raw: Path) -> None:
        raw.mkdir(parents=True)
        chance = np.random.default_rng(2)
        for split, n in (("train", 7), ("t10k", 5)):
            (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(chance.integers(0, 256, (n, 6, 5), dtype=np.uint8)))
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(chance.integers(0, 10, n, dtype=np.uint8)))

    return write


TABLE = pytest.StashKey[dict[str, Row]]()


@pytest.fixture
def fault_counts(request: pytest.FixtureRequest) -> Iterator[Count]:
    """Counts cases of an event; what was neither survived nor lost fails the test."""
    table, mine = request.config.stash.setdefault(TABLE, rows()), defaultdict(int)

    def count(event: str, *, tried: int, survived: int, lost: int = 0, note: str = "") -> None:
        table[event].add(tried=tried, survived=survived, lost=lost, notes=[note])
        mine["open"] += tried - survived - lost
        mine["lost"] += lost

    yield count
    assert mine["lost"] == 0
    assert mine["open"] == 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A test marked with an event is a case of it."""
    report = yield
    for mark in item.iter_markers("event"):
        if report.when == "call" and not report.skipped:
            row = item.config.stash.setdefault(TABLE, rows())[mark.args[0]]
            row.add(tried=1, survived=int(report.passed), lost=int(report.failed))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of what was tried."""
    table = terminalreporter.config.stash.get(TABLE, rows())
    if not FORM and not any(row.tried for row in table.values()):
        return
    terminalreporter.section("faults")
    width = max(len(row.text) for row in table.values())
    terminalreporter.write_line(f"{'event':<{width}}  {'tried':>6} {'survived':>8} {'lost':>5}")
    for row in table.values():
        if row.tried or FORM:
            note = "; ".join(row.notes) or ("" if row.tried else "no case" + (" without Ray" if row.needs_ray else ""))
            terminalreporter.write_line(
                f"{row.text:<{width}}  {row.tried:>6} {row.survived:>8} {row.lost:>5}  {note}".rstrip()
            )
    total = [sum(getattr(row, key) for row in table.values()) for key in ("tried", "survived", "lost")]
    terminalreporter.write_line(f"{'all':<{width}}  {total[0]:>6} {total[1]:>8} {total[2]:>5}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A row without a case is a promise that nobody has tried."""
    table = session.config.stash.get(TABLE, rows())
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's processes: what it has counted is added below
        session.config.workeroutput["faults"] = {event: asdict(row) for event, row in table.items()}
        return
    wanted = [row for row in table.values() if FORM == "full" or (FORM == "short" and not row.needs_ray)]
    if exitstatus == 0 and (any(row.lost for row in table.values()) or any(not row.tried for row in wanted)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what one of pytest-xdist's processes has counted."""
    table = node.config.stash.setdefault(TABLE, rows())
    for event, counted in getattr(node, "workeroutput", {}).get("faults", {}).items():
        row = table[event]
        row.add(tried=counted["tried"], survived=counted["survived"], lost=counted["lost"], notes=counted["notes"])
