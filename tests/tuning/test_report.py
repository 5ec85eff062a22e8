"""`report.html` is complete and in order, and a user's text in it is never code.

The sweep is real but small: four trials trained in this process, of which one was stopped and one diverged, and one
that failed before its first epoch. Every text that a user can set is hostile.
"""

import base64
import hashlib
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import digits_in_this_process
from vae_ray import Experiment
from vae_ray.config.experiment import preset_names
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.image_grids import png_bytes, square_grid
from vae_ray.training.fit import fit_epochs
from vae_ray.tuning import leaderboard
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord, read_trials
from vae_ray.tuning.report.charts import trimmed
from vae_ray.tuning.report.page import write_report
from vae_ray.tuning.report.trials import reproduction

HOSTILE = "</script><script>alert('text')</script>"
HOSTILE_ATTRIBUTE = "\"'><img src=x onerror=alert('attribute')>"
STOPPED = "0002"
SEARCH = {"model.latent_dim": {"choice": [2, 5]}, "objective.beta": {"loguniform": [0.1, 8]}}
TRIALS: dict[str, tuple[dict[str, Any], int, str]] = {
    # proposed, epochs done, state
    "0000": ({"model.latent_dim": 5, "objective.beta": 0.25}, 2, "finished"),
    "0001": ({"model.latent_dim": 2, "objective.beta": 1.0}, 2, "finished"),
    STOPPED: ({"model.latent_dim": 5, "objective.beta": 0.125}, 1, "stopped"),
    "0003": ({"model.latent_dim": 5, "objective.beta": 8.0}, 1, "diverged"),
    "0004": ({"model.latent_dim": 2, "objective.beta": 0.5}, 0, "failed"),
}


def build_sweep(path: Path, *, trials: dict[str, Any] = TRIALS, **description: Any) -> SweepDirectory:
    """A sweep's directory as a sweep leaves it, without Ray, with hostile text."""
    directory = SweepDirectory(path)
    path.mkdir(parents=True)
    base = digits_in_this_process(path / "trials").with_overrides(
        {"training.epochs": 2, "workers.num": 1, "data.cache_dir": str(path / HOSTILE_ATTRIBUTE)}
    )
    directory.write_description(
        {
            "experiment": base.to_dict(),
            "search": SEARCH,
            "metrics": ["val/nelbo"],
            "num_trials": len(trials),
            "scheduler": "asha",
            "searcher": HOSTILE_ATTRIBUTE,
            **description,
        }
    )
    for name, (overrides, epochs, state) in trials.items():
        reason = f"epoch {epochs + 1}: {HOSTILE} {HOSTILE_ATTRIBUTE}" if state in ("diverged", "failed") else ""
        directory.append_to_journal(
            {"trial": name, "event": "proposed", "overrides": overrides},
            {"trial": name, "event": "ended", "epoch": epochs, "state": state, "reason": reason},
        )
        if epochs:
            training = fit_epochs(
                base.with_overrides(overrides), directory.trial(name).path, SingleProcess(torch.device("cpu"))
            )
            for _ in range(epochs):
                next(training)
            training.close()
    return directory


def reported(directory: SweepDirectory) -> str:
    """The report, written from the sweep's files."""
    records = read_trials(directory)
    write_report(directory, records, leaderboard.rows(records, directory.description()["metrics"], directory))
    return directory.report.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("img", "meta", "link", "input", "br", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "every element is closed where it was opened"

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def pictures(self) -> list[tuple[str, bytes]]:
        """The alternative text and the content of each."""
        return [(image["alt"], base64.b64decode(image["src"].partition(",")[2])) for image in self.all("img")]

    @property
    def charts(self) -> dict[str, Any]:
        (data,) = (text for text in self.text("script") if text.startswith("{"))
        return json.loads(data, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, isolated_cache: Path) -> SweepDirectory:
    # the path contains the whole hostile text: its slash separates directories
    return build_sweep(tmp_path_factory.mktemp("sweep") / HOSTILE)


@pytest.fixture(scope="module")
def records(directory: SweepDirectory) -> list[TrialRecord]:
    return read_trials(directory)


@pytest.fixture(scope="module")
def html(directory: SweepDirectory) -> str:
    return reported(directory)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def layer(spec: dict[str, Any], name: str) -> dict[str, Any]:
    return next(layer for layer in spec["layer"] if layer.get("name") == name)


def test_hostile_text_is_text_and_never_an_element(page: Page) -> None:
    scripts = page.all("script")
    assert [script.get("type") for script in scripts] == ["application/json", "module", "module"]
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in page.all("img"))
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert sum(HOSTILE in text for text in page.text("td")) == 2, "the reasons of two trials"
    assert HOSTILE_ATTRIBUTE in "".join(page.text("dd")), "the searcher"


def test_nothing_is_fetched_and_only_our_two_scripts_may_run(page: Page, html: str) -> None:
    references = [
        (tag, value)
        for tag, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "data", "poster") and not value.startswith(("data:", "#"))
    ]
    assert references == []
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    scripts = re.findall(r'<script type="module">(.*?)</script>', html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert "$schema" not in json.dumps(page.charts)
    assert not re.search(r"@import|url\(", "".join(page.text("style")))


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


def test_the_gallery_goes_by_latent_dim_and_then_by_beta(html: str) -> None:
    gallery = html[html.index('id="gallery"') : html.index('id="trials"')]
    order = re.findall(r"<h3>latent_dim (\d+)</h3>|<b>beta ([\d.]+)</b>", gallery)
    assert order == [("2", ""), ("", "0.5"), ("", "1"), ("5", ""), ("", "0.125"), ("", "0.25"), ("", "8")]


def test_commands_train_the_trials_again(page: Page, directory: SweepDirectory) -> None:
    commands = [text for text in page.text("pre") if text.startswith("vae-ray train")]
    assert len(commands) == 1 + len(TRIALS), "the best trial's stands first too"
    base = Experiment.from_dict(directory.description()["experiment"])
    trials = {_place_free(base.with_overrides(overrides)) for overrides, _, _ in TRIALS.values()}
    assert {_place_free(_experiment_of(command)) for command in commands} == trials


def test_a_trial_that_ended_early_says_how_much_of_its_command_it_is(page: Page) -> None:
    notes = [text for text in page.text("p") if text.startswith("This trial ended after")]
    assert notes == ["This trial ended after 1 of the command's 2 epochs."] * 2, "a stopped and a diverged one"


def test_curves_are_the_recorded_metrics_and_end_where_the_trials_did(page: Page, records: list[TrialRecord]) -> None:
    rungs, *lines_and_ends = page.charts["curves-0"]["layer"]
    assert [layer["name"] for layer in lines_and_ends] == ["lines", "ends"]
    assert [rung["epoch"] for rung in rungs["data"]["values"]] == [1]
    points = page.charts["curves-0"]["data"]["values"]
    drawn = {(point["trial"], point["epoch"]): point["value"] for point in points}
    assert drawn == {(record.name, line["epoch"]): line["val/nelbo"] for record in records for line in record.history}
    ends = {point["trial"]: (point["epoch"], point["end"]) for point in points if point["is_last"]}
    best = next(point["trial"] for point in points if point["is_best"])
    assert ends == {
        "0000": (2, "finished"),
        "0001": (2, "finished"),
        STOPPED: (1, "stopped"),
        "0003": (1, "failed"),
    } | {best: (ends[best][0], "best")}


def test_the_plane_has_the_best_checkpoints_of_ranked_trials_and_their_pareto_front(
    page: Page, records: list[TrialRecord]
) -> None:
    points = {point["trial"]: point for point in page.charts["plane"]["data"]["values"]}
    assert points.keys() == {"0000", "0001", STOPPED}
    for record in records:
        if record.name in points and record.best is not None:
            point, metrics = points[record.name], record.best.metrics
            assert (point["rate"], point["distortion"]) == (metrics["val/rate"], metrics["val/distortion"])
            assert (point["latent_dim"], point["beta"]) == tuple(record.overrides[key] for key in SEARCH)
    places = {name: (point["rate"], point["distortion"]) for name, point in points.items()}
    dominated = {
        name
        for name, (rate, distortion) in places.items()
        for other, (other_rate, other_distortion) in places.items()
        if other != name and other_rate <= rate and other_distortion <= distortion
    }
    assert {name for name, point in points.items() if not point["pareto_front"]} == dominated


def test_parallel_coordinates_place_every_ranked_trial_on_every_axis(page: Page) -> None:
    spec = page.charts["parallel"]
    points = {(point["trial"], point["axis"]): point["position"] for point in spec["data"]["values"]}
    ranked, axes = ("0000", "0001", STOPPED), (*SEARCH, "val/nelbo")
    assert points.keys() == {(trial, axis) for trial in ranked for axis in axes}
    assert [points[trial, "model.latent_dim"] for trial in ranked] == [0.75, 0.25, 0.75]
    assert [points[trial, "objective.beta"] for trial in ranked] == pytest.approx([1 / 3, 1, 0]), "logarithmic"
    (best,) = {point["trial"] for point in spec["data"]["values"] if point["is_best"]}
    assert points[best, "val/nelbo"] == 0
    labels = [(label["axis"], label["label"]) for label in spec["layer"][-1]["data"]["values"]]
    assert labels[:5] == [
        *(("model.latent_dim", latent_dim) for latent_dim in ("2", "5")),
        *(("objective.beta", beta) for beta in ("0.125", "0.3536", "1")),
    ]


def test_tooltips_are_the_leaderboard(page: Page) -> None:
    for spec, layer in (("curves-0", 2), ("parallel", 1), ("plane", 1)):
        tooltip = page.charts[spec]["layer"][layer]["encoding"]["tooltip"]
        assert tooltip[-1] == {"field": r"objective\.beta", "type": "nominal", "title": "objective.beta"}
        assert {point["objective.beta"] for point in page.charts[spec]["data"]["values"]} >= {"0.25", "1", "0.125"}


def test_under_pbt_the_report_has_the_lineage_instead_of_a_command(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "pbt", trials={name: TRIALS[name] for name in ("0000", "0001")}, scheduler="pbt")
    donor, heir = directory.trial("0000"), directory.trial("0001")
    heir_best = read_trials(directory)[1].best
    assert heir_best is not None
    exploit = {"epoch": heir_best.epoch, "weights_of": "0000", "overrides": {"objective.beta": 0.75}}
    (heir.path / "lineage.jsonl").write_text(json.dumps(exploit) + '\n{"cut sho')
    page = Page(reported(directory))
    commands = [command for command in page.text("pre") if command.startswith("vae-ray train")]
    assert {_experiment_of(command).model.latent_dim for command in commands} == {5}, "only those of 0000"
    assert page.text("li") == [
        "start: model.latent_dim = 2, objective.beta = 1",
        f"after epoch {heir_best.epoch}: the weights of trial 0000, objective.beta = 0.75",
    ]
    # the pictures of the weights that it took over
    expected = (donor.images / "samples" / f"epoch={heir_best.epoch:04d}.png").read_bytes()
    assert {content for alt, content in page.pictures if alt == "samples of trial 0001"} == {expected}


def test_a_missing_picture_is_replaced_by_the_last_one(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "sweep", trials={"0000": TRIALS["0000"]})
    (record,) = read_trials(directory)
    assert record.best is not None
    (record.run.images / "samples" / f"epoch={record.best.epoch:04d}.png").unlink()
    other = png_bytes(square_grid(torch.rand(4, 1, 3, 3), title="other"))
    (record.run.images / "samples" / "epoch=0009.png").write_bytes(other)
    (record.run.images / "traversals").rename(record.run.images / "elsewhere")
    pictures = Page(reported(directory)).pictures
    assert {alt.split()[0] for alt, _ in pictures} == {"samples", "reconstructions"}
    assert {content for alt, content in pictures if alt.startswith("samples")} == {other}


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
    assert page.charts["curves-1"]["layer"][0]["data"]["values"] == [], "no rungs without ASHA"


def test_an_infinite_metric_is_left_out_of_the_curves(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "sweep", trials={"0000": TRIALS["0000"]})
    records = read_trials(directory)
    records[0].history[0]["val/nelbo"] = math.inf
    write_report(directory, records, leaderboard.rows(records, ["val/nelbo"], directory))
    points = Page(directory.report.read_text()).charts["curves-0"]["data"]["values"]
    assert [point["epoch"] for point in points] == [2]


def _place_free(experiment: Experiment) -> Experiment:
    return experiment.with_overrides({"run.name": None, "run.storage": "anywhere"})


def _experiment_of(command: str) -> Experiment:
    """The experiment of a command as the command line reads it."""
    program, train, preset, *flags = shlex.split(command)
    assert (program, train) == ("vae-ray", "train")
    assert all(flag.startswith("--") for flag in flags[::2])
    return Experiment.preset(preset).with_overrides(
        {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    )


OVERRIDES: dict[str, st.SearchStrategy[Any]] = {
    "data.source": st.sampled_from(["digits", "mnist", "kmnist"]),
    "data.root": st.none() | st.sampled_from(["/data/with spaces", "/it's", "-odd", "/$HOME;`ls`", HOSTILE]),
    "data.download": st.booleans(),
    "data.num_validation": st.integers(0, 10**6),
    "model.network.hidden": st.lists(st.integers(1, 65536), min_size=1, max_size=4),
    "model.latent_dim": st.integers(1, 65536),
    "likelihood.name": st.sampled_from(["bernoulli", "gaussian"]),
    "objective.beta": st.floats(0, 1e6),
    "optim.lr": st.floats(1e-300, 1e300),
    "optim.grad_clip": st.none() | st.floats(1e-6, 1e6),
    "training.epochs": st.integers(1, 10**9),
    "run.seed": st.integers(0, 2**63 - 1),
    "run.name": st.none() | st.just("a-name"),
}


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    preset = draw(st.sampled_from(preset_names()))
    keys = draw(st.sets(st.sampled_from(sorted(OVERRIDES))))
    overrides = {key: draw(OVERRIDES[key]) for key in sorted(keys)}
    if {"data.root", "data.download"} & keys:
        overrides["data.source"] = "mnist"  # digits have no such fields
    return Experiment.preset(preset).with_overrides(overrides)


@settings(max_examples=150, deadline=None)
@given(experiments())
def test_a_reproduction_reads_back_as_the_same_experiment(experiment: Experiment) -> None:
    assert _place_free(_experiment_of(reproduction(experiment))) == _place_free(experiment)


def test_a_reproduction_starts_from_the_nearest_preset() -> None:
    changed = Experiment.preset("notebook").with_overrides({"optim.grad_clip": 1.5, "model.network.hidden": "8,4"})
    assert reproduction(changed) == "vae-ray train notebook --model.network.hidden 8,4 --optim.grad-clip 1.5"
    assert reproduction(Experiment.preset("mnist").with_overrides({"run.name": "x"})) == "vae-ray train mnist"


@pytest.mark.parametrize(
    ("metric", "values", "highest"),
    [
        ("val/nelbo", [*(100.0 + n for n in range(20)), 1e9], 200.0),
        ("val/rate", [*[0.0] * 20, 30.0], 30.0),
        ("val/nelbo", [100.0] * 20, 100.0),
        ("val/nelbo", [100.0, 140.0], 140.0),
    ],
)
def test_a_diverged_trial_does_not_flatten_the_others(metric: str, values: list[float], highest: float) -> None:
    assert max(trimmed(metric, values)) <= highest
    assert trimmed(metric, values)[: len(values) - 1] == values[:-1]
