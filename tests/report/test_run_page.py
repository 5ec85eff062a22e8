"""`report.html` of a run: its numbers are the run's and its model's, and a user's text in it is never code."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.report.pages import HOSTILE, HOSTILE_ATTRIBUTE, Page
from tests.storage.servers import ObjectStore
from vae_ray import TrainedVAE, TrainResult
from vae_ray.cli.main import main
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.report.examination import THUMBNAIL_BYTES, Examination, _data_uris, examine
from vae_ray.report.latent_map import latent_maps
from vae_ray.report.run_charts import MOST_BARS, label_colors, map_points, rates_by_dimension
from vae_ray.report.run_page import MOST_FRAMES, frames, write_run_report
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.directory import open_directory
from vae_ray.storage.records import append_records, with_checksum

NUM_TEST = 359
"""Test images of the digits."""


def copied(trained: TrainResult, to: Path) -> Path:
    shutil.copytree(trained.run_dir, to)
    return to


@pytest.fixture(scope="module")
def run(trained_run: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose directory, warnings and evaluations are hostile."""
    path = copied(trained_run, tmp_path_factory.mktemp("run") / HOSTILE)
    append_records(path / "warnings.jsonl", [{"warning": HOSTILE_ATTRIBUTE}])
    hostile = Evaluation({HOSTILE: 1.5}, {}, {}, {HOSTILE_ATTRIBUTE: HOSTILE}, [HOSTILE_ATTRIBUTE])
    (path / "evaluations").mkdir()
    (path / "evaluations" / "hostile.json").write_text(json.dumps(with_checksum(hostile.to_dict())))
    return path


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    write_run_report(run)
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def examination(run: Path) -> Examination:
    return examine(TrainedVAE.load(run))


def test_hostile_text_is_text_and_nothing_is_fetched(page: Page) -> None:
    page.assert_self_contained()
    assert HOSTILE in page.text("td"), "a metric's name"
    assert any(HOSTILE in text for text in page.text("code")), "the directory"
    assert page.text("p").count(HOSTILE_ATTRIBUTE) == 2, "a warning of the run and one of an evaluation"


def test_curves_are_the_recorded_metrics_of_each_split(page: Page, trained_run: TrainResult) -> None:
    for term in ("nelbo", "distortion", "rate"):
        spec = page.charts[f"curves-{term}"]
        drawn = {(point["series"], point["epoch"]): point["value"] for point in spec["data"]["values"]}
        splits = ("train", "val", "test")
        expected = {(s, record["epoch"]): record[f"{s}/{term}"] for s in splits for record in trained_run.history}
        assert drawn == expected
        assert spec["layer"][0]["data"]["values"] == [{"epoch": trained_run.best_epoch}]


def test_only_settings_that_change_have_a_curve(page: Page, trained_run: TrainResult) -> None:
    drawn = {name for name in page.charts if name.startswith("settings-")}
    assert drawn == {"settings-lr"}, "beta is constant"
    values = [point["value"] for point in page.charts["settings-lr"]["data"]["values"]]
    assert values == [record["lr"] for record in trained_run.history]


def test_the_heading_has_the_evaluation_of_the_best_model(page: Page, trained_run: TrainResult) -> None:
    found = TrainedVAE.load(trained_run.run_dir).evaluate("test")
    nelbo, error = found["test/nelbo"], found.standard_errors["test/nelbo"]
    assert f"{nelbo:,.2f} ± {error:.2f} nats" in page.text("dd")
    assert f"{found['test/active_units']:.0f} of 5" in page.text("dd")
    assert f"{trained_run.best_epoch} of 3" in page.text("dd")


def test_bars_are_the_rates_of_dimensions_and_add_up(page: Page, examination: Examination) -> None:
    bars = page.charts["rates"]["data"]["values"]
    assert [bar["rate"] for bar in bars] == sorted((bar["rate"] for bar in bars), reverse=True)
    assert sum(bar["rate"] for bar in bars) == pytest.approx(examination.evaluation["test/rate"], rel=1e-6)
    assert {bar["dimension"] for bar in bars} == {f"z[{d}]" for d in range(5)}


def test_many_dimensions_are_cut_to_those_of_most_rate() -> None:
    rates = np.random.default_rng(0).uniform(0, 1, 3 * MOST_BARS)
    bars = rates_by_dimension([f"z[{d}]" for d in range(len(rates))], rates.tolist(), [])["data"]["values"]
    assert [bar["rate"] for bar in bars] == sorted(rates, reverse=True)[:MOST_BARS]


def test_reconstructions_are_those_of_smallest_and_largest_squared_error(
    examination: Examination, trained_run: TrainResult
) -> None:
    model = TrainedVAE.load(trained_run.run_dir)
    x = model.test_images(NUM_TEST)
    errors = (x - model.reconstruct(x)).double().square().sum((1, 2, 3)).sort().values
    # batches of another size sum in another order
    assert np.sort(examination.squared_errors) == pytest.approx(errors.numpy(), rel=1e-4)
    found = {name: [pair.squared_error for pair in pairs] for name, pairs in examination.pairs.items()}
    assert found["smallest"] == pytest.approx(errors[:8].tolist(), rel=1e-4)
    assert found["largest"] == pytest.approx(errors[-8:].tolist(), rel=1e-4)
    assert found["middle"] == pytest.approx(errors[175:183].tolist(), rel=1e-4), "of 359"


def test_the_map_has_every_image_with_its_label_and_its_picture(page: Page, examination: Examination) -> None:
    rows = page.datasets["map"]
    labels = examination.labels["label"]
    assert [row["label0"] for row in rows] == labels.tolist()
    assert len(rows) == NUM_TEST
    assert all(row["tooltip"]["image"].startswith("data:image/png;base64,") for row in rows)
    assert page.charts["map-0"]["data"] == page.charts["map-1"]["data"] == {"name": "map"}, "which is in the page once"
    # PCA against the singular vectors
    codes = examination.codes - examination.codes.mean(0)
    _, _, directions = np.linalg.svd(codes, full_matrices=False)
    drawn = np.array([[row["x0"], row["y0"]] for row in rows])
    assert np.abs(drawn) == pytest.approx(np.abs(codes @ directions[:2].T), rel=1e-6, abs=1e-8)


def test_t_sne_keeps_clusters_together() -> None:
    generator = np.random.default_rng(1)
    centres = generator.normal(0, 20, (3, 7))
    cluster = generator.integers(0, 3, 90)
    embedding = latent_maps(centres[cluster] + generator.normal(0, 1, (90, 7)))[1].positions
    distances = np.linalg.norm(embedding[:, None] - embedding[None], axis=2) + np.diag([np.inf] * 90)
    assert (cluster[distances.argmin(1)] == cluster).all()


def test_umap_is_drawn_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In CI it is not: there a stand-in shows that its embedding is what is drawn."""
    codes = np.random.default_rng(6).normal(size=(40, 5))
    if importlib.util.find_spec("umap") is None:

        class Umap:
            def __init__(self, **settings: Any) -> None:
                assert settings == {"n_neighbors": 15, "random_state": 0, "n_jobs": 1}

            def fit_transform(self, components: NDArray[np.float64]) -> NDArray[np.float32]:
                return components[:, 2:4].astype(np.float32)

        module = ModuleType("umap")
        module.UMAP = Umap  # type: ignore[attr-defined]
        module.__spec__ = ModuleSpec("umap", None)
        monkeypatch.setitem(sys.modules, "umap", module)
    maps = latent_maps(codes)
    assert [each.title for each in maps] == ["PCA", "t-SNE", "UMAP"]
    assert maps[2].positions.shape == (40, 2)
    assert np.isfinite(maps[2].positions).all()
    assert [each.title for each in latent_maps(codes[:15])] == ["PCA", "t-SNE"]  # fewer than it has neighbours


@pytest.mark.parametrize(
    ("codes", "titles"),
    [
        (np.zeros((40, 6)), []),
        (np.full((40, 6), np.nan), []),
        (np.eye(2), []),
        (np.random.default_rng(2).normal(size=(40, 1)), ["The latent dimension"]),
        (np.random.default_rng(3).normal(size=(40, 2)), ["The two latent dimensions"]),
        (np.random.default_rng(4).normal(size=(4, 3)), ["PCA", "t-SNE"]),
    ],
    ids=["equal", "not finite", "two images", "one dimension", "two dimensions", "four images"],
)
def test_maps_of_few_or_equal_codes(codes: NDArray[np.float64], titles: list[str]) -> None:
    maps = latent_maps(codes)
    assert [each.title for each in maps] == titles
    assert all(each.positions.shape == (len(codes), 2) and np.isfinite(each.positions).all() for each in maps)


def examined(num: int, labels: dict[str, NDArray[Any]], names: dict[str, list[str]] | None = None) -> Examination:
    evaluation = Evaluation({}, {}, {}, {}, [])
    return Examination(
        evaluation, [], [], np.zeros((num, 2)), labels, names or {}, np.arange(num) / 3, ["data:,"] * num, {}
    )


def test_labels_are_classes_or_numbers_by_how_many_values_they_have() -> None:
    labels = {HOSTILE: np.arange(40) % 3, "angle": np.arange(40) / 7, "same": np.zeros(40, dtype=int)}
    found = examined(40, labels, {HOSTILE: ["a", "b", HOSTILE_ATTRIBUTE]})
    rows = map_points(found, [])
    colors = label_colors(rows, [*labels])
    assert list(colors) == [HOSTILE, "angle"], "what is the same for all is no color"
    assert colors[HOSTILE]["scale"]["domain"] == sorted(["a", "b", HOSTILE_ATTRIBUTE])
    assert colors["angle"]["type"] == "quantitative"
    assert rows[5]["tooltip"] == {
        HOSTILE: HOSTILE_ATTRIBUTE, "angle": "0.714286", "same": "0", "squared error": "1.667", "image": "data:,"
    }  # fmt: skip


def test_thumbnails_of_large_colour_images_are_small() -> None:
    noise = torch.rand(3, 3, 200, 120, generator=torch.Generator().manual_seed(5))
    uris = _data_uris(noise)
    assert all(len(uri) <= len("data:image/jpeg;base64,") + 4 * (THUMBNAIL_BYTES + 2) / 3 for uri in uris)


@pytest.mark.parametrize(("num", "best"), [(1, 1), (24, 3), (25, 2), (1000, 777), (1000, 1)])
def test_frames_are_few_and_have_the_first_the_last_and_the_best(num: int, best: int, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "samples"
    folder.mkdir(parents=True)
    for epoch in range(1, num + 1):
        (folder / f"epoch={epoch:04d}.png").write_bytes(b"png")
    (folder / "epoch=x.png").touch()
    run = RunDirectory(tmp_path)
    epochs = [frame.epoch for frame in frames(run, "samples", best, most=MOST_FRAMES)]
    assert epochs == sorted(set(epochs))
    assert {1, best, num} <= set(epochs)
    assert len(epochs) == min(num, MOST_FRAMES) or len(epochs) == MOST_FRAMES - 1, "the best may be among the others"
    assert [frame.epoch for frame in frames(run, "samples", best, most=1)] == [best]


def test_a_run_whose_model_cannot_be_examined_has_a_page_that_says_why(
    trained_run: TrainResult, tmp_path: Path
) -> None:
    path = copied(trained_run, tmp_path / "run")
    weights = path / "checkpoints" / "epoch=0003" / "weights.safetensors"
    weights.write_bytes(b"cut")
    for checkpoint in ("epoch=0001", "epoch=0002"):
        shutil.rmtree(path / "checkpoints" / checkpoint, ignore_errors=True)
    result = write_run_report(path)
    page = Page((path / "report.html").read_text())
    page.assert_self_contained()
    (warning,) = result.warnings
    assert str(path) in warning
    assert any(warning in text for text in page.text("p"))
    assert {*page.charts} == {"curves-nelbo", "curves-distortion", "curves-rate", "settings-lr"}
    assert f"{result.metrics['test/nelbo']:,.2f} nats" in page.text("dd"), "as its checkpoint recorded"


def test_a_run_that_has_just_begun_has_a_page(trained_run: TrainResult, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    shutil.copy(Path(trained_run.run_dir) / "experiment.yaml", path)
    result = write_run_report(path)
    page = Page((path / "report.html").read_text())
    assert page.charts == {}
    assert result.best_checkpoint is None
    assert result.warnings == ["the run has no complete checkpoint yet"]
    assert "No epoch has ended." in page.text("p")
    assert "The run has no pictures of samples." in page.text("p")


def test_the_command_says_where_the_page_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == str(run / "report.html")
    assert answer["best_checkpoint"] == str(run / "checkpoints" / "epoch=0003")
    assert answer["warnings"] == []


def test_the_page_of_small_images_is_about_as_large_as_its_code(run: Path, page: Page) -> None:
    """3 MB: Vega-Lite's code has 0.9, and 359 images of 8x8 pixels 0.1."""
    assert (run / "report.html").stat().st_size < 3e6


def test_a_run_at_a_uri_has_its_page_there(trained_run: TrainResult, store: ObjectStore) -> None:
    uri = f"{store.uri}/report-of-a-run"
    there = open_directory(uri, key="run")
    for file in Path(trained_run.run_dir).rglob("*"):
        if file.is_file():
            there.write(file.relative_to(trained_run.run_dir).as_posix(), file.read_bytes())
    result = write_run_report(uri)
    assert result.report == f"{uri}/report.html"
    page = Page((there.read("report.html") or b"").decode())
    page.assert_self_contained()
    assert len(page.datasets["map"]) == NUM_TEST
