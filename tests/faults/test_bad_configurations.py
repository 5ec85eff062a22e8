"""Hundreds of configurations that cannot be: one line, exit code 2, nothing written, nothing started.

Generated from the schema itself, so that a field added tomorrow is tried as well.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.test_experiment import field_ids
from tests.config.test_keys import entry_of, with_entry
from tests.faults.conftest import FORM, Count
from vae_ray import Experiment, UserError
from vae_ray.cli.main import main
from vae_ray.config.experiment import field_docs
from vae_ray.config.keys import FieldDoc
from vae_ray.tuning.settings import settings as sweep_settings
from vae_ray.tuning.space import SearchSpace

pytestmark = pytest.mark.faults

FIELDS = list(field_docs())
NEVER: list[Any] = [{}, {"a": 1}, [[1]], [None], b"\xff", {1: 2}, [{}]]
"""Valid for no field."""
NO_NUMBERS: list[Any] = [
    "",
    " ",
    "fast",
    "1e",
    "0x10",
    "1,2",
    "--1",
    "1 2",
    "½",
    "١٢x",
    "1\n2",
    True,
    False,
    [],
    "nan?",
]
NO_WHOLE_NUMBERS: list[Any] = [
    *NO_NUMBERS,
    "1.5",
    1.5,
    1e300,
    "1e999",
    math.inf,
    math.nan,
    "NaN",
    "inf",
    -1,
    "-1",
    "−1",
]
NO_FLOATS: list[Any] = [*NO_NUMBERS, math.inf, -math.inf, math.nan, "NaN", "Infinity", "-inf", "1e999"]
NO_CHOICES: list[Any] = ["", "no such", "Adam", "ADAM ", "аdam", 1, True, 0.5, ["adam"], "null?", "x" * 10_000]
NO_SWITCHES: list[Any] = ["", "maybe", 2, -1, "yess", [True], 0.5, "11"]
NO_PATHS: list[Any] = ["", "a\0b", "a\nb", 5, True, ["a"]]
NO_NAMES: list[Any] = [
    "",
    ".",
    "..",
    "../up",
    "/abs",
    "a/b",
    ".hidden",
    "-rf",
    "a b",
    "ä",
    "ａ",
    "a\n",
    "a\0",
    "x" * 65,
    7,
]


def wrong_values(doc: FieldDoc) -> list[Any]:
    """Values that a field of that type refuses."""
    if doc.key == "run.name":
        return NO_NAMES
    if doc.key in ("run.storage", "run.initial_weights", "data.root"):
        return NO_PATHS
    if doc.key == "data.channels":
        return [value for value in NO_CHOICES if type(value) is not int]  # 1 is one of its choices
    if doc.type.startswith("{"):
        return NO_CHOICES
    by_type = {
        "INT": NO_WHOLE_NUMBERS,
        "INT|auto": [*NO_WHOLE_NUMBERS, "Auto", "2..1", "0..3"],
        "FLOAT": NO_FLOATS,
        "BOOL": NO_SWITCHES,
        "INT,INT,...": [0, "0", -1, "1,,x", [1.5]],
        "TEXT,TEXT,...": ["diary", "own:", ":Diary", "own:Diary,x", "own/code:Diary", 5, True, [5]],
    }
    return by_type.get(doc.type, ["a\0b", "a\nb"])


CASES = [(doc, value) for doc in FIELDS for value in [*NEVER, *wrong_values(doc)]]


def refused(doc: FieldDoc, value: Any) -> bool:
    try:
        with_entry(doc).with_overrides({doc.key: value})
    except UserError as error:
        assert "\n" not in " ".join(str(error).split())
        assert doc.key.rpartition(".")[2] in str(error), error
        assert len(str(error)) < 1000, error
        return True
    return False


@pytest.mark.parametrize("doc", FIELDS, ids=field_ids)
def test_every_field_refuses_what_is_not_of_its_kind(doc: FieldDoc, fault_counts: Count) -> None:
    values = [value for field, value in CASES if field is doc]
    accepted = [value for value in values if not refused(doc, value)]
    assert accepted == []
    fault_counts("bad configuration", tried=len(values), survived=len(values), note="every field")


OVERRIDES = [
    (doc, value)
    for doc in FIELDS
    for value in wrong_values(doc)
    if isinstance(value, str) and "\0" not in value and doc.type != "PATH"
]
if FORM == "short":  # one of each field and a sample; each value meets its field in test_every_field_refuses_...
    OVERRIDES = [case for n, case in enumerate(OVERRIDES) if n % 4 == 0 or case[0] is not OVERRIDES[n - 1][0]]


def test_wrong_values_on_the_command_line_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault_counts: Count
) -> None:
    monkeypatch.chdir(tmp_path)
    for doc, value in OVERRIDES:
        flags = [f"--{key.replace('_', '-')}={text}" for key, text in [*entry_of(doc).items(), (doc.key, value)]]
        assert main(["train", "digits", *flags]) == 2, (doc.key, value)
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), (doc.key, value)
        assert err.startswith("vae-ray: "), err
    assert list(tmp_path.iterdir()) == []
    fault_counts("bad configuration", tried=len(OVERRIDES), survived=len(OVERRIDES), note="command line")


def test_wrong_values_in_a_file_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault_counts: Count
) -> None:
    monkeypatch.chdir(tmp_path)
    file, tried = tmp_path / "x.yaml", 0
    for doc, value in CASES[:: 16 if FORM == "short" else 4]:
        content: Any = value
        for part in reversed(doc.key.split(".")):
            content = {part: content}
        file.write_text(yaml.safe_dump(content))
        assert main(["train", "x.yaml"]) == 2, (doc.key, value)
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), (doc.key, value)
        tried += 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]
    fault_counts("bad configuration", tried=tried, survived=tried, note="files")


SPACES: list[Any] = [
    *(None, [], {}, 5, "x", {"a": 1}, {"optim.lr": 5}, {"optim.lr": []}, {"optim.lr": {}}, {"no.key": {"choice": [1]}}),
    *(
        {"optim.lr": {kind: value}}
        for kind in ("uniform", "loguniform")
        for value in ([1], [2, 1], [0.1, "x"], None, {})
    ),
    *({"optim.lr": {"loguniform": value}} for value in ([0, 1], [-1, 1], [math.nan, 1], [1, math.inf], [1, 1])),
    *({"model.latent_dim": {kind: [1.5, 3]}} for kind in ("int", "logint")),
    *({"model.latent_dim": {"int": value}} for value in ([0, 3], [3, 1], [1, 10**9], ["1", []])),
    *({"model.latent_dim": {"choice": value}} for value in ([], [2, 2], [0], ["x"], [None], 5, [[1]], [True])),
    *(
        {key: {"choice": ["a", "b"]}}
        for key in ("run.name", "run.storage", "workers.num", "data.cache_dir", "optim.lr")
    ),
    {"optim.lr": {"uniform": [0.1, 0.2], "choice": [1]}},
    {"optim.lr": {"normal": [0, 1]}},
    {"optim.lr": {"choice": [0.1]}, "optim-lr": {"choice": [0.1]}, "optim.lr ": {"choice": [1]}},
]


@pytest.mark.parametrize("content", SPACES, ids=lambda content: repr(content)[:60])
def test_search_spaces_that_cannot_be_are_refused(content: Any, fault_counts: Count) -> None:
    with pytest.raises(UserError, match=r"search|key") as refusal:
        SearchSpace.from_dict(content).checked(Experiment())
    assert len(str(refusal.value)) < 1000
    fault_counts("bad configuration", tried=1, survived=1, note="search spaces")


SWEEPS: list[dict[str, Any]] = [
    *(
        {"metric": metric}
        for metric in ("", "loss", "val/loss", "test/nelbo", "val/nelbo,val/nelbo", "val/nelb", "a,b,c")
    ),
    *({"scheduler": name} for name in ("", "ASHA", "hyperband", "asha ")),
    *({"searcher": name} for name in ("", "bayes", "Grid")),
    *({"num_trials": number} for number in (0, -1)),
    {"metric": "val/rate,val/distortion", "scheduler": "asha"},
    {"scheduler": "pbt", "workers_per_trial": 2},
    {"scheduler": "pbt", "searcher": "optuna"},
    {"searcher": "grid", "search": {"optim.lr": {"uniform": [0.1, 0.2]}}},
    {"search": "no such space"},
    {"search": "/no/such/file.yaml"},
]


@pytest.mark.parametrize("arguments", SWEEPS, ids=lambda arguments: repr(arguments)[:60])
def test_sweeps_that_cannot_be_are_refused(arguments: dict[str, Any], fault_counts: Count) -> None:
    usual = {"metric": "val/nelbo", "num_trials": None, "scheduler": None, "searcher": "random", "workers_per_trial": 1}
    with pytest.raises(UserError):
        sweep_settings(**{"search": None, **usual, **arguments})
    fault_counts("bad configuration", tried=1, survived=1, note="sweeps")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(key=st.sampled_from([doc.key for doc in FIELDS]), value=ANYTHING)
def test_any_value_is_either_read_and_saved_or_refused_in_one_line(key: str, value: Any) -> None:
    try:
        experiment = Experiment().with_overrides({key: value})
    except UserError as error:
        assert len(str(error)) < 1000
    else:
        assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(alphabet="abc: -[]{}&*!?|>%@#\n\"'0.~", max_size=60).map(str.encode))
def test_any_bytes_are_either_an_experiment_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    try:
        Experiment.from_file(tmp_path / "x.yaml")
    except UserError as error:
        assert len(str(error)) < 1500
