"""Every illness is recognised by its own check, in a model made ill on purpose; healthy runs raise no alarm."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vae_ray import Experiment, TrainedVAE, train
from vae_ray.cli.main import main
from vae_ray.config.experiment import canonical_key
from vae_ray.data.splits import Splits
from vae_ray.evaluation.diagnosis.evidence import Evidence, gather, history_of
from vae_ray.evaluation.diagnosis.findings import CHECKS, Diagnosis, diagnose, returned_rises
from vae_ray.evaluation.diagnosis.two_samples import area_under_curve, separation
from vae_ray.runs.results import TrainResult

HEALTHY: dict[str, dict[str, Any]] = {
    "standard prior": {},
    "vamp": {"model.prior": "vamp", "model.prior.components": 50},
    "flow, optimal sigma": {"model.prior": "flow", "model.prior.transforms": 2, "likelihood.sigma": "optimal"},
    "mixture, conditional": {"model.prior": "mixture", "model.condition": "label"},
    "learned laplace": {"likelihood": "laplace", "likelihood.sigma": "learned"},
    "binary bernoulli, warm-up": {
        **{"likelihood": "bernoulli", "data.binarize": "dynamic", "training.epochs": 12},
        **{"objective.beta_schedule": "linear", "objective.beta_schedule.epochs": 3},
    },
    "conv": {
        **{"model.network": "conv", "model.network.channels": [8, 16], "model.network.hidden": [64]},
        "training.epochs": 4,
    },
    "ladder, free bits": {
        **{"model.network": "ladder", "model.network.hidden": [64, 32], "model.network.upper_dims": [3]},
        "objective.free_bits": 0.5,
    },
    "geco": {"objective": "geco", "objective.target": 0.0},
    "capacity": {"objective.beta": 5.0, "objective.capacity": 4.0},
    "beta_tc": {"objective": "beta_tc", "objective.beta": 3.0},
    "iwae": {"objective": "iwae"},
}
"""Of all axes something; each trains in about a second."""


def healthy_experiment(storage: Path, name: str) -> Experiment:
    experiment = Experiment.from_dict(
        {
            "data": {"source": "digits", "num_validation": 144},
            "model": {"network": {"name": "mlp", "hidden": [64]}, "latent_dim": 6, "initialization": "he"},
            "likelihood": {"name": "gaussian", "scale": 0.2},
            "optim": {"lr": 4e-3, "schedule": "cosine"},
            "training": {"epochs": 8, "global_batch_size": 64},
            "workers": {"num": 0, "cpus": 1, "device": "cpu"},
            "run": {"storage": str(storage), "seed": 3},
        }
    )
    return experiment.with_overrides({"run.name": "".join(c if c.isalnum() else "-" for c in name)})


def evidence_of(run: Path | str, change: Callable[[TrainedVAE], None] = lambda vae: None) -> Evidence:
    """The evidence of a run, of which `change` has made the model ill."""
    vae = TrainedVAE.load(run)
    change(vae)
    splits = Splits.open(vae.experiment)
    return gather(
        vae.model,
        vae.experiment,
        train=vae._loader(splits, "train"),
        test=vae._loader(splits, "test"),
        mean_image=splits.mean_training_image(),
        history=history_of(str(run)),
    )


def problems(diagnosis: Diagnosis) -> set[str]:
    return {name for name, finding in diagnosis.findings.items() if finding.is_problem}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnosis") / "runs"


@pytest.fixture(scope="module")
def healthy(storage: Path) -> TrainResult:
    return train(healthy_experiment(storage, "healthy"))


@pytest.fixture(scope="module")
def evidence(healthy: TrainResult) -> Evidence:
    return evidence_of(healthy.run_dir)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_raises_no_alarm(name: str, storage: Path) -> None:
    """Their training is short: that more epochs would help is no false alarm."""
    result = train(healthy_experiment(storage, name).with_overrides(HEALTHY[name]))
    found = TrainedVAE.load(result.run_dir).diagnose(result.history)
    assert problems(found) <= {"metrics still fall"}, str(found)


LARGE_LR = {"likelihood": "bernoulli", "optim.lr": 0.05, "optim.schedule": "constant"}
FEW_IMAGES = {"data.num_validation": 1380, "training.global_batch_size": 29, "likelihood.scale": 0.05}
ILL: list[tuple[str, dict[str, Any], str]] = [
    ("posterior collapse", {"objective.beta": 500.0, "training.epochs": 2}, "a smaller --objective.beta than 500"),
    ("nothing learned", {"optim.lr": 1e-12, "training.epochs": 1}, "a larger --optim.lr than 1e-12"),
    ("prior holes", {"objective.beta": 0.0, "training.epochs": 4}, "--objective.beta 1"),
    ("overfitting", {**FEW_IMAGES, "training.epochs": 30}, "--model.network.dropout 0.1"),
    ("underfitting", {"optim.lr": 8e-4, "likelihood.scale": 0.1, "training.epochs": 4}, "--optim.lr 0.001"),
    ("learning rate too large", LARGE_LR, "--optim.lr 0.005"),
    ("metrics still fall", {"training.epochs": 2}, "--training.epochs 4"),
]


@pytest.mark.parametrize(("name", "overrides", "remedy"), ILL, ids=[case[0] for case in ILL])
def test_a_run_made_ill_is_recognised(name: str, overrides: dict[str, Any], remedy: str, storage: Path) -> None:
    result = train(healthy_experiment(storage, f"ill {name}").with_overrides(overrides))
    found = diagnose(evidence_of(result.run_dir))
    assert name in problems(found), str(found)
    assert found.findings[name].remedy.endswith(remedy)
    flags = [word.removeprefix("--") for word in found.findings[name].remedy.split() if word.startswith("--")]
    assert {canonical_key(flag) for flag in flags} <= set(Experiment.from_dict(result.experiment).flat())
    assert not found.is_healthy


def test_copies_in_the_test_set_are_counted(storage: Path, tmp_path: Path) -> None:
    """7 of 40 test images are among the training images; one of them twice."""
    images = np.random.default_rng(0).integers(0, 256, (93, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "digits.npz", x_train=images[:60], x_test=np.concatenate([images[54:60], images[59:]]))
    overrides: dict[str, Any] = {
        "data.root": str(tmp_path / "digits.npz"),
        "data.num_validation": 0,
        "training.epochs": 1,
    }
    overrides["training.global_batch_size"] = 20
    experiment = healthy_experiment(storage, "copies").with_overrides({"data.source": "arrays", **overrides})
    found = diagnose(evidence_of(train(experiment).run_dir)).findings["test set overlaps with training"]
    assert found.evidence.startswith("7 of 40 test images (18 %)")
    assert found.is_problem


def test_a_single_copy_is_no_problem(evidence: Evidence) -> None:
    found = diagnose(dataclasses.replace(evidence, num_equal=1))
    assert not found.findings["test set overlaps with training"].is_problem
    assert found.is_healthy


def test_pixels_that_the_decoder_does_not_change_are_counted(healthy: TrainResult) -> None:
    def kill(vae: TrainedVAE) -> None:
        last = [layer for layer in vae.model.network.modules() if isinstance(layer, torch.nn.Linear)][-1]
        assert last.out_features == 64
        last.weight[26:29] = 0.0

    found = diagnose(evidence_of(healthy.run_dir, kill))
    assert found.findings["dead pixels"].evidence.startswith("3 of the ")


@pytest.mark.parametrize(("shift", "words"), [(-30.0, "below -15 in 6 of 6"), (30.0, "above 10 in 6 of 6")])
def test_a_log_variance_at_its_bound_is_recognised(shift: float, words: str, healthy: TrainResult) -> None:
    def move(vae: TrainedVAE) -> None:
        to_posterior = [
            layer
            for layer in vae.model.network.modules()
            if isinstance(layer, torch.nn.Linear) and layer.out_features == 12
        ]
        assert len(to_posterior) == 1
        to_posterior[0].bias[6:] += shift

    assert words in diagnose(evidence_of(healthy.run_dir, move)).findings["log variance at its bound"].evidence


def test_a_learned_scale_at_its_bound_is_recognised(storage: Path) -> None:
    experiment = healthy_experiment(storage, "scale").with_overrides(
        {"likelihood.sigma": "learned", "training.epochs": 1}
    )

    def shrink(vae: TrainedVAE) -> None:
        vae.model.likelihood.log_scale.fill_(math.log(0.0002))

    run = train(experiment).run_dir
    assert "decoder scale at its bound" not in diagnose(evidence_of(run)).findings
    found = diagnose(evidence_of(run, shrink)).findings["decoder scale at its bound"]
    assert "is 0.00102, at its lower bound 0.001" in found.evidence


def test_a_group_that_carries_nothing_is_recognised(evidence: Evidence) -> None:
    by_group = np.stack([np.zeros(359), evidence.test["rate"]], axis=1)
    unused = CHECKS["unused latent group"]
    assert unused(evidence) is None
    found = unused(dataclasses.replace(evidence, test={**evidence.test, "rate_by_group": by_group}))
    assert found is not None
    assert found.evidence.startswith("group 1 carries 0 of ")


def test_skipped_batches_are_recognised(evidence: Evidence) -> None:
    history = [{**record, "num_skipped": 32 * (record["epoch"] in (2, 5))} for record in evidence.history]
    found = diagnose(dataclasses.replace(evidence, history=history)).findings["skipped batches"]
    assert found.evidence.startswith("64 training images were skipped in 2 of 8 epochs")
    assert found.remedy == "--optim.lr 0.0004"


def test_idle_dimensions_are_information(evidence: Evidence) -> None:
    shares = np.copy(evidence.test["rate_shares"])
    shares[:, 2] = 0
    found = diagnose(dataclasses.replace(evidence, test={**evidence.test, "rate_shares": shares}))
    assert found.findings["idle dimensions"].evidence.startswith("1 of 6 latent dimensions")
    assert found.is_healthy


def test_a_validation_curve_that_rises_is_overfitting_although_the_best_checkpoint_is_kept(evidence: Evidence) -> None:
    values = [70.0, 20.0, 10.0, 15.0, 25.0, 40.0]
    history = [
        {"epoch": epoch, "train/distortion": 60.0 / epoch, "train/rate": 1.0}
        | {"val/distortion": value, "val/rate": 1.0, "val/nelbo": value + 1}
        for epoch, value in enumerate(values, 1)
    ]
    found = diagnose(dataclasses.replace(evidence, history=history)).findings["overfitting"]
    assert found.evidence.startswith(
        "val nelbo was lowest after epoch 3 of 6, 11 nats, and has risen to 41, while that"
    )
    assert found.remedy == "--training.patience-epochs 2"
    falling = [{**record, "train/distortion": record["val/distortion"]} for record in history]  # both rise
    assert "overfitting" not in diagnose(dataclasses.replace(evidence, history=falling)).findings


def test_curves_begin_where_the_objective_no_longer_changes(evidence: Evidence) -> None:
    """In a warm-up of beta over 3 epochs the last step of the third has a beta below 1."""
    schedule = {"objective.beta_schedule": "linear", "objective.beta_schedule.epochs": 3}
    experiment = evidence.experiment.with_overrides(schedule)
    history = [{**record, "beta": min(1.0, record["epoch"] / 3 - 0.01)} for record in evidence.history]
    warmed = dataclasses.replace(evidence, experiment=experiment, history=history)
    assert warmed.curve("val").epochs == [4, 5, 6, 7, 8]
    assert evidence.curve("val").epochs == [1, 2, 3, 4, 5, 6, 7, 8]


def test_rises_count_as_far_as_the_curve_falls_back() -> None:
    assert returned_rises(np.array([9.0, 5.0, 4.0])) == 0
    assert returned_rises(np.array([9.0, 5.0, 6.0, 7.0])) == 0  # GECO: it rises to its target
    assert returned_rises(np.array([9.0, 5.0, 5.0, 8.0, 4.0, 6.0, 5.5, 1.0])) == 3 + 2
    assert returned_rises(np.array([9.0, 5.0, 8.0, 7.0])) == 1
    assert returned_rises(np.array([2.0])) == 0


def test_the_area_is_the_fraction_of_ordered_pairs() -> None:
    negative, positive = torch.tensor([0.3, 0.1, 0.5, 0.5, 0.9]), torch.tensor([0.5, 0.7, 0.1])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert area_under_curve(negative, positive) == pytest.approx(sum(pairs) / 15, abs=1e-12)


def test_gaussians_are_told_apart_as_well_as_their_distance_allows() -> None:
    """The best area for N(0, I) against N(m, I) is Phi(|m| / sqrt 2); a classifier of 1,000 rows comes near to it.

    Standard errors of the held-out areas are 0.013 of equal ones, 0.011 of these.
    """
    draw = np.random.default_rng(4)
    a, b = draw.normal(size=(2000, 3)), draw.normal(size=(2000, 3))
    assert separation(a, b) == pytest.approx(0.5, abs=0.04)
    best = 0.5 * (1 + math.erf(0.5))
    assert separation(a, b + np.array([0.0, 1.0, 0.0])) == pytest.approx(best, abs=0.04)
    assert separation(a, b) == separation(a, b)


def test_a_hole_in_the_middle_is_seen_although_mean_and_variance_agree() -> None:
    """Half of the mass of a normal distribution, |x| < 0.67, is missing in the other sample: at best 0.766."""
    draw = np.random.default_rng(5)
    a, b = draw.normal(size=(2000, 2)), draw.normal(size=(9000, 2))
    b = b[np.abs(b[:, 0]) > 0.6745][:2000]
    b[:, 0] /= b[:, 0].std()
    assert 0.62 < separation(a, b) < 0.766


def test_the_command_says_what_is_wrong_and_what_to_try(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(storage / "ill-prior-holes")
    assert main(["diagnose", run]) == 0
    name, evidence, remedy = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert name == "prior holes"
    assert "of 100 pairs (50 if they were alike)" in evidence
    assert remedy == "  try --objective.beta 1"
    assert main(["diagnose", run, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["is_healthy"]
    assert "prior holes" in [finding["name"] for finding in answer["findings"]]


def test_the_command_says_that_nothing_is_wrong(healthy: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", f"{healthy.run_dir}/checkpoints/epoch=0008"]) == 0
    first, numbers = capsys.readouterr().out.splitlines()[:2]
    assert first == "nothing wrong found"
    assert "test nelbo" in numbers
