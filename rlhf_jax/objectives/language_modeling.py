"""Log-probabilities of tokens and the next-token loss, without [B, T, V] arrays."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives.masking import masked_sum

Array = jax.Array

MAX_LOGITS = 2**26  # elements of logits held at once (256 MiB in float32)
MAX_LOGITS_ACCELERATOR = 2**28  # 1 GiB
MIN_CHUNK = 512  # positions, see `loss_chunks`


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
    count: Array | None = None,
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
        count: int32 [], how many of the first positions of the rows add to the sum:
            chunks beyond are left out, and their logits never formed. None means all.

    Returns:
        The scalar loss; log-probabilities and entropies [B, T], without gradient, 0
        in chunks that were left out.
    """
    chex.assert_rank([hidden, embedding, targets], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, targets, *per_token], 2)
    per_token = jax.lax.stop_gradient(per_token)

    def chunk(hidden, embedding, targets, per_token):
        outs = _head(hidden, embedding, targets, contract)
        return loss_fn(*outs, *per_token), jax.lax.stop_gradient(outs)

    least = 1 if count is None else loss_chunks(targets.shape[1])
    cut, join, num_chunks = _chunks(targets.shape, embedding.shape[0], least)
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
    if count is None:
        sums, (outs, hidden_grad) = jax.lax.scan(step, start, xs)
    else:
        num = -(-count // xs[1].shape[2])
        sums, (outs, hidden_grad) = _scan_first(step, start, xs, num)
    loss, embedding_grad = sums
    # zero, with the gradient just computed
    loss += jnp.sum(embedding_grad * (embedding - fixed_embedding))
    loss += jnp.sum((join(hidden_grad) * (hidden - fixed_hidden)).astype(jnp.float32))
    return loss, jax.tree.map(join, outs)


def _scan_first(step, carry, xs, num):
    """`jax.lax.scan` over the first `num` [] of xs [N, ...]; 0 for the others."""
    shapes = jax.eval_shape(step, carry, jax.tree.map(lambda x: x[0], xs))[1]
    length = jax.tree.leaves(xs)[0].shape[0]
    ys = jax.tree.map(lambda y: jnp.zeros((length, *y.shape), y.dtype), shapes)

    def body(i, state):
        carry, ys = state
        carry, y = step(carry, jax.tree.map(lambda x: x[i], xs))
        return carry, jax.tree.map(lambda ys, y: ys.at[i].set(y), ys, y)

    return jax.lax.fori_loop(0, num, body, (carry, ys))


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
    shape: tuple[int, ...], vocab_size: int, accelerator: bool, least: int = 1
) -> tuple[int, int]:
    """How many chunks the logits [B, T, V] are cut into along T, and their width."""
    B, T = shape
    at_once = MAX_LOGITS_ACCELERATOR if accelerator else MAX_LOGITS
    num_chunks = max(least, -(-B * T * vocab_size // at_once))
    width = -(-T // min(max(num_chunks, 1), T))
    return -(-T // width), width


def loss_chunks(length: int) -> int:
    """Into how many chunks T is cut, at least, to leave out those without a loss.

    Each adds to a gradient [V, D], which for fewer positions than `MIN_CHUNK` costs
    more than there is to leave out.
    """
    return max(1, min(8, length // MIN_CHUNK))


def _chunks(shape: tuple[int, ...], vocab_size: int, least: int = 1):
    """Cut of [B, T, ...] into [chunks, B, width, ...] along time, and its inverse."""
    B, T = shape
    accelerator = jax.default_backend() != "cpu"
    num_chunks, width = logit_chunks(shape, vocab_size, accelerator, least)

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
    hidden: Array,
    embedding: Array,
    targets: Array,
    weights: Array,
    loss_first: Array | None = None,
) -> Array:
    """`next_token_loss` of hidden states, by `token_loss`.

    Args:
        hidden: [B, T, D].
        embedding: tied output embedding, [V, D].
        targets, weights: [B, T]; the weights sum to 1 over the global batch.
        loss_first: int32 [G, B / G T], the positions of each of G equal parts of the
            rows, those with a weight first: of the `loss_chunks` of a part the head is
            computed up to the last with a weight in any part. None means for all.

    Returns:
        Scalar, float32, in nats per token.
    """
    count = None
    if loss_first is not None and loss_chunks(loss_first.shape[1]) > 1:
        hidden, targets, weights = _in_order((hidden, targets, weights), loss_first)
        last = jnp.where(weights != 0, jnp.arange(1, weights.shape[1] + 1), 0)
        count = jnp.max(last)  # any order gives the loss, this one soonest

    def loss(logprobs, _, weights):
        return next_token_loss(logprobs, weights)

    return token_loss(
        hidden, embedding, targets, lambda x: x, loss, weights, count=count
    )[0]


def _in_order(arrays, order):
    """Arrays [B, T, ...] as [G, B / G T, ...], each part in its order [G, B / G T]."""

    @jax.vmap
    def take(x, index):
        return x.at[index].get(unique_indices=True, mode="promise_in_bounds")

    parts = order.shape[0]
    joined = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[2:]), arrays)
    return jax.tree.map(lambda x: take(x, order), joined)
