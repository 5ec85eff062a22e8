"""Contract and truth: the Experiment, its override language, its presets and what it says about mistakes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from vae_ray import Experiment, UserError
from vae_ray.config.experiment import NAME_PATTERN, FieldDoc, differing_fields, field_docs, preset_names
from vae_ray.data.sources import SOURCES
from vae_ray.models.initialization import INITIALIZATIONS
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.vae import NETWORKS
from vae_ray.training.optimization import OPTIMIZERS
from vae_ray.training.schedules import SCHEDULES

FIELDS = list(field_docs())
NUMBERS = [field.key for field in FIELDS if field.type in ("INT", "FLOAT")]


def field_ids(field: FieldDoc | str) -> str:
    return field if isinstance(field, str) else field.key


# --- what it says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS, ids=field_ids)
def test_every_field_is_documented_with_a_sentence(field: FieldDoc) -> None:
    assert re.fullmatch(r"\S.{10,}\.", field.description), field.description


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("data.source", SOURCES),
        ("model.network", NETWORKS),
        ("model.likelihood", LIKELIHOODS),
        ("optim.optimizer", OPTIMIZERS),
        ("model.initialization", INITIALIZATIONS),
        ("optim.schedule", SCHEDULES),
    ],
)
def test_allowed_names_are_the_keys_of_the_table(key: str, table: dict[str, Any]) -> None:
    (field,) = [field for field in FIELDS if field.key == key]
    assert set(field.type.strip("{}").split(",")) == set(table)


def test_schedules_of_beta_are_schedules() -> None:
    (field,) = [field for field in FIELDS if field.key == "objective.beta_schedule"]
    assert set(field.type.strip("{}").split(",")) <= set(SCHEDULES)


def test_notebook_preset_is_what_the_notebook_was() -> None:
    flat = Experiment.preset("notebook").flat()
    notebook = {
        "data.source": "mnist",
        "data.num_validation": 0,
        "model.network": "mlp",
        "model.hidden": [400, 100],
        "model.latent_dim": 20,
        "model.encoder_range": "signed",
        "model.likelihood": "bernoulli",
        "objective.beta": 1.0,
        "optim.optimizer": "adam",
        "optim.lr": 1e-3,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.weight_decay": 0.0,
        "optim.grad_clip": None,
        "training.epochs": 10,
        "training.global_batch_size": 64,
        "training.precision": "float32",
    }
    assert {key: flat[key] for key in notebook} == notebook


def test_presets_train_the_data_set_they_are_named_after() -> None:
    assert set(preset_names()) == {"digits", "mnist", "notebook"}
    assert {name: Experiment.preset(name).data.source for name in ("digits", "mnist")} == {
        "digits": "digits",
        "mnist": "mnist",
    }


# --- files and copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_survives_its_own_yaml(preset: str, tmp_path: Path) -> None:
    experiment = Experiment.preset(preset)
    file = tmp_path / "experiment.yaml"
    file.write_text(experiment.to_yaml())
    assert Experiment.from_file(file) == experiment


@given(st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False))
@example(5e-324)
@example(1e-5)
@example(1e22)
def test_any_learning_rate_survives_yaml_and_the_command_line(lr: float) -> None:
    experiment = Experiment().with_overrides({"optim.lr": lr})
    assert experiment.optim.lr == lr
    assert Experiment().with_overrides({"optim.lr": str(lr)}) == experiment
    assert round_trip(experiment) == experiment


def round_trip(experiment: Experiment) -> Experiment:
    return Experiment.from_dict(yaml.safe_load(experiment.to_yaml()))


def test_paths_null_and_odd_strings_survive_yaml() -> None:
    experiment = Experiment().with_overrides(
        {"data.root": "/a path/with: colon", "run.storage": "yes", "run.name": "1e3", "optim.grad_clip": 2}
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
    new = old.with_overrides({"optim.lr": 0.5, "model.hidden": "8"})
    assert differing_fields(old, new) == ["model.hidden: [400, 100] -> [8]", "optim.lr: 0.001 -> 0.5"]
    assert differing_fields(old, old) == []


# --- the override language ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", 1, 1.0),
        ("model.latent-dim", "8", 8),
        ("model.hidden", "400,100", (400, 100)),
        ("model.hidden", "[400, 100, 7]", (400, 100, 7)),
        ("model.hidden", [64], (64,)),
        ("optim.grad-clip", "null", None),
        ("optim.grad_clip", "None", None),
        ("optim.grad_clip", "0.5", 0.5),
        ("data.download", "false", False),
        ("data.download", True, True),
        ("data.root", "some/where", "some/where"),
        ("data.num-validation", "0", 0),
        ("workers.device", "cpu", "cpu"),
    ],
)
def test_a_value_is_read_as_its_field_s_type(key: str, given: object, expected: object) -> None:
    section, name = key.replace("-", "_").split(".")
    value = getattr(getattr(Experiment().with_overrides({key: given}), section), name)
    assert value == expected
    assert type(value) is type(expected) or isinstance(expected, Path)


@pytest.mark.parametrize("switch", [True, False, "true"])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_switch_is_not_a_number(key: str, switch: object) -> None:
    with pytest.raises(UserError, match=re.escape(key)):
        Experiment().with_overrides({key: switch})


def test_a_switch_is_not_a_width() -> None:
    with pytest.raises(UserError, match=r"model\.hidden"):
        Experiment().with_overrides({"model.hidden": [True, 100]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 0),
        ("optim.lr", "-1e-3"),
        ("optim.lr", "nan"),
        ("optim.lr", "inf"),
        ("optim.lr", "fast"),
        ("optim.lr", None),
        ("objective.beta", -0.1),
        ("model.latent_dim", 0),
        ("model.latent_dim", 2.5),
        ("model.hidden", "400,x"),
        ("model.hidden", [0]),
        ("model.likelihood", "poisson"),
        ("model.gaussian_scale", 0),
        ("training.epochs", "0"),
        ("training.global_batch_size", -3),
        ("data.num_validation", -1),
        ("data.source", "imagenet"),
        ("data.root", 3),
        ("workers.num", -1),
        ("workers.num", 5000),
        ("run.seed", -1),
        ("run.seed", 2**63),
        ("run.storage", ""),
        ("run.checkpoints_kept", 0),
    ],
)
def test_a_refusal_names_key_and_value_and_shows_an_example(key: str, value: object) -> None:
    with pytest.raises(UserError) as refusal:
        Experiment().with_overrides({key: value})
    message = str(refusal.value)
    assert message.startswith(f"{key}")
    wrong = {"400,x": "x", "[0]": 0}.get(str(value), value)  # of a list, the element that is wrong
    assert f"got {wrong!r}, " in message
    assert f"for example --{key.replace('_', '-')} " in message
    assert "\n" not in message


@pytest.mark.parametrize("field", FIELDS, ids=field_ids)
def test_every_field_refuses_nonsense_with_its_own_name(field: FieldDoc) -> None:
    with pytest.raises(UserError, match=re.escape(field.key)):
        Experiment().with_overrides({field.key: {"not": "a value"}})


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("training.lr", "optim.lr"),
        ("model.latentdim", "model.latent_dim"),
        ("epochs", "training.epochs"),
        ("training.batch_size", "training.global_batch_size"),
        ("objective.Beta", "objective.beta"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_real_one(wrong: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"{wrong}.*did you mean '{nearest}'"):
        Experiment().with_overrides({wrong: 1})


def test_an_unknown_preset_is_refused_with_the_nearest_real_one() -> None:
    with pytest.raises(UserError, match="'digit' does not exist; did you mean 'digits'"):
        Experiment.preset("digit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must be a mapping of sections"),
        ("optim: {lr: 1", "cannot be read as YAML"),
        ("optim: {lr: !!python/object/apply:os.getcwd []}", "cannot be read as YAML"),
        ("optim: 3", "'optim' does not exist"),
        ("optm: {lr: 1}", "'optm' does not exist; did you mean 'optim."),
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


def test_types_in_the_help_are_those_of_the_fields() -> None:
    by_type = {type_: [f.key for f in FIELDS if f.type == type_] for type_ in {f.type for f in FIELDS}}
    assert set(by_type) - {t for t in by_type if t.startswith("{")} == {
        "INT", "FLOAT", "BOOL", "TEXT", "PATH", "INT,INT,...",
    }  # fmt: skip
    assert by_type["INT,INT,..."] == ["model.hidden"]
