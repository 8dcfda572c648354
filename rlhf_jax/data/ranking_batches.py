"""Rankings to NumPy batches: prompts with K ranked responses each."""

from collections.abc import Sequence

import flax.struct
import numpy as np

from rlhf_jax.data.batches import Array, check_any, pad_prompts
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.records import DataError, Ranking
from rlhf_jax.data.schedule import Batches, Shard
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.data.widths import fitted_width


@flax.struct.dataclass
class RankingBatch:
    """Prompts with K ranked responses each."""

    prompts: Array
    """[B, P] int32."""
    prompt_lengths: Array
    """[B] int32, at least 1."""
    responses: Array
    """[B, K, R] int32."""
    response_lengths: Array
    """[B, K] int32, end token included; 0 where absent."""
    ranks: Array
    """[B, K] int32; 1 is best, equal ranks tie, 0 is an absent response."""


def ranking_batches(
    rankings: Sequence[Ranking],
    tokenizer: Tokenizer,
    format: PromptFormat,
    batch_size: int,
    prompt_len: int,
    response_len: int,
    num_responses: int,
    seed: int | None,
    shard: Shard = (0, 1),
) -> Batches[RankingBatch]:
    """Batches of prompts with up to K ranked responses.

    A response with more than response_len tokens is left out of its ranking; a ranking
    is left out when its prompt has more than prompt_len tokens, or when no two of its
    responses differ in rank. Both are counted. P, K and R are what the rest needs.

    Args:
        rankings: records.
        tokenizer: gives the ids.
        format: joins prompt and response.
        batch_size: rows of the global batch, B.
        prompt_len: longest prompt in tokens.
        response_len: longest response in tokens with its end token.
        num_responses: most responses of a ranking.
        seed: of the order; None reads in order.
        shard: (index, count) of this process.

    Raises:
        DataError: a ranking has more than num_responses, or no ranking is left.
    """
    check_any("rankings", rankings)
    prompts = [format.encode_prompt(tokenizer, r.prompt) for r in rankings]
    kept = []
    longest, num_dropped_responses = 0, 0
    for i, (ranking, prompt) in enumerate(zip(rankings, prompts, strict=True)):
        if len(ranking.responses) > num_responses:
            raise DataError(
                f"rankings: record {i} has {len(ranking.responses)} responses, more "
                f"than num_responses {num_responses}. Raise num_responses."
            )
        encoded = [
            format.encode_response(tokenizer, response, ended)
            for response, ended in zip(ranking.responses, ranking.ended, strict=True)
        ]
        longest = max(longest, *(len(ids) for ids in encoded))
        fitting = [
            (ids, rank)
            for ids, rank in zip(encoded, ranking.ranks, strict=True)
            if len(ids) <= response_len
        ]
        num_dropped_responses += len(encoded) - len(fitting)
        if len(prompt) <= prompt_len and len({rank for _, rank in fitting}) > 1:
            kept.append((prompt, fitting))
    if not kept:
        raise DataError(
            f"rankings: none of {len(rankings)} is left: prompts have up to "
            f"{max(map(len, prompts))} tokens (prompt_len {prompt_len}), responses up "
            f"to {longest} (response_len {response_len}), and two responses must "
            "differ in rank. Raise prompt_len or response_len."
        )

    P = fitted_width([len(prompt) for prompt, _ in kept], prompt_len)
    K = max(len(ranked) for _, ranked in kept)
    R = fitted_width([len(x) for _, ranked in kept for x, _ in ranked], response_len)

    def make_batch(mine: np.ndarray, _: np.ndarray, size: int) -> RankingBatch:
        rows = [kept[i] for i in mine]
        responses = np.full((size, K, R), tokenizer.pad_id, np.int32)
        lengths, ranks = np.zeros((2, size, K), np.int32)
        for row, (_, ranked) in enumerate(rows):
            for k, (ids, rank) in enumerate(ranked):
                responses[row, k, : len(ids)] = ids
                lengths[row, k], ranks[row, k] = len(ids), rank
        asked = pad_prompts([p for p, _ in rows], size, P, tokenizer.pad_id)
        return RankingBatch(
            asked.prompts, asked.prompt_lengths, responses, lengths, ranks
        )

    counts = (len(rankings) - len(kept), num_dropped_responses)
    return Batches(make_batch, len(kept), batch_size, seed, shard, *counts)
