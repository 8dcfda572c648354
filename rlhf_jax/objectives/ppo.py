"""The clipped PPO objective, the clipped value loss, and what to watch of them."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives.masking import masked_mean, masked_variance

Array = jax.Array


def ppo_objective(
    logprobs: Array, old_logprobs: Array, advantages: Array, clip: Array | float
) -> Array:
    """Clipped surrogate of each token, to be maximised.

    L_t = min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t)
    rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)

    Args:
        logprobs: of the taken tokens under the policy being trained, [B, R], nats.
        old_logprobs: the same under the policy that sampled them, [B, R].
        advantages: constants, [B, R].
        clip: half width of the trust interval, e.g. 0.2.

    Returns:
        [B, R], in units of advantage. NaN in, NaN out: nothing is hidden.

    Source: Schulman et al. 2017, eq. (7), arXiv:1707.06347.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages])
    ratio = jnp.exp(logprobs - old_logprobs)
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return jnp.minimum(ratio * advantages, clipped * advantages)


def clipped_value_loss(
    values: Array, old_values: Array, returns: Array, clip: Array | float
) -> Array:
    """Half squared error of each value, the worse of raw and clipped.

    0.5 max((v - R)^2, (v_old + clip(v - v_old, -clip, clip) - R)^2)

    Args:
        values: under the parameters being trained, [B, R], reward units.
        old_values: when the responses were sampled, [B, R].
        returns: targets, constants, [B, R].
        clip: reward units a value may move in one iteration.

    Returns:
        [B, R], squared reward units.

    Source: Ziegler et al. 2019, released code (`train_policy.py`).
    """
    chex.assert_equal_shape([values, old_values, returns])
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))


def kl_estimates(logprobs: Array, ref_logprobs: Array) -> dict[str, Array]:
    """Three estimates of KL(pi || pi_ref) from tokens sampled from pi.

    k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d,   d = log pi - log pi_ref

    Args:
        logprobs, ref_logprobs: of the sampled tokens, [...], nats.

    Returns:
        `k1` (unbiased), `k2` (biased), `k3` (unbiased, never negative), [...] each.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": 0.5 * jnp.square(d), "k3": jnp.expm1(-d) + d}


def ppo_diagnostics(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    clip: Array | float,
) -> dict[str, Array]:
    """How far the policy has moved from the one that sampled, over the mask.

    Args:
        logprobs, old_logprobs, advantages: [B, R].
        mask: bool, [B, R].
        clip: of the objective.

    Returns:
        Scalars: `ratio_mean`, `ratio_max`, `ratio_min`, `ratio_var`, `approx_kl` (k3 of
        old to new, nats per token), `clip_fraction` and its two sides `clip_low`
        (ratio < 1 - clip, A < 0) and `clip_high` (ratio > 1 + clip, A > 0).
    """
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    low = (ratio < 1.0 - clip) & (advantages < 0)
    high = (ratio > 1.0 + clip) & (advantages > 0)
    f32 = jnp.float32
    return {
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
        "ratio_min": jnp.min(jnp.where(mask, ratio, jnp.inf)),
        "ratio_var": masked_variance(ratio, mask),
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "clip_fraction": masked_mean((low | high).astype(f32), mask),
        "clip_low": masked_mean(low.astype(f32), mask),
        "clip_high": masked_mean(high.astype(f32), mask),
    }


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """1 - var(returns - values) / var(returns) over the mask: [B, R] -> scalar.

    1 is perfect, 0 no better than a constant, below 0 worse; 0 if returns are constant.
    """
    variance = masked_variance(returns, mask)
    residual = masked_variance(returns - values, mask)
    varies = variance > 1e-12 * masked_mean(jnp.square(returns), mask)  # not rounding
    return jnp.where(varies, 1.0 - residual / jnp.where(varies, variance, 1.0), 0.0)
