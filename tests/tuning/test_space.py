"""Truth and contract: what a search space draws, and what it says about one that cannot work."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from vae_ray import Experiment, UserError
from vae_ray.config.experiment import field_docs, preset_names
from vae_ray.tuning.space import DOMAIN_TYPES, Range, SearchSpace, Values, search_names

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
RARE = 1e-3
"""The p-value below which a fixed seed's sample is taken to be from another distribution."""

readable_numbers = st.builds(lambda digits, power: float(f"{digits}e{power}"), st.integers(1, 9999), st.integers(-9, 4))


def drawn(domain: dict[str, Any], num: int, *, key: str = "optim.lr") -> list[Any]:
    space = SearchSpace.from_dict({key: domain})
    return [space.draw(5, number)[key] for number in range(num)]


def range_of(kind: str, low: float, high: float) -> Range:
    domain = DOMAIN_TYPES[kind]([low, high])
    assert isinstance(domain, Range)
    return domain


def mistake_in(content: object, *, base: Experiment | None = None) -> str:
    """What is said about a space, read and held against an Experiment; one line."""
    with pytest.raises(UserError) as caught:
        SearchSpace.from_dict(content).checked(base or Experiment())
    message = str(caught.value)
    assert message.startswith("search: ")
    assert "\n" not in message
    return message


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


@given(st.sampled_from(["int", "logint"]), st.integers(1, 10**15), st.integers(1, 10**15), st.floats(0, ALMOST_ONE))
def test_whole_numbers_stay_whole_and_inside(kind: str, low: int, span: int, u: float) -> None:
    value = range_of(kind, low, low + span).at(u)
    assert isinstance(value, int)
    assert low <= value <= low + span


@given(st.sampled_from(["uniform", "loguniform"]), readable_numbers, readable_numbers)
def test_both_ends_of_a_range_are_drawn(kind: str, a: float, b: float) -> None:
    assume(a != b)
    domain = range_of(kind, min(a, b), max(a, b))
    assert (domain.at(0.0), domain.at(ALMOST_ONE)) == (min(a, b), max(a, b))


@given(st.sampled_from(["int", "logint"]), st.integers(1, 10**6), st.integers(1, 10**6))
def test_both_ends_of_a_range_of_whole_numbers_are_drawn(kind: str, low: int, span: int) -> None:
    domain = range_of(kind, low, low + span)
    assert (domain.at(0.0), domain.at(ALMOST_ONE)) == (low, low + span)


@given(readable_numbers)
def test_a_number_of_four_digits_is_not_rounded(value: float) -> None:
    assert range_of("uniform", value / 2, value * 2).rounded(value) == value


def test_a_uniform_range_is_uniform() -> None:
    sample = drawn({"uniform": [3, 8]}, 4000)
    assert stats.kstest(sample, stats.uniform(3, 5).cdf).pvalue > RARE


def test_a_logarithmic_range_is_uniform_in_its_logarithm() -> None:
    sample = np.log10(drawn({"loguniform": [1e-5, 1e-1]}, 4000))
    assert stats.kstest(sample, stats.uniform(-5, 4).cdf).pvalue > RARE


def test_whole_numbers_are_equally_frequent_ends_included() -> None:
    counts = Counter(drawn({"int": [3, 9]}, 7000))
    assert sorted(counts) == [3, 4, 5, 6, 7, 8, 9]
    assert stats.chisquare(list(counts.values())).pvalue > RARE


def test_whole_numbers_on_a_logarithmic_scale_are_as_frequent_as_their_intervals_are_long() -> None:
    counts = Counter(drawn({"logint": [1, 6]}, 6000))
    share = np.array([math.log((n + 0.5) / (n - 0.5)) for n in range(1, 7)]) / math.log(6.5 / 0.5)
    assert stats.chisquare([counts[n] for n in range(1, 7)], 6000 * share).pvalue > RARE


def test_choices_are_equally_frequent() -> None:
    counts = Counter(drawn({"choice": ["a", "b", "c", "d", "e"]}, 5000))
    assert sorted(counts) == ["a", "b", "c", "d", "e"]
    assert stats.chisquare(list(counts.values())).pvalue > RARE


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


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True), min_size=1, max_size=3))
def test_a_grid_is_the_whole_product_once(lists: list[list[int]]) -> None:
    keys = ("model.latent_dim", "optim.warmup_steps", "training.epochs")[: len(lists)]
    content = {
        key: {"choice" if n else "grid": values} for n, (key, values) in enumerate(zip(keys, lists, strict=True))
    }
    grid = SearchSpace.from_dict(content).grid()
    points = [tuple(point[key] for key in keys) for point in grid]
    assert len(points) == len(set(points)) == math.prod(map(len, lists))
    assert all(value in values for point in points for value, values in zip(point, lists, strict=True))


def test_a_range_has_no_grid() -> None:
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
    (domain,) = SearchSpace.from_dict({key: {"choice": given}}).checked(Experiment()).domains.values()
    assert isinstance(domain, Values)
    assert list(domain.values) == expected
    assert [type(value) for value in domain.values] == [type(value) for value in expected]


@given(st.lists(st.lists(st.integers(1, 65536), min_size=1, max_size=4).map(tuple), min_size=1, unique=True))
def test_lists_survive_as_text_that_the_experiment_reads_back(widths: list[tuple[int, ...]]) -> None:
    content = {"model.network.hidden": {"choice": [list(w) for w in widths]}}
    space = SearchSpace.from_dict(content).checked(Experiment())
    read = [Experiment().with_overrides(point).model.network.hidden for point in space.grid()]
    assert read == widths
    assert all(isinstance(point["model.network.hidden"], str) for point in space.grid())


def test_dashes_and_underscores_are_alike() -> None:
    dashed = SearchSpace.from_dict({"model.latent-dim": {"int": [2, 9]}})
    assert dashed == SearchSpace.from_dict({"model.latent_dim": {"int": [2, 9]}})
    assert dashed.draw(1, 2).keys() == {"model.latent_dim"}


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("name", search_names())
def test_a_space_that_ships_is_valid_for_every_preset(name: str, preset: str) -> None:
    base = Experiment.preset(preset)
    space = SearchSpace.load(name).checked(base)
    for number in range(20):
        overrides = space.draw(base.run.seed, number)
        assert base.with_overrides(overrides).flat().items() >= overrides.items()


def test_a_space_is_equal_to_the_one_its_source_describes() -> None:
    space = SearchSpace.from_dict(EVERY_KIND)
    assert SearchSpace.from_dict(yaml.safe_load(yaml.safe_dump(space.source))) == space


# --- mistakes -------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, object, list[str]]] = [
    ("nothing", None, ["should be a mapping", "loguniform"]),
    ("empty", {}, ["should be a mapping"]),
    ("a list", [{"optim.lr": {"choice": [1]}}], ["should be a mapping"]),
    ("text", "optim.lr", ["should be a mapping"]),
    ("unknown key", {"optim.lrr": {"choice": [1]}}, ["'optim.lrr'", "did you mean 'optim.lr'"]),
    ("a key without its section", {"latent_dim": {"choice": [1]}}, ["did you mean 'model.latent_dim'"]),
    ("a number for a key", {3: {"choice": [1]}}, ["'3'"]),
    ("unknown kind", {"optim.lr": {"normal": [0, 1]}}, ["optim.lr", "{'normal': [0, 1]}", *DOMAIN_TYPES]),
    ("two kinds", {"optim.lr": {"choice": [1], "grid": [1]}}, ["optim.lr", "should be one of"]),
    ("no kind", {"optim.lr": {}}, ["optim.lr: got {}", "should be one of"]),
    ("a bare value", {"optim.lr": 0.1}, ["optim.lr: got 0.1", "should be one of", "choice: [1, 2]"]),
    ("a bare list", {"optim.lr": [0.1, 0.2]}, ["optim.lr: got [0.1, 0.2]", "should be one of"]),
    ("reversed", {"optim.lr": {"uniform": [2, 1]}}, ["optim.lr: uniform: got [2, 1]", "a smaller and a larger"]),
    ("no width", {"optim.lr": {"uniform": [1, 1]}}, ["got [1, 1]", "a smaller and a larger"]),
    ("one end", {"optim.lr": {"uniform": [1]}}, ["got [1]", "should be [low, high]"]),
    ("a number for a range", {"optim.lr": {"uniform": 1}}, ["got 1", "should be [low, high]"]),
    ("text in a range", {"optim.lr": {"uniform": ["low", 1]}}, ["got ['low', 1]", "two numbers"]),
    ("null in a range", {"optim.lr": {"uniform": [None, 1]}}, ["got [None, 1]", "two numbers"]),
    ("not a number in a range", {"optim.lr": {"uniform": [math.nan, 1]}}, ["got [nan, 1]", "a smaller and a larger"]),
    ("an endless range", {"optim.lr": {"uniform": [0, math.inf]}}, ["got [0, inf]", "a smaller and a larger"]),
    ("logarithm of 0", {"optim.lr": {"loguniform": [0, 1]}}, ["loguniform: got [0, 1]", "above 0"]),
    ("whole logarithm of 0", {"optim.warmup_steps": {"logint": [0, 9]}}, ["logint: got [0, 9]", "above 0"]),
    ("parts of whole numbers", {"model.latent_dim": {"int": [1, 2.5]}}, ["int: got [1, 2.5]", "whole numbers"]),
    ("more than a float holds", {"run.seed": {"int": [1, 10**400]}}, ["run.seed: int: got"]),
    ("no choice", {"optim.lr": {"choice": []}}, ["choice: got []", "a list of values"]),
    ("a choice of one word", {"likelihood.name": {"choice": "gaussian"}}, ["got 'gaussian'", "a list of values"]),
    ("a value twice", {"model.latent_dim": {"choice": [2, 5, 2]}}, ["choice: got [2, 5, 2]", "twice"]),
    ("a value twice in a grid", {"model.latent_dim": {"grid": [2, 2]}}, ["grid: got [2, 2]", "twice"]),
    ("a value twice, once as text", {"model.latent_dim": {"choice": [8, "8"]}}, ["model.latent_dim", "twice"]),
    (
        "a key twice, with a dash",
        {"model.latent_dim": {"choice": [2]}, "model.latent-dim": {"choice": [3]}},
        ["model.latent_dim", "twice"],
    ),
    ("a value that is not allowed", {"optim.lr": {"choice": [0.1, -1]}}, ["optim.lr: got -1", "greater than 0"]),
    ("an end that is not allowed", {"optim.lr": {"uniform": [0, 1]}}, ["optim.lr: got 0", "greater than 0"]),
    ("an upper end that is not allowed", {"model.latent_dim": {"int": [1, 10**6]}}, ["latent_dim: got 1000000"]),
    ("a name that is not known", {"likelihood.name": {"choice": ["poisson"]}}, ["'poisson'", "bernoulli"]),
    ("numbers for a name", {"likelihood.name": {"int": [1, 3]}}, ["likelihood.name: got 1", "bernoulli"]),
    ("a list for a number", {"optim.lr": {"choice": [[1, 2]]}}, ["optim.lr: got [1, 2]"]),
    ("a switch for a number", {"optim.lr": {"choice": [True]}}, ["optim.lr: got True", "number"]),
]


@pytest.mark.parametrize(("content", "said"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_that_names_key_value_and_what_is_allowed(content: object, said: list[str]) -> None:
    message = mistake_in(content)
    assert [part for part in said if part not in message] == []


@pytest.mark.parametrize(
    ("key", "domain"),
    [
        ("model.latent_dim", {"uniform": [1, 64]}),
        ("model.latent_dim", {"loguniform": [1, 64]}),
        ("training.epochs", {"uniform": [2, 9]}),
        # four digits make whole numbers of all above 1000, but 0.5 would be drawn too
        ("optim.warmup_steps", {"uniform": [0, 10_000]}),
        ("run.seed", {"loguniform": [1, 1e9]}),
    ],
    ids=str,
)
def test_fractions_are_refused_where_the_experiment_has_whole_numbers(key: str, domain: dict[str, Any]) -> None:
    assert key in mistake_in({key: domain})


PLACE_KEYS = sorted({doc.key for doc in field_docs() if doc.is_place})


@pytest.mark.parametrize("key", PLACE_KEYS)
def test_where_a_trial_runs_cannot_be_searched(key: str) -> None:
    assert "not what it computes" in mistake_in({key.replace("_", "-"): {"choice": [1, 2]}})


# --- names and files ------------------------------------------------------------------------------------


def loading_fails(name: str) -> str:
    with pytest.raises(UserError) as caught:
        SearchSpace.load(name)
    return str(caught.value)


def test_a_file_is_the_space_it_describes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# mine\noptim.lr: {loguniform: [1e-4, 1.0e-2]}\nmodel.network.hidden: {choice: [[16], [32, 8]]}\n")
    space = SearchSpace.load(str(file))
    assert space == SearchSpace.from_dict(
        {"optim.lr": {"loguniform": ["1e-4", 1e-2]}, "model.network.hidden": {"choice": [[16], [32, 8]]}}
    )
    assert space.checked(Experiment()).domains["optim.lr"] == Range(1e-4, 1e-2, log=True, integer=False)


def test_a_file_needs_no_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("optim.lr: {choice: [0.1]}\n")
    assert SearchSpace.load("mine").draw(0, 0) == {"optim.lr": 0.1}


def test_an_unknown_name_gets_the_nearest() -> None:
    assert loading_fails("optimisation") == "search: 'optimisation' does not exist; did you mean 'optimization'?"
    assert all(name in loading_fails("q") for name in search_names())


def test_a_name_too_long_for_a_file_is_a_mistake() -> None:
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


def test_why_a_file_is_no_yaml_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optim.lr: {choice: [1")
    assert "\n" not in loading_fails(str(tmp_path / "mine.yaml"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/no.yaml: cannot be read" in loading_fails(f"{tmp_path}/no.yaml")
    assert f"{tmp_path}: cannot be read" in loading_fails(str(tmp_path))


def test_an_empty_file_is_no_space(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# nothing yet\n")
    assert "should be a mapping" in loading_fails(str(tmp_path / "mine.yaml"))


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"optim.lr: {{choice: [!!python/object/apply:os.mkdir ['{tmp_path}/made']]}}\n")
    loading_fails(str(tmp_path / "mine.yaml"))
    assert not (tmp_path / "made").exists()
