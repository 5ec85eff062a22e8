"""Truth: disentanglement metrics of codes that are the factors, of noise, and against brute force and scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vae_ray import UserError
from vae_ray.evaluation.disentanglement import (
    disentanglement_metrics,
    factor_levels,
    mig_ceiling,
    mig_chen,
    mig_locatello,
    modularity,
    sap,
    threshold_accuracy,
)
from vae_ray.evaluation.factor_prediction import dci, explicitness, fit_tree, linear_scores, one_hot, softmax_loss
from vae_ray.evaluation.mutual_information import (
    Floats,
    Levels,
    entropies,
    histogram_bins,
    mutual_information,
    posterior_information,
)
from vae_ray.evaluation.shared_factors import beta_vae_score, factor_vae_score


def grid(*sizes: int) -> Levels:
    """Every combination of values once, in a shuffled order."""
    return np.random.default_rng(0).permutation(np.array(list(itertools.product(*map(range, sizes)))))


def noise(num: int, d: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).normal(size=(num, d))


FACTORS = grid(3, 5, 7, 32)
"""3,360 images."""
AS_CODES = (FACTORS * [2.0, -0.5, 0.3, 0.1] + [1, 0, -3, 7])[:, [2, 0, 3, 1]]
"""Each factor shifted, scaled and moved."""
NOISY = np.hstack([AS_CODES + 0.1 * AS_CODES[:, ::-1], np.zeros((len(FACTORS), 1))]) + 0.3 * noise(len(FACTORS), 5)
"""Five dimensions of four factors, not quite separated."""


def information_by_definition(first: Levels, second: Levels) -> float:
    """sum p(a, b) log p(a, b) / (p(a) p(b)) by loops."""
    total = 0.0
    for a, b in itertools.product(set(first.tolist()), set(second.tolist())):
        joint = np.mean((first == a) & (second == b))
        if joint:
            total += joint * math.log(joint / (np.mean(first == a) * np.mean(second == b)))
    return total


# --- mutual information ---------------------------------------------------------------------------------------------


def test_information_of_bins_is_that_of_its_definition_and_the_edges_those_of_numpys_histogram() -> None:
    codes, factors = noise(41, 3), grid(2, 4, 7)[:41]
    codes[:, 1] = factors[:, 1] ** 2
    binned = histogram_bins(codes, 6)
    for code, bin_ in zip(codes.T, binned.T, strict=True):
        assert np.bincount(bin_, minlength=6).tolist() == np.histogram(code, 6)[0].tolist()
    expected = [[information_by_definition(b, f) for f in factors.T] for b in binned.T]
    assert mutual_information(binned, factors) == pytest.approx(np.array(expected), abs=1e-14)


def test_information_of_a_factor_with_itself_is_its_entropy_and_that_of_a_constant_dimension_zero() -> None:
    assert entropies(FACTORS) == pytest.approx(np.log([3, 5, 7, 32]), abs=1e-14)
    information = mutual_information(FACTORS, FACTORS)
    assert information == pytest.approx(np.diag(np.log([3, 5, 7, 32])), abs=1e-13)
    constant = histogram_bins(np.full((len(FACTORS), 1), 0.7), 20)
    assert mutual_information(constant, FACTORS) == pytest.approx(np.zeros((1, 4)), abs=1e-13)


def log_density(z: float, mean: float, logvar: float) -> float:
    return -0.5 * ((z - mean) ** 2 / math.exp(logvar) + logvar + math.log(2 * math.pi))


def test_information_of_samples_is_that_of_its_definition() -> None:
    # with 4 dimensions of 23 images a reshape in place of a transpose, which elsewhere gave MIG near 0, fails
    factors = grid(2, 3, 5)[:23]
    mean, logvar = noise(23, 4), noise(23, 4, seed=2)
    z = mean + np.exp(logvar / 2) * noise(23, 4, seed=3)
    expected = np.zeros((4, 3))
    for j, k in itertools.product(range(4), range(3)):
        for n in range(23):
            densities = np.exp([log_density(z[n, j], mean[m, j], logvar[m, j]) for m in range(23)])
            expected[j, k] += math.log(densities[factors[:, k] == factors[n, k]].mean() / densities.mean()) / 23
    assert posterior_information(mean, logvar, z, factors) == pytest.approx(expected.clip(0), abs=1e-12)


def test_information_of_samples_of_two_gaussians_is_their_jensen_shannon_divergence() -> None:
    num, distance = 4000, 1.6
    factors = np.repeat([[0, 1]], num // 2, axis=0).reshape(-1, 1)
    mean = distance * factors.astype(float)
    z = mean + noise(num, 1)
    x = np.linspace(-9, 11, 20_001)
    p, q = (np.exp(-0.5 * (x - m) ** 2) / math.sqrt(2 * math.pi) for m in (0.0, distance))
    divergence = sum(np.trapezoid(0.5 * a * np.log(2 * a / (p + q)), x) for a in (p, q))
    given = posterior_information(mean, np.zeros((num, 1)), z, factors)
    # one log ratio has a standard deviation of about 0.4
    assert given[0, 0] == pytest.approx(divergence, abs=4 * 0.4 / math.sqrt(num))


# --- MIG ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "ceiling"), [((32,), 0.850), ((40,), 0.812), ((3, 6, 40, 32, 32), 0.902), ((20, 3), 1.0)]
)
def test_ceiling_of_twenty_bins(sizes: tuple[int, ...], ceiling: float) -> None:
    num = math.lcm(*sizes)
    factors = np.stack([np.arange(num) % size for size in sizes], 1)  # only how often each value occurs counts
    assert mig_ceiling(factors, bins=20) == pytest.approx(ceiling, abs=5e-4)
    assert mig_ceiling(factors, bins=64) == pytest.approx(1, abs=1e-14)


def test_ceiling_of_32_levels_is_three_quarters_of_a_nat_of_two_below_one() -> None:
    # 20 bins: 12 with two levels, 8 with one, so H = 5 log 2 - 12 / 16 log 2
    assert mig_ceiling(np.arange(32)[:, None]) == pytest.approx(1 - 0.75 / 5, abs=1e-14)


def test_mig_of_factors_as_codes_is_its_ceiling() -> None:
    assert mig_locatello(AS_CODES, FACTORS) == pytest.approx(mig_ceiling(FACTORS), abs=1e-13)
    assert mig_locatello(AS_CODES, FACTORS, bins=64) == pytest.approx(1, abs=1e-13)
    with_noise = np.hstack([noise(len(FACTORS), 2), AS_CODES, np.ones((len(FACTORS), 1))])
    assert mig_locatello(with_noise, FACTORS) == pytest.approx(mig_ceiling(FACTORS), abs=0.05)  # noise has some nats


def test_mig_is_the_gap_over_dimensions_and_not_over_factors() -> None:
    factors = grid(4, 4)
    both = np.stack([factors[:, 0], factors[:, 0], factors[:, 1]], 1).astype(float)  # the first factor twice
    assert mig_locatello(both, factors) == pytest.approx(0.5, abs=1e-14)  # gaps 0 and 1
    one = factors[:, :1] + 4.0 * factors[:, 1:]  # both factors in one dimension, which is not punished
    assert mig_locatello(np.hstack([one, 0 * one]), factors) == pytest.approx(1, abs=1e-13)
    assert mig_locatello(one, factors) == pytest.approx(1, abs=1e-13)


def test_mig_of_samples_is_one_for_narrow_posteriors_at_the_factors_and_zero_for_the_prior() -> None:
    factors = grid(3, 5, 24)
    codes = factors[:, [2, 0, 1]] * [0.1, 2, -0.5]
    z = codes + math.exp(-6) * noise(*codes.shape)
    # values are 40 standard deviations apart; the other dimensions are exactly independent
    assert mig_chen(codes, np.full(codes.shape, -12.0), z, factors) == pytest.approx(1, abs=1e-12)
    unit = np.zeros(codes.shape)
    assert mig_chen(unit, unit, noise(*codes.shape), factors) == pytest.approx(0, abs=1e-14)
    assert 0 < mig_chen(codes, unit, codes + noise(*codes.shape), factors) < 0.5


def test_mig_of_samples_is_zero_where_every_dimension_identifies_the_image() -> None:
    factors = grid(3, 4, 10)[:, :2]
    mean = factors[:, :1] + 0.1 * noise(120, 5)
    z = mean + 1e-9 * noise(120, 5, seed=2)
    information = posterior_information(mean, np.full((120, 5), 2 * math.log(1e-9)), z, factors)
    assert information == pytest.approx(np.tile(np.log([3, 4]), (5, 1)), abs=1e-3)


# --- modularity, SAP ------------------------------------------------------------------------------------------------


def test_modularity_of_a_dimension_of_two_of_three_equal_factors_is_a_half() -> None:
    factors = grid(4, 4, 4)
    pair = factors[:, :1] + 4.0 * factors[:, 1:2]  # I = (log 4, log 4, 0): 1 - 1 / (3 - 1)
    assert modularity(pair, factors) == pytest.approx(0.5, abs=1e-13)
    assert modularity(np.hstack([pair, factors, 0 * pair]), factors) == pytest.approx((0.5 + 3) / 4, abs=1e-13)
    assert modularity(0 * pair, factors) == 0
    assert modularity(pair, factors[:, :1]) == 1


def test_threshold_accuracy_is_that_of_the_best_intervals_by_exhaustion() -> None:
    rng = np.random.default_rng(4)
    for num, num_levels in ((9, 2), (11, 3), (12, 4)):
        level = rng.permutation(np.arange(num) % num_levels)
        code = rng.integers(7, size=num) + 0.5 * level  # with ties
        ranked = np.argsort([code[level == c].mean() for c in range(num_levels)], kind="stable")
        edges = [-np.inf, *np.unique(code) + 0.25, np.inf]
        accuracies = []
        for cuts in itertools.combinations_with_replacement(edges, num_levels - 1):
            predicted = ranked[np.searchsorted(cuts, code)]
            accuracies.append(np.mean([(predicted == c)[level == c].mean() for c in range(num_levels)]))
        assert threshold_accuracy(code, level) == pytest.approx(max(accuracies), abs=1e-14)


def test_sap_of_factors_as_codes_is_one_less_chance() -> None:
    chance = np.mean(1 / np.array([3, 5, 7, 32]))
    assert sap(AS_CODES, FACTORS) == pytest.approx(1 - chance, abs=1e-13)
    assert threshold_accuracy(np.ones(len(FACTORS)), FACTORS[:, 2]) == pytest.approx(1 / 7, abs=1e-14)


# --- DCI, explicitness ----------------------------------------------------------------------------------------------


def test_dci_of_factors_as_codes_is_one() -> None:
    assert dci(AS_CODES, FACTORS, seed=0) == pytest.approx(
        {"disentanglement": 1, "completeness": 1, "informativeness": 1}, abs=1e-14
    )


def test_dci_of_a_factor_in_two_equal_dimensions_is_not_complete_and_of_two_in_one_not_disentangled() -> None:
    factors = grid(4, 4, 200)[:, :2]
    twice = np.stack([factors[:, 0], factors[:, 0], factors[:, 1]], 1).astype(float)
    scores = dci(twice, factors, seed=0)
    assert scores["completeness"] == pytest.approx((1 - math.log(2) / math.log(3) + 1) / 2, abs=1e-12)
    assert scores["disentanglement"] == pytest.approx(1, abs=1e-12)
    one = factors[:, :1] + 4.0 * factors[:, 1:]
    scores = dci(np.hstack([one, 0 * one]), factors, seed=0)
    assert scores == pytest.approx({"disentanglement": 0, "completeness": 1, "informativeness": 1}, abs=1e-12)


def test_tree_is_scikit_learns_where_it_grows_to_the_end() -> None:
    tree = pytest.importorskip("sklearn.tree")
    factors = np.random.default_rng(2).integers([3, 4], size=(1001, 2))  # levels of different frequencies: no ties
    codes = factors + 0.05 * noise(len(factors), 2)
    level, rows = factors[:, 0] * 4 + factors[:, 1], np.arange(len(factors))
    importance, accuracy = fit_tree(codes, level, rows[::2], rows[1::2])
    reference = tree.DecisionTreeClassifier(criterion="entropy", random_state=0).fit(codes[::2], level[::2])
    assert importance / importance.sum() == pytest.approx(reference.feature_importances_, abs=1e-12)
    assert accuracy == reference.score(codes[1::2], level[1::2]) == 1
    assert importance.sum() == pytest.approx(len(rows[::2]) * entropies(level[::2, None])[0], rel=1e-12)


def test_linear_classifier_is_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = noise(300, 4), np.random.default_rng(3).integers(3, size=300)
    x[:, :3] += one_hot(labels, 3)
    reference = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, labels)
    scores, expected = linear_scores(x, one_hot(labels, 3), x, loss=softmax_loss), reference.decision_function(x)
    centred = [s - s.mean(1, keepdims=True) for s in (scores, expected)]  # intercepts are free up to a constant
    assert centred[0] == pytest.approx(centred[1], abs=1e-4)


def test_explicitness_is_one_for_two_values_and_three_quarters_for_many_ordered_ones() -> None:
    binary = grid(2, 2, 400)[:, :2]
    assert explicitness(binary + 0.1 * noise(1600, 2), binary, seed=0) == pytest.approx(1, abs=1e-12)
    many = grid(32, 60)[:, :1]
    # a linear function ranks value c of L above a share max(c, L - 1 - c) / (L - 1) of the others
    expected = np.mean([max(c, 31 - c) / 31 for c in range(32)])
    assert explicitness(many.astype(float), many, seed=0) == pytest.approx(expected, abs=0.01)


# --- scores of images that share a factor ---------------------------------------------------------------------------


def test_scores_of_shared_factors_are_one_for_factors_as_codes() -> None:
    assert factor_vae_score(AS_CODES, FACTORS, seed=0) == 1
    assert beta_vae_score(AS_CODES, FACTORS, seed=0) == 1


def test_dead_dimensions_do_not_vote() -> None:
    dead = 0.01 * AS_CODES  # standard deviations below 0.05
    assert factor_vae_score(np.hstack([dead, AS_CODES]), FACTORS, seed=0) == 1
    for score in (factor_vae_score, beta_vae_score):
        assert score(0.001 * AS_CODES, FACTORS, seed=0) == 1 / 4


def test_factor_vae_score_of_two_factors_in_one_dimension_confuses_them() -> None:
    factors = grid(4, 4, 6)
    one = factors[:, :1] + 4.0 * factors[:, 1:2]
    # the second factor holds the one dimension most; the first varies it like any other
    score = factor_vae_score(np.hstack([one, factors[:, 2:]]), factors, seed=0)
    assert score == pytest.approx(2 / 3, abs=0.05)


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_noisy_codes() -> dict[str, float]:
    return disentanglement_metrics(NOISY, FACTORS, seed=0)


def test_no_metric_depends_on_the_order_of_dimensions_and_factors(of_noisy_codes: dict[str, float]) -> None:
    given = disentanglement_metrics(NOISY[:, [3, 0, 4, 2, 1]], FACTORS[:, [3, 1, 0, 2]], seed=0)
    for name in ("factor_vae_score", "beta_vae_score"):  # other draws for a factor: a standard error of 0.007
        assert given.pop(name) == pytest.approx(of_noisy_codes[name], abs=0.03)
    assert given == pytest.approx({name: of_noisy_codes[name] for name in given}, abs=1e-6)


def test_no_metric_depends_on_signs_scales_and_shifts(of_noisy_codes: dict[str, float]) -> None:
    scale, shift = np.array([-1.0, 3, 0.25, -8, 1.5]), np.array([0.0, -2, 1, 5, 0])
    given = disentanglement_metrics(NOISY * scale + shift, FACTORS, seed=0)
    assert given == pytest.approx(of_noisy_codes, abs=1e-6)
    mean, factors = NOISY[:500], FACTORS[:500]
    logvar, eps = np.full(mean.shape, -2.0), np.exp(-1) * noise(*mean.shape)
    sampled = mig_chen(mean, logvar, mean + eps, factors)
    moved = mig_chen(mean * scale, logvar + 2 * np.log(abs(scale)), (mean + eps) * scale, factors)
    assert moved == pytest.approx(sampled, abs=1e-12)


def test_the_same_seed_gives_the_same_numbers_and_another_nearly_the_same(of_noisy_codes: dict[str, float]) -> None:
    assert disentanglement_metrics(NOISY, FACTORS, seed=0) == of_noisy_codes
    assert disentanglement_metrics(NOISY, FACTORS, seed=1) == pytest.approx(of_noisy_codes, abs=0.05)


def test_noise_has_no_gaps_no_importances_and_the_accuracies_of_chance() -> None:
    codes, logvar = noise(len(FACTORS), 4, seed=7), np.full((len(FACTORS), 4), -2.0)
    z = codes + np.exp(-1) * noise(*codes.shape, seed=5)
    given = disentanglement_metrics(codes, FACTORS, seed=0, logvar=logvar, z=z)
    assert given.pop("mig_ceiling") > 0.9
    bias = (np.array([3, 5, 7, 32]) - 1) ** 2  # of the estimated information, up to a factor
    assert given.pop("modularity") == pytest.approx(1 - (bias.sum() / bias.max() - 1) / 3, abs=0.05)
    most_frequent = np.mean(1 / np.array([3, 5, 7, 32]))
    assert given == pytest.approx(
        {
            "mig_locatello": 0, "mig_chen": 0, "sap": 0, "dci_disentanglement": 0, "dci_completeness": 0,
            "dci_informativeness": most_frequent, "explicitness": 0.5, "factor_vae_score": 0.25, "beta_vae_score": 0.25,
        },
        abs=0.05,
    )  # fmt: skip


def test_factors_of_one_value_are_left_out_and_values_are_only_names() -> None:
    renamed = np.insert(FACTORS**2 - 5, [0, 2], 9, axis=1)
    assert factor_levels(renamed).tolist() == FACTORS.tolist()
    expected = {
        "mig_locatello": mig_ceiling(FACTORS),
        "modularity": 1.0,
        "dci_completeness": 1.0,
        "beta_vae_score": 1.0,
    }
    given = disentanglement_metrics(AS_CODES, renamed, seed=0)
    assert {name: given[name] for name in expected} == pytest.approx(expected, abs=1e-13)


def test_rare_values_and_few_images_give_numbers() -> None:
    factors = np.stack([np.arange(20) == 3, np.arange(20) % 2], 1).astype(int)  # one value of a single image
    given = disentanglement_metrics(noise(20, 3), factors, seed=0)
    assert all(0 <= value <= 1 for value in given.values())


def test_no_known_factor_and_too_few_images_are_mistakes_of_the_user() -> None:
    with pytest.raises(UserError, match=r"^factors: got 2 that do not vary over 6 images, should be .*; try [^\n]*$"):
        factor_levels(np.full((6, 2), 3))
    with pytest.raises(UserError, match=r"^images: got 49, should be 50 or more for the 5 values of factor 1 .*$"):
        factor_levels(np.stack([np.arange(49) % 2, np.arange(49) % 5], 1))
    with pytest.raises(UserError, match=r"^factors: got 0 "):
        factor_levels(np.empty((6, 0), dtype=np.int64))
