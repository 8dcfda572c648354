import json
import math

import numpy as np
import pytest

from rlhf_jax.evaluation.statistics import (
    Estimate,
    format_estimate,
    mean_estimate,
    paired_difference,
    preference_rate,
    rate_difference,
    rate_estimate,
    win_rate,
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
    values = np.random.default_rng(0).normal(size=11)
    assert mean_estimate(values, np.arange(11)) == mean_estimate(values)


def test_repeating_every_value_inside_its_cluster_adds_no_certainty():
    values = np.random.default_rng(1).normal(size=9)
    repeated = mean_estimate(np.repeat(values, 5), np.repeat(np.arange(9), 5))
    once = mean_estimate(values)
    assert repeated.n == once.n
    assert repeated.low == pytest.approx(once.low)
    assert repeated.high == pytest.approx(once.high)


def test_cluster_labels_may_be_strings_in_any_order():
    values = [1.0, 5.0, 2.0, 9.0]
    by_name = mean_estimate(values, ["b", "a", "b", "a"])
    assert by_name == mean_estimate(values, [0, 1, 0, 1])
    assert by_name.n == 2


def test_one_value_bounds_nothing_and_survives_strict_json():
    estimate = mean_estimate([2.5])
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)
    text = json.dumps(estimate.to_json(), allow_nan=False)
    assert Estimate.from_json(json.loads(text)) == estimate
    assert "no interval" in format_estimate(estimate)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_rate_keeps_a_width(value: float):
    alone = mean_estimate(np.full(20, value))
    assert alone.mean == value
    assert alone.high - alone.low > 0.1
    # Four prompts of five equal responses are worth four trials, not twenty.
    clustered = mean_estimate(np.full(20, value), np.repeat(np.arange(4), 5))
    assert clustered == rate_estimate(int(4 * value), 4)


def test_a_quantity_that_is_exactly_0_is_no_rate():
    estimate = mean_estimate(np.zeros(6), [0, 0, 1, 1, 2, 2], shares=False)
    assert (estimate.low, estimate.mean, estimate.high) == (0.0, 0.0, 0.0)


def test_wilson_interval_at_hand_made_values():
    # No successes in n: the upper end is z^2 / (n + z^2).
    z2 = 1.959964**2
    nothing = rate_estimate(0, 10)
    assert nothing.low == 0.0
    assert nothing.high == pytest.approx(z2 / (10 + z2), rel=1e-6)
    everything = rate_estimate(10, 10)
    assert everything.high == 1.0
    assert everything.low == pytest.approx(1 - nothing.high)
    # The ends solve (p - q)^2 = z^2 q (1 - q) / n.
    for end in (rate_estimate(7, 25).low, rate_estimate(7, 25).high):
        assert (7 / 25 - end) ** 2 == pytest.approx(z2 * end * (1 - end) / 25, rel=1e-6)


def test_preference_rate_of_zeros_and_ones_is_agresti_coull():
    z2 = 1.959964**2
    estimate = preference_rate([1, 1, 1, 0, 0, 1, 1, 1, 0, 1])
    centre = (7 + z2 / 2) / (10 + z2)
    half = math.sqrt(z2 * centre * (1 - centre) / (10 + z2))
    assert estimate.mean == pytest.approx(0.7)
    assert estimate.low == pytest.approx(centre - half, rel=1e-6)
    assert estimate.high == pytest.approx(centre + half, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_preferences_keep_a_width_inside_the_unit_interval(value: float):
    few, many = preference_rate([value] * 10), preference_rate([value] * 1000)
    for estimate in (few, many):
        assert 0.0 <= estimate.low <= value <= estimate.high <= 1.0
    assert few.high - few.low > many.high - many.low > 0


def test_win_rate_counts_ties_within_the_margin_as_half():
    ours, theirs = [1.0, 2.0, 3.0, 0.0], [0.0, 1.9, 3.0, 2.0]
    rate, wins, ties, losses = win_rate(ours, theirs, tie=0.2)
    assert (wins, ties, losses) == (0.25, 0.5, 0.25)
    assert rate.mean == 0.5
    assert win_rate(ours, theirs)[1:] == (0.5, 0.25, 0.25)


def test_win_rate_of_the_other_side_is_the_complement():
    rng = np.random.default_rng(2)
    ours, theirs = rng.integers(0, 4, 30), rng.integers(0, 3, 30)
    forward, wins, ties, losses = win_rate(ours, theirs)
    backward = win_rate(theirs, ours)
    assert backward[1:] == (losses, ties, wins)
    flipped = forward.complement()
    assert backward[0].mean == pytest.approx(flipped.mean)
    assert backward[0].low == pytest.approx(flipped.low)
    assert backward[0].high == pytest.approx(flipped.high)


def test_several_samples_of_one_prompt_are_one_trial():
    ours = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    rate, wins, _, losses = win_rate(ours, np.full((3, 2), 0.5))
    assert rate.n == 3
    assert rate == preference_rate([1.0, 0.0, 0.5])
    assert (wins, losses) == (0.5, 0.5)


def test_paired_difference_cancels_what_the_pairs_share():
    rng = np.random.default_rng(3)
    shared = rng.normal(scale=100.0, size=40)
    noise = rng.normal(scale=0.1, size=40)
    estimate = paired_difference(shared + 1.0 + noise, shared)
    assert estimate.low < 1.0 < estimate.high
    assert estimate.high - estimate.low < 0.1


def test_differences_of_zero_and_one_are_not_taken_for_a_rate():
    # Were they a rate, the interval could not reach below zero.
    assert paired_difference([1, 0, 0, 0], [0, 0, 0, 0]).low < 0


def coverage(draw, interval, truth: float, trials: int = 1500) -> float:
    rng = np.random.default_rng(4)
    estimates = [interval(draw(rng)) for _ in range(trials)]
    return float(np.mean([e.low <= truth <= e.high for e in estimates]))


def test_t_interval_covers_the_mean_of_a_small_sample():
    share = coverage(lambda rng: rng.normal(3.0, 2.0, 6), mean_estimate, 3.0)
    assert 0.93 < share < 0.97


def test_rate_interval_covers_a_rare_event():
    share = coverage(
        lambda rng: int(rng.binomial(60, 0.05)), lambda k: rate_estimate(k, 60), 0.05
    )
    assert 0.92 < share < 0.99


@pytest.mark.parametrize("chances", [(0.1, 0.2, 0.7), (0.02, 0.9, 0.08)])
def test_preference_interval_covers_with_ties(chances: tuple[float, float, float]):
    truth = 0.5 * chances[1] + chances[2]
    share = coverage(
        lambda rng: rng.choice([0.0, 0.5, 1.0], 50, p=chances), preference_rate, truth
    )
    assert 0.92 < share < 0.999


@pytest.mark.parametrize("both", [0.0, 0.85])
def test_interval_of_a_rate_difference_covers_and_gains_by_what_prompts_share(both):
    """Two samples a prompt; some prompts are met by either model, whatever it says."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        easy = rng.random(80) < both
        met = [
            (easy[:, None] | (rng.random((80, 2)) < rate)).mean(1)
            for rate in (0.7, 0.4)
        ]
        return met[0], met[1]

    truth = (1.0 - both) * 0.3
    assert 0.93 < coverage(draw, lambda x: rate_difference(*x), truth) < 0.985
    a, b = draw(np.random.default_rng(0))
    paired = rate_difference(a, b)
    assert paired.mean == pytest.approx(np.mean(a) - np.mean(b))
    alone = [preference_rate(x) for x in (a, b)]
    apart = math.hypot(*(x.high - x.low for x in alone))  # as if independent
    if both:
        assert paired.high - paired.low < 0.8 * apart


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
        return rng.normal(size=15)[index] + rng.normal(size=index.size)

    clustered = coverage(draw, lambda x: mean_estimate(x, index), 0.0)
    assert 0.92 < clustered < 0.98
    assert coverage(draw, mean_estimate, 0.0) < 0.75


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
        (lambda: mean_estimate([1.0, 2.0], [0]), "clusters of shape"),
        (lambda: rate_estimate(3, 2), "3 of 2"),
        (lambda: preference_rate([0.5, 1.5]), "win_rate"),
        (lambda: rate_difference([0.5, 1.5], [0.0, 1.0]), "must lie in"),
        (lambda: win_rate([1.0], [1.0, 2.0]), "one shape"),
        (lambda: paired_difference([math.inf], [1.0]), "not finite"),
        (lambda: Estimate(2.0, 0.0, 1.0, 3), "inside its interval"),
        (lambda: Estimate(0.5, 0.0, 1.0, 0), "n >= 1"),
        (lambda: Estimate.from_json({"mean": 1, "n": 2}), "lacks low, high"),
    ],
)
def test_bad_input_is_refused_by_name(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
