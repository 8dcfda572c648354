"""The GPT transformer as pure functions: parameters in, hidden states out.

One block serves every use; only how positions attend to each other differs, so the
attention is an argument of the block: causal over a sequence (training), K responses
sharing one prompt (reward model, PPO), or one new token on a cache (decoding).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.nn.attention import (
    causal_attention,
    document_numbers,
    document_positions,
    full_precision,
)
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.devices import embedding_table, keep_dealt, on_tensor_axis, whole_rows

Array = jax.Array
Params = Any  # nested dict of float32 arrays; blocks stacked on a leading axis L
Attend = Callable[[Array, Array, Array], Array]

MAX_UNROLLED = 4  # layers; more are one loop, which compiles as fast as one layer
MAX_UNROLLED_GPU = 24  # there the loop copies what the backward pass needs
_REMAT: dict[str, Callable] = {
    "none": lambda f: f,
    "elementwise": functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    "block": jax.checkpoint,
}


def init_params(key: Array, cfg: TransformerConfig) -> Params:
    """Draws GPT-2's initial parameters.

    Weights ~ N(0, 0.02^2), those that write to the residual stream N(0, 0.02^2 / 2L),
    token embeddings N(0, embed_std^2), positions N(0, 0.01^2), biases 0, norms 1.

    Args:
        key: typed PRNG key.
        cfg: shape of the model.

    Returns:
        `embed` [V, D], `pos_embed` [max_len, D], `blocks` (leaves [L, ...]) and, for
        pre-norm models, `final_norm`; all float32.

    Source: Radford et al. 2019, section 2.3, and the released code (positions 0.01).
        The 1/sqrt(2L) of the residual layers is in the paper only.
    """
    L, D, F = cfg.num_layers, cfg.model_dim, cfg.mlp_dim
    N, H = cfg.num_heads, cfg.head_dim
    keys = iter(jax.random.split(key, 6))

    def normal(std, *shape):
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    def norm(*leading):
        return {"scale": jnp.ones((*leading, D)), "bias": jnp.zeros((*leading, D))}

    residual_std = 0.02 / (2 * L) ** 0.5
    blocks = {
        "attn_norm": norm(L),
        "qkv": {"w": normal(0.02, L, D, 3, N, H), "b": jnp.zeros((L, 3, N, H))},
        "attn_out": {"w": normal(residual_std, L, N, H, D), "b": jnp.zeros((L, D))},
        "mlp_norm": norm(L),
        "mlp_up": {"w": normal(0.02, L, D, F), "b": jnp.zeros((L, F))},
        "mlp_down": {"w": normal(residual_std, L, F, D), "b": jnp.zeros((L, D))},
    }
    params = {
        "embed": normal(cfg.embed_std, cfg.vocab_size, D),
        "pos_embed": normal(0.01, cfg.max_len, D),
        "blocks": blocks,
    }
    if cfg.norm == "pre":
        params["final_norm"] = norm()
    return params


def layer_norm(params: Params, x: Array) -> Array:
    """Normalises the last axis in float32: (x - mean) / sqrt(var + 1e-5) scale + bias.

    Args:
        params: `scale` and `bias`, [D].
        x: [..., D].

    Returns:
        [..., D] in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    var = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(var + 1e-5)
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale, bias = params["scale"].reshape(shape), params["bias"].reshape(shape)
    return (y * scale + bias).astype(x.dtype)


def _dense(params: Params, x: Array) -> Array:
    """x W + b over the axes of W that b lacks, as one product of two matrices."""
    w, b = params["w"].astype(x.dtype), params["b"].astype(x.dtype)
    num_inputs = w.ndim - b.ndim
    leading, inputs = x.shape[:-num_inputs], w.shape[:num_inputs]
    if on_tensor_axis(w):  # [3, N, H] as one axis would gather what is cut along N
        return jnp.tensordot(x, w, num_inputs) + jnp.expand_dims(b, range(len(leading)))
    rows = x.reshape(-1, math.prod(inputs))
    y = rows @ w.reshape(rows.shape[1], -1) + b.reshape(1, -1)
    return y.reshape(*leading, *b.shape)


def _dropout(x: Array, rate: float, key: Array | None) -> Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def block(
    params: Params,
    x: Array,
    attend: Attend,
    cfg: TransformerConfig,
    key: Array | None = None,
    rows: Array | int | None = None,
) -> Array:
    """Applies one block: attention, then MLP, each added to the residual stream.

    pre-LN:  a = x + Attn(LN(x)),  y = a + MLP(LN(a))
    post-LN: a = LN(x + Attn(x)),  y = LN(a + MLP(a))
    MLP(h) = W2 gelu(W1 h + b1) + b2 with the tanh form of gelu.

    Args:
        params: one layer of `blocks`, without the leading axis.
        x: residual stream, [B, T, D].
        attend: `(q, k, v) -> out`, each [B, T, N, H]; q and out [B, S, N, H] of `rows`.
        cfg: reads `norm` and `dropout`.
        key: of the dropout masks; None turns dropout off.
        rows: int32 [B, S], the positions whose outputs are wanted, or the first of
            them; None means all.

    Returns:
        [B, T, D], or [B, S, D] of `rows`; the dtype of `x`.

    Source: Radford et al. 2018 (post-LN) and 2019 (pre-LN), and the released code.
    """
    with full_precision(x.dtype):
        return _block(params, x, attend, cfg, key, rows)


def _block(params, x, attend, cfg, key, rows):
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    pre = cfg.norm == "pre"

    x = keep_dealt(x)
    h = whole_rows(layer_norm(params["attn_norm"], x) if pre else x)
    if rows is None:
        qkv = _dense(params["qkv"], h)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    else:
        kv = _dense(jax.tree.map(lambda p: p[..., 1:, :, :], params["qkv"]), h)
        k, v = kv[:, :, 0], kv[:, :, 1]
        x, h = _take(whole_rows(x), rows), _take(h, rows)
        q = _dense(jax.tree.map(lambda p: p[..., 0, :, :], params["qkv"]), h)
    out = keep_dealt(whole_rows(_dense(params["attn_out"], attend(q, k, v))))
    x = x + _dropout(out, cfg.dropout, keys[0])
    x = x if pre else layer_norm(params["attn_norm"], x)

    h = whole_rows(layer_norm(params["mlp_norm"], x) if pre else x)
    h = jax.nn.gelu(_dense(params["mlp_up"], h), approximate=True)
    out = keep_dealt(whole_rows(_dense(params["mlp_down"], h)))
    x = x + _dropout(out, cfg.dropout, keys[1])
    return x if pre else layer_norm(params["mlp_norm"], x)


def _take(x: Array, rows: Array | int) -> Array:
    """Positions [B, S] of [B, T, D], or those from one on."""
    if isinstance(rows, int):
        return x[:, rows:]
    return jnp.take_along_axis(x, rows[:, :, None], axis=1)


def cast_once(params: Params, cfg: TransformerConfig) -> tuple[Params, Params]:
    """Parameters for loops over many steps, which would convert weights in each.

    Args:
        params: of `init_params`.
        cfg: reads `dtype`.

    Returns:
        The parameters with those of dense layers in `cfg.dtype`, norms and embeddings
        as they are; `{"embed"}` [V, D] in `cfg.dtype`, for `lm_logits`. The same
        results as without.
    """
    blocks = {
        name: layer
        if name.endswith("norm")
        else jax.tree.map(lambda p: p.astype(cfg.dtype), layer)
        for name, layer in params["blocks"].items()
    }
    return params | {"blocks": blocks}, {"embed": params["embed"].astype(cfg.dtype)}


def embed(params: Params, tokens: Array, positions: Array, dtype: str) -> Array:
    """Adds token and position embeddings: ids and positions [B, T] -> [B, T, D]."""
    table = embedding_table(params["embed"], tokens)
    x = whole_rows(table[tokens]) + params["pos_embed"][positions]
    return x.astype(dtype)


def final_norm(params: Params, x: Array) -> Array:
    """Normalises the residual stream [..., D] of a pre-LN model; else the identity."""
    return layer_norm(params["final_norm"], x) if "final_norm" in params else x


def unrolled(cfg: TransformerConfig) -> bool:
    """Whether the layers, [L, ...], are written out instead of looped over."""
    on_gpu = jax.default_backend() == "gpu" and cfg.remat == "none"
    return cfg.num_layers <= (MAX_UNROLLED_GPU if on_gpu else MAX_UNROLLED)


def transformer(
    params: Params,
    tokens: Array,
    positions: Array,
    attend: Attend,
    cfg: TransformerConfig,
    key: Array | None = None,
    last: tuple[Array | int, Attend] | None = None,
) -> Array:
    """Runs all blocks on [B, T] tokens with a given attention pattern.

    Args:
        params: of `init_params`.
        tokens: int32, [B, T].
        positions: int32 in [0, max_len), [B, T]; explicit, so that padding and shared
            prompts cannot move them.
        attend: which key each query reads, see the module.
        cfg: shape, dtype, norm, dropout, remat.
        key: of dropout; None turns it off.
        last: the positions [B, S] whose states are wanted, or the first of them, and
            how they attend in the last block, the rest of which is left out (without
            dropout).

    Returns:
        Hidden states after the last norm, [B, T, D] or [B, S, D], in `cfg.dtype`;
        heads are apart.
    """
    chex.assert_rank([tokens, positions], 2)
    chex.assert_equal_shape([tokens, positions])
    x = embed(params, tokens, positions, cfg.dtype)
    apply = functools.partial(block, attend=attend, cfg=cfg)
    remat = _REMAT[cfg.remat]
    apply = remat(apply)

    def layer(x, layer_params_and_index):
        layer_params, index = layer_params_and_index
        layer_key = None if key is None else jax.random.fold_in(key, index)
        return apply(layer_params, x, key=layer_key), None

    layers, blocks = jnp.arange(cfg.num_layers), params["blocks"]
    few = unrolled(cfg)
    if last is not None and few:
        rows, attend_last = last
        final = jax.tree.map(lambda p: p[-1], blocks)
        layers, blocks = jax.tree.map(lambda p: p[:-1], (layers, blocks))
    x, _ = jax.lax.scan(layer, x, (blocks, layers), unroll=few)
    if last is not None and few:
        apply = functools.partial(block, attend=attend_last, cfg=cfg, rows=rows)
        x = remat(apply)(final, x)
    elif last is not None:  # a slice of many blocks would copy their parameters
        x = _take(whole_rows(x), last[0])
    return whole_rows(final_norm(params, x))


def forward(
    params: Params,
    tokens: Array,
    cfg: TransformerConfig,
    key: Array | None = None,
    documents: Array | None = None,
) -> Array:
    """Hidden states of right-padded sequences under causal attention.

    Args:
        params: of `init_params`.
        tokens: int32, [B, T], T <= max_len; padding on the right.
        cfg: shape of the model; with `document_end` a row may hold several documents,
            each of which is read as if it stood alone.
        key: of dropout; None turns it off.
        documents: int32 [B, T], rising numbers of what shares a row, read apart like
            documents that `document_end` tells.

    Returns:
        [B, T, D]: position t has read tokens[..t], as far as they are of its document.
        Positions of padding hold garbage that no real position has read; give them
        weight 0.
    """
    chex.assert_rank(tokens, 2)
    check_length(tokens.shape[1], cfg)
    if cfg.document_end is not None:
        told = document_numbers(tokens, cfg.document_end)
        documents = told if documents is None else told + documents
    if documents is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return transformer(params, tokens, positions, causal_attention, cfg, key)
    positions = document_positions(documents)
    attend = functools.partial(causal_attention, documents=documents)
    return transformer(params, tokens, positions, attend, cfg, key)


def check_length(length: int, cfg: TransformerConfig) -> None:
    """Raises ValueError unless tokens [B, length] fit the model."""
    if length > cfg.max_len:
        raise ValueError(
            f"sequences of {length} tokens do not fit the model's max_len "
            f"{cfg.max_len}; shorten prompt_len + response_len or raise model.max_len"
        )
