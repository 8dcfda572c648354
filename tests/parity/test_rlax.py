"""Advantages and the clipped surrogate are those of rlax, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

rlax = pytest.importorskip("rlax", reason="needs the extra [parity]")

from rlhf_jax.objectives.advantages import gae, response_advantages  # noqa: E402
from rlhf_jax.objectives.ppo import ppo_objective  # noqa: E402


@pytest.fixture(autouse=True)
def their_promotion():
    """rlax mixes dtypes, and Python numbers with arrays."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_the_librarys(gamma, lam):
    rng = np.random.default_rng(0)
    T = 12
    rewards = jnp.float32(rng.normal(size=T))
    values = jnp.float32(rng.normal(size=T))
    discounts = jnp.float32(gamma * (rng.random(T) < 0.8)).at[-1].set(0.0)
    with_next = jnp.concatenate([values, jnp.float32(rng.normal(size=1))])
    theirs = rlax.truncated_generalized_advantage_estimation(
        rewards, discounts, lam, with_next
    )
    np.testing.assert_allclose(
        gae(rewards, values, discounts, lam), theirs, rtol=1e-5, atol=1e-6
    )


def test_padded_responses_have_the_advantages_of_their_real_part():
    rng = np.random.default_rng(1)
    lengths = jnp.array([1, 4, 7, 9])
    rewards = jnp.float32(rng.normal(size=(4, 9)))
    values = jnp.float32(rng.normal(size=(4, 9)))
    advantages, returns = response_advantages(rewards, values, lengths, 0.97, 0.9)
    for row, n in enumerate(np.asarray(lengths)):
        discounts = jnp.full(n, 0.97).at[-1].set(0.0)
        with_next = jnp.concatenate([values[row, :n], jnp.zeros(1)])
        theirs = rlax.truncated_generalized_advantage_estimation(
            rewards[row, :n], discounts, 0.9, with_next
        )
        np.testing.assert_allclose(advantages[row, :n], theirs, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            returns[row, :n], theirs + values[row, :n], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_the_clipped_surrogate_is_the_librarys(clip):
    rng = np.random.default_rng(2)
    old = jnp.float32(rng.normal(size=64))
    new = old + jnp.float32(0.4 * rng.normal(size=64))
    advantages = jnp.float32(rng.normal(size=64))

    def ours(new):
        return -jnp.mean(ppo_objective(new, old, advantages, clip))

    def theirs(new):
        ratios = jnp.exp(new - old)
        return rlax.clipped_surrogate_pg_loss(ratios, advantages, clip)

    np.testing.assert_allclose(ours(new), theirs(new), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(new), jax.grad(theirs)(new), atol=1e-7)
