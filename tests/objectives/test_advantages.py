import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.objectives.advantages import (
    adaptive_kl_coef,
    gae,
    kl_penalized_rewards,
    response_advantages,
)

R = 6
# the two rows of the formula sheet: gamma 1, lambda 0.95
REWARDS = jnp.array([[-0.01, 0.02, -0.03, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, -1.0]])
VALUES = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.0, -0.1, -0.2, -0.3, -0.4]])
GOLDEN = [
    [0.760166, 0.705437, 0.61625, 0.575, 0.5],
    [-0.859691, -0.799675, -0.7365, -0.67, -0.6],
]
compiled = jax.jit(response_advantages)


# ------------------------------------------------------------------------------- GAE


def test_advantages_of_the_published_rows(mode):
    lengths = jnp.array([5, 5], jnp.int32)
    advantages, returns = mode(response_advantages)(REWARDS, VALUES, lengths, 1.0, 0.95)
    np.testing.assert_allclose(advantages, GOLDEN, atol=1e-6)
    np.testing.assert_allclose(
        returns[0], [0.860166, 0.905437, 0.91625, 0.975, 1.0], atol=1e-6
    )


def test_one_trajectory_needs_no_batch(mode):
    discounts = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])
    for row in range(2):
        advantages = mode(gae)(REWARDS[row], VALUES[row], discounts, 0.95)
        np.testing.assert_allclose(advantages, GOLDEN[row], atol=1e-6)


def test_a_zero_discount_cuts_one_trajectory_into_episodes():
    discounts = jnp.array([0.9, 0.9, 0.0, 0.9, 0.0])
    advantages = gae(REWARDS[0], VALUES[0], discounts, 0.7)
    r, v = np.asarray(REWARDS[0], float), np.asarray(VALUES[0], float)
    expected = oracle.gae(r[:3], v[:3], 0.9, 0.7) + oracle.gae(r[3:], v[3:], 0.9, 0.7)
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, R), min_size=2, max_size=2),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_advantages_match_the_double_sum_and_padding_is_inert(
    seed, lengths, gamma, lam
):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, 2, R))
    mask = np.arange(R) < np.array(lengths)[:, None]
    advantages, returns = compiled(
        jnp.float32(np.where(mask, rewards, np.nan)),
        jnp.float32(np.where(mask, values, np.inf)),
        jnp.int32(lengths),
        gamma,
        lam,
    )
    for row, n in enumerate(lengths):
        expected = oracle.gae(list(rewards[row, :n]), list(values[row, :n]), gamma, lam)
        np.testing.assert_allclose(advantages[row, :n], expected, atol=1e-5)
        np.testing.assert_allclose(
            returns[row, :n], np.array(expected) + values[row, :n], atol=1e-5
        )
    np.testing.assert_array_equal(np.asarray(advantages)[~mask], 0.0)
    np.testing.assert_array_equal(np.asarray(returns)[~mask], 0.0)


def test_lambda_one_gives_the_reward_to_go_minus_the_value():
    lengths = jnp.array([5, 5], jnp.int32)
    advantages, returns = response_advantages(REWARDS, VALUES, lengths, 1.0, 1.0)
    to_go = np.cumsum(np.asarray(REWARDS)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, to_go, atol=1e-6)
    np.testing.assert_allclose(advantages[0], [0.88, 0.79, 0.67, 0.6, 0.5], atol=1e-6)


def test_lambda_zero_gives_the_one_step_error():
    lengths = jnp.array([5, 5], jnp.int32)
    advantages, _ = response_advantages(REWARDS, VALUES, lengths, 0.9, 0.0)
    following = np.concatenate([np.asarray(VALUES)[:, 1:], np.zeros((2, 1))], axis=1)
    expected = np.asarray(REWARDS) + 0.9 * following - np.asarray(VALUES)
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_wider_padding_changes_no_advantage():
    lengths = jnp.array([5, 3], jnp.int32)
    narrow, _ = response_advantages(REWARDS, VALUES, lengths, 0.99, 0.95)
    room = ((0, 0), (0, 3))
    wide, _ = response_advantages(
        jnp.pad(REWARDS, room), jnp.pad(VALUES, room), lengths, 0.99, 0.95
    )
    np.testing.assert_allclose(wide[:, :5], narrow, atol=1e-6)


# --------------------------------------------------------------------------- rewards


def test_the_score_comes_with_the_last_real_token(mode):
    """Six tokens by hand: an ended response, one cut at its limit, and one token."""
    ratio = jnp.array([0.5, -1.0, 0.0, 2.0, 0.25, -0.5])
    logprobs = jnp.stack([ratio - 1, ratio - 1, ratio - 1])
    ref_logprobs = jnp.full((3, R), -1.0)
    scores, lengths = jnp.array([3.0, -2.0, 1.0]), jnp.array([4, 6, 1], jnp.int32)
    rewards = mode(kl_penalized_rewards)(scores, logprobs, ref_logprobs, lengths, 0.1)
    expected = [
        [-0.05, 0.1, 0.0, -0.2 + 3.0, 0.0, 0.0],
        [-0.05, 0.1, 0.0, -0.2, -0.025, 0.05 - 2.0],
        [-0.05 + 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, expected, atol=1e-6)


@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, R), min_size=2, max_size=2),
)
def test_rewards_match_the_oracle_and_ignore_what_follows_the_end(seed, lengths):
    rng = np.random.default_rng(seed)
    logprobs, ref_logprobs = -rng.random((2, 2, R))
    scores = rng.normal(size=2)
    mask = np.arange(R) < np.array(lengths)[:, None]
    rewards = kl_penalized_rewards(
        jnp.float32(scores),
        jnp.float32(np.where(mask, logprobs, np.nan)),
        jnp.float32(np.where(mask, ref_logprobs, -np.inf)),
        jnp.int32(lengths),
        0.3,
    )
    for row in range(2):
        expected = oracle.kl_penalized_rewards(
            scores[row], logprobs[row], ref_logprobs[row], lengths[row], 0.3
        )
        np.testing.assert_allclose(rewards[row], expected, atol=1e-6)


def test_rewards_sum_to_the_score_minus_the_penalty():
    rng = np.random.default_rng(0)
    logprobs, ref_logprobs = (jnp.float32(-rng.random((2, R))) for _ in range(2))
    scores, lengths = jnp.array([1.0, -1.0]), jnp.array([6, 2], jnp.int32)
    args = (scores, logprobs, ref_logprobs, lengths)
    totals = jnp.sum(kl_penalized_rewards(*args, 0.2), axis=1)
    for row, n in enumerate((6, 2)):
        kl = np.sum(np.asarray(logprobs - ref_logprobs)[row, :n])
        expected = float(scores[row]) - 0.2 * kl
        assert float(totals[row]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_integer_rewards_are_refused(position):
    """Scores added into integers would be cut to 0: a known bug elsewhere."""
    args = [jnp.zeros((1,)), jnp.zeros((1, R)), jnp.zeros((1, R))]
    args[position] = args[position].astype(jnp.int32)
    with pytest.raises(AssertionError):
        kl_penalized_rewards(*args, jnp.array([3], jnp.int32), 0.1)


# --------------------------------------------------------------------------- KL coef


def test_adaptive_coefficient_follows_the_published_sequence(mode):
    """beta 0.15, target 6, horizon 10000, 512 episodes an update."""
    update = mode(functools.partial(adaptive_kl_coef, num_episodes=512))
    coef = jnp.float32(0.15)
    seen = []
    for kl in (0.0, 0.5, 2.0, 5.0, 6.0, 6.5, 9.0, 20.0):
        coef = update(coef, jnp.float32(kl), 6.0, 10_000.0)
        seen.append(float(coef))
    expected = [0.148464, 0.146944, 0.145439, 0.144198]
    expected += [0.144198, 0.144813, 0.146296, 0.147794]
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_adaptive_coefficient_moves_by_a_bounded_share():
    for kl, factor in ((0.0, 1 - 0.2 * 0.0512), (1e6, 1 + 0.2 * 0.0512)):
        coef = adaptive_kl_coef(jnp.float32(1.0), jnp.float32(kl), 6.0, 10_000.0, 512)
        assert float(coef) == pytest.approx(factor, rel=1e-6)
