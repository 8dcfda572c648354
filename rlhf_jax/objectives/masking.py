"""Every masked reduction, once. A mask is 1 on real entries and 0 elsewhere."""

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def normalize_weights(mask: Array) -> Array:
    """Turns a mask into weights that sum to 1: w = mask / sum(mask).

    Called once on the global batch, before it is cut into microbatches or shards: every
    loss is then a plain weighted sum, and sums of sums stay exact.

    Args:
        mask: bool or non-negative float, [...].

    Returns:
        float32, [...]; all 0 where the mask is empty.
    """
    mask = mask.astype(jnp.float32)
    total = jnp.sum(mask)
    return mask / jnp.where(total > 0, total, 1.0)


def masked_sum(x: Array, weights: Array) -> Array:
    """Sum of weights * x where the weight is not 0: [...] -> scalar.

    Entries of weight 0 may be NaN or infinite; they touch neither value nor gradient.
    """
    chex.assert_equal_shape([x, weights])
    return jnp.sum(jnp.where(weights != 0, x, 0.0) * weights)


def masked_mean(x: Array, mask: Array) -> Array:
    """Mean of `x` over the mask: [...] -> scalar, in the unit of `x`; 0 if empty."""
    return masked_sum(x, normalize_weights(mask))


def masked_variance(x: Array, mask: Array) -> Array:
    """Biased variance of `x` over the mask: [...] -> scalar; 0 if empty."""
    x = jnp.where(mask, x, 0.0)
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def masked_whiten(x: Array, mask: Array, shift_mean: bool = True) -> Array:
    """Scales `x` to variance 1 over the mask, and to mean 0 if `shift_mean`.

    (x - mean) / sqrt(var + 1e-8), var biased; `shift_mean=False` adds the mean back.

    Args:
        x: float32, [...].
        mask: bool, [...].
        shift_mean: False keeps the mean (Ziegler's whitening of rewards).

    Returns:
        [...], 0 outside the mask.

    Source: Ziegler et al. 2019, released code (`core.py`, whiten).
    """
    chex.assert_equal_shape([x, mask])
    x = jnp.where(mask, x, 0.0)
    mean = masked_mean(x, mask)
    white = (x - mean) * jax.lax.rsqrt(masked_variance(x, mask) + 1e-8)
    white = white if shift_mean else white + mean
    return jnp.where(mask, white, 0.0)


def response_mask(lengths: Array, response_len: int) -> Array:
    """True on the first `lengths` positions: int [...] -> bool [..., response_len]."""
    steps = jnp.arange(response_len).reshape((1,) * lengths.ndim + (-1,))
    return steps < lengths[..., None]
