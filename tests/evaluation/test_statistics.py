import json
import math

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.evaluation.statistics import (
    Estimate,
    format_estimate,
    mean_estimate,
    rate_difference,
    rate_estimate,
)


def test_mean_estimate_is_the_textbook_t_interval():
    # t_{0.975, 3} = 3.182446 (tables); s = sqrt(20 / 3) of (1, 3, 5, 7).
    estimate = mean_estimate([1.0, 3.0, 5.0, 7.0])
    half = 3.182446 * math.sqrt(20 / 3) / 2
    assert estimate.mean == 4.0
    assert estimate.n == 4
    assert estimate.low == pytest.approx(4 - half, abs=1e-5)
    assert estimate.high == pytest.approx(4 + half, abs=1e-5)


def test_singleton_clusters_change_nothing():
    values = np.random.default_rng(0).random(11)
    assert rate_estimate(values, np.arange(11)) == rate_estimate(values)


def test_cluster_labels_may_be_strings_in_any_order():
    values = [0.1, 0.5, 0.2, 0.9]
    by_name = rate_estimate(values, ["b", "a", "b", "a"])
    assert by_name == rate_estimate(values, [0, 1, 0, 1])
    assert by_name.n == 2


def test_one_value_bounds_nothing_and_survives_strict_json():
    estimate = mean_estimate([2.5])
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)
    text = json.dumps(estimate.to_json(), allow_nan=False)
    assert Estimate.from_json(json.loads(text)) == estimate
    assert "no interval" in format_estimate(estimate)


def test_a_constant_mean_has_no_width_and_a_constant_rate_has():
    estimate = mean_estimate(np.zeros(6))
    assert (estimate.low, estimate.mean, estimate.high) == (0.0, 0.0, 0.0)
    assert rate_estimate(np.zeros(6), [0, 0, 1, 1, 2, 2]).high > 0.3


def test_rate_of_zeros_and_ones_is_agresti_coull():
    z2 = 1.959964**2
    estimate = rate_estimate([1, 1, 1, 0, 0, 1, 1, 1, 0, 1])
    centre = (7 + z2 / 2) / (10 + z2)
    half = math.sqrt(z2 * centre * (1 - centre) / (10 + z2))
    assert estimate.mean == pytest.approx(0.7)
    assert estimate.low == pytest.approx(centre - half, rel=1e-6)
    assert estimate.high == pytest.approx(centre + half, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_preferences_keep_a_width_inside_the_unit_interval(value: float):
    few, many = rate_estimate([value] * 10), rate_estimate([value] * 1000)
    for estimate in (few, many):
        assert 0.0 <= estimate.low <= value <= estimate.high <= 1.0
    assert few.high - few.low > many.high - many.low > 0


def test_equal_samples_of_one_prompt_are_one_trial():
    """Repeating every value adds nothing but the t quantile of so many prompts."""
    values = np.random.default_rng(2).integers(0, 2, 400).astype(float)
    once = rate_estimate(values)
    repeated = rate_estimate(np.repeat(values, 5), np.repeat(np.arange(400), 5))
    assert (repeated.n, repeated.mean) == (once.n, once.mean) == (400, values.mean())
    assert repeated.low == pytest.approx(once.low, abs=2e-3)
    assert repeated.high == pytest.approx(once.high, abs=2e-3)
    independent = rate_estimate(np.repeat(values, 5))
    assert independent.high - independent.low < 0.5 * (once.high - once.low)


def test_clusters_of_any_size_by_the_formula():
    """Oracle: a loop over the clusters; t of 29 and of n - 1 degrees of freedom."""
    rng = np.random.default_rng(3)
    sizes, z = rng.integers(3, 9, 30), 1.959964
    index = np.repeat(np.arange(30), sizes)
    x = np.clip(rng.random(30)[index] + 0.3 * rng.normal(size=index.size), 0, 1)
    apart = x - x.mean()
    size = sum(apart[index == g].sum() ** 2 for g in range(30)) / (apart**2).sum()
    assert 1.0 < size < index.size / 30
    groups = [(x[index == g], 1.0) for g in range(30)]
    groups += [(np.array([v]), z**2 / 2 * size) for v in (0.0, 1.0)]
    total = index.size + z**2 * size
    centre = sum(w * g.sum() for g, w in groups) / total
    squares = sum((g - centre).sum() ** 2 for g, _ in groups[:30])
    squares += z**2 / 2 * size**2 * (centre**2 + (1 - centre) ** 2)
    half = z * stats.t.ppf(0.975, 29) / stats.t.ppf(0.975, x.size - 1)
    half *= squares**0.5 / total
    estimate = rate_estimate(x, index)
    assert estimate.mean == pytest.approx(x.mean())
    assert estimate.low == pytest.approx(centre - half)
    assert estimate.high == pytest.approx(centre + half)


def test_a_rare_event_bounds_about_as_much_as_none_at_all():
    """Of 600 prompts with two samples each, none, one or two with the event."""
    index, highs = np.repeat(np.arange(600), 2), []
    for events in range(4):
        x = np.zeros(1200)
        x[: 2 * events : 2] = 1.0
        highs.append(rate_estimate(x, index).high)
    assert 0.004 < min(highs) <= max(highs) < 0.01
    assert highs[1:] == sorted(highs[1:])


def test_few_clusters_of_many_pairs_are_neither_hopeless_nor_decisive():
    """A quarter of the pairs wrong in each of four topics, a little more in some."""
    x = np.tile([1.0, 1.0, 1.0, 0.0], 40)
    index = np.repeat(np.arange(4), 40)
    x[:4] = 0.0
    estimate = rate_estimate(x, index)
    assert 0.6 < estimate.low < 0.69
    assert 0.78 < estimate.high < 0.86
    alone = rate_estimate(x, np.zeros(160))
    assert (alone.low, alone.high, alone.n) == (0.0, 1.0, 1)


def coverage(draw, interval, truth: float, trials: int = 1500) -> float:
    rng = np.random.default_rng(4)
    estimates = [interval(draw(rng)) for _ in range(trials)]
    return float(np.mean([e.low <= truth <= e.high for e in estimates]))


def test_t_interval_covers_the_mean_of_a_small_sample():
    share = coverage(lambda rng: rng.normal(3.0, 2.0, 6), mean_estimate, 3.0)
    assert 0.93 < share < 0.97


def test_rate_interval_covers_a_rare_event():
    share = coverage(
        lambda rng: (rng.random(60) < 0.05).astype(float), rate_estimate, 0.05
    )
    assert 0.92 < share < 0.99


@pytest.mark.parametrize("truth", [0.0025, 0.02, 0.3])
def test_rate_interval_covers_with_samples_of_one_prompt_alike_or_not(truth: float):
    """600 prompts; the second sample repeats the first for half of them."""
    index = np.repeat(np.arange(600), 2)

    def draw(rng: np.random.Generator) -> np.ndarray:
        x = (rng.random((600, 2)) < truth).astype(float)
        x[:300, 1] = x[:300, 0]
        return x.reshape(-1)

    share = coverage(draw, lambda x: rate_estimate(x, index), truth)
    assert 0.93 < share < 0.995


@pytest.mark.parametrize(("num_clusters", "size"), [(4, 60), (10, 20), (120, 15)])
def test_rate_interval_covers_with_few_clusters_of_many(num_clusters, size):
    """Topics whose own rates differ, each with many pairs."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sizes = rng.integers(size // 2, size + size // 2, num_clusters)
        index = np.repeat(np.arange(num_clusters), sizes)
        rates = rng.beta(0.7 / 0.1, 0.3 / 0.1, num_clusters)
        return (rng.random(index.size) < rates[index]).astype(float), index

    share = coverage(draw, lambda x: rate_estimate(*x), 0.7)
    assert 0.89 < share < 0.975


def test_a_clustered_difference_covers_and_does_not_decide_by_two_prompts():
    index = np.repeat(np.arange(40), 6)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ease = np.clip(rng.normal(0, 0.1, 40), -0.2, 0.2)[index]
        return rng.random(240) < 0.7 + ease, rng.random(240) < 0.6 - ease

    def interval(x):
        return rate_difference(x[0].astype(float), x[1].astype(float), index)

    assert 0.92 < coverage(draw, interval, 0.1) < 0.985
    two = rate_difference([1.0, 1.0], [0.0, 0.0], [0, 1])
    assert two.low < 0.5
    assert two.high == 1.0
    assert rate_difference([1.0, 1.0], [1.0, 1.0], [0, 1]).low < 0.0


@pytest.mark.parametrize("chances", [(0.1, 0.2, 0.7), (0.02, 0.9, 0.08)])
def test_preference_interval_covers_with_ties(chances: tuple[float, float, float]):
    truth = 0.5 * chances[1] + chances[2]
    share = coverage(
        lambda rng: rng.choice([0.0, 0.5, 1.0], 50, p=chances), rate_estimate, truth
    )
    assert 0.92 < share < 0.999


@pytest.mark.parametrize("both", [0.0, 0.85])
def test_interval_of_a_rate_difference_covers_and_gains_by_what_prompts_share(both):
    """Two samples a prompt; some prompts are met by either model, whatever it says."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        easy = rng.random(240) < both
        met = [
            (easy[:, None] | (rng.random((240, 2)) < rate)).mean(1)
            for rate in (0.7, 0.4)
        ]
        return met[0], met[1]

    truth = (1.0 - both) * 0.3
    most = 0.999 if both else 0.985  # the units added weigh more where few differ
    assert 0.93 < coverage(draw, lambda x: rate_difference(*x), truth) < most
    a, b = draw(np.random.default_rng(0))
    paired = rate_difference(a, b)
    assert paired.mean == pytest.approx(np.mean(a) - np.mean(b))
    alone = [rate_estimate(x) for x in (a, b)]
    apart = math.hypot(*(x.high - x.low for x in alone))  # as if independent
    if both:
        assert paired.high - paired.low < 0.9 * apart


def test_a_difference_of_rates_is_that_of_a_sample_with_units_added():
    """z^2 / 2 units where one model alone did it, as many where the other did."""
    a, b = np.array([1.0, 0, 1, 1, 1, 0]), np.array([0.0, 0, 1, 0, 0, 1])
    z = stats.norm.ppf(0.975)
    values = [*(a - b), 1.0, -1.0]
    weights = [1.0] * 6 + [z**2 / 2] * 2
    n = sum(weights)
    centre = sum(w * x for w, x in zip(weights, values, strict=True)) / n
    squares = sum(w * (x - centre) ** 2 for w, x in zip(weights, values, strict=True))
    half = z * math.sqrt(squares) / n
    found = rate_difference(a, b)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize("count", [50, 100, 190, 400])
def test_a_rare_event_of_one_model_alone_is_not_excluded_too_often(count):
    """It happens in 2 % of the prompts: in few samples not once."""
    rng = np.random.default_rng(0)
    zeros = [0.0] * count
    excluded = [
        rate_difference((rng.random(count) < 0.02).astype(float), zeros).high < 0.02
        for _ in range(2000)
    ]
    assert np.mean(excluded) < 0.04


def test_equal_rates_leave_their_difference_open():
    zero = rate_difference([0.0] * 50, [0.0] * 50)
    assert zero.low < zero.mean == 0.0 < zero.high
    assert zero.n == 50
    a, b = [1.0, 0.5, 0.0, 1.0], [0.0, 0.5, 0.0, 1.0]
    assert rate_difference(b, a).low == pytest.approx(-rate_difference(a, b).high)
    assert rate_difference(a, b).negated().high == -rate_difference(a, b).low


def test_cluster_interval_covers_where_the_plain_one_does_not():
    index = np.repeat(np.arange(15), 8)

    def draw(rng: np.random.Generator) -> np.ndarray:
        rates = rng.beta(0.5, 0.5, 15)
        return (rng.random(index.size) < rates[index]).astype(float)

    clustered = coverage(draw, lambda x: rate_estimate(x, index), 0.5)
    assert 0.92 < clustered < 0.98
    assert coverage(draw, rate_estimate, 0.5) < 0.75


def test_format_states_percent_and_interval():
    estimate = Estimate(0.734, 0.714, 0.754, 10)
    assert format_estimate(estimate, unit="%") == "73.4 % [71.4, 75.4]"
    assert format_estimate(estimate, unit="points") == "73.4 points [71.4, 75.4]"
    assert format_estimate(estimate) == "0.734 [0.714, 0.754]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_estimate([]), "non-empty"),
        (lambda: mean_estimate([1.0, math.nan]), "value 1 of 2 is nan"),
        (lambda: rate_estimate([1.0, 0.0], [0]), "clusters of shape"),
        (lambda: rate_estimate([0.5, 1.5]), "must lie in"),
        (lambda: rate_difference([0.5, 1.5], [0.0, 1.0]), "must lie in"),
        (lambda: rate_difference([1.0], [1.0, 0.0]), "pairs of 1 and 2"),
        (lambda: Estimate(2.0, 0.0, 1.0, 3), "inside its interval"),
        (lambda: Estimate(0.5, 0.0, 1.0, 0), "n >= 1"),
        (lambda: Estimate.from_json({"mean": 1, "n": 2}), "lacks low, high"),
    ],
)
def test_bad_input_is_refused_by_name(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
