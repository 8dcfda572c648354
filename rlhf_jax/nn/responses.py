"""K responses that share one prompt, computed once: exact, and fewer positions.

The row is `[prompt, response 1, ..., response K]`; each response attends to the prompt
and to itself, and positions restart after the prompt. Prompt and responses are padded
each, or packed, several prompts a row, where their lengths are known before.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.nn.attention import (
    NEG_INF,
    attention_scores,
    causal_attention,
    fused,
    fused_attention,
    masked_attention,
    readable,
)
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import Params, check_length, transformer

Array = jax.Array


def forward_responses(
    params: Params,
    prompts: Array,
    prompt_lengths: Array,
    responses: Array,
    cfg: TransformerConfig,
) -> Array:
    """Hidden states of K responses to one prompt, the prompt computed once.

    Exactly the states of K separate sequences, from P - 1 + K (R + 1) instead of
    K (P + R) positions, and of K (R + 1) in the last block where layers are `unrolled`.

    Args:
        params: of `init_params`.
        prompts: int32, [B, P], right-padded.
        prompt_lengths: int32 >= 1, [B].
        responses: int32, [B, K, R], right-padded.
        cfg: shape of the model, P + R <= max_len.

    Returns:
        [B, K, R + 1, D]. Index t has read the prompt and responses[..., :t]: it decides
        token t, and index `response_length` is the state after the last real token,
        where a reward model reads.
    """
    row = _shared_row(prompts, prompt_lengths, responses, cfg)
    B, K, R = responses.shape
    stem = row[0].shape[1] - K * (R + 1)
    causal, valid = _causal(R + 1), _valid(prompt_lengths, stem)

    def attend_last(q, k, v):  # the prompt is read, but has no more to say
        own = q.reshape(B, K, R + 1, *q.shape[2:])
        return _attend_branches(own, k, v, valid, causal).reshape(q.shape)

    attend = _attend(prompt_lengths, responses, row)
    hidden = transformer(params, *row, attend, cfg, last=(stem, attend_last))
    return hidden.reshape(B, K, R + 1, -1)


def last_response_states(
    params: Params,
    prompts: Array,
    prompt_lengths: Array,
    responses: Array,
    lengths: Array,
    cfg: TransformerConfig,
) -> Array:
    """The state after the last real token of each response, and no other.

    `forward_responses` at index `lengths`, where layers are `unrolled` without the rest
    of the last block.

    Args:
        params, prompts, prompt_lengths, responses, cfg: of `forward_responses`.
        lengths: int32 in [0, R], [B, K].

    Returns:
        [B, K, D].
    """
    row = _shared_row(prompts, prompt_lengths, responses, cfg)
    B, K, R = responses.shape
    stem = row[0].shape[1] - K * (R + 1)
    read = jnp.arange(R + 1)[None, None] <= lengths[:, :, None]  # [B, K, R + 1]

    def attend_last(q, k, v):  # q [B, K, N, H]
        valid = _valid(prompt_lengths, stem)
        out = _attend_branches(q[:, :, None], k, v, valid, read[:, :, None, None])
        return out[:, :, 0]

    rows = stem + jnp.arange(K)[None] * (R + 1) + lengths
    attend = _attend(prompt_lengths, responses, row)
    return transformer(params, *row, attend, cfg, last=(rows, attend_last))


def packed_last_states(
    params: Params,
    tokens: Array,
    positions: Array,
    documents: Array,
    branches: Array,
    last: Array,
    cfg: TransformerConfig,
) -> Array:
    """The state after the last token of each response, of several prompts in a row.

    `last_response_states` without padding between prompts and responses.

    Args:
        params: of `init_params`.
        tokens, positions, documents, branches: int32, [N, T], see `PackedRankings`;
            positions < cfg.max_len.
        last: int32 in [0, T), [N, S], the places that are wanted.
        cfg: shape of the model.

    Returns:
        [N, S, D].
    """
    chex.assert_equal_shape([tokens, positions, documents, branches])
    places = jnp.arange(tokens.shape[1])[None]
    of_last = (jnp.take_along_axis(x, last, axis=1) for x in (documents, branches))
    mask = readable((last, *of_last), (places, documents, branches))
    attend = functools.partial(causal_attention, documents=documents, branches=branches)
    attend_last = functools.partial(masked_attention, mask=mask)
    final = last, attend_last
    return transformer(params, tokens, positions, attend, cfg, last=final)


def _shared_row(prompts, prompt_lengths, responses, cfg) -> tuple[Array, Array]:
    """Tokens and positions of the row, [B, P - 1 + K (R + 1)] each."""
    chex.assert_rank([prompts, prompt_lengths, responses], [2, 1, 3])
    (B, P), (_, K, R) = prompts.shape, responses.shape
    check_length(P + R, cfg)
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)  # [B, 1]
    starts = jnp.broadcast_to(last[:, :, None], (B, K, 1))
    branches = jnp.concatenate([starts, responses], axis=2)  # [B, K, R + 1]
    stem = P - 1  # the last prompt token starts each branch
    positions = [
        jnp.broadcast_to(jnp.arange(stem)[None], (B, stem)),
        jnp.tile(prompt_lengths[:, None] - 1 + jnp.arange(R + 1)[None], (1, K)),
    ]
    tokens = [prompts[:, :-1], branches.reshape(B, -1)]
    return jnp.concatenate(tokens, axis=1), jnp.concatenate(positions, axis=1)


def _valid(prompt_lengths: Array, stem: int) -> Array:
    """Which columns of the stem are the prompt's: bool [B, stem]."""
    return jnp.arange(stem)[None] < prompt_lengths[:, None] - 1


def _causal(length: int) -> Array:
    """Which tokens of its branch a token reads: bool [1, 1, 1, R + 1, R + 1]."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None, None]


def _attend(prompt_lengths, responses, row):
    """Attention of all positions of the row."""
    B, K, R = responses.shape
    stem = row[0].shape[1] - K * (R + 1)
    valid = _valid(prompt_lengths, stem)
    causal = _causal(R + 1)

    def attend(q, k, v):
        stem_q, stem_k, stem_v = q[:, :stem], k[:, :stem], v[:, :stem]
        out_stem = causal_attention(stem_q, stem_k, stem_v) if stem else stem_v
        own = q[:, stem:].reshape(B, K, R + 1, *q.shape[2:])
        out = _attend_branches(own, k, v, valid, causal)
        return jnp.concatenate([out_stem, out.reshape(B, -1, *out.shape[3:])], axis=1)

    return attend


def _attend_branches(q, k, v, valid, own_mask) -> Array:
    """Attention of Q positions of each branch to the prompt and to their branch.

    Args:
        q: [B, K, Q, N, H].
        k, v: [B, stem + K (R + 1), N, H], of the whole row.
        valid: bool, [B, stem].
        own_mask: bool, broadcast to [B, K, N, Q, R + 1].

    Returns:
        [B, K, Q, N, H].
    """
    B, K = q.shape[:2]
    stem = valid.shape[1]
    own = functools.partial(jnp.reshape, shape=(B, K, -1, *k.shape[2:]))
    k_own, v_own = own(k[:, stem:]), own(v[:, stem:])
    if fused(q):  # the prompt's keys once for each response: the kernel knows no groups
        Q, width = q.shape[2], k_own.shape[2]
        own_mask = jnp.broadcast_to(own_mask[:, :, 0], (B, K, Q, width))
        to_stem = jnp.broadcast_to(valid[:, None, None], (B, K, Q, stem))
        mask = jnp.concatenate([to_stem, own_mask], axis=-1)

        def flat(stems, branches):
            stems = jnp.broadcast_to(stems[:, None], (B, K, *stems.shape[1:]))
            joined = jnp.concatenate([stems, branches], axis=2)
            return joined.reshape(B * K, *joined.shape[2:])

        keys, values = flat(k[:, :stem], k_own), flat(v[:, :stem], v_own)
        mask = mask.reshape(B * K, Q, stem + width)
        out = fused_attention(q.reshape(B * K, *q.shape[2:]), keys, values, mask)
        return out.reshape(q.shape)
    to_stem = attention_scores("bktnh,bsnh->bknts", q, k[:, :stem])
    to_own = attention_scores("bktnh,bksnh->bknts", q, k_own)
    to_stem = jnp.where(valid[:, None, None, None], to_stem, NEG_INF)
    to_own = jnp.where(own_mask, to_own, NEG_INF)
    weights = jax.nn.softmax(jnp.concatenate([to_stem, to_own], -1), axis=-1)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bknts,bsnh->bktnh", weights[..., :stem], v[:, :stem])
    return out + jnp.einsum("bknts,bksnh->bktnh", weights[..., stem:], v_own)
