"""`report.html`: whole, in order, with nothing of a user's that a browser would take for its own.

The sweep is real, only small: four trials trained in this process, one of which was stopped and one diverged, and one
that failed before it had anything to show. Wherever a text of a user can get in, a hostile one did.
"""

import base64
import hashlib
import json
import math
import re
import shlex
import shutil
import struct
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
from vae_ray.errors import UserError
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.image_grids import png_bytes, square_grid
from vae_ray.training.fit import fit_epochs
from vae_ray.tuning import leaderboard
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord, read_trials
from vae_ray.tuning.report.charts import learning_curves, parallel_coordinates, rate_distortion
from vae_ray.tuning.report.page import reproduction, write_report
from vae_ray.tuning.report.scales import even_ticks, log_ticks, trimmed
from vae_ray.tuning.space import SearchSpace

HOSTILE = "</script><script>alert('text')</script>"
HOSTILE_ATTRIBUTE = "\"'><img src=x onerror=alert('attribute')>"
STOPPED = "0002"
"""Not hostile: a name that leads out of the sweep, or is no name, is refused when the journal is read."""
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
    """A sweep's directory as a sweep leaves it, without Ray; hostile wherever that is possible."""
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
    """The report, written anew from the sweep's files."""
    records = read_trials(directory)
    write_report(directory, records, leaderboard.rows(records, directory.description()["metrics"], directory))
    return directory.report.read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("img", "meta", "link", "input", "br"):
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
    def charts(self) -> dict[str, Any]:
        (data,) = (text for text in self.text("script") if text.startswith("{"))
        return json.loads(data, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, isolated_cache: Path) -> SweepDirectory:
    # the path contains the whole hostile text, as its slash parts directories
    return build_sweep(tmp_path_factory.mktemp("sweep") / HOSTILE)


@pytest.fixture(scope="module")
def records(directory: SweepDirectory) -> list[TrialRecord]:
    return read_trials(directory)


@pytest.fixture(scope="module")
def table(directory: SweepDirectory, records: list[TrialRecord]) -> list[dict[str, Any]]:
    return leaderboard.rows(records, ["val/nelbo"], directory)


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
    handlers = [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert handlers == []
    assert sum(HOSTILE in text for text in page.text("td")) == 2, "the reasons of two trials"
    assert HOSTILE_ATTRIBUTE in "".join(page.text("td"))


def test_a_hostile_trial_name_never_reaches_the_report(directory: SweepDirectory, tmp_path: Path) -> None:
    copy = SweepDirectory(tmp_path / "copy")
    shutil.copytree(directory.path, copy.path)
    copy.append_to_journal({"trial": f"0002{HOSTILE}", "event": "proposed", "overrides": {}})
    with pytest.raises(UserError, match=r"trials\.jsonl: damaged"):
        reported(copy)


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


def test_every_trial_has_its_place_and_the_failed_their_reasons(page: Page) -> None:
    ids = [details["id"] for details in page.all("details")]
    assert sorted(ids) == sorted(f"trial-{name}" for name in TRIALS)
    links = {link["href"] for link in page.all("a")}
    assert {f"#trial-{name}" for name in TRIALS} <= links
    assert len(page.all("figure")) == len(TRIALS)
    assert sum(text.strip().startswith("epoch 1: ") for text in page.text("td")) == 1
    assert sum(text.strip().startswith("epoch 2: ") for text in page.text("td")) == 1


def test_pictures_are_those_of_the_best_epoch_byte_for_byte(page: Page, records: list[TrialRecord]) -> None:
    embedded = {base64.b64decode(picture["src"].partition(",")[2]): picture for picture in page.all("img")}
    with_checkpoint = [record for record in records if record.best is not None]
    files = {
        record.run.images / kind / f"epoch={record.best.epoch:04d}.png"
        for record in with_checkpoint
        for kind in ("samples", "reconstructions", "traversals")
        if record.best is not None
    }
    assert len(files) == 12
    assert set(embedded) == {file.read_bytes() for file in files}
    for content, attributes in embedded.items():
        assert struct.unpack(">II", content[16:24]) == (int(attributes["width"]), int(attributes["height"]))


def test_the_gallery_goes_by_latent_dim_and_then_by_beta(html: str) -> None:
    gallery = html[html.index('id="gallery"') : html.index('id="trials"')]
    order = re.findall(r"<h3>latent_dim (\d+)</h3>|<b>beta ([\d.]+)</b>", gallery)
    assert order == [("2", ""), ("", "0.5"), ("", "1"), ("5", ""), ("", "0.125"), ("", "0.25"), ("", "8")]


def test_commands_train_the_trials_again(page: Page, records: list[TrialRecord]) -> None:
    commands = [text for text in page.text("pre") if text.startswith("vae-ray train")]
    assert len(commands) == len(TRIALS)
    found = {_place_free(_experiment_of(command)) for command in commands}
    base = Experiment.from_dict(_description(records)["experiment"])
    assert found == {_place_free(base.with_overrides(overrides)) for overrides, _, _ in TRIALS.values()}


def test_a_stopped_trial_says_which_part_of_its_command_it_is(html: str) -> None:
    details = html[html.index('id="trials"') : html.index('id="sweep"')].split("<details")
    (stopped,) = (text for text in details if "trial-0002" in text)
    assert "This trial is the first 1 of the command's\n        2 epochs." in stopped
    (finished,) = (text for text in details if "trial-0000" in text)
    assert "This trial is the first" not in finished


def test_curves_are_the_recorded_metrics_and_end_where_the_trials_did(
    records: list[TrialRecord], table: list[dict[str, Any]]
) -> None:
    spec = learning_curves(records, table, "val/nelbo", tooltip_columns=["val/nelbo"], rungs=[1])
    assert spec is not None
    drawn = {(point["trial"], point["epoch"]): point["value"] for point in spec["data"]["values"]}
    assert drawn == {(record.name, line["epoch"]): line["val/nelbo"] for record in records for line in record.history}
    ends = {end["trial"]: (end["epoch"], end["end"]) for end in layer(spec, "ends")["data"]["values"]}
    best = table[0]["trial"]
    assert ends[best] == (2, "best")
    assert ends[STOPPED] == (1, "stopped")
    assert ends["0003"] == (1, "failed")
    assert "0004" not in ends
    assert [rung["epoch"] for rung in spec["layer"][0]["data"]["values"]] == [1]


def test_the_plane_holds_the_best_checkpoints_and_their_pareto_front(
    records: list[TrialRecord], table: list[dict[str, Any]]
) -> None:
    experiments = {record.name: record.best.experiment() for record in records if record.best is not None}
    spec = rate_distortion(table, experiments, ["val/nelbo"], tooltip_columns=["val/nelbo"])
    assert spec is not None
    points = {point["trial"]: point for point in spec["data"]["values"]}
    assert points.keys() == experiments.keys()
    for record in records:
        if record.best is not None:
            point, metrics = points[record.name], record.best.metrics
            assert (point["rate"], point["distortion"]) == (metrics["val/rate"], metrics["val/distortion"])
            assert (point["beta"], point["latent_dim"]) == tuple(record.overrides[key] for key in reversed(SEARCH))
    ranked = [point for point in points.values() if point["end"] == "ranked"]
    assert {point["trial"] for point in ranked} == {"0000", "0001", STOPPED}
    front = [
        mine["trial"]
        for mine in ranked
        if not any(
            o["rate"] <= mine["rate"] and o["distortion"] <= mine["distortion"] and o is not mine for o in ranked
        )
    ]
    assert sorted(front) == sorted(point["trial"] for point in points.values() if point["pareto_front"])
    color = layer(spec, "points")["encoding"]["color"]
    assert (color["scale"]["type"], color["scale"]["domain"]) == ("log", [0.125, 1.0, 8.0])


def test_parallel_coordinates_place_every_ranked_trial_on_every_axis(table: list[dict[str, Any]]) -> None:
    spec = parallel_coordinates(table, SearchSpace.from_dict(SEARCH), ["val/nelbo"], tooltip_columns=[])
    assert spec is not None
    places = {(point["trial"], point["axis"]): point["at"] for point in spec["data"]["values"]}
    assert len(places) == 3 * 3
    assert all(0 <= at <= 1 for at in places.values())
    assert places["0001", 0] < places["0000", 0], "latent_dim 2 below 5"
    assert places["0001", 1] == pytest.approx(math.log(10) / math.log(80)), "beta 1 between 0.1 and 8"
    assert min(("0000", "0001", STOPPED), key=lambda name: places[name, 2]) == table[0]["trial"]


def test_under_pbt_the_lineage_is_told_instead_of_a_command(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "pbt", trials={name: TRIALS[name] for name in ("0000", "0001")}, scheduler="pbt")
    donor, heir = directory.trial("0000"), directory.trial("0001")
    heir_best = read_trials(directory)[1].best
    assert heir_best is not None
    step = {"epoch": heir_best.epoch, "weights_of": "0000", "overrides": {"objective.beta": 0.75}}
    (heir.path / "lineage.jsonl").write_text(json.dumps(step) + '\n{"cut sho')
    page = Page(reported(directory))
    assert sum(text.startswith("vae-ray train") for text in page.text("pre")) == 1
    tooltip_columns = " ".join(" ".join(page.text("li")).split())
    assert "began with model.latent_dim = 2, objective.beta = 1" in tooltip_columns
    assert f"after epoch {heir_best.epoch} it took over the weights of trial 0000 and went on with " in tooltip_columns
    assert "objective.beta = 0.75" in tooltip_columns
    # what it took over looks as it did where it came from
    samples = [picture["src"] for picture in page.all("img") if picture["alt"] == "samples of trial 0001"]
    expected = (donor.images / "samples" / f"epoch={heir_best.epoch:04d}.png").read_bytes()
    assert {base64.b64decode(source.partition(",")[2]) for source in samples} == {expected}


def test_a_missing_picture_is_replaced_by_the_last_there_is(tmp_path: Path) -> None:
    directory = build_sweep(tmp_path / "sweep", trials={"0000": TRIALS["0000"]})
    (record,) = read_trials(directory)
    assert record.best is not None
    (record.run.images / "samples" / f"epoch={record.best.epoch:04d}.png").unlink()
    other = png_bytes(square_grid(torch.rand(4, 1, 3, 3), title="other"))
    (record.run.images / "samples" / "epoch=0009.png").write_bytes(other)
    (record.run.images / "traversals").rename(record.run.images / "elsewhere")
    pictures = [
        (picture["alt"].split()[0], base64.b64decode(picture["src"].partition(",")[2]))
        for picture in Page(reported(directory)).all("img")
    ]
    assert {kind for kind, _ in pictures} == {"samples", "reconstructions"}
    assert {content for kind, content in pictures if kind == "samples"} == {other}


def test_a_sweep_that_came_to_nothing_still_says_why(tmp_path: Path) -> None:
    page = Page(reported(build_sweep(tmp_path / "sweep", trials={"0004": TRIALS["0004"]})))
    assert page.charts == {}
    assert page.all("img") == []
    assert "No trial can be ranked" in page.text("h2")
    assert HOSTILE in "".join(page.text("td"))


def test_two_metrics_are_two_curves_and_two_axes(tmp_path: Path) -> None:
    trials = {name: TRIALS[name] for name in ("0000", "0001")}
    metrics = ["val/rate", "val/distortion"]
    page = Page(reported(build_sweep(tmp_path / "sweep", trials=trials, metrics=metrics, scheduler="none")))
    assert list(page.charts) == ["curves-0", "curves-1", "parallel", "plane"]
    assert len(page.charts["parallel"]["data"]["values"]) == 2 * (2 + 2)
    assert page.charts["curves-1"]["layer"][0]["data"]["values"] == [], "no rungs without ASHA"


def test_numbers_that_are_none_are_left_out(records: list[TrialRecord], table: list[dict[str, Any]]) -> None:
    broken = [
        TrialRecord(**{**vars(record), "history": [{**line, "val/nelbo": math.nan} for line in record.history]})
        if record.name == "0003"
        else record
        for record in records
    ]
    spec = learning_curves(broken, table, "val/nelbo", tooltip_columns=["val/nelbo"], rungs=[])
    assert spec is not None
    assert "0003" not in {point["trial"] for point in spec["data"]["values"]}
    json.dumps(spec, allow_nan=False)


def _description(records: list[TrialRecord]) -> dict[str, Any]:
    return SweepDirectory(next(record.run.path for record in records if record.name == "0000").parents[1]).description()


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


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e-2), (0.1, 16.0), (0.7, 1.3), (2, 40), (1, 65536)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    for ticks in (log_ticks(low, high), even_ticks(low, high)):
        assert 2 <= len(ticks) <= 7
        assert ticks == sorted(set(ticks))
        assert low <= ticks[0] <= ticks[-1] <= high


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
