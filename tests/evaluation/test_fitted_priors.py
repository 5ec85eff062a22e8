"""System: a prior fitted after training is kept beside the run, generates and is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.storage.servers import ObjectStore
from vae_ray import Experiment, TrainedVAE, UserError, train
from vae_ray.cli.main import main
from vae_ray.errors import CorruptFile
from vae_ray.evaluation.fitted_priors import FittedPrior
from vae_ray.models.priors import fitting


@pytest.fixture(scope="module")
def run(module_quick: Experiment) -> Path:
    """A small beta: the codes are far from N(0, I)."""
    return Path(train(module_quick.with_overrides({"objective.beta": 0.02})).run_dir)


@pytest.fixture(scope="module")
def mixture(run: Path) -> FittedPrior:
    return TrainedVAE.load(run).fit_prior("mixture", components=10)


@pytest.fixture(scope="module")
def flow(run: Path) -> FittedPrior:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "STEPS", 100)
        return TrainedVAE.load(run).fit_prior("flow")


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_a_fitted_prior_is_nearer_to_codes_of_test_images(run: Path, kind: str, request: pytest.FixtureRequest) -> None:
    fitted: FittedPrior = request.getfixturevalue(kind)
    gain = fitted.record["held_out"]["nats"]["gain"]
    assert gain > 5 * fitted.record["held_out"]["standard_errors"]["gain"]
    model = TrainedVAE.load(run)
    own, found = (each.evaluate("test", "elbo,aggregated-posterior") for each in (model, model.with_prior(kind)))
    assert found["test/nelbo"] < own["test/nelbo"] - 1
    assert found["test/distortion"] == own["test/distortion"]
    # of the same z, log q(z) - log p(z)
    assert own["test/marginal_kl"] - found["test/marginal_kl"] == pytest.approx(gain, abs=1e-4)
    assert found.labels == {**own.labels, "prior": f"{kind}, fitted"}


@pytest.mark.parametrize("kind", ["mixture", "flow"])
def test_files_have_the_prior_to_the_bit(run: Path, kind: str, request: pytest.FixtureRequest) -> None:
    fitted: FittedPrior = request.getfixturevalue(kind)
    folder = run / "priors" / kind
    assert fitted.location == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["prior.json", "prior.safetensors"]
    model = TrainedVAE.load(run).with_prior(kind)
    assert model.fitted_prior is not None
    assert model.fitted_prior.record.items() >= fitted.record.items()
    written = fitted.prior.state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.model.prior.state_dict().items())


@pytest.mark.usefixtures("mixture", "flow")
def test_samples_are_functions_of_the_seed_and_differ_from_those_of_the_own_prior(run: Path) -> None:
    model = TrainedVAE.load(run)
    for kind in ("mixture", "flow"):
        images = model.generate(9, seed=4, prior=kind)
        assert torch.equal(images, model.generate(9, seed=4, prior=kind))
        assert torch.equal(images, model.with_prior(kind).generate(9, seed=4))
        assert not torch.allclose(images, model.generate(9, seed=5, prior=kind))
        assert not torch.allclose(images, model.generate(9, seed=4))


def test_the_top_group_of_a_hierarchy_gets_the_prior(run: Path, module_quick: Experiment) -> None:
    network = {"name": "ladder", "hidden": [16, 12], "upper_dims": [3]}
    small = {"model": {"network": network, "latent_dim": 4}, "training": {"epochs": 1}, "run": {"name": "ladder"}}
    flat = module_quick.to_dict()
    changed = {**flat, **{key: {**flat[key], **value} for key, value in small.items()}}
    model = TrainedVAE.load(train(Experiment.from_dict(changed)).run_dir)
    fitted = model.fit_prior("mixture", components=2, name="two")
    other = model.with_prior("two")
    assert other.model.prior.latent_shape == model.model.latent_shapes[0]
    found, own = (each.evaluate("test", "elbo") for each in (other, model))
    assert found["test/rate_group_2"] == own["test/rate_group_2"]
    assert found["test/rate_group_1"] != own["test/rate_group_1"]
    assert found.labels["prior"] == fitted.label == "mixture two, fitted"


def test_mistakes_are_named(run: Path, mixture: FittedPrior, tmp_path: Path) -> None:
    model = TrainedVAE.load(run)
    with pytest.raises(UserError, match=r"prior: got 'none', but .* has none of that name; fit it: vae-ray fit-prior"):
        model.with_prior("none")
    with pytest.raises(UserError, match=r"prior: got '\.\./mixture', should be a name of letters"):
        model.with_prior("../mixture")
    with pytest.raises(UserError, match="components: got 3, but only a mixture has components"):
        model.fit_prior("flow", components=3)
    with pytest.raises(UserError, match="prior: codes do not depend on it"):
        model.with_prior("mixture").write_codes(tmp_path / "codes.parquet")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    moved = TrainedVAE.load(copy)
    moved.with_prior("mixture")
    moved.checkpoint.files["weights.safetensors"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match=r"prior: 'mixture' was fitted to other weights, of epoch \d; fit it again"):
        moved.with_prior("mixture")
    file = copy / "priors" / "mixture" / "prior.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(CorruptFile, match=r"priors/mixture: damaged \(prior.safetensors is not what was written\)"):
        TrainedVAE.load(copy).with_prior("mixture")
    alone = tmp_path / "alone"
    shutil.copytree(model.checkpoint.path, alone)
    with pytest.raises(UserError, match=r"prior: .*alone is a checkpoint without its run"):
        TrainedVAE.load(alone).with_prior("mixture")


def test_of_a_sweeps_best_and_of_a_uri(run: Path, tmp_path: Path, store: ObjectStore, module_quick: Experiment) -> None:
    sweep = tmp_path / "sweep"
    shutil.copytree(TrainedVAE.load(run).checkpoint.path, sweep / "best")
    (sweep / "sweep.yaml").touch()
    assert TrainedVAE.load(sweep).fit_prior("mixture", components=2).location == str(sweep / "priors" / "mixture")
    TrainedVAE.load(sweep / "best").with_prior("mixture")
    there = {"run.storage": store.uri, "run.name": "fitted", "training.epochs": 1}
    at_uri = TrainedVAE.load(train(module_quick.with_overrides(there)).run_dir)
    fitted = at_uri.fit_prior("mixture", components=2)
    assert fitted.location == f"{store.uri}/fitted/priors/mixture"
    assert {"priors/mixture/prior.json", "priors/mixture/prior.safetensors"} <= store.names("fitted")
    written = fitted.prior.state_dict()
    loaded = at_uri.with_prior("mixture").model.prior.state_dict()
    assert all(torch.equal(loaded[name], written[name]) for name in written)


def test_commands(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit-prior", str(run), "--kind", "mixture", "--components", "4", "--name", "four", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["prior"], answer["settings"]) == (str(run / "priors" / "four"), {"components": 4})
    assert main(["generate", str(run), "--prior", "four", "--out", str(tmp_path / "new.png")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--prior", "four", "--metrics", "elbo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"]["prior"] == "mixture four, fitted"
    assert main(["fit-prior", str(run), "--kind", "mixture", "--components", "5", "--name", "four"]) == 0
    assert "--prior four, of generate and evaluate" in capsys.readouterr().out
    assert main(["fit-prior", str(run), "--kind", "gaussian"]) == 2
    assert main(["generate", str(run), "--prior", "none", "--out", str(tmp_path / "no.png")]) == 2
