"""Experiments of vae_ray 0.1, as files and as checkpoints have them, are today's experiments."""

from pathlib import Path
from typing import Any

import pytest

from vae_ray import Experiment, UserError
from vae_ray.checkpoints.loading import read_checkpoint

DATA = Path(__file__).parents[1] / "data"


def test_an_experiment_file_of_0_1_is_read() -> None:
    old = Experiment.from_file(DATA / "run-v0.1" / "experiment.yaml")
    today = Experiment.from_dict(
        {
            "data": {"source": "digits", "num_validation": 144},
            "model": {"network": {"name": "mlp", "hidden": [256, 128]}, "latent_dim": 10, "initialization": "he"},
            "optim": {"lr": 2e-3, "schedule": "cosine"},
            "training": {"epochs": 40, "global_batch_size": 64},
            "workers": {"num": 0, "cpus": 1},
            "run": {"storage": old.run.storage},
        }
    )
    assert old == today
    assert Experiment.from_dict(old.to_dict()) == old


@pytest.mark.parametrize("name", ["golden-checkpoint-v1", "golden-checkpoint-v2", "run-v0.1/checkpoints/epoch=0032"])
def test_the_experiment_of_an_old_checkpoint_is_read(name: str) -> None:
    experiment = read_checkpoint(DATA / name).experiment()
    assert experiment.likelihood.name == "bernoulli"
    assert experiment.model.network.name == "mlp"


@pytest.mark.parametrize(
    ("old", "today"),
    [
        ({"model": {"network": "mlp", "hidden": [9]}}, {"model.network.hidden": [9]}),
        ({"model": {"hidden": [9]}}, {"model.network.hidden": [9]}),
        (
            {"model": {"likelihood": "gaussian", "gaussian_scale": 0.5}},
            {"likelihood": "gaussian", "likelihood.scale": 0.5},
        ),
        ({"model": {"likelihood": "bernoulli", "gaussian_scale": 0.5}}, {}),
        (
            {"training": {"nonfinite": "rollback", "nonfinite_limit": 2, "rollback_lr_factor": 0.1}},
            {"training.nonfinite": {"name": "rollback", "limit": 2, "lr_factor": 0.1}},
        ),
        ({"training": {"nonfinite": "stop", "nonfinite_limit": 2, "rollback_lr_factor": 0.1}}, {}),
        ({"data": {"source": "digits", "root": "/x", "download": True}}, {}),
        (
            {"data": {"source": "mnist", "root": "/x", "download": False}},
            {"data.source": "mnist", "data.root": "/x", "data.download": False},
        ),
        (
            {"objective": {"beta": 2.0, "beta_schedule": "constant"}},
            {"objective.beta": 2.0},
        ),
    ],
)
def test_keys_of_0_1_mean_what_they_meant(old: dict[str, Any], today: dict[str, Any]) -> None:
    assert Experiment.from_dict(old) == Experiment().with_overrides(today)


def test_a_wrong_value_of_an_old_key_is_refused_by_its_new_name() -> None:
    with pytest.raises(UserError, match=r"model\.network\.hidden: got 0"):
        Experiment.from_dict({"model": {"hidden": [0]}})
