"""Decoding: keys and values of the prompt, then one token a row at a time."""

import jax
import jax.numpy as jnp

from rlhf_jax.nn.attention import NEG_INF, attention_scores, causal_attention
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import MAX_UNROLLED_GPU, Params, block, embed, final_norm

Array = jax.Array

MIN_STRETCH = 32  # tokens; each part is compiled


def stretches(length: int) -> list[int]:
    """Ends of the parts of responses [B, R] that read a cache of one width each.

    At most 4, of at least `MIN_STRETCH` tokens. To read the live part of the cache only
    took 9 % off 8 rows of 64 + 128 tokens and 4 % off 32, on a CPU, in one process.
    """
    count = min(max(length // MIN_STRETCH, 1), 4)
    return [-(-length * (i + 1) // count) for i in range(count)]


def written_out(cfg: TransformerConfig) -> bool:
    """Whether decoding writes layers [L, ...] out: on GPUs, unless they are many."""
    return jax.default_backend() == "gpu" and cfg.num_layers <= MAX_UNROLLED_GPU


def layers_apart(params: Params, cfg: TransformerConfig) -> Params:
    """Parameters for decoding: where it is `written_out`, a tuple of layers instead of
    blocks [L, ...].

    A slice of stacked weights in a loop over tokens is copied in each step: 24 of the
    151 ms that 128 steps of GPT-2 124M took in a profile on an H100.
    """
    if not written_out(cfg):
        return params

    def layer(index):
        return jax.tree.map(lambda p: p[index], params["blocks"])

    return params | {"blocks": tuple(layer(i) for i in range(cfg.num_layers))}


def prefill(
    params: Params, prompts: Array, cfg: TransformerConfig, num_columns: int
) -> tuple[Array, Array]:
    """Keys and values of all prompt tokens but the last, in a cache with room for more.

    Args:
        params: of `init_params`.
        prompts: int32, [B, P], right-padded.
        cfg: shape of the model.
        num_columns: free columns after the P - 1 of the prompt.

    Returns:
        keys and values, each [L, B, N, P - 1 + num_columns, H] in `cfg.dtype`: the
        layout in which each decoding step reads them.
    """
    tokens = prompts[:, :-1]
    B, stem = tokens.shape
    shape = (cfg.num_layers, B, cfg.num_heads, stem + num_columns, cfg.head_dim)
    if stem == 0:
        return jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype)
    positions = jnp.broadcast_to(jnp.arange(stem)[None], tokens.shape)

    def layer(x, layer_params):
        kept = []

        def attend(q, k, v):
            kept.extend((jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
            return causal_attention(q, k, v)

        x = block(layer_params, x, attend, cfg)
        return x, tuple(kept)

    x = embed(params, tokens, positions, cfg.dtype)
    _, (keys, values) = jax.lax.scan(layer, x, params["blocks"])
    room = ((0, 0), (0, 0), (0, 0), (0, num_columns), (0, 0))
    return jnp.pad(keys, room), jnp.pad(values, room)


def decode_step(
    params: Params,
    cache: tuple[Array, Array],
    tokens: Array,
    positions: Array,
    column: Array,
    mask: Array,
    cfg: TransformerConfig,
) -> tuple[Array, tuple[Array, Array]]:
    """Feeds one token a row: writes its keys and values, returns its hidden state.

    Args:
        params: of `layers_apart` or `init_params`.
        cache: keys and values, each [L, B, N, S, H]; the carry of the loops, so that
            they are updated in place.
        tokens: int32, [B].
        positions: int32, [B].
        column: int32 [], the cache column all rows write to.
        mask: bool, [B, S'], columns each row reads, `column` among them; those from
            S' <= S on are left alone.
        cfg: shape of the model.

    Returns:
        hidden states after the last norm, [B, D]; the new cache.
    """

    def layer(carry, layer_params_and_index):
        layer_params, index = layer_params_and_index
        x, keys, values = carry
        _, B, N, _, H = keys.shape
        written = []

        def here(cache):  # what this layer reads: [B, N, S', H]
            sizes = (1, B, N, mask.shape[1], H)
            return jax.lax.dynamic_slice(cache, (index, 0, 0, 0, 0), sizes)[0]

        def attend(q, k, v):  # [B, 1, N, H]
            start = (index, 0, 0, column, 0)
            k, v = jnp.swapaxes(k, 1, 2)[None], jnp.swapaxes(v, 1, 2)[None]
            all_keys = jax.lax.dynamic_update_slice(keys, k, start)
            all_values = jax.lax.dynamic_update_slice(values, v, start)
            written.extend((all_keys, all_values))
            scores = attention_scores("bnh,bnsh->bns", q[:, 0], here(all_keys))
            weights = jax.nn.softmax(jnp.where(mask[:, None], scores, NEG_INF), axis=-1)
            weights = weights.astype(v.dtype)
            return jnp.einsum("bns,bnsh->bnh", weights, here(all_values))[:, None]

        x = block(layer_params, x, attend, cfg)
        return (x, *written), None

    x = embed(params, tokens[:, None], positions[:, None], cfg.dtype)
    carry, blocks = (x, *cache), params["blocks"]
    if isinstance(blocks, tuple):
        for layer_params_and_index in zip(blocks, range(cfg.num_layers), strict=True):
            carry, _ = layer(carry, layer_params_and_index)
    else:
        carry, _ = jax.lax.scan(layer, carry, (blocks, jnp.arange(cfg.num_layers)))
    x, keys, values = carry
    return final_norm(params, x)[:, 0], (keys, values)
