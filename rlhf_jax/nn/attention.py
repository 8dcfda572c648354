"""Attention of a position to those before it, within a document or across them."""

import jax
import jax.numpy as jnp

Array = jax.Array

NEG_INF = -1e9  # finite, so that a row without any key gives no NaN


def attention_scores(equation: str, q: Array, k: Array) -> Array:
    """q k^T / sqrt(H) by an einsum equation, in float32: e.g. [B, N, T, S]."""
    scale = q.shape[-1] ** -0.5
    return scale * jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)


def causal_attention(
    q: Array, k: Array, v: Array, documents: Array | None = None
) -> Array:
    """Softmax attention of each position to itself and those before it.

    softmax(q k^T / sqrt(H) + causal mask) v, the softmax in float32. Padding needs no
    mask here as long as it stands to the right: no real position reads it.

    Args:
        q, k, v: [B, T, N, H].
        documents: int32 [B, T], numbers of the documents packed in a row, across which
            nothing is read; None reads across them.

    Returns:
        [B, T, N, H], the dtype of `v`.
    """
    scores = attention_scores("btnh,bsnh->bnts", q, k)
    T = q.shape[1]
    mask = jnp.tril(jnp.ones((T, T), bool))[None]
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, NEG_INF), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


def documents_and_positions(tokens: Array, end: int) -> tuple[Array, Array]:
    """Which document each token of a packed row is of, and its place in it.

    Args:
        tokens: int32, [B, T].
        end: id that ends a document and is its last token.

    Returns:
        Numbers of documents and positions that begin anew at 0, int32 [B, T] each.
    """
    steps = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    first = jnp.zeros_like(tokens[:, :1], bool)
    begins = jnp.concatenate([first, tokens[:, :-1] == end], axis=1)
    starts = jax.lax.cummax(jnp.where(begins, steps, 0), axis=1)
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32), steps - starts
