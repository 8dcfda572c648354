"""Log-probabilities of tokens and the next-token loss, without [B, T, V] arrays."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives.masking import masked_sum

Array = jax.Array

MAX_LOGITS = 2**25  # elements of logits held at once (128 MiB in float32)


def logprobs_and_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Log-probability of each target and entropy of its distribution, in nats.

    log p(y) = z_y - log sum_v exp z_v,   H = -sum_v p_v log p_v

    Args:
        logits: float32, [..., V].
        targets: int32, [...].

    Returns:
        log-probabilities and entropies, float32, [...] each.
    """
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    logprobs = jax.nn.log_softmax(logits)
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, targets.ndim)
    is_target = ids == targets[..., None]
    # a sum over the vocabulary fuses; a gather's gradient would be a scatter
    chosen = jnp.sum(jnp.where(is_target, logprobs, 0.0), axis=-1)
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def token_logprobs(
    hidden: Array,
    embedding: Array,
    targets: Array,
    contract: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """`logprobs_and_entropy` of hidden states, at most `MAX_LOGITS` logits at a time.

    Large vocabularies are cut along time into chunks whose logits are recomputed in the
    backward pass, so that no [B, T, V] array exists.

    Args:
        hidden: [B, T, D].
        embedding: tied output embedding, float32, [V, D].
        targets: int32, [B, T]; position t is decided by hidden[:, t].
        contract: logits [..., V] -> logits of the sampling contract, e.g.
            `contract_logits` with its temperature; identity for language modelling.

    Returns:
        log-probabilities and entropies, float32, [B, T] each, in nats.
    """
    chex.assert_rank([hidden, embedding, targets], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    B, T = targets.shape
    table = embedding.astype(hidden.dtype)

    def chunk(hidden, targets):
        logits = jnp.einsum(
            "btd,vd->btv", hidden, table, preferred_element_type=jnp.float32
        )
        return logprobs_and_entropy(contract(logits), targets)

    num_chunks = -(-B * T * embedding.shape[0] // MAX_LOGITS)
    if num_chunks <= 1:
        return chunk(hidden, targets)
    width = -(-T // min(num_chunks, T))
    num_chunks = -(-T // width)

    def cut(x):  # [B, T, ...] -> [chunks, B, width, ...]
        room = [(0, 0)] * x.ndim
        room[1] = (0, num_chunks * width - T)
        x = jnp.pad(x, room).reshape(B, num_chunks, width, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    step = jax.checkpoint(chunk)
    _, outs = jax.lax.scan(
        lambda carry, xs: (carry, step(*xs)), None, (cut(hidden), cut(targets))
    )
    logprobs, entropy = (
        jnp.moveaxis(x, 0, 1).reshape(B, num_chunks * width)[:, :T] for x in outs
    )
    return logprobs, entropy


def next_token_loss(logprobs: Array, weights: Array) -> Array:
    """Weighted negative log-likelihood: -sum_t w_t log p(y_t | x_<=t).

    Args:
        logprobs: of the targets, [B, T], in nats.
        weights: [B, T], summing to 1 over the global batch; 0 on what is not learned.

    Returns:
        Scalar, float32: the mean in nats per token; 0 if all weights are 0.
    """
    return -masked_sum(logprobs, weights)
