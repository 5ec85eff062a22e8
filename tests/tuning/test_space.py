"""Truth and contract: what a search space draws, and the message for one that cannot work."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from vae_ray import Experiment, UserError
from vae_ray.config.experiment import field_docs, preset_names
from vae_ray.tuning.space import DOMAIN_TYPES, INCOMPARABLE, Range, SearchSpace, Values, search_names

ALMOST_ONE = math.nextafter(1, 0)
"""The largest number that `random()` returns."""
EVERY_KIND = {
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "objective.beta": {"uniform": [0, 4]},
    "model.latent_dim": {"int": [2, 17]},
    "optim.warmup_steps": {"logint": [1, 300]},
    "likelihood.name": {"choice": ["bernoulli", "gaussian"]},
    "training.precision": {"grid": ["float32", "bfloat16"]},
}

readable_numbers = st.builds(lambda digits, power: float(f"{digits}e{power}"), st.integers(1, 9999), st.integers(-9, 4))


def range_of(kind: str, low: float, high: float) -> Range:
    domain = SearchSpace.from_dict({"optim.lr": {kind: [low, high]}}).domains["optim.lr"]
    assert isinstance(domain, Range)
    return domain


# --- a draw has an address ------------------------------------------------------------------------------


@given(st.permutations(list(EVERY_KIND)), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_the_order_of_the_keys_does_not_change_a_draw(order: list[str], seed: int, number: int) -> None:
    draw = SearchSpace.from_dict({key: EVERY_KIND[key] for key in order}).draw(seed, number)
    assert draw == SearchSpace.from_dict(EVERY_KIND).draw(seed, number)
    assert list(draw) == order


@pytest.mark.parametrize("seed", range(5))
def test_few_draws_cover_the_space_evenly(seed: int) -> None:
    """16 trials fall into 16 different sixteenths of every range; independent draws leave a third empty."""
    space = SearchSpace.from_dict({"optim.lr": {"uniform": [1, 17]}, "objective.beta": {"uniform": [1, 17]}})
    draws = [space.draw(seed, number) for number in range(16)]
    for key in space.domains:
        assert sorted(int(draw[key]) for draw in draws) == list(range(1, 17))
    quarters = {(int(draw["optim.lr"] - 1) // 4, int(draw["objective.beta"] - 1) // 4) for draw in draws}
    assert len(quarters) == 16


def test_seed_number_and_key_each_change_a_draw() -> None:
    keys = ("optim.lr", "objective.beta", "likelihood.scale")
    space = SearchSpace.from_dict({key: {"uniform": [1, 2]} for key in keys})
    draws = [value for seed in range(8) for number in range(8) for value in space.draw(seed, number).values()]
    # of 192 numbers on a grid of 1000 some coincide; equal streams would leave a third of them or fewer
    assert len(set(draws)) > 150


def test_a_draw_is_the_same_on_every_machine() -> None:
    """Golden: a change of these numbers changes what every sweep tries."""
    assert SearchSpace.from_dict(EVERY_KIND).draw(3, 1) == {
        "optim.lr": 0.00914,
        "objective.beta": 2.487,
        "model.latent_dim": 3,
        "optim.warmup_steps": 12,
        "likelihood.name": "gaussian",
        "training.precision": "bfloat16",
    }


# --- ranges ---------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["uniform", "loguniform"]),
    st.floats(1e-300, 1e300),
    st.floats(1e-300, 1e300),
    st.floats(0, ALMOST_ONE),
)
def test_rounding_never_leaves_the_range(kind: str, a: float, b: float, u: float) -> None:
    assume(a != b)
    low, high = sorted((a, b))
    domain = range_of(kind, low, high)
    assert low <= domain.at(u) <= high
    assert low <= domain.rounded(low + (high - low) * u) <= high


@given(st.sampled_from(["int", "logint"]), st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0, ALMOST_ONE))
def test_whole_numbers_stay_whole_and_inside_and_both_ends_are_drawn(kind: str, low: int, span: int, u: float) -> None:
    domain = range_of(kind, low, low + span)
    assert isinstance(domain.at(u), int)
    assert low <= domain.at(u) <= low + span
    assert (domain.at(0.0), domain.at(ALMOST_ONE)) == (low, low + span)


@given(st.sampled_from(["uniform", "loguniform"]), readable_numbers, readable_numbers)
def test_both_ends_of_a_range_are_drawn(kind: str, a: float, b: float) -> None:
    assume(a != b)
    domain = range_of(kind, min(a, b), max(a, b))
    assert (domain.at(0.0), domain.at(ALMOST_ONE)) == (min(a, b), max(a, b))


@given(st.floats(0, ALMOST_ONE))
def test_ranges_are_the_quantiles_of_scipy_s_distributions(u: float) -> None:
    """To the four digits that are kept."""
    assert range_of("uniform", 3, 8).at(u) == pytest.approx(stats.uniform(3, 5).ppf(u), rel=5e-4)
    assert range_of("loguniform", 1e-5, 0.1).at(u) == pytest.approx(stats.loguniform(1e-5, 0.1).ppf(u), rel=5e-4)


def test_whole_numbers_and_choices_are_as_frequent_as_their_intervals_are_long() -> None:
    even = [(n + 0.5) / 60_000 for n in range(60_000)]
    counts = Counter(range_of("int", 3, 9).at(u) for u in even)
    assert counts == pytest.approx(dict.fromkeys(range(3, 10), 60_000 / 7), abs=1)
    counts = Counter(range_of("logint", 1, 6).at(u) for u in even)
    shares = {n: math.log((n + 0.5) / (n - 0.5)) / math.log(6.5 / 0.5) for n in range(1, 7)}
    assert counts == pytest.approx({n: 60_000 * share for n, share in shares.items()}, abs=1)
    assert Counter(Values(("a", "b", "c"), is_grid=False).at(u) for u in even) == dict.fromkeys("abc", 20_000)


# --- grids ----------------------------------------------------------------------------------------------

GRIDS = {
    "model.latent_dim": {"grid": [2, 5, 10]},
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "objective.beta": {"grid": [0.5, 2.0]},
}


def test_grids_are_crossed_and_gone_through_in_turn_while_the_rest_is_random() -> None:
    draws = [SearchSpace.from_dict(GRIDS).draw(0, number) for number in range(24)]
    points = [(draw["model.latent_dim"], draw["objective.beta"]) for draw in draws]
    assert set(points[:6]) == {(d, b) for d in (2, 5, 10) for b in (0.5, 2.0)}
    assert points == points[:6] * 4
    assert len({draw["optim.lr"] for draw in draws}) == 24


def test_a_grid_is_the_whole_product_once_and_a_range_has_none() -> None:
    content = {"model.latent_dim": {"grid": [2, 5]}, "training.epochs": {"choice": [1, 7, 3]}}
    points = [tuple(point.values()) for point in SearchSpace.from_dict(content).grid()]
    assert points == [(2, 1), (2, 7), (2, 3), (5, 1), (5, 7), (5, 3)]
    with pytest.raises(UserError, match=r"search: optim\.lr: a range has no grid; .*--searcher random"):
        SearchSpace.from_dict(GRIDS).grid()


# --- values as the Experiment reads them ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("optim.lr", ["1e-3", 1], [0.001, 1.0]),  # YAML reads 1e-3 as text
        ("model.latent-dim", ["8", 9], [8, 9]),
        ("optim.grad_clip", [None, "2"], [None, 2.0]),
        ("model.network.hidden", [[16], "400,100", [7, 5, 3]], ["[16]", "[400, 100]", "[7, 5, 3]"]),
    ],
)
def test_values_are_read_as_their_field_s_type(key: str, given: Any, expected: Any) -> None:
    space = SearchSpace.from_dict({key: {"choice": given}}).checked(Experiment())
    ((name, domain),) = space.domains.items()
    assert isinstance(domain, Values)
    assert [(type(value), value) for value in domain.values] == [(type(value), value) for value in expected]
    for overrides, value in zip(space.grid(), given, strict=True):  # also lists, which are text by then
        assert Experiment().with_overrides(overrides) == Experiment().with_overrides({name: value})


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("name", search_names())
def test_a_space_that_ships_is_valid_for_every_preset(name: str, preset: str) -> None:
    base = Experiment.preset(preset)
    space = SearchSpace.load(name).checked(base)
    for number in range(20):
        overrides = space.draw(base.run.seed, number)
        assert base.with_overrides(overrides).flat().items() >= overrides.items()


def test_a_space_is_equal_to_the_one_its_source_describes() -> None:
    dashed = SearchSpace.from_dict({key.replace("_", "-"): domain for key, domain in EVERY_KIND.items()})
    assert SearchSpace.from_dict(yaml.safe_load(yaml.safe_dump(dashed.source))) == SearchSpace.from_dict(EVERY_KIND)


# --- mistakes -------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, object, list[str]]] = [
    ("nothing", None, ["should be a mapping", "loguniform"]),
    ("empty", {}, ["should be a mapping"]),
    ("unknown key", {"optim.lrr": {"choice": [1]}}, ["'optim.lrr'", "did you mean 'optim.lr'"]),
    ("a key without its section", {"latent_dim": {"choice": [1]}}, ["did you mean 'model.latent_dim'"]),
    ("a number for a key", {3: {"choice": [1]}}, ["'3'"]),
    ("unknown kind", {"optim.lr": {"normal": [0, 1]}}, ["optim.lr", "{'normal': [0, 1]}", *DOMAIN_TYPES]),
    ("two kinds", {"optim.lr": {"choice": [1], "grid": [1]}}, ["optim.lr", "should be one of"]),
    ("a bare value", {"optim.lr": 0.1}, ["optim.lr: got 0.1", "should be one of", "choice: [1, 2]"]),
    ("reversed", {"optim.lr": {"uniform": [2, 1]}}, ["optim.lr: uniform: got [2, 1]", "the smaller first"]),
    ("no width", {"optim.lr": {"uniform": [1, 1]}}, ["got [1, 1]", "the smaller first"]),
    ("one end", {"optim.lr": {"uniform": [1]}}, ["got [1]", "should be two numbers"]),
    ("text for a range", {"optim.lr": {"uniform": "12"}}, ["got '12'", "should be two numbers"]),
    ("null in a range", {"optim.lr": {"uniform": [None, 1]}}, ["got [None, 1]", "two numbers"]),
    ("not a number in a range", {"optim.lr": {"uniform": [math.nan, 1]}}, ["got [nan, 1]", "two numbers"]),
    ("an endless range", {"optim.lr": {"uniform": [0, math.inf]}}, ["got [0, inf]", "two numbers"]),
    ("logarithm of 0", {"optim.lr": {"loguniform": [0, 1]}}, ["loguniform: got [0, 1]", "above 0"]),
    ("whole logarithm of 0", {"optim.warmup_steps": {"logint": [0, 9]}}, ["logint: got [0, 9]", "above 0"]),
    ("parts of whole numbers", {"model.latent_dim": {"int": [1, 2.5]}}, ["int: got [1, 2.5]", "whole numbers"]),
    ("more than a float holds", {"training.epochs": {"int": [1, 10**400]}}, ["training.epochs: int: got"]),
    ("no choice", {"optim.lr": {"choice": []}}, ["choice: got []", "a list of values"]),
    ("a choice of one word", {"training.precision": {"choice": "float32"}}, ["got 'float32'", "a list of values"]),
    ("a value twice", {"model.latent_dim": {"choice": [2, 5, 2]}}, ["got [2, 5, 2]", "twice"]),
    ("a value twice, once as text", {"model.latent_dim": {"grid": [8, "8"]}}, ["model.latent_dim", "twice"]),
    (
        "a key twice, with a dash",
        {"model.latent_dim": {"choice": [2]}, "model.latent-dim": {"choice": [3]}},
        ["model.latent_dim", "twice"],
    ),
    ("a value that is not allowed", {"optim.lr": {"choice": [0.1, -1]}}, ["optim.lr: got -1", "greater than 0"]),
    ("an end that is not allowed", {"optim.lr": {"uniform": [0, 1]}}, ["optim.lr: got 0", "greater than 0"]),
    ("an upper end that is not allowed", {"model.latent_dim": {"int": [1, 10**6]}}, ["latent_dim: got 1000000"]),
    ("a name that does not exist", {"optim.optimizer": {"choice": ["sgd"]}}, ["optim.optimizer: got 'sgd'", "adamw"]),
    ("a list for a number", {"optim.lr": {"choice": [[1, 2]]}}, ["optim.lr: got [1, 2]"]),
    ("a switch for a number", {"optim.lr": {"choice": [True]}}, ["optim.lr: got True", "number"]),
    ("fractions of whole numbers", {"model.latent_dim": {"uniform": [1, 64]}}, ["model.latent_dim: got"]),
    # four digits make whole numbers of all above 1000, but 0.5 would be drawn too
    ("fractions among whole numbers", {"optim.warmup_steps": {"uniform": [0, 10_000]}}, ["optim.warmup_steps: got"]),
    ("fractions on a logarithmic scale", {"training.epochs": {"loguniform": [1, 9]}}, ["training.epochs: got"]),
    ("code", {"model.network": {"choice": ["my_nets:tiny"]}}, ["model.network.name", "named on the command line"]),
]


@pytest.mark.parametrize(("content", "parts"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_that_names_key_value_and_what_is_allowed(content: object, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        SearchSpace.from_dict(content).checked(Experiment())
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert message.startswith("search: ")
    assert "\n" not in message


@pytest.mark.parametrize("key", sorted({doc.key for doc in field_docs() if doc.is_place}))
def test_where_a_trial_runs_cannot_be_searched(key: str) -> None:
    with pytest.raises(UserError, match="not what it computes"):
        SearchSpace.from_dict({key.replace("_", "-"): {"choice": [1, 2]}}).checked(Experiment())


@pytest.mark.parametrize("key", [*INCOMPARABLE, "data.source", "data.binarize", "data", "likelihood"])
def test_what_makes_nats_incomparable_cannot_be_searched(key: str) -> None:
    with pytest.raises(UserError, match=r"cannot be searched, .*their nats do not compare; run a sweep for each value"):
        SearchSpace.from_dict({key: {"choice": [1, 2]}}).checked(Experiment())


# --- names and files ------------------------------------------------------------------------------------


def test_a_file_is_the_space_it_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "mine"):
        Path(name).write_text("# mine\noptim.lr: {loguniform: [1e-4, 1.0e-2]}\n")
        space = SearchSpace.load(name)
        assert space == SearchSpace.from_dict({"optim.lr": {"loguniform": [1e-4, 1e-2]}})
        assert space.checked(Experiment()).domains["optim.lr"] == Range(1e-4, 1e-2, log=True, integer=False)


def loading_fails(name: str) -> str:
    with pytest.raises(UserError) as caught:
        SearchSpace.load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_gets_the_nearest() -> None:
    assert loading_fails("optimisation") == "search: 'optimisation' does not exist; did you mean 'optimization'?"
    assert all(name in loading_fails("q") for name in search_names())
    assert "does not exist" in loading_fails("x" * 300)


@pytest.mark.parametrize(
    "content",
    [b"optim.lr: {choice: [1", b"a: b: c", b"\xff\xfe\x00", b"optim.lr: !!python/name:os.system"],
    ids=["torn", "two colons", "not text", "a name of Python's"],
)
def test_a_file_that_is_no_yaml_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    assert re.match(rf"search: {re.escape(str(file))}: cannot be read as YAML: ", loading_fails(str(file)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/no.yaml: cannot be read" in loading_fails(f"{tmp_path}/no.yaml")
    assert f"{tmp_path}: cannot be read" in loading_fails(str(tmp_path))


def test_combinations_are_all_of_the_choices_at_both_ends_of_the_ranges_or_each_value_once() -> None:
    choices = {"model.prior.name": {"choice": ["standard", "vamp"]}, "model.latent_dim": {"grid": [2, 5, 9]}}
    space = SearchSpace.from_dict({**choices, "optim.lr": {"loguniform": [1e-4, 1e-2]}})
    points = [tuple(each.values()) for each in space.combinations(6)]
    assert points == [(p, d, lr) for lr in (1e-4, 1e-2) for p in ("standard", "vamp") for d in (2, 5, 9)]
    few = [tuple(each.values()) for each in space.combinations(5)]
    assert len(few) == 6
    assert [{*values} for values in zip(*few, strict=True)] == [{"standard", "vamp"}, {2, 5, 9}, {1e-4, 1e-2}]
