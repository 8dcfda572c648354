"""Heads on hidden states: next-token logits, and one scalar per position."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.nn.attention import full_precision
from rlhf_jax.nn.transformer import Params

Array = jax.Array


def lm_logits(params: Params, hidden: Array) -> Array:
    """Next-token logits by the tied embedding: hidden [..., D] -> float32 [..., V].

    Full logits take 4 V bytes a position; losses use `token_logprobs` instead.
    """
    with full_precision(hidden.dtype):
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            params["embed"].astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )


def init_scalar_head(key: Array, model_dim: int) -> Params:
    """Draws a scalar head: `w` [D] ~ N(0, 1 / (D + 1)), `b` [] = 0, `shift` [] = 0.

    `shift` is the constant that sets the mean score of demonstrations to 0 after
    training; it is not trained.

    Source: Stiennon et al. 2020, appendix B (the variance); InstructGPT did not publish
        its initialisation.
    """
    std = (model_dim + 1) ** -0.5
    return {
        "w": std * jax.random.normal(key, (model_dim,), jnp.float32),
        "b": jnp.zeros(()),
        "shift": jnp.zeros(()),
    }


def scalar_head(head: Params, hidden: Array) -> Array:
    """Score or value of each position: w . h + b - shift.

    Args:
        head: of `init_scalar_head`.
        hidden: [..., D].

    Returns:
        float32, [...], in reward units. `shift` receives no gradient.
    """
    chex.assert_rank([head["w"], head["b"], head["shift"]], [1, 0, 0])
    with full_precision(jnp.float32):
        scores = jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head["w"])
    return scores + head["b"] - jax.lax.stop_gradient(head["shift"])
