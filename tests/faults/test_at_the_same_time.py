"""Real processes that want the same thing at once: one decodes, one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import digits_in_this_process
from tests.data_layer.stored import pixels_of
from tests.faults.conftest import Count
from tests.faults.file_operations import SERVER
from vae_ray import Experiment
from vae_ray.config.sections.data import DigitsData
from vae_ray.data.cache import open_dataset
from vae_ray.data.sources.decoded import Decoded
from vae_ray.data.sources.digits import Digits

pytestmark = pytest.mark.faults


def opened(cache: str, log: str, start: float, answer: Any) -> None:
    """Open the digits, with a note of every decoding, which is slow enough for others to come."""
    original = Digits.load

    def load(self: Digits, split: str) -> Decoded:
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{split} {os.getpid()}\n")
        time.sleep(0.3)
        return original(self, split)

    Digits.load = load  # type: ignore[method-assign]
    time.sleep(max(0.0, start - time.time()))
    splits = open_dataset(DigitsData(cache_dir=Path(cache))).splits
    answer.put({name: pixels_of(split).tobytes() for name, split in splits.items()})


@pytest.mark.parametrize("cache_was", ["cold", "damaged"])
def test_eight_processes_that_ask_for_the_same_data_decode_it_once(
    cache_was: str, tmp_path: Path, fault_counts: Count
) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    if cache_was == "damaged":
        open_dataset(DigitsData(cache_dir=cache))
        (file,) = cache.rglob("test-*.arrow")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.unlink()
        file.write_bytes(content)
    answers, start = SERVER.SimpleQueue(), time.time() + 1.0
    processes = [SERVER.Process(target=opened, args=(str(cache), str(log), start, answers)) for _ in range(8)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(split for split, _ in lines) == ["test", "train"]
    assert len({process for _, process in lines}) == 1
    expected = {name: Digits().load(name)[0].tobytes() for name in ("train", "test")}
    good = sum(pixels == expected for pixels in found)
    fault_counts("cold cache", tried=8, survived=good, lost=8 - good, note="one decoding each time")


def command(experiment: Experiment, file: Path, *more: str) -> subprocess.Popen[str]:
    file.write_text(experiment.to_yaml())
    arguments = [sys.executable, "-m", "vae_ray", "train", str(file), "--json", *more]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_runs_with_one_name_at_the_same_time_the_second_is_refused(tmp_path: Path, fault_counts: Count) -> None:
    experiment = digits_in_this_process(tmp_path / "runs").with_overrides({"training.epochs": 30})
    first = command(experiment, tmp_path / "first.yaml")
    run = tmp_path / "runs" / "digits-in-process"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(19)  # SIGSTOP: it stands still while others try, and lives
    for more in ([], ["--resume"]):
        second = command(experiment, tmp_path / "second.yaml", *more)
        out, err = second.communicate(timeout=120)
        assert (second.returncode, out) == (2, "")
        assert err.strip().count("\n") == 0
        assert "'digits-in-process'" in err
    first.send_signal(18)
    answer, stderr = first.communicate(timeout=200)
    assert first.returncode == 0, stderr
    assert json.loads(answer)["epochs"] == 30
    lines = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 31))
    fault_counts("same name", tried=2, survived=2)
