"""Contract: dotted keys, the one language that overrides fields, and what it answers to mistakes."""

import functools
import re
from pathlib import Path

import pytest

from tests.config.test_experiment import FIELDS, field_ids
from vae_ray import Experiment, UserError
from vae_ray.config.keys import FieldDoc

NUMBERS = [field for field in FIELDS if field.type.split("|")[0] in ("INT", "FLOAT") and field.key != "workers.num"]


def entry_of(field: FieldDoc) -> dict[str, str]:
    """The override that chooses the entry whose setting the field is."""
    axis = field.key.rpartition(".")[0]
    return {"data.source" if axis == "data" else axis: field.entry.split(", ")[0]} if field.entry else {}


def with_entry(field: FieldDoc) -> Experiment:
    """The default experiment, with that entry."""
    return Experiment().with_overrides(entry_of(field))


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", 1, 1.0),
        ("model.latent-dim", "8", 8),
        ("model.network.hidden", "400,100", (400, 100)),
        ("model.network.hidden", "[400, 100, 7]", (400, 100, 7)),
        ("model.network.hidden", [64], (64,)),
        ("optim.grad-clip", "null", None),
        ("optim.grad_clip", "None", None),
        ("optim.grad_clip", "0.5", 0.5),
        ("data.download", "false", False),
        ("data.download", True, True),
        ("data.root", "some/where", "some/where"),
        ("workers.num", "2..8", (2, 8)),
        ("workers.num", "3..3", 3),
        ("workers.num", "auto", "auto"),
        ("workers.cpus", "2", 2),
        ("run.callbacks", "a:b,c.d:e", ("a:b", "c.d:e")),
        ("data.num-validation", "0", 0),
        ("workers.device", "cpu", "cpu"),
    ],
)
def test_a_value_is_read_as_its_field_s_type(key: str, given: object, expected: object) -> None:
    experiment = Experiment().with_overrides({"data.source": "mnist", key: given})
    value = functools.reduce(getattr, key.replace("-", "_").split("."), experiment)
    assert value == expected
    assert type(value) is type(expected) or isinstance(expected, Path)


@pytest.mark.parametrize("switch", [True, False, "true"])
@pytest.mark.parametrize("field", NUMBERS, ids=field_ids)
def test_a_switch_is_not_a_number(field: FieldDoc, switch: object) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(field.key)}: got {switch!r}, "):
        with_entry(field).with_overrides({field.key: switch})


def test_a_switch_is_not_a_width() -> None:
    with pytest.raises(UserError, match=r"model\.network\.hidden"):
        Experiment().with_overrides({"model.network.hidden": [True, 100]})


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
        ("model.network.hidden", "400,x"),
        ("model.network.hidden", [0]),
        ("optim.optimizer", "sgd"),
        ("training.epochs", "0"),
        ("training.global_batch_size", -3),
        ("data.num_validation", -1),
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


@pytest.mark.parametrize("field", [field for field in NUMBERS if field.type == "FLOAT"], ids=field_ids)
def test_a_number_that_float32_cannot_hold_is_refused(field: FieldDoc) -> None:
    with pytest.raises(UserError, match=rf"^{field.key}: got '1e\+?300', .*; for example --\S+ \S+$"):
        with_entry(field).with_overrides({field.key: "1e300"})


@pytest.mark.parametrize("field", [field for field in FIELDS if field.type.endswith(",...")], ids=field_ids)
def test_a_list_that_is_too_long_is_refused_with_its_lengths(field: FieldDoc) -> None:
    with pytest.raises(
        UserError, match=rf"^{field.key}: got .*, should be at most \d+ values, not 300; for example --"
    ):
        with_entry(field).with_overrides({field.key: ["a:b" if "TEXT" in field.type else 8] * 300})


@pytest.mark.parametrize(("overrides", "line"), [
    ({"model.num_classes": "4"}, "model.num_classes: got '4', which has no effect without model.condition; for example "
     "--model.condition label"),
    ({"model.num_classes": "40000", "model.condition": "label"}, "model.num_classes: got '40000', should be less than "
     "or equal to 10000; for example --model.num-classes null"),
    ({"model.network": "resnet", "model.network.channels": "16,1"}, "model.network.channels: got '16,1', should each "
     "be at least 2: after a norm a single value would always be 0; for example --model.network.channels 16,2"),
    ({"model.network": "resnet", "model.network.groups": "5"}, "model.network.groups: got '5', should divide each of "
     "channels 32,64,128 into groups of at least 2 channels; for example --model.network.groups 16"),
    ({"model.network": "ladder", "model.network.hidden": "7"}, "model.network.upper_dims: got (8,), should be one "
     "number less than hidden: 0, not 1; for example --model.network.upper-dims ''"),
    ({"objective.capacity": "3", "objective.free_bits": "1"}, "objective.free_bits: got '1', should be 0 where "
     "objective.capacity is given; for example --objective.free-bits 0.0"),
    ({"objective": "geco", "objective.target": "nan"}, "objective.target: got 'nan', should be a finite number; for "
     "example --objective.target 100"),
])  # fmt: skip
def test_values_that_do_not_go_together_are_refused_by_the_name_of_one(overrides: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as refusal:
        Experiment().with_overrides(overrides)
    assert str(refusal.value) == line


@pytest.mark.parametrize("field", FIELDS, ids=field_ids)
def test_every_field_refuses_nonsense_with_its_own_name(field: FieldDoc) -> None:
    with pytest.raises(UserError, match=re.escape(field.key)):
        with_entry(field).with_overrides({field.key: {"not": "a value"}})


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


# --- entries --------------------------------------------------------------------------------------------


def test_an_entry_is_chosen_by_its_axis_and_comes_with_its_defaults() -> None:
    ladder = (
        Experiment()
        .with_overrides({"model.network.hidden": [8], "model.latent_dim": 3})
        .with_overrides({"model.network": "ladder", "model.network.upper-dims": "4"})
    )
    network = ladder.to_dict()["model"]["network"]
    assert (network["name"], network["hidden"], network["upper_dims"]) == ("ladder", [256, 256], [4])
    assert ladder.model.latent_dim == 3
    assert ladder == Experiment.from_dict(
        {"model": {"network": {"name": "ladder", "upper_dims": [4]}, "latent_dim": 3}}
    )


def test_an_entry_and_its_settings_may_come_in_any_order() -> None:
    overrides = {"objective.beta_schedule.epochs": 3, "objective.beta_schedule": "linear", "objective.beta": 2}
    orders = [Experiment().with_overrides(dict(order)) for order in (overrides.items(), reversed(overrides.items()))]
    assert orders[0] == orders[1]
    assert orders[0].flat()["objective.beta_schedule.epochs"] == 3


def test_an_entry_of_an_entry_that_was_just_chosen_can_be_chosen() -> None:
    experiment = Experiment.from_dict({"objective": "mmd"})
    given = {"objective": "elbo", "objective.beta-schedule": "linear", "objective.beta-schedule.epochs": "9"}
    schedule = experiment.with_overrides(given).to_dict()["objective"]["beta_schedule"]
    assert (schedule["name"], schedule["epochs"]) == ("linear", 9)
    with pytest.raises(UserError, match=r"^objective\.beta_schedule\.epochs: the schedule 'constant' has no field"):
        experiment.with_overrides({"objective": "elbo", "objective.beta_schedule.epochs": 9})


def test_choosing_the_entry_that_is_chosen_changes_nothing() -> None:
    experiment = Experiment().with_overrides({"likelihood": {"name": "gaussian", "scale": 0.3}})
    assert experiment.with_overrides({"likelihood": "gaussian"}) == experiment


def test_what_all_data_sources_have_in_common_is_kept() -> None:
    experiment = Experiment().with_overrides({"data.num_validation": 7, "data.source": "mnist", "data.root": "/x"})
    other = experiment.with_overrides({"data.source": "kmnist"})
    assert (other.data.num_validation, other.flat()["data.root"]) == (7, None)
    back = other.with_overrides({"data.source": "digits"})
    assert (back.data.num_validation, "data.root" in back.flat()) == (7, False)


def test_settings_of_own_code_are_read_as_yaml() -> None:
    given = {"model.network": "nets:tiny", "model.network.width": "3", "model.network.names": "[a, b]"}
    experiment = Experiment().with_overrides(given)
    assert experiment.to_dict()["model"]["network"] == {"name": "nets:tiny", "width": 3, "names": ["a", "b"]}
    assert Experiment.from_dict(experiment.to_dict()) == experiment
    assert experiment.user_code() == ["nets:tiny"]
    by_text = {"010": 10, "12:30": "12:30", "1e-3": 0.001, "'010'": "010", "yes": "yes", "null": None, "true": True}
    for text, value in by_text.items():
        assert experiment.with_overrides({"model.network.width": text}).model.network.settings["width"] == value  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"model\.network\.width: got '\{', which is no YAML"):
        experiment.with_overrides({"model.network.width": "{"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "likelihood",
            "poisson",
            "likelihood: got 'poisson', should be one of bernoulli, continuous_bernoulli, gaussian, ",
        ),
        ("data.source", "minst", "data.source: got 'minst', should be one of .*; did you mean 'mnist'"),
        ("training.nonfinite", "a:b", "training.nonfinite: got 'a:b', should be one of stop, skip, rollback$"),
        ("likelihood", {"name": "gaussian", "scale": 1e-12}, "at least 0.001: rounding to 256 levels alone"),
        (
            "likelihood.scale",
            0.2,
            "likelihood.scale: the likelihood 'bernoulli' has no field 'scale', gaussian, laplace have; ",
        ),
        (
            "data.root",
            "/x",
            "data.root: the data source 'digits' has no field 'root', mnist, .* have; for example --data.source auto",
        ),
        ("model.hidden", 8, "key 'model.hidden' does not exist any more; use 'model.network.hidden'"),
        ("training.nonfinite_limit", 8, "use 'training.nonfinite.limit'"),
        ("model", 8, "model: is a section; set one of model.latent_dim, model.network"),
        ("optim.lr.name", 8, "key 'optim.lr.name' does not exist"),
    ],
)
def test_a_mistake_about_entries_names_what_there_is(key: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Experiment().with_overrides({key: value})


def test_types_in_the_help_are_those_of_the_fields() -> None:
    by_type = {type_: [f.key for f in FIELDS if f.type == type_] for type_ in {f.type for f in FIELDS}}
    assert set(by_type) - {t for t in by_type if t.startswith("{")} == {
        "INT", "INT|auto", "FLOAT", "BOOL", "TEXT", "TEXT,TEXT,...", "FLOAT,FLOAT,...", "PATH", "INT,INT,...",
        "INT|HEIGHT,WIDTH", "auto|LOW,HIGH", "flip,shift:INT", "white|black|#RRGGBB",
    }  # fmt: skip
    assert by_type["INT|HEIGHT,WIDTH"] == ["data.image_size"]
    assert set(by_type["INT,INT,..."]) == {
        *(f"model.network.{name}" for name in ("hidden", "channels", "upper_dims", "latent_groups")),
        "model.prior.hidden",
        "data.stride",
    }
