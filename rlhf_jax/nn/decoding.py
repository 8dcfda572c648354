"""Decoding: keys and values of the prompt, then one token a row at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.nn.attention import NEG_INF, attention_scores, causal_attention
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import (
    MAX_UNROLLED,
    MAX_UNROLLED_GPU,
    Params,
    block,
    embed,
    final_norm,
)

Array = jax.Array

MIN_STRETCH = 64  # tokens; each part is compiled
MIN_ROWS = 4  # fewer take as long as these

Cache = tuple[Any, ...]
"""Keys and values, [L, B, N, S, H] each in `cfg.dtype`, as a step reads them; or such
a pair [B, N, S, H] for each layer, see `caches_apart`."""


def stretches(length: int) -> list[int]:
    """Ends of the parts of responses [B, R] that read a cache of one width each.

    At most 4, of at least `MIN_STRETCH` tokens.
    """
    count = min(max(length // MIN_STRETCH, 1), 4)
    return [-(-length * (i + 1) // count) for i in range(count)]


def narrower(num_rows: int, length: int) -> list[int]:
    """Numbers of rows that decoding goes on with when no more of [B, R] have not ended.

    Half and a quarter on one CPU device, where a step's time is about in proportion to
    its rows. Each is compiled, so that short responses have none; nor have several
    devices, which would pass rows to each other, or accelerators, where it was not
    measured.
    """
    one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    if not one_cpu or length < MIN_STRETCH:
        return []
    return [rows for rows in (num_rows // 2, num_rows // 4) if rows >= MIN_ROWS]


def unfinished(done: Array, count: int) -> Array:
    """Indices [count] of rows that have not ended [B], then of others, in order."""
    return jnp.argsort(done, stable=True)[:count]


def rows_of(cache: Cache, rows: Array) -> Cache:
    """The cache [..., B, N, S, H] of these rows."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=-4), cache)


def written_out(cfg: TransformerConfig) -> bool:
    """Whether decoding writes layers [L, ...] out instead of looping over them.

    A slice of stacked weights in a loop over tokens is copied in each step: 24 of the
    151 ms that 128 steps of GPT-2 124M took in a profile on an H100.
    """
    most = {"gpu": MAX_UNROLLED_GPU, "cpu": MAX_UNROLLED}
    return cfg.num_layers <= most.get(jax.default_backend(), 0)


def layers_apart(params: Params, cfg: TransformerConfig) -> Params:
    """Parameters for decoding: where it is `written_out`, a tuple of layers instead of
    blocks [L, ...]."""
    if not written_out(cfg):
        return params

    def layer(index):
        return jax.tree.map(lambda p: p[index], params["blocks"])

    return params | {"blocks": tuple(layer(i) for i in range(cfg.num_layers))}


def caches_apart(cfg: TransformerConfig) -> bool:
    """Whether each layer has a cache of its own, [B, N, S, H], in `generate` no wider
    than its stretch.

    On a CPU what a product reads of a larger array is copied first, in each step
    (docs/speed.md has the times). On accelerators the cache is what memory is short of:
    it is laid out once.
    """
    return jax.default_backend() == "cpu" and written_out(cfg)


def widened(cache: Cache, num_columns: int) -> Cache:
    """The cache, [..., N, S, H], with room for so many columns, S, if it has fewer."""

    def widen(x):
        missing = max(num_columns - x.shape[-2], 0)
        return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, missing), (0, 0)))

    return jax.tree.map(widen, cache)


def prefill(
    params: Params, prompts: Array, cfg: TransformerConfig, num_columns: int
) -> Cache:
    """Keys and values of all prompt tokens but the last, in a cache with room for more.

    Args:
        params: of `init_params`.
        prompts: int32, [B, P], right-padded.
        cfg: shape of the model.
        num_columns: free columns after the P - 1 of the prompt.

    Returns:
        The cache, of P - 1 + num_columns columns.
    """
    tokens = prompts[:, :-1]
    B, stem = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(stem)[None], tokens.shape)

    def layer(x, index, rows=None):
        kept = []

        def attend(q, k, v):
            kept.extend((jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
            return causal_attention(q, k, v) if rows is None else q

        at_index = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        layer_params = jax.tree.map(lambda p: at_index(p, index), params["blocks"])
        x = block(layer_params, x, attend, cfg, rows=rows)
        return x, tuple(kept)

    if stem:
        x = embed(params, tokens, positions, cfg.dtype)
        x, cache = jax.lax.scan(layer, x, jnp.arange(cfg.num_layers - 1))
        _, last = layer(x, cfg.num_layers - 1, rows=stem)  # no state of it is read
    else:
        none = jnp.zeros((B, cfg.num_heads, 0, cfg.head_dim), cfg.dtype)
        last = none, none
        cache = (jnp.broadcast_to(none, (cfg.num_layers - 1, *none.shape)),) * 2
    if caches_apart(cfg):
        cache = (*zip(*cache, strict=True), last)
    else:
        cache = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), cache, last)
    return widened(cache, stem + num_columns)


def decode_step(
    params: Params,
    cache: Cache,
    tokens: Array,
    positions: Array,
    column: Array,
    mask: Array,
    cfg: TransformerConfig,
) -> tuple[Array, Cache]:
    """Feeds one token a row: writes its keys and values, returns its hidden state.

    Args:
        params: of `layers_apart`.
        cache: of `prefill`; the carry of the loops, so that it is updated in place.
        tokens: int32, [B].
        positions: int32, [B].
        column: int32 [], the cache column all rows write to.
        mask: bool, [B, S'], columns each row reads, `column` among them; those from
            S' <= S on are left alone (S' = S where each layer has its own cache).
        cfg: shape of the model.

    Returns:
        hidden states after the last norm, [B, D]; the new cache.
    """

    def put(cache, new, index):
        """A layer's new column [B, 1, N, H] in its cache; what it then reads of it,
        [B, N, S', H]."""
        new = jnp.swapaxes(new, 1, 2)
        if index is None:
            cache = jax.lax.dynamic_update_slice(cache, new, (0, 0, column, 0))
            return cache, cache
        start = (index, 0, 0, column, 0)
        cache = jax.lax.dynamic_update_slice(cache, new[None], start)
        sizes = (1, *new.shape[:2], mask.shape[1], new.shape[3])
        return cache, jax.lax.dynamic_slice(cache, (index, 0, 0, 0, 0), sizes)[0]

    def layer(x, params, cache, index):
        """One layer, number `index` of its cache; None: the cache is its own."""
        written = []

        def attend(q, k, v):  # [B, 1, N, H]
            keys, k = put(cache[0], k, index)
            values, v = put(cache[1], v, index)
            written.extend((keys, values))
            scores = attention_scores("bnh,bnsh->bns", q[:, 0], k)
            weights = jax.nn.softmax(jnp.where(mask[:, None], scores, NEG_INF), axis=-1)
            return jnp.einsum("bns,bnsh->bnh", weights.astype(v.dtype), v)[:, None]

        x = block(params, x, attend, cfg)
        return x, tuple(written)

    x = embed(params, tokens[:, None], positions[:, None], cfg.dtype)
    blocks = params["blocks"]
    if isinstance(cache[0], tuple):
        caches = []
        for layer_params, own in zip(blocks, cache, strict=True):
            x, own = layer(x, layer_params, own, None)
            caches.append(own)
        cache = tuple(caches)
    elif isinstance(blocks, tuple):
        for index, layer_params in enumerate(blocks):
            x, cache = layer(x, layer_params, cache, index)
    else:
        (x, cache), _ = jax.lax.scan(
            lambda carry, xs: (layer(carry[0], xs[0], carry[1], xs[1]), None),
            (x, cache),
            (blocks, jnp.arange(cfg.num_layers)),
        )
    return final_norm(params, x)[:, 0], cache
