"""Log-probabilities of tokens and the next-token loss, without [B, T, V] arrays."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives.masking import masked_sum

Array = jax.Array

MAX_LOGITS = 2**25  # elements of logits held at once (128 MiB in float32)
MAX_LOGITS_ACCELERATOR = 2**28  # 1 GiB


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
    z = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(z)
    total = jnp.sum(weights, axis=-1)
    normalizer = jnp.log(total)
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, targets.ndim)
    # a sum over the vocabulary fuses; a gather's gradient would be a scatter
    chosen = jnp.sum(jnp.where(ids == targets[..., None], z, 0.0), axis=-1)
    entropy = normalizer - jnp.sum(weights * z, axis=-1) / total
    return chosen - normalizer, entropy


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

    def chunk(hidden, targets):
        return _head(hidden, embedding, targets, contract)

    cut, join, num_chunks = _chunks(targets.shape, embedding.shape[0])
    if num_chunks == 1:
        return chunk(hidden, targets)
    step = jax.checkpoint(chunk)
    _, outs = jax.lax.scan(
        lambda carry, xs: (carry, step(*xs)), None, (cut(hidden), cut(targets))
    )
    return jax.tree.map(join, outs)


def token_loss(
    hidden: Array,
    embedding: Array,
    targets: Array,
    contract: Callable[[Array], Array],
    loss_fn: Callable[..., Array],
    *per_token: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """A loss of `token_logprobs`, its gradient formed in the same pass over the logits.

    sum over chunks of loss_fn(logprobs, entropy, *per_token)

    What autodiff would keep for the backward pass, or compute again, is a chunk's
    logits; here each chunk leaves its share of the gradient instead: three matrix
    products, no [B, T, V] array. Differentiable once.

    Args:
        hidden, embedding, targets, contract: see `token_logprobs`.
        loss_fn: `(logprobs, entropy, *per_token) -> scalar`, a sum over tokens.
        per_token: constants, [B, T] each; 0 where a chunk is filled up, so that such
            tokens must add nothing to the sum: make one of them the weights.

    Returns:
        The scalar loss; log-probabilities and entropies [B, T], without gradient.
    """
    chex.assert_rank([hidden, embedding, targets], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, targets, *per_token], 2)
    per_token = jax.lax.stop_gradient(per_token)

    def chunk(hidden, embedding, targets, per_token):
        outs = _head(hidden, embedding, targets, contract)
        return loss_fn(*outs, *per_token), jax.lax.stop_gradient(outs)

    cut, join, num_chunks = _chunks(targets.shape, embedding.shape[0])
    if num_chunks == 1:
        return chunk(hidden, embedding, targets, per_token)
    fixed_hidden, fixed_embedding = jax.lax.stop_gradient((hidden, embedding))

    def step(carry, xs):
        loss, embedding_grad = carry
        hidden, targets, per_token = xs
        grad_fn = jax.value_and_grad(chunk, argnums=(0, 1), has_aux=True)
        (part, outs), grads = grad_fn(hidden, fixed_embedding, targets, per_token)
        return (loss + part, embedding_grad + grads[1]), (outs, grads[0])

    start = (jnp.float32(0.0), jnp.zeros_like(fixed_embedding))
    xs = jax.tree.map(cut, (fixed_hidden, targets, per_token))
    (loss, embedding_grad), (outs, hidden_grad) = jax.lax.scan(step, start, xs)
    # zero, with the gradient just computed
    loss += jnp.sum(embedding_grad * (embedding - fixed_embedding))
    loss += jnp.sum((join(hidden_grad) * (hidden - fixed_hidden)).astype(jnp.float32))
    return loss, jax.tree.map(join, outs)


def _head(hidden, embedding, targets, contract):
    rows = hidden.reshape(-1, hidden.shape[-1])  # one product of two matrices
    logits = _logits(rows, embedding)
    outs = logprobs_and_entropy(contract(logits), targets.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(targets.shape), outs)


@jax.custom_vjp
def _logits(rows: Array, embedding: Array) -> Array:
    """float32 logits [n, V] of [n, D]; their gradient meets the factors in the dtype of
    `rows`, since float32 beside bfloat16 is multiplied as float32. No jvp."""
    return _product(rows, embedding.T.astype(rows.dtype))


def _product(a: Array, b: Array) -> Array:
    """a b in float32, of float32 factors on accelerators too."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=exact, preferred_element_type=jnp.float32)


def _logits_forward(rows, embedding):
    return _logits(rows, embedding), (rows, embedding)


def _logits_backward(kept, grad):
    rows, embedding = kept
    grad = grad.astype(rows.dtype)
    rows_grad = _product(grad, embedding.astype(rows.dtype)).astype(rows.dtype)
    return rows_grad, _product(grad.T, rows)


_logits.defvjp(_logits_forward, _logits_backward)


def logit_chunks(
    shape: tuple[int, ...], vocab_size: int, accelerator: bool
) -> tuple[int, int]:
    """How many chunks the logits [B, T, V] are cut into along T, and their width."""
    B, T = shape
    at_once = MAX_LOGITS_ACCELERATOR if accelerator else MAX_LOGITS
    num_chunks = -(-B * T * vocab_size // at_once)
    width = -(-T // min(max(num_chunks, 1), T))
    return -(-T // width), width


def _chunks(shape: tuple[int, ...], vocab_size: int):
    """Cut of [B, T, ...] into [chunks, B, width, ...] along time, and its inverse."""
    B, T = shape
    num_chunks, width = logit_chunks(shape, vocab_size, jax.default_backend() != "cpu")

    def cut(x):
        room = [(0, 0)] * x.ndim
        room[1] = (0, num_chunks * width - T)
        x = jnp.pad(x, room).reshape(B, num_chunks, width, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(B, num_chunks * width, *x.shape[3:])[:, :T]

    return cut, join, num_chunks


def next_token_loss(logprobs: Array, weights: Array) -> Array:
    """Weighted negative log-likelihood: -sum_t w_t log p(y_t | x_<=t).

    Args:
        logprobs: of the targets, [B, T], in nats.
        weights: [B, T], summing to 1 over the global batch; 0 on what is not learned.

    Returns:
        Scalar, float32: the mean in nats per token; 0 if all weights are 0.
    """
    return -masked_sum(logprobs, weights)


def next_token_head(
    hidden: Array, embedding: Array, targets: Array, weights: Array
) -> Array:
    """`next_token_loss` of hidden states, by `token_loss`.

    Args:
        hidden: [B, T, D].
        embedding: tied output embedding, [V, D].
        targets, weights: [B, T]; the weights sum to 1 over the global batch.

    Returns:
        Scalar, float32, in nats per token.
    """

    def loss(logprobs, _, weights):
        return next_token_loss(logprobs, weights)

    return token_loss(hidden, embedding, targets, lambda x: x, loss, weights)[0]
