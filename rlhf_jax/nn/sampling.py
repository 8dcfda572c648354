"""Sampling responses: prefill, then one compiled loop over a key-value cache.

The sampling contract (`Sampling`) is applied by one function to the logits, here and
wherever log-probabilities are recomputed for training, so both speak of the same
distribution.
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.nn.config import TransformerConfig, check_range
from rlhf_jax.nn.decoding import (
    caches_apart,
    decode_step,
    layers_apart,
    narrower,
    prefill,
    rows_of,
    stretches,
    unfinished,
    widened,
)
from rlhf_jax.nn.heads import lm_logits
from rlhf_jax.nn.transformer import Params, cast_once, check_length

Array = jax.Array
LEAST = float(jnp.finfo(jnp.float32).min)  # below any logit at any temperature
LEAST_WEIGHT = -80.0  # nats below the likeliest token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution responses are drawn from: part of every rollout's meaning."""

    response_len: int = 32
    """Longest response in tokens, R, end-of-text included."""
    temperature: float = 1.0
    """Divides the logits. InstructGPT: 1 (C.4); Ziegler and the TL;DR code: 0.7."""
    top_k: int | None = None
    """Keep the k likeliest tokens, and those as likely as the last (None: all)."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens with this mass, and those as likely as
    its last (None: all)."""

    def __post_init__(self):
        if not 1e-6 <= self.temperature < math.inf:  # logits / T must stay finite
            raise ValueError(
                f"temperature must be at least 1e-6, got {self.temperature}; "
                "for greedy decoding use top_k = 1"
            )
        check_range(self, "[1, inf)", "response_len")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1] or None, got {self.top_p}")


@struct.dataclass
class Rollout:
    """Responses and what the sampler knew of them."""

    responses: Array  # int32 [B, R], pad id after the end
    lengths: Array  # int32 [B], tokens of each response, end-of-text included
    ended: Array  # bool [B], True where the response ends in end-of-text
    logprobs: Array  # float32 [B, R], of each token under the contract, 0 after the end


def empty_rollout(num_rows: int, response_len: int, pad_id: int) -> Rollout:
    """A rollout of [B, R] before the first token."""
    shape = (num_rows, response_len)
    return Rollout(
        responses=jnp.full(shape, pad_id, jnp.int32),
        lengths=jnp.zeros(shape[:1], jnp.int32),
        ended=jnp.zeros(shape[:1], bool),
        logprobs=jnp.zeros(shape, jnp.float32),
    )


def contract_logits(logits: Array, temperature: Array | float, cfg: Sampling) -> Array:
    """Logits of the distribution that is sampled from.

    logits / temperature, then every token outside the top k, or outside the smallest
    likeliest set of mass top_p, is set to the least float32 (ties at the edge are all
    kept). Its log-softmax is the log-probability of the sampling contract.

    Args:
        logits: float32, [..., V].
        temperature: > 0; traced, so that sweeps do not recompile.
        cfg: reads `top_k` and `top_p`.

    Returns:
        float32, [..., V].

    Source: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p).
    """
    logits = logits / temperature
    if cfg.top_k is not None:
        kept, _ = jax.lax.top_k(logits, min(cfg.top_k, logits.shape[-1]))
        logits = jnp.where(logits >= kept[..., -1:], logits, LEAST)
    if cfg.top_p is not None and cfg.top_p < 1.0:  # a rounded sum may reach 1 early
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        threshold = jnp.min(
            jnp.where(mass_before < cfg.top_p, ordered, jnp.inf), axis=-1, keepdims=True
        )
        logits = jnp.where(logits >= threshold, logits, LEAST)
    return logits


def sample_tokens(uniforms: Array, logits: Array) -> tuple[Array, Array]:
    """Draws one token a row by the inverse of the cumulative distribution.

    The smallest v with sum_{w <= v} p_w > u, in two levels (blocks of tokens, then one
    block): one uniform number a row instead of V Gumbel draws, no further array [B, V].

    Args:
        uniforms: float32 in [0, 1), [B].
        logits: float32, [B, V], of the contract.

    Returns:
        tokens, int32 [B], never one of probability 0 (or e^-80 of the likeliest's);
        their log-probabilities, float32 [B].
    """
    chex.assert_rank([uniforms, logits], [1, 2])
    B, V = logits.shape
    width = max(1, round(V**0.5))
    whole = V // width * width  # the rest is a block of fewer tokens
    top = jnp.max(logits, axis=-1, keepdims=True)

    def weights(logits, top):
        """exp(logits - top). Sums and the drawn block compute it each, and must agree
        on what is 0: it is where one of them might flush a tiny number to 0."""
        return jnp.where(logits - top > LEAST_WEIGHT, jnp.exp(logits - top), 0.0)

    blocks = logits[:, :whole].reshape(B, -1, width)
    masses = jnp.sum(weights(blocks, top[:, :, None]), axis=-1)
    if whole < V:
        end = jnp.sum(weights(logits[:, whole:], top), axis=-1, keepdims=True)
        masses = jnp.concatenate([masses, end], axis=-1)

    def pick(rest, masses):  # index where the running sum passes `rest`; what is left
        sums = jnp.cumsum(masses, axis=-1)  # a parallel sum: may move where a mass is 0
        passed = (masses > 0) & (sums > rest[:, None])
        last = masses.shape[-1] - 1 - jnp.argmax(masses[:, ::-1] > 0, axis=-1)
        index = jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)
        index = index[:, None]
        before = jnp.take_along_axis(sums - masses, index, axis=-1)
        return index, jnp.maximum(rest - before[:, 0], 0.0)

    total = jnp.sum(masses, axis=-1)
    block, rest = pick(uniforms * total, masses)
    first = block * width
    start = jnp.minimum(first, V - width)  # reads as many tokens of the last block
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=width)
    inside = weights(jax.vmap(cut)(logits, start[:, 0]), top)
    inside = jnp.where(start + jnp.arange(width)[None] >= first, inside, 0.0)
    place, _ = pick(rest, inside)
    tokens = (start + place)[:, 0].astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - top[:, 0] - jnp.log(total)


def generate(
    params: Params,
    prompts: Array,
    prompt_lengths: Array,
    key: Array,
    temperature: Array | float,
    *,
    eos_id: int,
    pad_id: int,
    model: TransformerConfig,
    sampling: Sampling,
) -> Rollout:
    """Samples one response to each prompt.

    A `while_loop` over response positions that stops when every row has drawn
    end-of-text; long responses have several in turn, which read ever more of the cache
    (`stretches`) or go on with the rows that have not ended (`narrower`). Masks come
    from lengths; pad may equal end-of-text.

    Args:
        params: policy.
        prompts: int32, [B, P], right-padded.
        prompt_lengths: int32 >= 1, [B].
        key: typed PRNG key; step t uses `fold_in(key, t)`.
        temperature: of the contract (traced).
        eos_id: token that ends a response and belongs to it.
        pad_id: fills what lies after the end.
        model: shape of the policy, P + R <= max_len.
        sampling: reads `response_len`, `top_k`, `top_p`.

    Returns:
        `Rollout` of R = `sampling.response_len` tokens a row.
    """
    chex.assert_rank([prompts, prompt_lengths], [2, 1])
    (B, P), R = prompts.shape, sampling.response_len
    check_length(P + R, model)
    stem = P - 1
    params, table = cast_once(params, model)
    layers = layers_apart(params, model)
    in_prompt = jnp.arange(stem)[None] < prompt_lengths[:, None] - 1
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, 0]

    def draw(rows, end, carry):
        """One token for these rows of the batch (None: all, left on their devices)."""
        t, tokens, alive, cache, rollout = carry
        of_rows = lambda x: x if rows is None else x[rows]  # noqa: E731
        positions = of_rows(prompt_lengths) - 1 + t
        so_far = jnp.broadcast_to(jnp.arange(end)[None] <= t, (len(tokens), end))
        mask = jnp.concatenate([of_rows(in_prompt), so_far], axis=1)
        hidden, cache = decode_step(
            layers, cache, tokens, positions, stem + t, mask, model
        )
        logits = contract_logits(lm_logits(table, hidden), temperature, sampling)
        uniforms = of_rows(jax.random.uniform(jax.random.fold_in(key, t), (B,)))
        drawn, logprobs = sample_tokens(uniforms, logits)
        drawn = jnp.where(alive, drawn, pad_id)
        put = jax.lax.dynamic_update_slice
        rollout = Rollout(
            responses=put(rollout.responses, drawn[:, None], (0, t)),
            lengths=rollout.lengths + alive.astype(jnp.int32),
            ended=rollout.ended | (alive & (drawn == eos_id)),
            logprobs=put(
                rollout.logprobs, jnp.where(alive, logprobs, 0.0)[:, None], (0, t)
            ),
        )
        return t + 1, drawn, alive & (drawn != eos_id), cache, rollout

    def draw_until(rows, end, enough, carry):
        """Tokens up to `end`, or until no more than `enough` rows have not ended."""
        return jax.lax.while_loop(
            lambda carry: (carry[0] < end) & (jnp.sum(carry[2]) > enough),
            functools.partial(draw, rows, end),
            carry,
        )

    cache = prefill(params, prompts, model, 0 if caches_apart(model) else R)
    alive = jnp.ones((B,), bool)
    carry = (jnp.int32(0), last, alive, cache, empty_rollout(B, R, pad_id))
    widths = narrower(B, R)
    goals = [*widths, 0]
    for end in stretches(R):
        *progress, cache, rollout = carry
        carry = (*progress, widened(cache, stem + end), rollout)
        carry = draw_until(None, end, goals[0], carry)
    rows, rollout = jnp.arange(B), carry[-1]
    for width, enough in zip(widths, goals[1:], strict=True):
        t, tokens, alive, cache, _ = carry
        kept = unfinished(~alive, width)
        rows, cache = rows[kept], rows_of(cache, kept)
        part = jax.tree.map(lambda x, rows=rows: x[rows], rollout)
        carry = (t, tokens[kept], alive[kept], cache, part)
        carry = draw_until(rows, R, enough, carry)
        write_back = lambda whole, new, rows=rows: whole.at[rows].set(new)  # noqa: E731
        rollout = jax.tree.map(write_back, rollout, carry[-1])
    return rollout
