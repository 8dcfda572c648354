"""Sampling with slots: a row that ends takes the next prompt inside the loop."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.decoding import decode_step, layers_apart, prefill, widened
from rlhf_jax.nn.heads import lm_logits
from rlhf_jax.nn.sampling import (
    Rollout,
    Sampling,
    check_room,
    contract_logits,
    empty_rollout,
    sample_tokens,
)
from rlhf_jax.nn.transformer import Params, cast_once

Array = jax.Array


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
    written since it began.

    Args:
        params: policy.
        prompts: int32, [N, P], right-padded; the keys and values of all are computed
            first and held.
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
    check_room(P, R, model)
    stem = P - 1
    params, table = cast_once(params, model)
    draws = jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(key, t), (N,)))
    uniforms = draws(jnp.arange(R))  # [R, N]
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, 0]
    stems = prefill(params, prompts, model, 0)
    layers = layers_apart(params, model)
    first = jnp.arange(B)
    cache = widened(jax.tree.map(lambda x: x[..., :B, :, :, :], stems), stem + R)

    def refill(carry):
        """Gives the next prompt to the first free slot."""
        step, next_prompt, rows, starts, tokens, free, cache, rollout = carry
        slot = jnp.argmax(free)
        put = jax.lax.dynamic_update_slice_in_dim

        def take(slots, all_stems):
            stem = jax.lax.dynamic_index_in_dim(all_stems, next_prompt, -4)
            return put(slots, stem, slot, -4)

        cache = jax.tree.map(take, cache, stems)
        rows = put(rows, next_prompt[None], slot, 0)
        starts = put(starts, step[None], slot, 0)
        tokens = put(tokens, last[next_prompt][None], slot, 0)
        free = put(free, jnp.zeros((1,), bool), slot, 0)
        return step, next_prompt + 1, rows, starts, tokens, free, cache, rollout

    def body(carry):
        carry = jax.lax.while_loop(
            lambda carry: jnp.any(carry[5]) & (carry[1] < N), refill, carry
        )
        step, next_prompt, rows, starts, tokens, free, cache, rollout = carry
        t = step - starts  # [B], which token each slot draws; a free one counts on
        places = jnp.minimum(t, R - 1)
        written = step - jnp.mod(step - jnp.arange(R), R)  # step that filled a column
        in_prompt = jnp.arange(stem)[None] < prompt_lengths[rows][:, None] - 1
        own = written[None] >= starts[:, None]  # starts are never negative
        mask = jnp.concatenate([in_prompt, own], axis=1)
        column = stem + jnp.mod(step, R)
        positions = prompt_lengths[rows] - 1 + places
        hidden, cache = decode_step(
            layers, cache, tokens, positions, column, mask, model
        )
        logits = contract_logits(lm_logits(table, hidden), temperature, sampling)
        drawn, logprobs = sample_tokens(uniforms[places, rows], logits)
        alive = ~free
        kept = jnp.where(alive, rows, N)  # a row beyond the last is dropped
        ends = drawn == eos_id
        rollout = Rollout(
            responses=rollout.responses.at[kept, t].set(drawn, mode="drop"),
            lengths=rollout.lengths.at[kept].add(1, mode="drop"),
            ended=rollout.ended.at[kept].set(ends, mode="drop"),
            logprobs=rollout.logprobs.at[kept, t].set(logprobs, mode="drop"),
        )
        free = free | ends | (t + 1 >= R)
        return step + 1, next_prompt, rows, starts, drawn, free, cache, rollout

    begin = jnp.zeros((B,), jnp.int32)
    carry = (
        jnp.int32(0),
        jnp.int32(B),
        first,
        begin,
        last[:B],
        jnp.zeros((B,), bool),
        cache,
        empty_rollout(N, R, pad_id),
    )
    *_, rollout = jax.lax.while_loop(
        lambda carry: ~jnp.all(carry[5]) | (carry[1] < N), body, carry
    )
    return rollout
