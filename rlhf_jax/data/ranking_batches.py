"""Rankings to NumPy batches: prompts with K ranked responses each.

`RankingBatch` pads every prompt and response; `PackedRankings` holds them one after the
other, several rankings a row, and so has fewer positions where lengths vary.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.struct
import numpy as np

from rlhf_jax.data.batches import Array, check_any, pad_prompts
from rlhf_jax.data.packing import all_batches, fullest_rows, shared_rows
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.records import DataError, Ranking
from rlhf_jax.data.schedule import Batches, Shard
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.data.widths import WIDTH_STEP, fitted_width


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
class PackedRankings:
    """The same in rows `[prompt, response 1, ..., response K, next prompt, ...]`."""

    tokens: Array
    """[N, T] int32."""
    positions: Array
    """[N, T] int32, from 0 in a prompt, each response going on from its end."""
    documents: Array
    """[N, T] int32, which ranking of the row a token is of."""
    branches: Array
    """[N, T] int32, which response of it, from 1; 0 is the prompt."""
    last: Array
    """[N, G, K] int32, where in its row each response ends; 0 where absent."""
    ranks: Array
    """[N, G, K] int32, see `RankingBatch`."""


@dataclasses.dataclass(frozen=True)
class EncodedRanking:
    """A ranking's ids, and the record without the responses that were too long."""

    record: Ranking
    prompt: np.ndarray
    responses: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def num_positions(self) -> int:
        """Of the prompt and its longest response."""
        return len(self.prompt) + max(map(len, self.responses))


@dataclasses.dataclass(frozen=True)
class EncodedRankings:
    """Rankings that fit, and what became of the others.

    Attributes:
        kept: in the order read.
        num_read: rankings before any was left out.
        num_dropped_responses: too long, of all rankings.
        limits: most tokens of a prompt and of a response.
        longest: tokens of a prompt and of a response before any was left out.
        pad_id: id of padding.
    """

    kept: list[EncodedRanking]
    num_read: int
    num_dropped_responses: int
    limits: tuple[int, int]
    longest: tuple[int, int]
    pad_id: int

    @property
    def num_dropped(self) -> int:
        """Rankings left out."""
        return self.num_read - len(self.kept)

    @property
    def num_responses(self) -> int:
        """Most responses of a ranking, K."""
        return max(len(ranking.responses) for ranking in self.kept)

    def check_any(self) -> None:
        """Raises DataError where none is left."""
        check_any("rankings", range(self.num_read))
        if not self.kept:
            (prompt, response), (prompt_len, response_len) = self.longest, self.limits
            raise DataError(
                f"rankings: none of {self.num_read} is left: prompts have up to "
                f"{prompt} tokens (prompt_len {prompt_len}), responses up to "
                f"{response} (response_len {response_len}), and two responses must "
                "differ in rank. Raise prompt_len or response_len."
            )


def encode_rankings(
    rankings: Sequence[Ranking],
    tokenizer: Tokenizer,
    format: PromptFormat,
    prompt_len: int,
    response_len: int,
    num_responses: int,
) -> EncodedRankings:
    """Ids of the rankings that fit.

    A response with more than response_len tokens is left out of its ranking; a ranking
    is left out when its prompt has more than prompt_len tokens, or when no two of its
    responses differ in rank. Both are counted.

    Args:
        rankings: records.
        tokenizer: gives the ids.
        format: joins prompt and response.
        prompt_len: longest prompt in tokens.
        response_len: longest response in tokens with its end token.
        num_responses: most responses of a ranking.

    Raises:
        DataError: a ranking that fits has more than num_responses.
    """
    kept = []
    longest_prompt, longest_response, num_dropped_responses = 0, 0, 0
    for i, ranking in enumerate(rankings):
        prompt = format.encode_prompt(tokenizer, ranking.prompt)
        encoded = [
            format.encode_response(tokenizer, response, ended)
            for response, ended in zip(ranking.responses, ranking.ended, strict=True)
        ]
        longest_prompt = max(longest_prompt, len(prompt))
        longest_response = max(longest_response, *map(len, encoded))
        fitting = [k for k, ids in enumerate(encoded) if len(ids) <= response_len]
        num_dropped_responses += len(encoded) - len(fitting)
        record = dataclasses.replace(
            ranking,
            responses=tuple(ranking.responses[k] for k in fitting),
            ranks=tuple(ranking.ranks[k] for k in fitting),
            ended=tuple(ranking.ended[k] for k in fitting),
        )
        if len(prompt) > prompt_len or len(set(record.ranks)) < 2:
            continue
        if len(fitting) > num_responses:
            raise DataError(
                f"rankings: record {i} has {len(fitting)} responses, more than "
                f"num_responses {num_responses}. Raise num_responses."
            )
        kept.append(EncodedRanking(record, prompt, [encoded[k] for k in fitting]))
    limits, longest = (prompt_len, response_len), (longest_prompt, longest_response)
    sizes = limits, longest, tokenizer.pad_id
    return EncodedRankings(kept, len(rankings), num_dropped_responses, *sizes)


def ranking_batches(
    rankings: EncodedRankings,
    batch_size: int,
    seed: int | None,
    shard: Shard = (0, 1),
) -> Batches[RankingBatch]:
    """Batches [B] of prompts [P] with up to K ranked responses [R].

    P, K and R are what all of the rankings need.

    Args:
        rankings: of `encode_rankings`.
        batch_size: rows of the global batch, B.
        seed: of the order; None reads in order.
        shard: (index, count) of this process.

    Raises:
        DataError: there is no ranking.
    """
    rankings.check_any()
    kept = rankings.kept
    P, R = _widths(rankings)
    K = rankings.num_responses

    def make_batch(mine: np.ndarray, _: np.ndarray, size: int) -> RankingBatch:
        rows = [kept[i] for i in mine]
        responses = np.full((size, K, R), rankings.pad_id, np.int32)
        lengths, ranks = np.zeros((2, size, K), np.int32)
        for row, ranking in enumerate(rows):
            for k, ids in enumerate(ranking.responses):
                responses[row, k, : len(ids)] = ids
                lengths[row, k] = len(ids)
            ranks[row, : len(ranking.responses)] = ranking.record.ranks
        asked = pad_prompts([r.prompt for r in rows], size, P, rankings.pad_id)
        return RankingBatch(
            asked.prompts, asked.prompt_lengths, responses, lengths, ranks
        )

    counts = rankings.num_dropped, rankings.num_dropped_responses
    return Batches(make_batch, len(kept), batch_size, seed, shard, *counts)


def packed_ranking_batches(
    rankings: EncodedRankings,
    batch_size: int,
    seed: int,
    num_epochs: int,
    multiple: int = 1,
    shard: Shard = (0, 1),
) -> Batches[PackedRankings] | None:
    """Batches of the same rankings in rows [N, T] that they share.

    T is a multiple of 64, the longest ranking's or up to twice as wide; N is what the
    fullest batch needs; together they are what costs least. A position costs
    1 + keys / 1024: its own products, and attention to a row of T or, padded, P + R.

    Args:
        rankings, batch_size, seed, shard: of `ranking_batches`.
        num_epochs: that will be read.
        multiple: that N shall be of, e.g. devices times microbatches.

    Returns:
        None where `ranking_batches` cost no more.

    Raises:
        DataError: there is no ranking.
    """
    rankings.check_any()
    kept = rankings.kept
    P, R = _widths(rankings)
    K = rankings.num_responses
    lengths = np.array([len(ranking) for ranking in kept])
    least = -(-lengths.max() // WIDTH_STEP)  # steps
    padded = -(-batch_size // multiple) * multiple
    best, least_cost = None, padded * (P - 1 + K * (R + 1)) * _cost(P + R)
    read = all_batches(len(kept), batch_size, seed, num_epochs)
    for width in sorted({WIDTH_STEP * -(-least * n // 4) for n in (4, 5, 6, 8)}):
        of_rows = multiple * width * _cost(width)
        most = (math.ceil(least_cost / of_rows) - 1) * multiple
        found = fullest_rows(lengths, width, read, most)
        if found is not None:
            num_parts = -(-found[0] // multiple)
            best = width, num_parts * multiple, found[1]
            least_cost = num_parts * of_rows
    if best is None:
        return None
    T, N, G = best
    rows_of = shared_rows(lengths, T, N, shard)

    def make_batch(_: np.ndarray, batch: np.ndarray, size: int) -> PackedRankings:
        del size
        rows = rows_of(batch)
        tokens = np.full((len(rows), T), rankings.pad_id, np.int32)
        positions, documents, branches = np.zeros((3, len(rows), T), np.int32)
        last, ranks = np.zeros((2, len(rows), G, K), np.int32)
        for row, shared in enumerate(rows):
            begin = 0
            for g, i in enumerate(shared):
                prompt, responses = kept[i].prompt, kept[i].responses
                documents[row, begin:] = g  # padding is of the last one's
                asked = begin + len(prompt)
                for branch, ids in enumerate([prompt, *responses]):
                    end = begin + len(ids)
                    first = len(prompt) if branch else 0
                    tokens[row, begin:end] = ids
                    positions[row, begin:end] = np.arange(first, first + len(ids))
                    branches[row, begin:end] = branch
                    if branch:  # an empty one is read where it would begin
                        last[row, g, branch - 1] = (end if len(ids) else asked) - 1
                    begin = end
                ranks[row, g, : len(responses)] = kept[i].record.ranks
        return PackedRankings(tokens, positions, documents, branches, last, ranks)

    counts = rankings.num_dropped, rankings.num_dropped_responses
    return Batches(make_batch, len(kept), batch_size, seed, shard, *counts)


def _cost(keys: int) -> float:
    """Of a position, in that of its products alone, roughly.

    On a CPU attention to 700 (4 layers of 192) and 1100 keys (3 of 64) took as long as
    the rest; in wider models it takes more.
    """
    return 1.0 + keys / 1024


def _widths(rankings: EncodedRankings) -> tuple[int, int]:
    """P and R of padded rows."""
    prompt_len, response_len = rankings.limits
    prompts = [len(ranking.prompt) for ranking in rankings.kept]
    responses = [len(ids) for ranking in rankings.kept for ids in ranking.responses]
    return fitted_width(prompts, prompt_len), fitted_width(responses, response_len)
