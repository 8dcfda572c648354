"""From scores to advantages: KL-penalised rewards, GAE, the adaptive KL coefficient."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives.masking import response_mask

Array = jax.Array


def kl_penalized_rewards(
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array,
    lengths: Array,
    kl_coef: Array | float,
) -> Array:
    """Reward of each response token: a KL penalty on all, the score on the last.

    r_t = -kl_coef (log pi(a_t | s_t) - log pi_ref(a_t | s_t)) + [t = length - 1] score

    The estimator of the KL is k1, the only one of k1, k2, k3 whose use inside the
    reward gives the policy gradient of the KL.

    Args:
        scores: of the reward model, [B], reward units.
        logprobs: of the sampled tokens under the policy that sampled them, [B, R],
            nats.
        ref_logprobs: the same under the reference, [B, R].
        lengths: int32, [B], response tokens including end-of-text.
        kl_coef: reward units per nat.

    Returns:
        float32, [B, R]; 0 after the response.

    Source: Ziegler et al. 2019, eq. (2), arXiv:1909.08593; Ouyang et al. 2022, eq. (2).
    """
    chex.assert_rank([scores, logprobs, lengths], [1, 2, 1])
    chex.assert_equal_shape([logprobs, ref_logprobs])
    chex.assert_type([scores, logprobs, ref_logprobs], jnp.float32)
    R = logprobs.shape[1]
    penalty = -kl_coef * (logprobs - ref_logprobs)
    last = jnp.arange(R)[None] == lengths[:, None] - 1
    at_end = jnp.where(last, scores[:, None], 0.0)
    return jnp.where(response_mask(lengths, R), penalty + at_end, 0.0)


def gae(
    rewards: Array,
    values: Array,
    discounts: Array,
    lam: Array | float,
) -> Array:
    """Generalised advantage estimates of one trajectory; `vmap` it over a batch.

    delta_t = r_t + discount_t v_{t+1} - v_t
    A_t     = delta_t + discount_t lam A_{t+1},   v_T = A_T = 0

    Args:
        rewards: of action t, [T], reward units.
        values: of the state before action t, [T]. The state after the last action is
            terminal, its value 0.
        discounts: gamma where the episode goes on after action t, 0 where it ends, [T].
            What stands after an end is cut off by that 0.
        lam: 0 gives the one-step error, 1 the return minus the value.

    Returns:
        Advantages, [T]. `advantages + values` are the returns that the value fits.

    Source: Schulman et al. 2016, eq. (16), arXiv:1506.02438.
    """
    chex.assert_rank([rewards, values, discounts], 1)
    chex.assert_equal_shape([rewards, values, discounts])
    next_values = jnp.concatenate([values[1:], jnp.zeros_like(values[:1])])
    deltas = rewards + discounts * next_values - values

    def step(advantage, delta_and_discount):
        delta, discount = delta_and_discount
        advantage = delta + discount * lam * advantage
        return advantage, advantage

    last = jnp.zeros((), deltas.dtype)
    _, advantages = jax.lax.scan(step, last, (deltas, discounts), reverse=True)
    return advantages


def response_advantages(
    rewards: Array,
    values: Array,
    lengths: Array,
    gamma: Array | float,
    lam: Array | float,
) -> tuple[Array, Array]:
    """GAE of right-padded responses: the episode ends with the last response token.

    Args:
        rewards: [B, R].
        values: [B, R], before each token.
        lengths: int32, [B].
        gamma: discount per token.
        lam: of GAE.

    Returns:
        advantages and returns, [B, R] each; 0 after the response.
    """
    chex.assert_equal_shape([rewards, values])
    R = rewards.shape[1]
    mask = response_mask(lengths, R)
    discounts = jnp.where(response_mask(lengths - 1, R), gamma, 0.0)
    rewards = jnp.where(mask, rewards, 0.0)
    values = jnp.where(mask, values, 0.0)
    advantages = jax.vmap(gae, in_axes=(0, 0, 0, None))(rewards, values, discounts, lam)
    return jnp.where(mask, advantages, 0.0), jnp.where(mask, advantages + values, 0.0)


def adaptive_kl_coef(
    kl_coef: Array,
    kl: Array,
    target: Array | float,
    horizon: Array | float,
    num_episodes: int,
) -> Array:
    """Moves the KL coefficient towards a target KL.

    error = clip(kl / target - 1, -0.2, 0.2);  coef' = coef (1 + error n / horizon)

    Args:
        kl_coef: now, [].
        kl: mean over episodes of the summed KL, [], nats per response.
        target: nats per response.
        horizon: episodes over which the coefficient changes by a factor.
        num_episodes: n, episodes since the last change.

    Returns:
        The new coefficient, [].

    Source: Ziegler et al. 2019, section 2.2, and the released code (n / horizon).
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * num_episodes / horizon)
