"""Records to NumPy batches: each batch is a pure function of the step.

The shift is made here, once: `tokens = ids[:-1]`, `targets = ids[1:]`, so that position
t of every array speaks of the same decision. Everything is padded on the right with the
pad id; masks come from lengths, never from ids. Rows are as wide as the whole data set
needs (`fitted_width`), so all of its batches have one shape.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import flax.struct
import numpy as np

from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.records import DataError, Demonstration, Prompt, Ranking
from rlhf_jax.data.schedule import Batches, Shard
from rlhf_jax.data.tokenizer import Tokenizer, tokenize_corpus
from rlhf_jax.data.widths import fitted_width

Array = Any  # numpy.ndarray here, jax.Array once it is on a device


@flax.struct.dataclass
class TokenBatch:
    """Sequences for next-token prediction."""

    tokens: Array
    """[B, T] int32, inputs."""
    targets: Array
    """[B, T] int32, the token after each input."""
    weights: Array
    """[B, T] float32; sums to 1 over the global batch, 0 where nothing is learned."""


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


@flax.struct.dataclass
class PromptBatch:
    """Prompts to respond to."""

    prompts: Array
    """[B, P] int32."""
    prompt_lengths: Array
    """[B] int32, at least 1."""


def packed_batches(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    batch_size: int,
    seq_len: int,
    seed: int | None,
    shard: Shard = (0, 1),
    cache_dir: Path | None = None,
) -> Batches[TokenBatch]:
    """Batches of packed documents: each followed by the end token, joined, and cut.

    Windows overlap by one token, so that every token but the first is predicted once.
    All weights of a batch are equal; only the last window may be shorter than T.

    Args:
        documents: texts; their order is shuffled once by the seed, then the windows.
        tokenizer: gives the ids and the end token.
        batch_size: rows of the global batch, B.
        seq_len: tokens per row, T.
        seed: of both orders; None reads in order.
        shard: (index, count) of this process.
        cache_dir: where the ids are kept for the next run; None keeps nothing.

    Raises:
        DataError: there is no text, or the cached ids are damaged.
    """
    ids = tokenize_corpus(documents, tokenizer, cache_dir)
    if len(ids) < 2:
        raise DataError("corpus: holds no text. Give some documents.")
    if seed is not None:
        ends = np.flatnonzero(ids == tokenizer.eos_id) + 1  # text has no end token
        order = np.random.default_rng(seed).permutation(len(ends))
        parts = np.split(ids, ends[:-1])
        ids = np.concatenate([parts[i] for i in order])
    counts = np.full(-(-(len(ids) - 1) // seq_len), seq_len)
    counts[-1] = len(ids) - 1 - (len(counts) - 1) * seq_len

    def make_batch(mine: np.ndarray, batch: np.ndarray, size: int) -> TokenBatch:
        rows = [ids[i * seq_len : (i + 1) * seq_len + 1] for i in mine]
        starts = np.zeros(len(rows), np.int64)
        weight = 1.0 / counts[batch].sum()
        return _token_batch(rows, starts, size, seq_len, tokenizer.pad_id, weight)

    return Batches(make_batch, len(counts), batch_size, seed, shard)


def demonstration_batches(
    demonstrations: Sequence[Demonstration],
    tokenizer: Tokenizer,
    format: PromptFormat,
    batch_size: int,
    seq_len: int,
    seed: int | None,
    loss_on: Literal["response", "all"] = "response",
    shard: Shard = (0, 1),
) -> Batches[TokenBatch]:
    """Batches [B, T] of prompt, response and end token, one demonstration per row.

    Args:
        demonstrations: those with more than seq_len + 1 tokens are dropped and counted.
        tokenizer: gives the ids.
        format: joins prompt and response.
        batch_size: rows of the global batch, B.
        seq_len: most tokens per row.
        seed: of the order; None reads in order.
        loss_on: which targets have weight: those of the response with its end token, or
            those of the prompt too.
        shard: (index, count) of this process.

    Raises:
        DataError: no demonstration fits.
    """
    if loss_on not in ("response", "all"):
        raise ValueError(f"loss_on {loss_on!r}: choose 'response' or 'all'")
    prompts = [format.encode_prompt(tokenizer, d.prompt) for d in demonstrations]
    responses = tokenizer.encode_batch([d.response for d in demonstrations])
    end = np.array([tokenizer.eos_id], np.int32)
    joined = [
        np.concatenate([prompt, response, end])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    lengths = [len(ids) - 1 for ids in joined]
    kept = [i for i, length in enumerate(lengths) if length <= seq_len]
    _check_some_left("demonstrations", kept, lengths, "seq_len", seq_len)
    sequences = [joined[i] for i in kept]
    # The first target of the response is read at the last token of the prompt.
    first = [len(prompts[i]) - 1 if loss_on == "response" else 0 for i in kept]
    starts = np.array(first, np.int64)
    counts = np.array([len(ids) - 1 for ids in sequences]) - starts
    width = fitted_width([lengths[i] for i in kept], seq_len)

    def make_batch(mine: np.ndarray, batch: np.ndarray, size: int) -> TokenBatch:
        rows = [sequences[i] for i in mine]
        weight = 1.0 / counts[batch].sum()
        return _token_batch(rows, starts[mine], size, width, tokenizer.pad_id, weight)

    num_dropped = len(demonstrations) - len(kept)
    return Batches(make_batch, len(kept), batch_size, seed, shard, num_dropped)


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
    _check_any("rankings", rankings)
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
        asked = _prompt_batch([p for p, _ in rows], size, P, tokenizer.pad_id)
        return RankingBatch(
            asked.prompts, asked.prompt_lengths, responses, lengths, ranks
        )

    counts = (len(rankings) - len(kept), num_dropped_responses)
    return Batches(make_batch, len(kept), batch_size, seed, shard, *counts)


def prompt_batches(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    format: PromptFormat,
    batch_size: int,
    prompt_len: int,
    seed: int | None,
    shard: Shard = (0, 1),
) -> Batches[PromptBatch]:
    """Batches of prompts [B, P], P as wide as the longest needs, see `fitted_width`.

    Args:
        prompts: records; those with more than prompt_len tokens are dropped, counted.
        tokenizer: gives the ids.
        format: what stands around a prompt.
        batch_size: rows of the global batch, B.
        prompt_len: longest prompt in tokens.
        seed: of the order; None reads in order.
        shard: (index, count) of this process.

    Raises:
        DataError: no prompt fits.
    """
    encoded = [format.encode_prompt(tokenizer, p.prompt) for p in prompts]
    lengths = [len(ids) for ids in encoded]
    kept = [i for i, length in enumerate(lengths) if length <= prompt_len]
    _check_some_left("prompts", kept, lengths, "prompt_len", prompt_len)
    P = fitted_width([lengths[i] for i in kept], prompt_len)

    def make_batch(mine: np.ndarray, _: np.ndarray, size: int) -> PromptBatch:
        rows = [encoded[kept[i]] for i in mine]
        return _prompt_batch(rows, size, P, tokenizer.pad_id)

    num_dropped = len(prompts) - len(kept)
    return Batches(make_batch, len(kept), batch_size, seed, shard, num_dropped)


def _check_any(what: str, records: Sequence[Any]) -> None:
    if not records:
        raise DataError(f"{what}: there are none. Give at least one.")


def _check_some_left(
    what: str, kept: list[int], lengths: list[int], field: str, limit: int
) -> None:
    _check_any(what, lengths)
    if not kept:
        raise DataError(
            f"{what}: all {len(lengths)} are longer than {field} {limit}: they have "
            f"{min(lengths)} to {max(lengths)} tokens. Raise {field}."
        )


def _token_batch(
    rows: list[np.ndarray],
    starts: np.ndarray,
    size: int,
    seq_len: int,
    pad_id: int,
    weight: float,
) -> TokenBatch:
    """Shifts and pads; targets from `starts` [rows] to the end of a row have weight."""
    tokens = np.full((size, seq_len), pad_id, np.int32)
    targets = np.full((size, seq_len), pad_id, np.int32)
    weights = np.zeros((size, seq_len), np.float32)
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        length = len(ids) - 1
        tokens[row, :length] = ids[:-1]
        targets[row, :length] = ids[1:]
        weights[row, start:length] = weight
    return TokenBatch(tokens, targets, weights)


def _prompt_batch(
    rows: list[np.ndarray], size: int, prompt_len: int, pad_id: int
) -> PromptBatch:
    """Pads prompts; a padding row is one pad token, so that every length is >= 1."""
    prompts = np.full((size, prompt_len), pad_id, np.int32)
    lengths = np.ones(size, np.int32)
    for row, ids in enumerate(rows):
        prompts[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return PromptBatch(prompts, lengths)
