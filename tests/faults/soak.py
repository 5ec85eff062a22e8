"""Random kills for as long as one likes: `make soak`, or `python -m tests.faults.soak --minutes 60 [--ray]`.

Run after run is killed with SIGKILL at random moments and resumed until it ends, and must then have the bits of the
same run undisturbed. With `--ray` every other run trains on two Ray workers, and driver and workers are killed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vae_ray import Experiment
from vae_ray.checkpoints.listing import complete_checkpoints

SLOWEST_START_SECONDS = {0: 6.0, 2: 45.0}
"""Kills come within so many seconds, by the number of workers: from the first import to the middle of training."""


def experiment(storage: Path, name: str, *, seed: int, workers: int) -> Experiment:
    """A run of some hundred checkpoints."""
    return Experiment.from_dict(
        {
            "data": {"source": "digits", "num_validation": 100},
            "model": {"network": {"name": "mlp", "hidden": [16]}, "latent_dim": 3},
            "training": {"epochs": 15, "global_batch_size": 256},
            "workers": {"num": workers, "device": "cpu"},
            "run": {"storage": str(storage), "name": name, "seed": seed, "checkpoint_every_steps": 2},
        }
    )


def start(wanted: Experiment, directory: Path) -> subprocess.Popen[bytes]:
    """`vae-ray train --resume` in a session of its own."""
    file = directory / f"{wanted.run.name}.yaml"
    file.write_text(wanted.to_yaml())
    command = [sys.executable, "-m", "vae_ray", "train", str(file), "--resume"]
    with (directory / "stderr.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)


def bits(wanted: Experiment) -> bytes:
    """The last checkpoint's weights and optimizer."""
    last = complete_checkpoints(Path(wanted.run.storage) / str(wanted.run.name) / "checkpoints")[-1]
    assert last.epoch == wanted.training.epochs
    return last.read("weights.safetensors") + last.read("training_state.safetensors")


def killed_until_it_ends(wanted: Experiment, directory: Path, chance: random.Random) -> int:
    """Kill and resume until a process ends by itself; how often it was killed."""
    num_kills = 0
    longest = SLOWEST_START_SECONDS[2 if wanted.workers.num else 0]
    while True:
        process = start(wanted, directory)
        try:
            code = process.wait(chance.uniform(0.2, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            num_kills += 1
            longest *= 1.1  # so that it comes to an end
            continue
        if code:
            sys.exit(f"lost: it ended with {code}: {(directory / 'stderr.txt').read_text()[-2000:]}")
        return num_kills


def main() -> None:
    """Soak, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    chance, started, num_runs, num_kills = random.Random(options.seed), time.monotonic(), 0, 0
    directory = Path(tempfile.mkdtemp(prefix="vae_ray-soak-"))
    print(f"seed {options.seed}, in {directory}", flush=True)
    while time.monotonic() - started < 60 * options.minutes:
        seed, workers = chance.randrange(2**31), 2 if options.ray and num_runs % 2 else 0
        undisturbed = experiment(directory, "undisturbed", seed=seed, workers=workers)
        disturbed = experiment(directory, "disturbed", seed=seed, workers=workers)
        if start(undisturbed, directory).wait():
            sys.exit(f"the undisturbed run failed: {(directory / 'stderr.txt').read_text()[-2000:]}")
        num_kills += killed_until_it_ends(disturbed, directory, chance)
        if bits(disturbed) != bits(undisturbed):
            sys.exit(f"lost: other bits after kills; both runs are in {directory}")
        num_runs += 1
        print(f"{time.monotonic() - started:6.0f} s: {num_runs} runs, {num_kills} kills, all equal", flush=True)
        for wanted in (undisturbed, disturbed):
            shutil.rmtree(directory / str(wanted.run.name))
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
