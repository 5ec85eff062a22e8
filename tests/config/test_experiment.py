"""Contract and truth: the Experiment, its fields and names, its presets and files."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from vae_ray import Experiment, UserError
from vae_ray.config.experiment import PRESET_DIR, differing_fields, field_docs, is_place_key, preset_names
from vae_ray.config.keys import FieldDoc
from vae_ray.config.sections.run import NAME_PATTERN
from vae_ray.models.initialization import INITIALIZATIONS
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.networks import NETWORKS
from vae_ray.models.priors import PRIORS
from vae_ray.objectives import OBJECTIVES
from vae_ray.objectives.schedules import SCHEDULES as RISES
from vae_ray.storage.reading import parse_yaml
from vae_ray.training.optimization import OPTIMIZERS
from vae_ray.training.schedules import SCHEDULES
from vae_ray.tuning.space import SEARCH_DIR

FIELDS = list(field_docs())


def field_ids(field: FieldDoc) -> str:
    return f"{field.key} {field.entry}".rstrip()


# --- what it says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS, ids=field_ids)
def test_every_field_is_documented_with_a_sentence(field: FieldDoc) -> None:
    assert re.fullmatch(r"\S.{10,}\.", field.description), field.description


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("model.network", NETWORKS),
        ("model.prior", PRIORS),
        ("likelihood", LIKELIHOODS),
        ("objective", OBJECTIVES),
        ("optim.optimizer", OPTIMIZERS),
        ("model.initialization", INITIALIZATIONS),
        ("optim.schedule", SCHEDULES),
        ("objective.beta_schedule", RISES),
        ("objective.capacity_schedule", RISES),
    ],
)
def test_allowed_names_are_the_keys_of_the_table(key: str, table: dict[str, Any]) -> None:
    fields = [field for field in FIELDS if field.key == key]
    assert fields
    assert all(set(field.type.strip("{}").split(",")) - {"MODULE:NAME"} == set(table) for field in fields)


def test_place_is_what_changes_no_number_of_a_run() -> None:
    """Resume lets these fields differ."""
    content = {field.key for field in FIELDS if not field.is_place}
    assert not content & {"workers.num", "workers.cpus", "run.storage", "data.root", "training.nonfinite.limit"}
    assert content >= {"optim.lr", "run.seed", "likelihood", "likelihood.scale", "training.ema_decay", "model.network"}
    assert all(is_place_key(field.key) == field.is_place for field in FIELDS)
    assert [is_place_key(key) for key in ("training.nonfinite.name", "likelihood.name", "no.key")] == [
        True,
        False,
        False,
    ]


def test_notebook_preset_is_what_the_notebook_was() -> None:
    flat = Experiment.preset("notebook").flat()
    notebook = {
        "data.source": "mnist",
        "data.num_validation": 0,
        "model.network.name": "mlp",
        "model.network.hidden": [400, 100],
        "model.latent_dim": 20,
        "model.encoder_range": "signed",
        "likelihood.name": "bernoulli",
        "objective.beta": 1.0,
        "optim.optimizer": "adam",
        "optim.lr": 1e-3,
        "optim.schedule.name": "constant",
        "optim.warmup_steps": 0,
        "optim.weight_decay": 0.0,
        "optim.grad_clip": None,
        "training.epochs": 10,
        "training.global_batch_size": 64,
        "training.precision": "float32",
    }
    assert {key: flat[key] for key in notebook} == notebook


def test_presets_train_the_data_set_they_are_named_after() -> None:
    assert set(preset_names()) == {
        "binary-mnist",
        "cifar",
        "digits",
        "images",
        "iwae",
        "ladder-mnist",
        "mnist",
        "notebook",
        "sprites",
    }
    assert {name: Experiment.preset(name).data.source for name in ("digits", "images", "mnist")} == {
        "digits": "digits",
        "images": "auto",
        "mnist": "mnist",
    }


# --- files and copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_survives_its_own_yaml(preset: str, tmp_path: Path) -> None:
    experiment = Experiment.preset(preset)
    file = tmp_path / "experiment.yaml"
    file.write_text(experiment.to_yaml())
    assert Experiment.from_file(file) == experiment


@given(st.floats(min_value=0, max_value=3.4e38, exclude_min=True))
@example(5e-324)
@example(1e-5)
@example(1e22)
def test_any_learning_rate_survives_yaml_and_the_command_line(lr: float) -> None:
    experiment = Experiment().with_overrides({"optim.lr": lr})
    assert experiment.optim.lr == lr
    assert Experiment().with_overrides({"optim.lr": str(lr)}) == experiment
    assert round_trip(experiment) == experiment


def round_trip(experiment: Experiment) -> Experiment:
    return Experiment.from_dict(parse_yaml(experiment.to_yaml().encode()))


TEXT = [
    "010",
    "1e3",
    "12:30",
    "0o17",
    "0x1f",
    "yes",
    "No",
    "~",
    "",
    "null",
    ".inf",
    "1_000",
    "2026-01-01",
    "<<",
    "=",
    "é",
]


@pytest.mark.parametrize("text", TEXT)
def test_text_of_own_settings_stays_text_in_yaml(text: str) -> None:
    given = {"data": {"source": "my:images", "label": text}}
    experiment = Experiment.from_dict(given)
    assert experiment.data.label == text  # type: ignore[union-attr]
    assert round_trip(experiment) == experiment
    assert yaml.safe_load(experiment.to_yaml()) == experiment.to_dict()  # also by readers of YAML 1.1


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("010", 10), ("-007", -7), ("0o17", 15), ("0x1F", 31), ("+3", 3), ("12", 12)],
        *[("1e3", 1000.0), ("1E-4", 1e-4), (".5", 0.5), ("1.", 1.0), ("-1.5e+2", -150.0), ("-.inf", -math.inf)],
        *[("true", True), ("FALSE", False), ("~", None), ("null", None), ("", None)],
        *[
            (text, text)
            for text in ("12:30", "1:2:3.5", "yes", "off", "y", "0b11", "1_000", "2026-01-01", "1.2.3", "=")
        ],
        *[("!!int 010", 10), ("!!float 3", 3.0), ("'010'", "010")],
    ],
)
def test_numbers_of_yaml_are_those_of_version_1_2(written: str, value: object) -> None:
    (found,) = parse_yaml(f"key: {written}".encode()).values()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("file", [*PRESET_DIR.glob("*.yaml"), *SEARCH_DIR.glob("*.yaml")], ids=lambda file: file.name)
def test_our_own_files_mean_the_same_by_both_versions_of_yaml(file: Path) -> None:
    assert parse_yaml(file.read_bytes()) == yaml.safe_load(file.read_bytes())


def test_paths_null_and_odd_strings_survive_yaml() -> None:
    experiment = Experiment().with_overrides(
        {
            "data.source": "mnist",
            "data.root": "/a path/with: colon",
            "run.storage": "yes",
            "run.name": "1e3",
            "optim.grad_clip": 2,
        }
    )
    assert round_trip(experiment) == experiment
    assert experiment.to_dict()["data"]["root"] == "/a path/with: colon"


def test_an_experiment_cannot_be_changed() -> None:
    experiment = Experiment()
    with pytest.raises(ValidationError, match="frozen"):
        experiment.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        experiment.optim = experiment.optim  # type: ignore[misc]
    varied = experiment.with_overrides({"optim.lr": 0.5})
    assert (varied.optim.lr, experiment.optim.lr) == (0.5, 1e-3)


def test_differing_fields_name_key_and_both_values() -> None:
    old = Experiment()
    new = old.with_overrides({"optim.lr": 0.5, "model.network.hidden": "8"})
    assert differing_fields(old, new) == ["model.network.hidden: [400, 100] -> [8]", "optim.lr: 0.001 -> 0.5"]
    assert differing_fields(old, old) == []


def test_an_unknown_preset_is_refused_with_the_nearest_real_one() -> None:
    with pytest.raises(UserError, match="'digit' does not exist; did you mean 'digits'"):
        Experiment.preset("digit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must be a mapping of sections"),
        ("optim: {lr: 1", "cannot be read as YAML"),
        ("optim: {lr: !!python/object/apply:os.getcwd []}", "cannot be read as YAML"),
        ("optim: 3", "optim: is a section; set one of optim.optimizer, optim.lr"),
        ("optm: {lr: 1}", "'optm.lr' does not exist; did you mean 'optim."),
        ("optim: {lr: -1}", "optim.lr: got -1"),
        ("\0", "cannot be read as YAML"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        Experiment.from_file(file)
    assert "\n" not in str(refusal.value)


@given(st.text(max_size=70))
@example("a" * 64)
@example("a" * 65)
@example("abc\n")
@example("../up")
@example(".hidden")
@example("ünïcode")
@example("")
def test_a_name_matches_the_pattern_or_is_refused(name: str) -> None:
    if name.lower() in ("null", "none", "~"):
        assert Experiment().with_overrides({"run.name": name}).run.name is None
    elif re.fullmatch(NAME_PATTERN.strip("^$"), name):
        assert Experiment().with_overrides({"run.name": name}).run.name == name
    else:
        with pytest.raises(UserError, match=re.escape("run.name: got")):
            Experiment().with_overrides({"run.name": name})
