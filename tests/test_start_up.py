"""How soon a process that trains begins: what it must not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vae_ray.config.sections.data import DigitsData
from vae_ray.data.cache import open_dataset

SLOW = ("torch._dynamo", "sympy", "sklearn", "scipy", "ray", "pandas", "torchvision", "matplotlib")
TRAINING = """
import sys
from vae_ray import Experiment, train
train(Experiment.preset("digits").with_overrides(
    {"training.epochs": 1, "workers.num": 0, "run.storage": sys.argv[1], "optim.grad_clip": 100}
))
print([name for name in sys.argv[2:] if name in sys.modules])
"""


def test_training_imports_neither_compilers_nor_statistics(tmp_path: Path) -> None:
    """Each of them takes a process, and so every Ray worker and trial, up to four seconds."""
    open_dataset(DigitsData())  # decodes the images, for which scikit-learn is needed
    command = [sys.executable, "-c", TRAINING, str(tmp_path), *SLOW]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
