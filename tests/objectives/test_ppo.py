import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.objectives.masking import masked_mean, masked_sum, normalize_weights
from rlhf_jax.objectives.ppo import (
    clipped_value_loss,
    explained_variance,
    kl_estimates,
    ppo_diagnostics,
    ppo_objective,
)

CLIP = 0.2
# the example of the formula sheet; advantages are whitened over both rows
OLD = jnp.array([[-1.0, -2.0, -0.5, -1.5, -3.0], [-0.2, -0.7, -1.1, -2.2, -0.9]])
MOVE = jnp.array([[0.1, -0.3, 0.25, 0.0, -0.05], [-0.25, 0.15, 0.4, -0.1, 0.05]])
ADVANTAGES = jnp.array(
    [
        [1.178078, 1.098585, 0.96904, 0.909124, 0.800187],
        [-1.174771, -1.087597, -0.995835, -0.899244, -0.797568],
    ]
)
OLD_VALUES = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.0, -0.1, -0.2, -0.3, -0.4]])
VALUE_MOVE = jnp.array([[0.3, -0.1, 0.05, 0.5, -0.4], [0.1, 0.0, -0.3, 0.25, 0.2]])
RETURNS = OLD_VALUES + jnp.array(
    [
        [0.760166, 0.705437, 0.61625, 0.575, 0.5],
        [-0.859691, -0.799675, -0.7365, -0.67, -0.6],
    ]
)
EVERYWHERE = jnp.ones((2, 5), bool)
SHORT_FIRST_ROW = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)


def policy_loss(logprobs, mask):
    return -masked_mean(ppo_objective(logprobs, OLD, ADVANTAGES, CLIP), mask)


# ------------------------------------------------------------------- policy objective


def test_policy_loss_of_the_published_example(mode):
    loss = mode(policy_loss)
    assert float(loss(OLD + MOVE, EVERYWHERE)) == pytest.approx(0.039220, abs=2e-6)
    assert float(loss(OLD, EVERYWHERE)) == pytest.approx(0.0, abs=2e-6)


def test_masked_policy_loss_is_the_mean_over_tokens_not_over_sequences():
    loss = float(policy_loss(OLD + MOVE, SHORT_FIRST_ROW))
    assert loss == pytest.approx(0.257811, abs=2e-6)  # over sequences: -0.012330


def test_objective_matches_the_oracle_token_by_token(mode):
    objective = mode(ppo_objective)(OLD + MOVE, OLD, ADVANTAGES, CLIP)
    for index in np.ndindex(2, 5):
        new, old, advantage = (float(x[index]) for x in (OLD + MOVE, OLD, ADVANTAGES))
        expected = oracle.ppo_objective(new, old, advantage, CLIP)
        assert float(objective[index]) == pytest.approx(expected, abs=1e-6)


def test_at_ratio_one_the_objective_is_the_advantage_whatever_the_clip():
    for clip in (0.0, 0.2, 10.0):
        objective = ppo_objective(OLD, OLD, ADVANTAGES, clip)
        np.testing.assert_array_equal(objective, ADVANTAGES)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    """d/d logits of sum A log pi, on a softmax policy over 5 tokens."""
    rng = np.random.default_rng(0)
    logits = jnp.float32(rng.normal(size=(2, 5, 7)))
    actions = jnp.int32(rng.integers(0, 7, (2, 5)))

    def logprobs_of(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(logprobs, actions[..., None], axis=-1)[..., 0]

    old = logprobs_of(logits)
    surrogate = jax.grad(
        lambda logits: jnp.sum(
            ppo_objective(logprobs_of(logits), old, ADVANTAGES, CLIP)
        )
    )(logits)
    one_hot = np.eye(7)[np.asarray(actions)]
    score = one_hot - np.asarray(jax.nn.softmax(logits))  # gradient of log pi
    expected = np.asarray(ADVANTAGES)[..., None] * score
    np.testing.assert_allclose(surrogate, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "grows"),
    [
        (1.3, 1.0, False),  # far enough in the good direction
        (0.7, -1.0, False),
        (1.3, -1.0, True),  # wrong direction: always pulled back
        (0.7, 1.0, True),
        (1.1, 1.0, True),  # within the interval
        (0.9, -1.0, True),
    ],
)
def test_clipping_stops_the_gradient_on_the_good_side_only(ratio, advantage, grows):
    gradient = jax.grad(ppo_objective)(
        jnp.float32(math.log(ratio)), jnp.float32(0), jnp.float32(advantage), CLIP
    )
    expected = ratio * advantage if grows else 0.0
    assert float(gradient) == pytest.approx(expected, abs=1e-5)


def test_the_objective_hides_no_nan_but_weights_of_zero_do():
    spoiled = (OLD + MOVE).at[0, 4].set(jnp.nan)
    objective = ppo_objective(spoiled, OLD, ADVANTAGES, CLIP)
    assert np.isnan(objective[0, 4]) and np.sum(np.isnan(objective)) == 1
    value, grads = jax.value_and_grad(policy_loss)(spoiled, SHORT_FIRST_ROW)
    assert float(value) == pytest.approx(0.257811, abs=2e-6)
    assert np.isfinite(value)
    assert np.all(np.isfinite(np.asarray(grads)[np.asarray(SHORT_FIRST_ROW)]))


def test_masking_the_logprobs_first_keeps_overflow_out_of_the_gradient():
    """exp(1000) outside the mask: its gradient is 0 only if it is masked before exp."""
    logprobs = (OLD + MOVE).at[0, 4].set(1000.0)
    weights = normalize_weights(SHORT_FIRST_ROW)

    def loss(logprobs):
        kept = jnp.where(SHORT_FIRST_ROW, logprobs, OLD)
        return -masked_sum(ppo_objective(kept, OLD, ADVANTAGES, CLIP), weights)

    value, grads = jax.value_and_grad(loss)(logprobs)
    assert float(value) == pytest.approx(0.257811, abs=2e-6)
    assert np.all(np.isfinite(grads)) and float(grads[0, 4]) == 0.0


# -------------------------------------------------------------------------- value loss


def test_value_loss_of_the_published_example(mode):
    def loss(values):
        return masked_mean(
            clipped_value_loss(values, OLD_VALUES, RETURNS, CLIP), EVERYWHERE
        )

    moved, still = mode(loss)(OLD_VALUES + VALUE_MOVE), mode(loss)(OLD_VALUES)
    assert float(moved) == pytest.approx(0.278425, abs=2e-6)
    assert float(still) == pytest.approx(0.238288, abs=2e-6)


def test_value_loss_matches_the_oracle_value_by_value():
    values = OLD_VALUES + VALUE_MOVE
    loss = clipped_value_loss(values, OLD_VALUES, RETURNS, CLIP)
    for index in np.ndindex(2, 5):
        args = (float(x[index]) for x in (values, OLD_VALUES, RETURNS))
        expected = oracle.clipped_value_loss(*args, CLIP)
        assert float(loss[index]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_clipping_stops_a_value_that_nears_its_target_and_no_other(side):
    def gradient(move, target):
        args = (jnp.float32(side * move), jnp.float32(0), jnp.float32(side * target))
        return side * float(jax.grad(clipped_value_loss)(*args, CLIP))

    assert gradient(0.5, 1.0) == 0.0  # moved over the clip, towards the target
    assert gradient(0.1, 1.0) == pytest.approx(-0.9)  # within the clip
    assert gradient(0.5, -1.0) == pytest.approx(1.5)  # away from it: pulled back
    assert gradient(1.9, 1.0) == pytest.approx(0.9)  # past the target: the raw error


# ---------------------------------------------------------------------- KL estimators

P = np.array([0.5, 0.3, 0.15, 0.05])
Q = np.array([0.4, 0.2, 0.2, 0.2])


def test_kl_estimators_have_the_published_moments(mode):
    estimates = mode(kl_estimates)(jnp.float32(np.log(P)), jnp.float32(np.log(Q)))
    golden = {"k1": (0.1207443, 0.4101), "k2": (0.0913609, 0.2010)}
    golden["k3"] = (0.1207443, 0.3432)
    assert set(estimates) == set(golden)
    for name, (mean, std) in golden.items():
        values = np.asarray(estimates[name], np.float64)
        assert P @ values == pytest.approx(mean, abs=1e-6)
        spread = math.sqrt(P @ (values - P @ values) ** 2)
        assert spread == pytest.approx(std, abs=5e-5)


def test_kl_estimators_have_their_known_gradients_as_losses():
    """On samples of the policy: k1 none, k2 that of KL(p, q), k3 that of KL(q, p)."""

    def expected_gradient(name):
        def loss(logits):
            logprobs = jax.nn.log_softmax(logits)
            estimates = kl_estimates(logprobs, jnp.float32(np.log(Q)))
            return jnp.sum(jnp.float32(P) * estimates[name])

        return np.asarray(jax.grad(loss)(jnp.float32(np.log(P))))

    d = np.log(P / Q)
    np.testing.assert_allclose(expected_gradient("k1"), 0.0, atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k2"), P * (d - P @ d), atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k3"), P - Q, atol=1e-6)


@given(d=st.floats(-20, 20, width=32) | st.floats(-(2**-10), 2**-10, width=32))
def test_k3_is_never_negative(d):
    assert float(kl_estimates(jnp.float32(d), jnp.float32(0))["k3"]) >= 0.0


# ------------------------------------------------------------------------ diagnostics


@pytest.mark.parametrize("mask", [EVERYWHERE, SHORT_FIRST_ROW], ids=["all", "short"])
def test_diagnostics_match_the_oracle_and_ignore_what_is_masked(mode, mask):
    garbage = jnp.where(mask, 0.0, jnp.nan)
    args = (OLD + MOVE + garbage, OLD, ADVANTAGES + garbage, mask)
    actual = mode(ppo_diagnostics)(*args, CLIP)
    expected = oracle.ppo_diagnostics(
        np.asarray(OLD + MOVE, float),
        np.asarray(OLD, float),
        np.asarray(ADVANTAGES),
        np.asarray(mask),
        CLIP,
    )
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert float(actual[name]) == pytest.approx(value, abs=1e-6), name


def test_diagnostics_of_the_published_example():
    diagnostics = ppo_diagnostics(OLD + MOVE, OLD, ADVANTAGES, EVERYWHERE, CLIP)
    golden = {"ratio_mean": 1.046981, "approx_kl": 0.021981, "clip_fraction": 0.2}
    for name, value in golden.items():
        assert float(diagnostics[name]) == pytest.approx(value, abs=2e-6)


def test_diagnostics_see_both_sides_of_the_clip():
    moves = jnp.log(jnp.array([[1.3, 0.7, 0.7, 1.3]]))
    advantages = jnp.array([[1.0, -1.0, -1.0, -1.0]])
    mask = jnp.ones((1, 4), bool)
    diagnostics = ppo_diagnostics(moves, jnp.zeros((1, 4)), advantages, mask, CLIP)
    sides = [float(diagnostics[name]) for name in ("clip_high", "clip_low")]
    assert sides == [0.25, 0.5] and float(diagnostics["clip_fraction"]) == 0.75


def test_a_policy_that_has_not_moved_shows_it():
    diagnostics = ppo_diagnostics(OLD, OLD, ADVANTAGES, SHORT_FIRST_ROW, CLIP)
    ones = {"ratio_mean", "ratio_max", "ratio_min"}
    for name, value in diagnostics.items():
        assert float(value) == pytest.approx(float(name in ones), abs=1e-6), name


# ------------------------------------------------------------------ explained variance


def test_explained_variance_matches_its_definition(mode):
    values = OLD_VALUES + VALUE_MOVE
    for mask in (EVERYWHERE, SHORT_FIRST_ROW):
        garbage = jnp.where(mask, 0.0, jnp.nan)
        actual = mode(explained_variance)(values + garbage, RETURNS + garbage, mask)
        errors = oracle.masked_values(np.asarray(RETURNS - values), np.asarray(mask))
        targets = oracle.masked_values(np.asarray(RETURNS), np.asarray(mask))
        expected = 1 - oracle.variance(errors) / oracle.variance(targets)
        assert float(actual) == pytest.approx(expected, abs=1e-5)


def test_explained_variance_has_its_three_marks():
    mask = EVERYWHERE
    perfect = explained_variance(RETURNS, RETURNS, mask)
    constant = explained_variance(jnp.full((2, 5), 3.0), RETURNS, mask)
    opposite = explained_variance(-RETURNS, RETURNS, mask)
    np.testing.assert_allclose([perfect, constant, opposite], [1, 0, -3], atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.7, -123.4])
def test_constant_returns_explain_nothing_even_when_their_mean_rounds(constant):
    returns = jnp.full((1, 7), constant)
    variance = explained_variance(
        jnp.arange(7.0)[None], returns, jnp.ones((1, 7), bool)
    )
    assert float(variance) == 0.0
