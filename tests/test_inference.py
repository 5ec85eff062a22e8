"""Truth: what a trained model does afterwards is deterministic, exact, and the same as during training."""

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vae_ray import TrainedVAE, TrainResult, UserError, train
from vae_ray.config.experiment import Experiment
from vae_ray.data.sources.decoded import Decoded
from vae_ray.data.sources.digits import Digits
from vae_ray.data.splits import Splits
from vae_ray.inference import INTERPOLATIONS, Method
from vae_ray.models.coordinates import coordinates, movable
from vae_ray.models.likelihoods import Bernoulli
from vae_ray.models.vae import build_vae
from vae_ray.storage.records import read_records
from vae_ray.training.callbacks import decoder_of


@pytest.fixture(scope="module")
def model(trained_run: TrainResult) -> TrainedVAE:
    return TrainedVAE.load(trained_run.run_dir)


def flat_weights(model: TrainedVAE) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.model.state_dict().values()])


def test_a_run_directory_stands_for_its_best_checkpoint(trained_run: TrainResult, model: TrainedVAE) -> None:
    assert model.checkpoint.path == trained_run.best_checkpoint
    assert torch.equal(flat_weights(model), flat_weights(TrainedVAE.load(trained_run.best_checkpoint)))


def test_best_is_by_nelbo_and_neither_the_last_nor_by_the_loss(quick: Experiment) -> None:
    """Without a weight on the rate the loss falls for ever, while the bound soon gets worse (NUMBERS.md, traps)."""
    result = train(quick.with_overrides({"objective.beta": 0, "training.epochs": 6}))
    history = read_records(result.run_dir / "metrics.jsonl")
    by_nelbo, by_loss = (min(history, key=lambda line: line[key])["epoch"] for key in ("val/nelbo", "train/loss"))
    assert by_nelbo < by_loss
    assert TrainedVAE.load(result.run_dir).checkpoint.epoch == result.best_epoch == by_nelbo
    assert result.last_checkpoint.name == "epoch=0006"
    assert result.metrics["val/nelbo"] == history[by_nelbo - 1]["val/nelbo"]


# --- generate, encode, reconstruct ----------------------------------------------------------------------


def test_generated_images_are_a_function_of_the_seed(model: TrainedVAE) -> None:
    first, again, other = (model.generate(6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(torch.unique(first, dim=0)) == 6
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("num", [1, 8, 63, 65])
def test_the_first_images_do_not_depend_on_how_many_are_generated(model: TrainedVAE, num: int) -> None:
    torch.testing.assert_close(model.generate(100)[:num], model.generate(num), rtol=0, atol=1e-6)


def test_temperature_scales_the_prior(model: TrainedVAE) -> None:
    at_zero = model.generate(3, temperature=0.0)
    torch.testing.assert_close(at_zero, model.decode(torch.zeros(3, model.latent_dim)), rtol=0, atol=1e-6)


def test_generating_leaves_and_ignores_the_global_random_state(model: TrainedVAE) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images = model.generate(4, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(model.generate(4, seed=1), images)


def test_encode_is_the_posterior_mean_and_never_a_sample(model: TrainedVAE) -> None:
    images = model.test_images(9)
    codes = model.encode(images)
    assert torch.equal(codes, model.posterior(images).mean)
    assert torch.equal(codes, model.encode(images))
    assert len(torch.unique(codes, dim=0)) == 9


def test_a_reconstruction_is_the_decoded_code(model: TrainedVAE) -> None:
    images = model.test_images(9)
    assert torch.equal(model.reconstruct(images), model.decode(model.encode(images)))


def test_reconstructions_are_nearer_to_their_images_than_to_others(model: TrainedVAE) -> None:
    images = model.test_images(50)
    distances = torch.cdist(model.reconstruct(images).flatten(1), images.flatten(1))
    own = distances.diagonal().mean()
    assert float(own) < 0.8 * float(distances.mean())


def test_bytes_and_floats_of_the_same_image_agree(model: TrainedVAE) -> None:
    as_bytes = Splits.open(model.experiment).test.first(7)
    as_floats = as_bytes.double() / 255
    torch.testing.assert_close(model.encode(as_bytes), model.encode(as_floats), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.reconstruct(as_bytes), model.reconstruct(as_floats), rtol=1e-5, atol=1e-6)


def test_using_a_model_leaves_its_weights_alone(model: TrainedVAE) -> None:
    before = flat_weights(model).clone()
    model.evaluate("test")
    model.generate(3)
    assert torch.equal(flat_weights(model), before)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


# --- interpolation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(INTERPOLATIONS))
def test_a_path_begins_and_ends_with_the_reconstructions(model: TrainedVAE, method: Method) -> None:
    images = model.test_images(6)
    start, end = images[:3], images[3:]
    path = model.interpolate(start, end, steps=5, method=method)
    assert path.shape == (3, 5, 1, 8, 8)
    # sin(w) / sin(w) and products of other sizes: a few float32 roundings
    torch.testing.assert_close(path[:, 0], model.reconstruct(start), rtol=0, atol=2e-5)
    torch.testing.assert_close(path[:, -1], model.reconstruct(end), rtol=0, atol=2e-5)
    assert float((path[:, 2] - path[:, 0]).abs().max()) > 0.01


def codes(*, n: int = 4, latent_dim: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    a, b = torch.randn(2, n, latent_dim, generator=generator, dtype=torch.float64)
    return 2.5 * F.normalize(a), 2.5 * F.normalize(b)


def test_spherical_keeps_the_norm_of_equal_codes_and_turns_at_constant_speed() -> None:
    a, b = codes()
    path = INTERPOLATIONS["spherical"](a, b, torch.linspace(0, 1, 7, dtype=torch.float64))
    torch.testing.assert_close(path.norm(dim=2), torch.full((4, 7), 2.5, dtype=torch.float64), rtol=1e-12, atol=0)
    angles = torch.acos((path[:, 1:] * path[:, :-1]).sum(2) / 2.5**2)
    whole = torch.acos((a * b).sum(1) / 2.5**2)
    torch.testing.assert_close(angles, whole[:, None].expand(-1, 6) / 6, rtol=1e-7, atol=1e-9)


def test_spherical_at_a_right_angle_is_the_circle() -> None:
    a, b = torch.eye(2, dtype=torch.float64).split(1)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = torch.stack([torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2)], dim=1)[None]
    torch.testing.assert_close(INTERPOLATIONS["spherical"](a, b, t), expected, rtol=0, atol=1e-15)


def test_linear_is_the_straight_line() -> None:
    a, b = codes()
    path = INTERPOLATIONS["linear"](a, b, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    torch.testing.assert_close(path, torch.stack([a, 0.75 * a + 0.25 * b, b], dim=1), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-9, 3.0, -1.0])
def test_spherical_between_parallel_codes_is_finite_and_has_the_right_ends(factor: float) -> None:
    a, _ = codes()
    path = INTERPOLATIONS["spherical"](a, factor * a, torch.linspace(0, 1, 4, dtype=torch.float64))
    assert bool(path.isfinite().all())
    torch.testing.assert_close(path[:, [0, -1]], torch.stack([a, factor * a], dim=1), rtol=1e-9, atol=1e-9)


# --- hierarchies and spatial latents --------------------------------------------------------------------

LADDERS = {
    "dense": {"name": "ladder", "hidden": [24, 16, 12], "upper_dims": [2, 3]},
    "conv": {"name": "ladder", "kind": "conv", "channels": [8, 10], "latent_groups": [1, 2]},
}


@pytest.fixture(params=["dense standard", "conv standard", "conv flow", "dense mixture", "conv vamp"])
def hierarchy(request: pytest.FixtureRequest, model: TrainedVAE) -> TrainedVAE:
    """A ladder with random weights and the images of the run."""
    kind, prior = request.param.split()
    sections = {"model": {"network": LADDERS[kind], "latent_dim": 4, "prior": {"name": prior}}}
    experiment = Experiment.from_dict({**model.experiment.to_dict(), **sections})
    return TrainedVAE(build_vae(experiment, model.image_shape, seed=2), experiment, model.checkpoint)


@pytest.mark.parametrize("method", sorted(INTERPOLATIONS))
def test_a_path_of_a_hierarchy_leads_through_the_noise_of_each_group(hierarchy: TrainedVAE, method: Method) -> None:
    images = hierarchy.test_images(6)
    start, end = images[:3], images[3:]
    path = hierarchy.interpolate(start, end, steps=5, method=method)
    # (z - m) / s * s + m, and what follows from it: some float32 roundings
    torch.testing.assert_close(path[:, 0], hierarchy.reconstruct(start), rtol=0, atol=2e-5)
    torch.testing.assert_close(path[:, -1], hierarchy.reconstruct(end), rtol=0, atol=2e-5)
    shapes = hierarchy.model.latent_shapes
    ends = []
    for side in (start, end):
        top, *lower = hierarchy.groups(side)
        eps = [coordinates(top), *((g.z - g.prior.mean) / g.prior.sigma for g in lower)]
        ends.append(torch.cat([each.flatten(1) for each in eps], dim=1))
    quarter = INTERPOLATIONS[method](*ends, torch.tensor([0.25]))[:, 0]
    parts = quarter.split([math.prod(shape) for shape in shapes], dim=1)
    noise = [part.reshape(3, *shape) for part, shape in zip(parts, shapes, strict=True)]
    params, _ = hierarchy.model.top_down(None, lambda group, q, p: movable(p).rsample(noise[group]), 3)
    torch.testing.assert_close(path[:, 1], hierarchy.model.likelihood.mean(params), rtol=0, atol=2e-5)


def test_a_traversal_of_a_hierarchy_shows_the_most_informative_of_all_groups(hierarchy: TrainedVAE) -> None:
    moved = hierarchy.traverse(hierarchy.test_images(50), num_dimensions=5, steps=3)
    assert moved.images.shape == (5, 3, *hierarchy.image_shape)
    assert bool(((moved.images >= 0) & (moved.images <= 1)).all())
    assert moved.rates == sorted(moved.rates, reverse=True)
    # in the middle of a row all groups are at the start; under a mixture, which starts at a code, of lower groups' rows
    middle = moved.images[[row for row, group in enumerate(moved.groups) if group or not moved.is_at_image], 1]
    torch.testing.assert_close(middle, middle[:1].expand_as(middle), rtol=0, atol=1e-6)


def test_a_representation_is_the_mean_of_the_top_group(hierarchy: TrainedVAE, model: TrainedVAE) -> None:
    images = model.test_images(5)
    assert torch.equal(model.representation(images), model.encode(images))
    top = hierarchy.groups(images)[0].posterior
    assert top is not None
    vectors = hierarchy.representation(images)
    assert torch.equal(vectors, top.mean.flatten(1))
    assert vectors.shape == (5, math.prod(hierarchy.model.latent_shapes[0]))
    codes = hierarchy.encode(images)
    assert codes.shape == (5, hierarchy.latent_dim)
    assert torch.equal(codes[:, : vectors.shape[1]], vectors)


@pytest.mark.parametrize("hierarchy", ["dense standard", "conv standard", "conv flow"], indirect=True)
def test_a_hierarchy_at_temperature_0_is_at_the_means_of_all_its_priors(hierarchy: TrainedVAE) -> None:
    at_zero = hierarchy.generate(2, temperature=0.0)
    params, _ = hierarchy.model.top_down(None, lambda group, q, p: p.mean, 2)
    torch.testing.assert_close(at_zero, hierarchy.model.likelihood.mean(params), rtol=0, atol=1e-6)
    assert not torch.allclose(at_zero, hierarchy.generate(2, temperature=1.0))


def test_a_code_of_a_hierarchy_is_decoded_to_the_reconstruction(hierarchy: TrainedVAE) -> None:
    images = hierarchy.test_images(4)
    made = hierarchy.decode(hierarchy.encode(images))
    torch.testing.assert_close(made, hierarchy.model.reconstruct(images), rtol=0, atol=2e-5)
    assert torch.equal(made, hierarchy.reconstruct(images))


def test_the_evaluation_of_a_hierarchy_has_the_rate_of_each_group(hierarchy: TrainedVAE) -> None:
    found = hierarchy.evaluate("val")
    rates = [found[f"val/rate_group_{g}"] for g in range(1, 4)]
    assert "val/rate_group_4" not in found
    assert sum(rates) == pytest.approx(found["val/rate"], rel=1e-5)  # float32 sums


# --- evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_equals_the_metrics_recorded_in_the_checkpoint(model: TrainedVAE, split: str) -> None:
    found = model.evaluate(split, "elbo")  # type: ignore[arg-type]
    assert set(found) == {f"{split}/{name}" for name in ("nelbo", "distortion", "rate")}
    # training ran under its own matmul precision, exact to 1e-5 of the largest element
    assert found == pytest.approx({key: model.checkpoint.metrics[key] for key in found}, rel=1e-6)


def test_evaluation_is_deterministic(model: TrainedVAE) -> None:
    assert model.evaluate("test") == model.evaluate("test")


def test_evaluation_samples_z_and_does_not_use_the_posterior_mean(model: TrainedVAE) -> None:
    """NUMBERS.md: a test value far below the train value means z = mu, which is not the ELBO."""
    images = model.test_images(359)
    posterior = model.posterior(images)
    of_mean = F.binary_cross_entropy(model.decode(posterior.mean), images, reduction="sum") / 359
    found = model.evaluate("test")
    assert found["test/distortion"] > float(of_mean) + 0.1
    (group,) = model.groups(images)
    assert found["test/rate"] == pytest.approx(float(group.rate().mean()), rel=1e-5)


def test_nelbo_has_beta_one_whatever_the_loss_had(model: TrainedVAE) -> None:
    found, trained = model.evaluate("test"), model.checkpoint.metrics
    assert model.experiment.flat()["objective.beta"] == 0.25
    assert found["test/nelbo"] == pytest.approx(found["test/distortion"] + found["test/rate"], rel=1e-12)
    assert trained["train/loss"] == pytest.approx(trained["train/distortion"] + 0.25 * trained["train/rate"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_does_not_depend_on_the_batch_size(model: TrainedVAE, batch_size: int) -> None:
    other = TrainedVAE.load(model.checkpoint.path)
    other.experiment = model.experiment.with_overrides({"training.evaluation_batch_size": batch_size})
    assert model.experiment.training.evaluation_batch_size == 1000
    assert other.evaluate("test") == pytest.approx(model.evaluate("test"), rel=1e-6)


def test_labels_say_what_the_numbers_mean(model: TrainedVAE) -> None:
    labels = model.evaluate("val").labels
    assert labels["data"] == "digits"
    assert labels["split"] == "val"
    assert labels["likelihood"] == "bernoulli"
    assert labels["beta"] == 0.25
    assert labels["z"] == "sampled"
    assert labels["epoch"] == model.checkpoint.epoch
    assert (labels["weights"], labels["num_images"]) == ("last", 100)
    assert "binarization" in labels
    assert "num_samples" not in labels  # of nothing here


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 1, 8, 7), (3, 2, 8, 8), (3, 64)])
def test_images_of_another_shape_are_refused_with_both_shapes(model: TrainedVAE, shape: tuple[int, ...]) -> None:
    for use in (model.encode, model.reconstruct, model.posterior):
        with pytest.raises(UserError, match=r"got shape .*should be \(N, .*1, 8, 8"):
            use(torch.rand(shape))


def nested(x: torch.Tensor, *, layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in prototype stage"
        return torch.nested.nested_tensor(list(x), layout=layout)


RANGE = r"should be uint8, bool, or floats in \[0, 1\]"


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x: x * 255, f"got float32 from 0 to 255, {RANGE}; try images / 255"),
        (lambda x: 2 * x - 1, f"got float32 from -1 to 1, {RANGE}; try .images . 1. / 2"),
        (lambda x: (x * 255).long(), f"got int64 from 0 to 255, {RANGE}; convert them to uint8"),
        (lambda x: (x * 65535).to(torch.uint16), f"got uint16 from 0 to 65535, {RANGE}$"),
        (lambda x: (x * 100).to(torch.int8), "got int8 from 0 to 100"),
        (lambda x: x - 3, f"got float32 from -3 to -2, {RANGE}$"),
        (lambda x: x * torch.nan, f"got float32 with NaN or infinity, {RANGE}$"),
        (lambda x: x.half() / 0, "got float16 with NaN or infinity"),
        (lambda x: x.to(torch.complex64), f"got complex64, {RANGE}$"),
        (lambda x: x[:0], r"got shape \(0, 1, 8, 8\), should be \(N, 1, 8, 8\) with at least one image"),
        (lambda x: [[1.0], [2.0, 3.0]], "got a list that is no array of numbers"),
        (lambda x: None, "got a NoneType that is no array of numbers"),
        (lambda x: x.to_sparse(), "got a sparse tensor, should be a dense tensor"),
        (lambda x: x.to("meta"), "got a meta tensor, should be a dense tensor"),
        (lambda x: nested(x, layout=torch.strided), "got a nested tensor, should be a dense tensor"),
        (lambda x: nested(x, layout=torch.jagged), "got a nested tensor, should be a dense tensor"),
        (lambda x: np.ma.masked_less(x.numpy(), 0.5), r"got a masked array, .*; try .filled\(0\)"),
        (lambda x: x.movedim(1, -1), r"got shape \(5, 8, 8, 1\), .*; channels come first: try np.moveaxis"),
    ],
)
def test_images_in_another_range_are_refused_with_what_to_try(
    model: TrainedVAE, convert: Callable[[torch.Tensor], Any], message: str
) -> None:
    x = model.test_images(5)
    images = convert(x)
    uses = [model.encode, model.posterior, model.groups, model.reconstruct, model.traverse]
    for use in [*uses, lambda images: model.interpolate(x, images), lambda images: model.interpolate(images, x)]:
        with pytest.raises(UserError, match=f"images: {message}"):
            use(images)


def elsewhere(model: TrainedVAE, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, *, height: int = 8) -> TrainedVAE:
    """The model where the test images of its source are others than it was trained with."""

    original = Digits.load

    def load(self: Digits, split: str) -> Decoded:
        pixels, columns = original(self, split)
        return pixels[:, :, :height] if split == "train" else 255 - pixels[:, :, :height], columns

    monkeypatch.setattr(Digits, "load", load)
    monkeypatch.setattr(Digits, "fingerprint", lambda self: f"others of height {height}")
    return TrainedVAE.load(model.checkpoint.path, data={"data.cache_dir": cache_dir})


def test_other_images_than_those_of_the_run_are_named(
    model: TrainedVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = elsewhere(model, tmp_path, monkeypatch)
    assert other.evaluate("val", "elbo").keys() == {"val/nelbo", "val/distortion", "val/rate"}
    assert caplog.text == ""
    for use in (lambda: other.evaluate("test"), lambda: other.test_images(3)):
        caplog.clear()
        use()
        assert "data.source: digits has other test images than the run had" in caplog.text
    other = elsewhere(model, tmp_path, monkeypatch, height=7)
    for use in (lambda: other.evaluate("test"), lambda: other.evaluate("train"), lambda: other.test_images(3)):
        with pytest.raises(UserError, match=r"images of shape \(1, 7, 8\), where the run's had"):
            use()


def test_the_images_of_a_run_may_lie_elsewhere_and_nothing_else_may_change(model: TrainedVAE, tmp_path: Path) -> None:
    moved = TrainedVAE.load(model.checkpoint.path, data={"data.cache-dir": str(tmp_path), "data.num_validation": 100})
    assert moved.evaluate("val") == model.evaluate("val")
    assert list(tmp_path.glob("digits-*/train-*.arrow")) != []
    for key, value in {"data.num_validation": 9, "optim.lr": 0.5, "run.seed": 8, "data.source": "mnist"}.items():
        with pytest.raises(UserError, match=f"{key}: got .*, but of digits only data.cache_dir can differ"):
            TrainedVAE.load(model.checkpoint.path, data={key: value})


def test_a_split_that_does_not_exist_is_refused(model: TrainedVAE) -> None:
    with pytest.raises(UserError, match="split: got 'validation', should be train, val or test"):
        model.evaluate("validation")  # type: ignore[arg-type]


def test_tensors_arrays_and_lists_of_every_allowed_type_are_the_same_images(model: TrainedVAE) -> None:
    as_bytes = Splits.open(model.experiment).test.first(4)
    floats = as_bytes.float() / 255
    expected = model.encode(floats)
    same = [
        floats.numpy(),
        floats.tolist(),
        list(floats),
        floats.numpy().astype(">f8"),
        as_bytes.numpy(),
        floats + 1e-7,
    ]
    for images in [*same, (2 * floats - 1 + 1) / 2]:
        torch.testing.assert_close(model.encode(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.encode(floats.half()), expected, rtol=0, atol=1e-2)
    assert torch.equal(model.encode(floats > 0.5), model.encode((floats > 0.5).float()))


def test_codes_may_be_of_any_float_type_and_must_be_finite(model: TrainedVAE) -> None:
    z = model.encode(model.test_images(3))
    expected = model.decode(z)
    for same in (z.double(), z.double().numpy(), z.tolist(), z.requires_grad_(False)):
        assert torch.equal(model.decode(same), expected)
    assert torch.equal(decoder_of(model.model)(z.tolist()), expected)
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(UserError, match="z: got complex numbers, NaN or infinity, should be finite"):
            model.decode(z + bad)
    with pytest.raises(UserError, match="z: got a sparse tensor, should be a dense tensor"):
        model.decode(z.to_sparse())
    with pytest.raises(UserError, match=r"z: got a code with 3e.38, which gives images with NaN or infinity"):
        model.decode(torch.full_like(z, 3e38))
    with pytest.raises(UserError, match=r"z: got shape \(0, 5\), should be \(N, 5\) with at least one code"):
        model.decode(z[:0])


@pytest.mark.parametrize("num", [0, -1, 2.0, "3"])
def test_a_number_of_test_images_that_is_none_is_refused(model: TrainedVAE, num: Any) -> None:
    with pytest.raises(UserError, match=f"num: got {num!r}, should be a whole number, at least 1"):
        model.test_images(num)
    assert len(model.test_images(10**6)) == 359


def test_impossible_requests_are_refused(model: TrainedVAE) -> None:
    images = model.test_images(2)
    with pytest.raises(UserError, match="num: got 0"):
        model.generate(0)
    with pytest.raises(UserError, match="temperature: got nan"):
        model.generate(2, temperature=math.nan)
    with pytest.raises(UserError, match="extent: got inf"):
        model.traverse(images, extent=math.inf)
    with pytest.raises(UserError, match="steps: got 1"):
        model.interpolate(images, images, steps=1)
    for method in ("cubic", ["linear"]):
        with pytest.raises(UserError, match=rf"method: got {re.escape(repr(method))}, should be linear or spherical"):
            model.interpolate(images, images, method=method)  # type: ignore[arg-type]


NO_NUMBERS = [True, None, "3", math.nan, math.inf, 1j, 10**400]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.5, -1])
def test_what_is_no_whole_number_is_refused(model: TrainedVAE, value: Any) -> None:
    images = model.test_images(2)
    uses: dict[str, Callable[[], object]] = {
        "num": lambda: model.generate(value),
        "seed": lambda: model.generate(1, seed=value),
        "steps": lambda: model.traverse(images, steps=value),
        "num_dimensions": lambda: model.traverse(images, num_dimensions=value),
    }
    for name, use in uses.items():
        with pytest.raises(UserError, match=rf"^{name}: got .*, should be a whole number, at least [012] and below"):
            use()


@pytest.mark.parametrize("value", [*NO_NUMBERS, -math.inf, 1e39])
def test_what_is_no_finite_number_is_refused(model: TrainedVAE, value: Any) -> None:
    with pytest.raises(UserError, match=r"^temperature: got .*, should be a finite number from 0 to 3.403e.38"):
        model.generate(1, temperature=value)
    with pytest.raises(UserError, match=r"^extent: got .*, should be a finite number from -3.403e.38 to 3.403e.38"):
        model.traverse(model.test_images(2), extent=value)


def test_numbers_may_be_numpy_s(model: TrainedVAE) -> None:
    images = model.generate(np.int64(2), seed=np.uint8(3), temperature=np.float32(0.5))  # type: ignore[arg-type]
    assert torch.equal(images, model.generate(2, seed=3, temperature=0.5))
    assert model.interpolate(images, images, steps=np.int8(100)).shape[:2] == (2, 100)  # type: ignore[arg-type]


def test_images_that_are_not_finite_are_refused_wherever_they_come_from(model: TrainedVAE) -> None:
    uses: dict[str, Callable[[], object]] = {
        "temperature: got 3e": lambda: model.generate(6, temperature=3e38),
        "extent: got 3e": lambda: model.traverse(model.test_images(2), extent=3e38),
        "z: got a code with 3e": lambda: model.decode(torch.full((1, model.latent_dim), 3e38)),
    }
    for given, use in uses.items():
        with pytest.raises(
            UserError, match=rf"^{given}.38, which gives images with NaN or infinity; try a number nearer to 0"
        ):
            use()


class Unbounded(Bernoulli):
    def mean(self, params: torch.Tensor) -> torch.Tensor:
        return 100 * params


def test_means_outside_of_the_unit_interval_are_warned_of_once(
    model: TrainedVAE, caplog: pytest.LogCaptureFixture
) -> None:
    own = TrainedVAE.load(model.checkpoint.path)
    own.model.likelihood = Unbounded()
    for _ in range(2):
        own.generate(3)
        own.reconstruct(own.test_images(3))
        own.traverse(own.test_images(3))
    (record,) = caplog.records
    assert record.getMessage().startswith("likelihood: Unbounded.mean gives values outside of [0, 1]")


def test_more_images_than_one_call_can_make_are_refused(model: TrainedVAE) -> None:
    images = model.test_images(2)
    uses: dict[str, Callable[[], object]] = {
        "num: asks for 1000000000000000": lambda: model.generate(10**15),
        "steps: asks for 2000000": lambda: model.interpolate(images, images, steps=10**6),
        "steps: asks for 5000000": lambda: model.traverse(images, steps=10**6),
    }
    for asked, use in uses.items():
        with pytest.raises(UserError, match=f"^{asked} images, should be at most 1000000: they are in memory together"):
            use()


NO_DEVICES = ["gpu", "meta", "xla", "cuda:99", 99, None, True, 1.5, torch.device("meta")]


@pytest.mark.parametrize(
    ("argument", "values", "allowed"),
    [
        ("weights", ["best", "", ["last"], 1, False], "should be averaged or last"),
        ("device", NO_DEVICES, "this machine has cpu"),
        ("data", ["x", "", ["data.root"], 3], "should be a mapping, as in"),
    ],
)
def test_loading_refuses_what_there_is_not(model: TrainedVAE, argument: str, values: list[Any], allowed: str) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"^{argument}: got {re.escape(repr(value))}, {allowed}"):
            TrainedVAE.load(model.checkpoint.path, **{argument: value})


def test_the_devices_of_the_machine_are_named(model: TrainedVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in ("cuda:2", "mps"):
        with pytest.raises(UserError, match=f"^device: got {device!r}, this machine has cpu, cuda:0, cuda:1$"):
            TrainedVAE.load(model.checkpoint.path, device=device)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", 0])
def test_an_accelerator_that_is_not_there_is_refused(model: TrainedVAE, device: Any) -> None:
    with pytest.raises(UserError, match=f"^device: got {device!r}, this machine has cpu$"):
        TrainedVAE.load(model.checkpoint.path, device=device)


def test_paths_between_unequal_numbers_of_images_are_refused(model: TrainedVAE) -> None:
    with pytest.raises(UserError, match=r"start|end"):
        model.interpolate(model.test_images(3), model.test_images(2))


def test_codes_of_another_size_are_refused(model: TrainedVAE) -> None:
    with pytest.raises(UserError, match="z: got shape"):
        model.decode(torch.zeros(3, model.latent_dim + 1))


def test_validation_of_a_run_without_one_is_refused(quick: Experiment) -> None:
    result = train(quick.with_overrides({"data.num_validation": 0, "training.epochs": 1}))
    with pytest.raises(UserError, match=r"split val: .*data\.num_validation 0"):
        TrainedVAE.load(result.run_dir).evaluate("val")
