"""Sampling with slots: a row that ends takes the next prompt inside the loop."""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.decoding import (
    decode_step,
    layers_apart,
    narrower,
    prefill,
    rows_of,
    unfinished,
)
from rlhf_jax.nn.heads import lm_logits
from rlhf_jax.nn.sampling import (
    Rollout,
    Sampling,
    contract_logits,
    empty_rollout,
    sample_tokens,
)
from rlhf_jax.nn.transformer import Params, cast_once, check_length

Array = jax.Array


@struct.dataclass
class Slots:
    """What each slot, [B], is at."""

    rows: Array  # int32, the prompt
    starts: Array  # int32, the step it began at
    tokens: Array  # int32, the last token, which the next step reads
    free: Array  # bool


def generate_refilled(
    params: Params,
    prompts: Array,
    prompt_lengths: Array,
    key: Array,
    temperature: Array | float,
    *,
    num_slots: int,
    eos_id: int,
    pad_id: int,
    model: TransformerConfig,
    sampling: Sampling,
) -> Rollout:
    """Samples one response to each of N prompts, `num_slots` at a time.

    The same tokens as `generate` with the same key, up to rounding: token t of prompt n
    is drawn by the same number. Where lengths vary, about sum(lengths) / num_slots
    steps are taken instead of the longest length for every batch. New keys and values
    go round a ring of R columns, one column a step for all slots; a row reads those
    written since it began. When no prompt is left, the last rows go on in fewer slots
    (`narrower`).

    Args:
        params: policy.
        prompts: int32, [N, P], right-padded; the keys and values of all are computed
            first, at most `num_slots` at a time, and held.
        prompt_lengths: int32 >= 1, [N].
        key: typed PRNG key.
        temperature: of the contract (traced).
        num_slots: rows decoded at a time, B.
        eos_id, pad_id: see `generate`.
        model: shape of the policy, P + R <= max_len.
        sampling: reads `response_len`, `top_k`, `top_p`.

    Returns:
        `Rollout` of N rows.
    """
    chex.assert_rank([prompts, prompt_lengths], [2, 1])
    (N, P), R, B = prompts.shape, sampling.response_len, min(num_slots, len(prompts))
    if num_slots < 1:
        raise ValueError(f"num_slots must be at least 1, got {num_slots}")
    check_length(P + R, model)
    stem = P - 1
    params, table = cast_once(params, model)
    draws = jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(key, t), (N,)))
    uniforms = draws(jnp.arange(R))  # [R, N]
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, 0]
    num_groups = -(-N // B)
    size = -(-N // num_groups)
    padded = jnp.pad(prompts, ((0, num_groups * size - N), (0, 0)))
    groups = padded.reshape(num_groups, size, P)
    stems = jax.lax.map(lambda group: prefill(params, group, model, 0), groups)
    layers = layers_apart(params, model)

    def cache_like(stems):
        """Columns of B slots; made of the first group's, since zeros would be laid out
        while the prompts are computed."""
        widths = [(0, 0)] * (stems.ndim - 1)
        widths[-4], widths[-2] = (0, B - size), (0, R)
        return jnp.pad(stems[0], widths)

    def refill(carry):
        """Gives the next prompt to the first free slot."""
        step, next_prompt, slots, cache, rollout = carry
        slot = jnp.argmax(slots.free)
        put = jax.lax.dynamic_update_slice_in_dim

        def take(columns, stems):
            place = [0] * stems.ndim
            place[0], place[-4] = next_prompt // size, next_prompt % size
            one = list(stems.shape)
            one[0] = one[-4] = 1
            return put(columns, jax.lax.dynamic_slice(stems, place, one)[0], slot, -4)

        taken = Slots(next_prompt, step, last[next_prompt], jnp.bool_(False))
        slots = jax.tree.map(lambda x, new: put(x, new[None], slot, 0), slots, taken)
        cache = jax.tree.map(take, cache, stems)
        return step, next_prompt + 1, slots, cache, rollout

    def refilled(carry):
        return jax.lax.while_loop(
            lambda carry: jnp.any(carry[2].free) & (carry[1] < N), refill, carry
        )

    def draw(carry):
        """One token for each slot."""
        step, next_prompt, slots, cache, rollout = carry
        rows, starts = slots.rows, slots.starts
        t = step - starts  # which token each slot draws; a free one counts on
        places = jnp.minimum(t, R - 1)
        written = step - jnp.mod(step - jnp.arange(R), R)  # step that filled a column
        in_prompt = jnp.arange(stem)[None] < prompt_lengths[rows][:, None] - 1
        own = written[None] >= starts[:, None]  # starts are never negative
        mask = jnp.concatenate([in_prompt, own], axis=1)
        column = stem + jnp.mod(step, R)
        positions = prompt_lengths[rows] - 1 + places
        hidden, cache = decode_step(
            layers, cache, slots.tokens, positions, column, mask, model
        )
        logits = contract_logits(lm_logits(table, hidden), temperature, sampling)
        drawn, logprobs = sample_tokens(uniforms[places, rows], logits)
        kept = jnp.where(slots.free, N, rows)  # a row beyond the last is dropped
        ends = drawn == eos_id
        rollout = Rollout(
            responses=rollout.responses.at[kept, t].set(drawn, mode="drop"),
            lengths=rollout.lengths.at[kept].add(1, mode="drop"),
            ended=rollout.ended.at[kept].set(ends, mode="drop"),
            logprobs=rollout.logprobs.at[kept, t].set(logprobs, mode="drop"),
        )
        free = slots.free | ends | (t + 1 >= R)
        slots = slots.replace(tokens=drawn, free=free)
        return step + 1, next_prompt, slots, cache, rollout

    def goes_on(enough, carry):
        return (jnp.sum(~carry[2].free) > enough) | (carry[1] < N)

    none = jnp.zeros((B,), jnp.int32)
    carry = (
        jnp.int32(0),
        jnp.int32(0),
        Slots(rows=none, starts=none, tokens=none, free=jnp.ones((B,), bool)),
        jax.tree.map(cache_like, stems),
        empty_rollout(N, R, pad_id),
    )
    widths = narrower(B, R)
    goals = [*widths, 0]
    carry = jax.lax.while_loop(
        functools.partial(goes_on, goals[0]), lambda carry: draw(refilled(carry)), carry
    )
    for width, enough in zip(widths, goals[1:], strict=True):
        step, next_prompt, slots, cache, rollout = carry  # no prompt is left
        kept = unfinished(slots.free, width)
        slots = jax.tree.map(lambda x, kept=kept: x[kept], slots)
        carry = step, next_prompt, slots, rows_of(cache, kept), rollout
        carry = jax.lax.while_loop(functools.partial(goes_on, enough), draw, carry)
    return carry[-1]
