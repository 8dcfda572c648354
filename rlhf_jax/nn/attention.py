"""Attention of a position to those before it, within a document or across them."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.nn.devices import on_each_device

Array = jax.Array

NEG_INF = -1e9  # finite, so that a row without any key gives no NaN
MIN_BLOCK = 128  # positions; on CPU blocks of 64 were no faster
FUSED_IMPLEMENTATION = "cudnn"  # of jax.nn.dot_product_attention


def attention_scores(equation: str, q: Array, k: Array) -> Array:
    """q k^T / sqrt(H) by an einsum equation, in float32: e.g. [B, N, T, S]."""
    scale = q.shape[-1] ** -0.5
    return scale * jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)


def full_precision(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager:
    """Within it float32 matrices are multiplied in float32 on accelerators too.

    Their default rounds the factors first: an error of 3e-4 instead of 8e-7 in a
    product of 2048 on an H100. bfloat16 is left alone: a float32 result of it would be
    multiplied as float32.

    Args:
        dtype: of the factors, [..., D] and [D, ...].
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest" if exact else "default")


def fused(q: Array) -> bool:
    """Whether cuDNN computes attention of such queries: bfloat16 on an NVIDIA GPU.

    Its gradient adds up in no fixed order: three calls differed in their last bits on
    an H100.

    Args:
        q: [B, T, N, H].
    """
    client = jax.devices()[0].client
    fits = q.dtype == jnp.bfloat16 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    return fits and client.platform == "gpu" and "cuda" in client.platform_version


def fused_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Softmax attention without [T, S] scores in memory, by cuDNN.

    Args:
        q, k, v: [B, T, N, H] and twice [B, S, N, H], see `fused`.
        mask: bool, [B, T, S], which key each query reads; None means causal, T = S.

    Returns:
        [B, T, N, H]; garbage where a query has no key.
    """
    T, S = q.shape[1], k.shape[1]
    odd, heads = ((0, T % 2), (0, S % 2)), ((0, 0), (0, 0))  # gradients want even sizes
    q = jnp.pad(q, ((0, 0), odd[0], *heads))
    k, v = (jnp.pad(x, ((0, 0), odd[1], *heads)) for x in (k, v))
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), *odd))[:, None]
    causal, how = mask is None, FUSED_IMPLEMENTATION
    attention = jax.nn.dot_product_attention
    out = attention(q, k, v, mask=mask, is_causal=causal, implementation=how)  # type: ignore[arg-type]
    return out[:, :T]


def flash(q: Array) -> bool:
    """Whether the TPU's kernel computes causal attention of such queries: bfloat16.

    Args:
        q: [B, T, N, H]; a T under one block is not worth the kernel.
    """
    T, H = q.shape[1], q.shape[-1]
    fits = q.dtype == jnp.bfloat16 and (H <= 128 or H % 128 == 0)
    return fits and T >= MIN_BLOCK and jax.devices()[0].platform == "tpu"


def flash_attention(
    q: Array, k: Array, v: Array, documents: Array | None = None
) -> Array:
    """`causal_attention` without [T, T] scores in memory, by JAX's kernel for TPUs.

    Rows are filled up on the right to whole blocks, which no real query reads. Each
    device runs it on its rows and heads: the compiler cannot cut a kernel.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    T, scale = q.shape[1], q.shape[-1] ** -0.5
    width = next(n for n in (512, 256, 128) if -(-T // n) * n == -(-T // 128) * 128)
    names = (field.name for field in dataclasses.fields(kernel.BlockSizes))
    sizes = kernel.BlockSizes(**{n: 1 if n == "block_b" else width for n in names})

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -T % width), *((0, 0),) * (x.ndim - 2)))

    def local(q, k, v, *ids):
        heads_first = (padded(x).swapaxes(1, 2) for x in (q, k, v))
        segments = [kernel.SegmentIds(*[padded(x)] * 2) for x in ids]
        how = {"causal": True, "sm_scale": scale, "block_sizes": sizes}
        out = kernel.flash_attention(*heads_first, None, *segments, **how)
        return out.swapaxes(1, 2)[:, :T]

    ids = () if documents is None else (documents,)
    return on_each_device(local, q, k, v, *ids)


def blocks(length: int) -> list[tuple[int, int]]:
    """Starts and ends of 1, 2 or 4 blocks of queries that [T, T] is cut into."""
    count = next(n for n in (4, 2, 1) if length >= n * MIN_BLOCK or n == 1)
    width = max(1, -(-length // count))
    return [(start, min(start + width, length)) for start in range(0, length, width)]


def causal_pairs(length: int) -> int:
    """Queries times keys that attention over [T, T] computes, without a kernel."""
    return sum((end - start) * end for start, end in blocks(length))


def readable(queries: tuple[Array, ...], keys: tuple[Array, ...]) -> Array:
    """Which keys each query reads: those up to its place, of its document and branch.

    Args:
        queries: int32 [B or 1, S] each: places in the row; if told, the documents they
            are of; if told, their branches, of which number 0 is read by all others.
        keys: the same, [B or 1, T].

    Returns:
        bool, [B or 1, S, T].
    """
    pairs = [(q[:, :, None], k[:, None]) for q, k in zip(queries, keys, strict=True)]
    query, key = pairs[0]
    mask = key <= query
    if len(pairs) > 1:
        own, other = pairs[1]
        mask &= other == own
    if len(pairs) > 2:
        own, other = pairs[2]
        mask &= (other == own) | (other == 0)
    return mask


def masked_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """softmax(q k^T / sqrt(H), of the keys read) v, the softmax in float32.

    Args:
        q: [B, S, N, H].
        k, v: [B, T, N, H].
        mask: bool, [B or 1, S, T], at least one key for each query.

    Returns:
        [B, S, N, H], the dtype of `v`.
    """
    if fused(q):
        return fused_attention(q, k, v, mask)
    scores = attention_scores("btnh,bsnh->bnts", q, k)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, NEG_INF), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    documents: Array | None = None,
    branches: Array | None = None,
) -> Array:
    """Softmax attention of each position to itself and those before it.

    softmax(q k^T / sqrt(H) + causal mask) v, the softmax in float32. Padding needs no
    mask here as long as it stands to the right: no real position reads it. Long rows
    are cut into `blocks` of queries, which leave out the keys after them.

    Args:
        q, k, v: [B, T, N, H].
        documents: int32 [B, T], numbers of the documents packed in a row, across which
            nothing is read; None reads across them.
        branches: int32 [B, T], parts of a document that read its part 0 and themselves
            alone; None for whole documents.

    Returns:
        [B, T, N, H], the dtype of `v`.
    """
    T = q.shape[1]
    if branches is not None and documents is None:
        documents = jnp.zeros_like(branches)
    told = [x for x in (documents, branches) if x is not None]
    if fused(q) and not told:
        return fused_attention(q, k, v)
    if flash(q) and branches is None:
        return flash_attention(q, k, v, documents)
    where = (jnp.arange(T)[None], *told)
    parts = []
    for start, end in [(0, T)] if fused(q) else blocks(T):
        queries, keys = (tuple(x[:, a:end] for x in where) for a in (start, 0))
        mask = readable(queries, keys)
        parts.append(masked_attention(q[:, start:end], k[:, :end], v[:, :end], mask))
    return jnp.concatenate(parts, axis=1)


def document_numbers(tokens: Array, end: int) -> Array:
    """Which document each token of a packed row is of, from 0: int32, [B, T].

    Args:
        tokens: int32, [B, T].
        end: id that ends a document and is its last token.
    """
    first = jnp.zeros_like(tokens[:, :1], bool)
    begins = jnp.concatenate([first, tokens[:, :-1] == end], axis=1)
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def document_positions(documents: Array) -> Array:
    """Places of tokens in their documents, from 0: int32, [B, T].

    Args:
        documents: numbers of documents, int32 [B, T]; each is in one piece.
    """
    steps = jnp.broadcast_to(jnp.arange(documents.shape[1])[None], documents.shape)
    first = jnp.zeros_like(documents[:, :1], bool)
    changes = documents[:, 1:] != documents[:, :-1]
    begins = jnp.concatenate([first, changes], axis=1)
    return steps - jax.lax.cummax(jnp.where(begins, steps, 0), axis=1)
