"""`report.html` is complete and in order, and a user's text in it is never code.

The sweep is real but small: four trials trained in this process, of which one was stopped and one diverged, and one
that failed before its first epoch. Every text that a user can set is hostile.
"""

import base64
import functools
import io
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import digits_in_this_process
from tests.report.pages import HOSTILE, HOSTILE_ATTRIBUTE, Page
from vae_ray import Experiment
from vae_ray.config.experiment import preset_names
from vae_ray.errors import UserError
from vae_ray.parallel.group import SingleProcess
from vae_ray.report.charts import trimmed
from vae_ray.report.pictures import data_uri, limit_of
from vae_ray.report.text import as_text, reproduction, short_names
from vae_ray.run_files.image_grids import png_bytes
from vae_ray.run_files.progress import format_nats
from vae_ray.training.fit import fit_epochs
from vae_ray.tuning import leaderboard
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord, read_trials, trial_experiment
from vae_ray.tuning.report.page import write_report

SEARCH = {"model.latent_dim": {"choice": [2, 5]}, "objective.beta": {"loguniform": [0.1, 8]}}
TRIALS: dict[str, tuple[dict[str, Any], int, str]] = {
    # proposed, epochs done, state
    "0000": ({"model.latent_dim": 5, "objective.beta": 0.25}, 2, "finished"),
    "0001": ({"model.latent_dim": 2, "objective.beta": 1.0}, 2, "finished"),
    "0002": ({"model.latent_dim": 5, "objective.beta": 0.125}, 1, "stopped"),
    "0003": ({"model.latent_dim": 5, "objective.beta": 8.0}, 1, "diverged"),
    "0004": ({"model.latent_dim": 2, "objective.beta": 0.5}, 0, "failed"),
}

REPEATED = {
    "0000": TRIALS["0000"],
    "0000-1": TRIALS["0000"],
    "0001": TRIALS["0001"],
    "0001-1": (TRIALS["0001"][0], 1, "diverged"),
}
"""Two configurations by two seeds."""


def build_sweep(
    path: Path, *, trials: dict[str, Any] = TRIALS, base: dict[str, Any] | None = None, **description: Any
) -> SweepDirectory:
    """A sweep's directory as a sweep leaves it, without Ray, with hostile text; `base` overrides its experiment."""
    directory = SweepDirectory(path)
    path.mkdir(parents=True)
    experiment = digits_in_this_process(path / "trials").with_overrides(
        {"training.epochs": 2, "workers.num": 1, "data.cache_dir": str(path / HOSTILE_ATTRIBUTE), **(base or {})}
    )
    defaults = {"metrics": ["val/nelbo"], "scheduler": "asha", "searcher": HOSTILE_ATTRIBUTE}
    content = {
        "experiment": experiment.to_dict(),
        "search": SEARCH,
        "num_trials": len(trials),
        **defaults,
        **description,
    }
    directory.write_description(content)
    for name, (overrides, epochs, state) in trials.items():
        reason = f"epoch {epochs + 1}: {HOSTILE} {HOSTILE_ATTRIBUTE}" if state in ("diverged", "failed") else ""
        directory.append_to_journal(
            {"trial": name, "event": "proposed", "overrides": overrides},
            {"trial": name, "event": "ended", "epoch": epochs, "state": state, "reason": reason},
        )
        if epochs:
            group = SingleProcess(torch.device("cpu"))
            own = trial_experiment(experiment, directory.location, name, overrides)
            training = fit_epochs(own, directory.trial(name).path, group)
            for _ in range(epochs):
                next(training)
            training.close()
    return directory


def reported(directory: SweepDirectory) -> str:
    """The report, written from the sweep's files."""
    records, description = read_trials(directory), directory.description()
    table = leaderboard.rows(records, description["metrics"], directory, description.get("repeats", 1))
    write_report(directory, records, table)
    return directory.report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, isolated_cache: Path) -> SweepDirectory:
    # the path contains the whole hostile text: its slash separates directories
    return build_sweep(tmp_path_factory.mktemp("sweep") / HOSTILE)


@pytest.fixture(scope="module")
def records(directory: SweepDirectory) -> list[TrialRecord]:
    return read_trials(directory)


@pytest.fixture(scope="module")
def page(directory: SweepDirectory) -> Page:
    return Page(reported(directory))


def test_hostile_text_is_text_and_never_an_element(page: Page) -> None:
    scripts = page.all("script")
    assert [script.get("type") for script in scripts] == ["application/json", "module", "module"]
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in page.all("img"))
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert sum(HOSTILE in text for text in page.text("td")) == 2, "the reasons of two trials"
    assert HOSTILE_ATTRIBUTE in "".join(page.text("dd")), "the searcher"


def test_a_hostile_trial_name_never_reaches_the_report(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "sweep", trials={})
    directory.append_to_journal({"trial": f"0002{HOSTILE}", "event": "proposed", "overrides": {}})
    with pytest.raises(UserError, match=r"trials\.jsonl: damaged"):
        reported(directory)


def test_nothing_is_fetched_and_only_our_two_scripts_may_run(page: Page) -> None:
    page.assert_self_contained()


def test_every_trial_is_listed_and_failed_trials_with_their_reasons(page: Page) -> None:
    ids = {attributes["id"] for attributes in page.all("div") if "id" in attributes}
    links = {link["href"] for link in page.all("a")}
    for name in TRIALS:
        assert f"trial-{name}" in ids
        assert f"#trial-{name}" in links
    assert len(page.all("figure")) == len(page.all("details")) == len(TRIALS)
    assert [text[:9] for text in page.text("td") if text.startswith("epoch ")] == ["epoch 2: ", "epoch 1: "]


def test_pictures_are_those_of_the_best_epoch_byte_for_byte(page: Page, records: list[TrialRecord]) -> None:
    files = {
        record.run.images / kind / f"epoch={record.best.epoch:04d}.png"
        for record in records
        for kind in ("samples", "reconstructions", "traversals")
        if record.best is not None
    }
    assert len(files) == 12
    assert {content for _, content in page.pictures} == {file.read_bytes() for file in files}


def _noise(*, width: int, height: int) -> bytes:
    """A PNG that nothing compresses."""
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return png_bytes(Image.fromarray(pixels))


def _opened(uri: str | None) -> tuple[str, int, Image.Image]:
    """Kind of file, bytes and picture of a data URI."""
    assert uri is not None
    kind, _, content = uri.partition(";base64,")
    file = base64.b64decode(content)
    return kind, len(file), Image.open(io.BytesIO(file))


def test_a_picture_that_is_too_large_is_a_jpeg_of_the_same_size_if_that_is_small_enough() -> None:
    gradient = np.linspace(0, 255, 400 * 300 * 3).reshape(300, 400, 3)
    noisy = gradient + np.random.default_rng(6).normal(0, 2, gradient.shape)
    png = png_bytes(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    assert len(png) > 100_000
    kind, size, picture = _opened(data_uri(png, limit=50_000))
    assert kind == "data:image/jpeg"
    assert size <= 50_000
    assert picture.size == (400, 300)
    assert np.abs(np.asarray(picture) - gradient).mean() < 4
    assert data_uri(png, limit=len(png)) == f"data:image/png;base64,{base64.b64encode(png).decode()}"


@pytest.mark.parametrize(("width", "height"), [(640, 480), (900, 90), (33, 1000)])
def test_a_picture_that_is_still_too_large_is_reduced_in_proportion(width: int, height: int) -> None:
    kind, size, picture = _opened(data_uri(_noise(width=width, height=height), limit=16_000))
    assert kind == "data:image/jpeg"
    assert 4_000 < size <= 16_000
    assert picture.width / picture.height == pytest.approx(width / height, rel=0.1)  # 10 pixels, rounded


def test_a_large_picture_that_was_torn_by_a_full_disk_is_left_out() -> None:
    png = _noise(width=200, height=100)
    for torn in (png[: len(png) // 2], png[:20], b"x" * 30_000, png[:5000] + b"\0" * 5000 + png[10000:]):
        assert data_uri(torn, limit=10) is None


def test_the_pictures_of_a_hundred_trials_have_eight_megabytes() -> None:
    assert 300 * limit_of(300) <= 8e6
    assert limit_of(1) == limit_of(0) == 250_000


def test_the_gallery_goes_by_latent_dim_and_then_by_beta(page: Page) -> None:
    order = re.findall(r"<h3>latent_dim (\d+)</h3>|<b>beta ([\d.]+)</b>", page.html)
    assert order == [("2", ""), ("", "0.5"), ("", "1"), ("5", ""), ("", "0.125"), ("", "0.25"), ("", "8")]


SEARCHED: dict[str, tuple[str, list[Any], list[str], dict[str, Any]]] = {
    # key, values, captions in order, and what else the experiment has
    "beta": ("objective.beta", [2.0, 0.5], ["0.5", "2"], {}),
    "objective": ("objective.name", ["mmd", "elbo"], ["elbo", "mmd"], {}),
    "sigma": ("likelihood.sigma", ["learned", "fixed"], ["fixed", "learned"], {"likelihood": "gaussian"}),
    "network": ("model.network.name", ["mlp", "ladder"], ["ladder", "mlp"], {}),
    "hidden": ("model.network.hidden", [[19, 8], [9, 8]], ["[9, 8]", "[19, 8]"], {}),
    "channels": ("model.network.channels", [[8], [4, 12], [4]], ["[4]", "[4, 12]", "[8]"], {"model.network": "conv"}),
    "attention": (
        "model.network.attention",
        [True, False],
        ["false", "true"],
        {"model.network": "resnet", "model.network.channels": [8], "model.network.groups": 2},
    ),
}


@pytest.mark.parametrize(("key", "values", "captions", "base"), SEARCHED.values(), ids=SEARCHED)
def test_the_gallery_and_the_plane_show_whatever_was_searched(
    key: str, values: list[Any], captions: list[str], base: dict[str, Any], tmp_path: Path
) -> None:
    search, trials = {key: {"choice": values}}, [{key: value} for value in values]
    trained = {f"{number:04}": (overrides, 1, "finished") for number, overrides in enumerate(trials)}
    directory = build_sweep(tmp_path / "sweep", base=base, trials=trained, search=search, scheduler="none")
    page = Page(reported(directory))
    name = key.removesuffix(".name").rpartition(".")[2]
    assert re.findall(rf"<figcaption><b>{name} ([^<]+)</b>", page.html) == captions
    assert "<h3>latent_dim" not in page.html
    plane = page.charts["plane"]
    color = plane["layer"][1]["encoding"]["color"]
    assert color["title"] == name
    drawn = {point["trial"]: as_text(point["color"]) for point in plane["data"]["values"]}
    assert drawn == {f"{number:04}": as_text(value) for number, value in enumerate(values)}
    if name == "beta":
        assert (color["type"], color["scale"]["type"]) == ("quantitative", "log")
    else:
        assert (color["type"], color["scale"]["domain"]) == ("nominal", captions)
    axis = [label["label"] for label in page.charts["parallel"]["layer"][-1]["data"]["values"] if label["axis"] == key]
    assert sorted(axis) == sorted(captions)
    # the pictures of what each group holds are those of ladders only
    assert ("groups of trial 0001" in page.html) == ("ladder" in captions)
    assert ('id="show-groups"' in page.html) == ("ladder" in captions)


def test_headings_are_of_the_first_key_and_captions_of_the_others(tmp_path: Path) -> None:
    search = {"model.prior.hidden": {"choice": [[5], [6]]}, "model.network.hidden": {"choice": [[7], [8]]}}
    trials = {
        f"{number:04}": (
            {"model.prior.hidden": [5 + number % 2], "model.network.hidden": [7 + number // 2]},
            1,
            "stopped",
        )
        for number in (3, 0, 2)
    }
    directory = build_sweep(
        tmp_path / "sweep", base={"model.prior": "flow"}, trials=trials, search=search, scheduler="none"
    )
    page = Page(reported(directory))
    order = re.findall(r"<h3>([^<]+)</h3>|<figcaption><b>([^<]+)</b>", page.html)
    assert [(above.strip(), below) for above, below in order if "hidden" in above + below] == [
        ("prior.hidden [5]", ""),
        ("", "network.hidden [7]"),
        ("", "network.hidden [8]"),
        ("prior.hidden [6]", ""),
        ("", "network.hidden [8]"),
    ]
    assert "in order of prior.hidden, network.hidden." in page.html


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["model.latent_dim", "objective.beta", "model.network.name"], ["latent_dim", "beta", "network"]),
        (["model.network.hidden", "model.prior.hidden"], ["network.hidden", "prior.hidden"]),
        (
            ["optim.schedule.name", "optim.schedule.epochs", "objective.beta_schedule.epochs"],
            ["schedule", "schedule.epochs", "beta_schedule.epochs"],
        ),
        (["model.prior.hidden", "model.prior.name"], ["hidden", "prior"]),
    ],
)
def test_names_of_keys_are_as_short_as_they_can_be(keys: list[str], names: list[str]) -> None:
    assert list(short_names(keys).values()) == names


def test_commands_train_the_trials_again(page: Page, directory: SweepDirectory) -> None:
    assert len(page.commands) == 1 + len(TRIALS), "that of the best trial is at the top too"
    base = Experiment.from_dict(directory.description()["experiment"])
    trials = {_without_place(base.with_overrides(overrides)) for overrides, _, _ in TRIALS.values()}
    assert {_experiment_of(command) for command in page.commands} == trials


def test_a_trial_that_ended_early_says_how_much_of_its_command_it_is(page: Page) -> None:
    notes = [text for text in page.text("p") if text.startswith("This trial ended after")]
    assert notes == ["This trial ended after 1 of the command's 2 epochs."] * 2, "a stopped and a diverged one"


def test_curves_are_the_recorded_metrics_and_end_where_the_trials_did(page: Page, records: list[TrialRecord]) -> None:
    spec = page.charts["curves-0"]
    points = spec["data"]["values"]
    drawn = {(point["trial"], point["epoch"]): point["value"] for point in points}
    assert drawn == {(record.name, line["epoch"]): line["val/nelbo"] for record in records for line in record.history}
    ends = {point["trial"]: (point["epoch"], point["end"]) for point in points if point["is_last"]}
    assert ends.pop(next(point["trial"] for point in points if point["is_best"])) == (2, "best")
    assert sorted(ends.values()) == [(1, "failed"), (1, "stopped"), (2, "finished")]
    assert [rung["epoch"] for rung in spec["layer"][0]["data"]["values"]] == [1]


def test_the_plane_has_the_best_checkpoints_of_the_ranked_trials(page: Page, records: list[TrialRecord]) -> None:
    points = {point["trial"]: point for point in page.charts["plane"]["data"]["values"]}
    assert points.keys() == {"0000", "0001", "0002"}
    for record in records[:3]:
        point = points[record.name]
        assert (point["rate"], point["distortion"]) == (record.value("val/rate"), record.value("val/distortion"))
        assert (point["latent_dim"], point["color"]) == tuple(record.overrides[key] for key in SEARCH)
    front = leaderboard.non_dominated(records, ["val/rate", "val/distortion"])
    assert {name for name, point in points.items() if point["pareto_front"]} == {record.name for record in front}


def test_parallel_coordinates_place_every_ranked_trial_on_every_axis(page: Page) -> None:
    spec = page.charts["parallel"]
    points = {(point["trial"], point["axis"]): point["position"] for point in spec["data"]["values"]}
    ranked = ("0000", "0001", "0002")
    assert points.keys() == {(trial, axis) for trial in ranked for axis in (*SEARCH, "val/nelbo")}
    assert [points[trial, "model.latent_dim"] for trial in ranked] == [0.75, 0.25, 0.75]
    assert [points[trial, "objective.beta"] for trial in ranked] == pytest.approx([1 / 3, 1, 0]), "logarithmic"
    (best,) = {point["trial"] for point in spec["data"]["values"] if point["is_best"]}
    assert points[best, "val/nelbo"] == 0
    labels = [label["label"] for label in spec["layer"][-1]["data"]["values"]]
    assert labels[:5] == ["2", "5", "1", "0.3536", "0.125"]


def test_under_pbt_the_report_has_the_lineage_instead_of_a_command(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "pbt", trials={name: TRIALS[name] for name in ("0000", "0001")}, scheduler="pbt")
    best = read_trials(directory)[1].best
    assert best is not None
    exploit = {"epoch": best.epoch, "weights_of": "0000", "overrides": {"objective.beta": 0.75}}
    (directory.trial("0001").path / "lineage.jsonl").write_text(json.dumps(exploit) + '\n{"cut sho')
    page = Page(reported(directory))
    assert {_experiment_of(command).model.latent_dim for command in page.commands} == {5}, "only those of 0000"
    assert page.text("li") == [
        "start: model.latent_dim = 2, objective.beta = 1",
        f"after epoch {best.epoch}: the weights of trial 0000, objective.beta = 0.75",
    ]
    # the pictures of the weights that it took over
    expected = (directory.trial("0000").images / "samples" / f"epoch={best.epoch:04d}.png").read_bytes()
    assert {content for alt, content in page.pictures if alt == "samples of trial 0001"} == {expected}


def test_a_sweep_whose_trials_all_failed_lists_the_errors(tmp_path: Path) -> None:
    page = Page(reported(build_sweep(tmp_path / "sweep", trials={"0004": TRIALS["0004"]})))
    assert page.charts == {}
    assert page.all("img") == []
    assert "No trial has a rank" in page.text("h2")
    assert HOSTILE in "".join(page.text("td"))


def test_two_metrics_are_two_curves_and_two_axes(tmp_path: Path) -> None:
    trials = {name: TRIALS[name] for name in ("0000", "0001")}
    metrics = ["val/rate", "val/distortion"]
    page = Page(reported(build_sweep(tmp_path / "sweep", trials=trials, metrics=metrics, scheduler="none")))
    assert list(page.charts) == ["curves-0", "curves-1", "parallel", "plane"]
    assert len(page.charts["parallel"]["data"]["values"]) == 2 * (2 + 2)
    assert [layer["name"] for layer in page.charts["curves-1"]["layer"]] == ["lines", "ends"], "no rungs without ASHA"


def test_with_repeats_configurations_are_shown_by_their_seeds(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "sweep", trials=REPEATED, scheduler="none", repeats=2, num_trials=2)
    page, seed = Page(reported(directory)), Experiment.from_dict(directory.description()["experiment"]).run.seed
    records = {record.name: record for record in read_trials(directory)}
    first, second = leaderboard.ranked_configurations([*records.values()], ["val/nelbo"], 2)
    assert (first.name, second.name) == ("0000", "0001")
    assert "Best configuration: " in page.text("h2")
    assert [text for text in page.text("td") if text.endswith("of 2")] == ["2 of 2", "1 of 2"]
    assert f"seed {seed + 1} diverged: epoch 2: {HOSTILE} {HOSTILE_ATTRIBUTE}" in page.text("td")
    shown = [format_nats(value) for each in (first, second) for value in each.values("val/nelbo").values()]
    assert [text for text in page.text("span") if text in shown] == shown, "the value of each seed"
    assert [text for text in page.text("p") if "looks better than it is" in text]
    # charts: seeds and curves by trial, the others by configuration
    points = page.charts["seeds-0"]["data"]["values"]
    by_seed = sorted(point["value"] for point in points if point["kind"] == "seed")
    assert by_seed == sorted(records[name].value("val/nelbo") for name in ("0000", "0000-1", "0001"))
    (interval,) = (point for point in points if point["kind"] == "interval")
    assert (interval["value"], interval["high"]) == first.interval("val/nelbo")
    assert [point["state"] for point in points if point["kind"] == "mean"] == ["best", "incomplete"]
    assert {point["trial"] for point in page.charts["curves-0"]["data"]["values"]} == REPEATED.keys()
    plane = page.charts["plane"]["data"]["values"]
    assert sorted(point["rate"] for point in plane) == sorted(each.value("val/rate") for each in (first, second))
    # every trial's command has its seed, and the split of the first
    commands = [_experiment_of(command) for command in page.commands]
    assert {(each.run.seed, each.split_seed) for each in commands} == {(seed, seed), (seed + 1, seed)}
    assert len(commands) == 1 + len(REPEATED)
    assert len(page.pictures) == (1 + 2) * 3, "of the best seed of each, and the winner's at the top"


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "sweep", trials={"0000": TRIALS["0000"]})
    records = read_trials(directory)
    records[0].history[0]["val/nelbo"] = math.inf
    shutil.rmtree(records[0].run.images / "samples")
    write_report(directory, records, leaderboard.rows(records, ["val/nelbo"], directory))
    page = Page(directory.report.read_text())
    assert [point["epoch"] for point in page.charts["curves-0"]["data"]["values"]] == [2]
    assert {alt.split()[0] for alt, _ in page.pictures} == {"reconstructions", "traversals"}


def _without_place(experiment: Experiment) -> Experiment:
    return experiment.with_overrides({"run.name": None, "run.storage": "anywhere"})


def _experiment_of(command: str) -> Experiment:
    """The experiment of a command as the command line reads it."""
    program, train, preset, *flags = shlex.split(command)
    assert (program, train) == ("vae-ray", "train")
    assert all(flag.startswith("--") for flag in flags[::2])
    overrides = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    return _without_place(Experiment.preset(preset).with_overrides(overrides))


OVERRIDES: dict[str, st.SearchStrategy[Any]] = {
    "data.root": st.none() | st.sampled_from(["/data/with spaces", "/it's", "-odd", "/$HOME;`ls`", HOSTILE]),
    "data.download": st.booleans(),
    "model.network.hidden": st.lists(st.integers(1, 65536), min_size=1, max_size=4),
    "likelihood.name": st.sampled_from(["bernoulli", "gaussian"]),
    "optim.lr": st.floats(1e-300, 1e38),
    "optim.grad_clip": st.none() | st.floats(1e-6, 1e6),
    "run.seed": st.integers(0, 2**63 - 1),
}


@pytest.fixture(scope="module")
def presets_are_read_once() -> Iterator[None]:
    """A reproduction looks for the nearest of all presets, each of which is parsed in YAML."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "preset", functools.cache(Experiment.preset))
        yield


@pytest.mark.usefixtures("presets_are_read_once")
@settings(max_examples=150)
@given(st.sampled_from(preset_names()), st.fixed_dictionaries({}, optional=OVERRIDES))
def test_a_reproduction_reads_back_as_the_same_experiment(preset: str, overrides: dict[str, Any]) -> None:
    network = {"model.network": "mlp"} if "model.network.hidden" in overrides else {}
    experiment = Experiment.preset(preset).with_overrides({"data.source": "mnist", **network, **overrides})
    assert _experiment_of(reproduction(experiment)) == _without_place(experiment)


def test_a_reproduction_starts_from_the_nearest_preset() -> None:
    changed = Experiment.preset("notebook").with_overrides({"optim.grad_clip": 1.5, "model.network.hidden": "8,4"})
    assert reproduction(changed) == "vae-ray train notebook --model.network.hidden '[8, 4]' --optim.grad-clip 1.5"
    assert reproduction(Experiment.preset("mnist").with_overrides({"run.name": "x"})) == "vae-ray train mnist"


def test_a_diverged_trial_does_not_flatten_the_others() -> None:
    values = [100.0 + n for n in range(20)]
    assert trimmed("val/nelbo", [*values, 1e9]) == [*values, pytest.approx(190)]
    for metric, untouched in (
        ("val/rate", [*[0.0] * 20, 30.0]),
        ("val/nelbo", [100.0] * 20),
        ("val/nelbo", [1.0, 9.0]),
    ):
        assert trimmed(metric, untouched) == untouched
