"""Numbers are ranked only against numbers of the same labels, and the page says which label differs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.pages import HOSTILE, HOSTILE_ATTRIBUTE, Page
from vae_ray import Experiment, TrainResult
from vae_ray.cli.main import main
from vae_ray.errors import UserError
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.report.compared_runs import compared_runs, distinct_names
from vae_ray.report.comparison import RECORDED, ComparedRun, differing_settings, groups_of
from vae_ray.report.comparison_page import (
    comparison_text,
    families_of,
    learning_curves,
    rate_distortion,
    table_of,
    write_comparison,
)
from vae_ray.storage.records import checksum, with_checksum

LABELS = {
    "data": "digits",
    "split": "test",
    "num_images": 359,
    "binarization": "none",
    "likelihood": "gaussian",
    "support": "real",
    "weights": "last",
    "beta": 1.0,
    "epoch": 3,
}


def evaluation(metrics: dict[str, float], **labels: Any) -> Evaluation:
    return Evaluation(metrics, {"test/nelbo": 0.25}, {}, {**LABELS, **labels}, [])


def run(
    name: str, *evaluations: Evaluation, history: list[dict[str, Any]] | None = None, **overrides: Any
) -> ComparedRun:
    experiment = Experiment.preset("digits").with_overrides(overrides)
    return ComparedRun(name, f"/runs/{name}", experiment, 3, history or [], list(evaluations), None)


def test_numbers_of_equal_labels_are_ranked_the_lowest_first() -> None:
    runs = [run(name, evaluation({"test/nelbo": value})) for name, value in (("a", 3.0), ("b", -2.0), ("c", 1.0))]
    (group,) = groups_of(runs)
    assert [row.run for row in group.rows] == ["b", "c", "a"]
    assert (group.ranked_by, group.differences) == ("test/nelbo", [])


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("data", "mnist"),
        ("split", "val"),
        ("num_images", 100),
        ("binarization", "dynamic"),
        ("likelihood", "laplace"),
        ("support", "256 levels"),
        ("weights", "averaged"),
        ("features", "a label that is yet to be invented"),
    ],
)
def test_numbers_whose_labels_differ_are_in_separate_groups_that_say_which(label: str, other: Any) -> None:
    runs = [run("a", evaluation({"test/nelbo": 3.0})), run("b", evaluation({"test/nelbo": -2.0}, **{label: other}))]
    first, second = groups_of(runs)
    assert ([row.run for row in first.rows], [row.run for row in second.rows]) == (["a"], ["b"])
    (line,) = second.differences
    assert line.startswith("test/nelbo must not be compared with group 1: ")
    assert f"{label} {other} here, {LABELS.get(label, '–')} there" in line
    assert line in comparison_text(runs)


def test_beta_and_epoch_are_what_one_compares() -> None:
    runs = [run(str(beta), evaluation({"test/nelbo": beta}, beta=beta, epoch=4)) for beta in (4.0, 0.5)]
    (group,) = groups_of(runs)
    assert [(row.run, row.epoch) for row in group.rows] == [("0.5", 4), ("4.0", 4)]
    assert "0.5, epoch 4" in comparison_text(runs), "the best epoch is 3"


def test_num_samples_concerns_nll_alone() -> None:
    runs = [
        run("a", evaluation({"test/nelbo": 3.0, "test/nll": 2.0}, num_samples=5000)),
        run("b", evaluation({"test/nelbo": 2.5, "test/nll": 2.2}, num_samples=100)),
        run("c", evaluation({"test/nelbo": 2.0})),
    ]
    nelbo, *nll = groups_of(runs)
    assert [row.run for row in nelbo.rows] == ["c", "b", "a"]
    assert [[row.run for row in group.rows] for group in nll] == [["a"], ["b"]]
    assert nll[1].differences == [
        "test/nll must not be compared with group 2: num_samples 100 here, 5000 there"
    ]  # fmt: skip


def test_what_training_recorded_is_left_out_only_where_an_evaluation_repeats_it() -> None:
    def recorded(value: float) -> Evaluation:
        return evaluation({"test/nelbo": value}, num_images=RECORDED)

    # the sum of an evaluation is in another order
    a, b = evaluation({"test/nelbo": 3.0 + 1e-6}), evaluation({"test/nelbo": 2.0})
    (group,) = groups_of([run("a", a, recorded(3.0)), run("b", b, recorded(2.0))])
    assert group.labels["num_images"] == 359
    both, alone = groups_of([run("a", a, recorded(3.0)), run("b", recorded(2.0))])
    assert [row.run for row in both.rows] == ["b", "a"]
    assert alone.differences == [
        f"test/nelbo must not be compared with group 1: num_images 359 here, {RECORDED} there; vae-ray evaluate RUN "
        "gives numbers that compare"
    ]  # fmt: skip
    of_a_part = evaluation({"test/nelbo": 3.5}, num_images=50)
    assert len(groups_of([run("a", of_a_part, recorded(3.0)), run("b", of_a_part, recorded(2.0))])) == 2


def test_differences_are_of_the_same_images() -> None:
    """Half the images are hard for both models: the difference is known far better than either of the numbers."""
    generator = np.random.default_rng(0)
    hard = np.repeat([0.0, 100.0], 50)
    runs = []
    for name, shift in (("a", 0.5), ("b", 0.0), ("c", 0.0)):
        arrays = {"distortion": hard + shift + generator.normal(0, 0.1, 100), "rate": np.full(100, 2.0)}
        nelbo = arrays["distortion"] + arrays["rate"]
        kept = {} if name == "c" else arrays
        found = evaluation({"test/nelbo": float(nelbo.mean()) + 9 * (name == "c")})
        runs.append(run(name, dataclasses.replace(found, arrays=kept)))
    (group,) = groups_of(runs)
    b, a, c = group.rows
    assert [each.run for each in group.rows] == ["b", "a", "c"]
    assert (b.worse_by, c.worse_by) == (None, None), "the first, and one of which nothing is kept"
    difference = a.by_image["test/nelbo"] - b.by_image["test/nelbo"]
    assert a.worse_by == (pytest.approx(difference.mean()), pytest.approx(difference.std(ddof=1) / 10))
    assert a.worse_by.value == pytest.approx(0.5, abs=0.05)
    assert a.worse_by.standard_error < 0.02
    header, first, second, _ = (line.split() for line in comparison_text(runs).splitlines()[1:5])
    assert header == ["run", "test/nelbo", "worse", "by", "best", "epoch"]
    assert (first[0], first[4], second[0], second[6]) == ("b", "–", "a", "0.01")


def test_more_numbers_than_runs_are_rows() -> None:
    metrics = {"test/nelbo": 3.0, "test/distortion": 2.0, "test/rate": 1.0}
    runs = [run(name, evaluation(metrics)) for name in ("a", "b")]
    (group,) = groups_of(runs)
    names = {each.name: each for each in runs}
    settings = {"beta": {"a": 1.0, "b": 2.0}}
    assert table_of(group, names, settings) == [
        ["run", "a", "b"],
        ["test/nelbo", "3.00 ± 0.25", "3.00 ± 0.25"],
        ["test/distortion", "2.00", "2.00"],
        ["test/rate", "1.00", "1.00"],
        ["beta", "1", "2"],
        ["best epoch", "3", "3"],
    ]


def test_settings_that_differ_are_those_that_change_what_is_computed() -> None:
    runs = [
        run("a", **{"objective.beta": 2.0, "run.storage": "/x"}),
        run("b", **{"objective.beta": 0.5, "likelihood": "laplace"}),
    ]
    settings = differing_settings(runs)
    assert settings["objective.beta"] == {"a": 2.0, "b": 0.5}
    assert settings["likelihood.name"] == {"a": "gaussian", "b": "laplace"}
    assert not [key for key in settings if key.startswith(("run.storage", "data.", "optim."))]


@pytest.mark.parametrize(
    ("locations", "names"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a", "/s/a", "/s/b"], ["r/a", "s/a", "s/b"]),
        (["s3://x/a", "s3://y/a"], ["x/a", "y/a"]),
    ],
)
def test_names_are_as_short_as_they_can_be(locations: list[str], names: list[str]) -> None:
    assert distinct_names(locations) == names


def test_curves_are_of_a_split_that_all_runs_recorded() -> None:
    with_val = [{"epoch": 1, "val/nelbo": 5.0, "test/nelbo": 6.0}]
    without = [{"epoch": 1, "test/nelbo": 7.0}, {"epoch": 2, "test/nelbo": 4.0}]
    spec = learning_curves([run("a", history=with_val), run("b", history=without)])
    drawn = [(point["run"], point["epoch"], point["value"]) for point in spec["data"]["values"]]
    assert drawn == [("a", 1, 6.0), ("b", 1, 7.0), ("b", 2, 4.0)]


def test_points_of_the_plane_are_of_the_same_images() -> None:
    def of(rate: float, **labels: Any) -> Evaluation:
        return evaluation({"test/rate": rate, "test/distortion": 2 * rate}, **labels)

    runs = [run("a", of(9.0, num_images=50), of(3.0, num_images=RECORDED)), run("b", of(4.0, num_images=RECORDED))]
    points = rate_distortion(runs)["data"]["values"]
    assert [(point["run"], point["rate"], point["distortion"]) for point in points] == [
        ("a", 3.0, 6.0),
        ("b", 4.0, 8.0),
    ]
    assert rate_distortion([*runs, run("c")])["data"]["values"] == [], "c recorded nothing"


def test_runs_whose_nats_do_not_compare_are_in_charts_of_their_own() -> None:
    runs = [
        run(name, evaluation({"test/nelbo": 1.0}, data=data, num_images=RECORDED))
        for name, data in (("a", "x"), ("b", "y"), ("c", "x"))
    ]
    assert [[each.name for each in family] for _, family in families_of(runs)] == [["a", "c"], ["b"]]


@pytest.fixture
def runs(trained_run: TrainResult, tmp_path: Path) -> list[Path]:
    """Two runs of hostile directories, and a sweep whose best trial is a third."""
    first, second = tmp_path / HOSTILE, tmp_path / HOSTILE_ATTRIBUTE / "b"
    sweep = tmp_path / "sweep"
    for path in (first, second, sweep / "trials" / "0001"):
        shutil.copytree(trained_run.run_dir, path, ignore=shutil.ignore_patterns("evaluations"))
    (sweep / "sweep.yaml").touch()
    (sweep / "summary.json").write_text(json.dumps(with_checksum({"best": {"trial": "0001"}})))
    kept = evaluation({"test/nelbo": 1.5, HOSTILE: 2.0}, note=HOSTILE_ATTRIBUTE)
    (first / "evaluations").mkdir()
    (first / "evaluations" / "x.json").write_text(json.dumps(with_checksum(kept.to_dict())))
    return [first, second, sweep]


def test_runs_and_the_best_of_sweeps_are_read_from_their_files(runs: list[Path], trained_run: TrainResult) -> None:
    read = compared_runs(runs)
    assert [each.name for each in read] == ["script>", "b", "sweep/0001"]
    for each in read:
        assert each.best_epoch == trained_run.best_epoch
        assert [record["epoch"] for record in each.history] == [1, 2, 3]
        assert (each.samples or "").startswith("data:image/png;base64,")
        recorded = {key: value for e in each.evaluations[-2:] for key, value in e.metrics.items()}
        expected = {key: value for key, value in trained_run.metrics.items() if not key.startswith("train/")}
        assert recorded == expected
    group = groups_of(read)[0]
    assert len(group.rows) == 3


def test_the_page_is_complete_and_hostile_text_is_text(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    write_comparison(compared_runs(runs), out)
    page = Page(out.read_text())
    page.assert_self_contained()
    assert {*page.charts} == {"curves-0", "plane-0"}
    assert {point["run"] for point in page.charts["plane-0"]["data"]["values"]} == {"script>", "b", "sweep/0001"}
    assert len(page.pictures) == 3
    assert any(HOSTILE_ATTRIBUTE in text for text in page.text("span") + page.text("p"))
    assert page.html.count("must not be compared with group 1") >= 1


def test_the_command_prints_tables_or_plain_data(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(path) for path in runs]
    assert main(["compare", *names]) == 0
    text = capsys.readouterr().out
    assert "group 1: data digits, split test" in text
    assert "must not be compared" in text
    assert main(["compare", *names, "--json", "--out", str(tmp_path / "c.html")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [each["location"] for each in answer["runs"]] == names
    assert (tmp_path / "c.html").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{0}"], "should be at least two different ones"),
        (["{0}", "{0}"], "should be at least two different ones"),
        (["{0}", "no/such"], "no such run or sweep, it has no experiment.yaml"),
        (["{0}", "{1}", "--out", "x.png"], "should end in .html"),
        (["{0}", "{1}", "--out", "no/such/x.html"], "cannot be written"),
        (["{0}", "{2}"], "has no best trial"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], part: str, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[2] / "summary.json").write_text(json.dumps({"best": {}, "crc": checksum({"best": {}})}))
    assert main(["compare", *(argument.format(*runs) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_run_without_a_checkpoint_is_refused(runs: list[Path]) -> None:
    shutil.rmtree(runs[1] / "checkpoints")
    with pytest.raises(UserError, match="has no complete checkpoint yet; continue it with: vae-ray resume"):
        compared_runs(runs)
