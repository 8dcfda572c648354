"""Rankings to NumPy batches: prompts with K ranked responses each."""

import dataclasses
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
        num_tied: rankings whose responses all tie, which are left out.
        num_dropped_responses: too long, of all rankings.
        limits: most tokens of a prompt and of a response.
        longest: tokens of a prompt and of a response before any was left out.
        pad_id: id of padding.
    """

    kept: list[EncodedRanking]
    num_read: int
    num_tied: int
    num_dropped_responses: int
    limits: tuple[int, int]
    longest: tuple[int, int]
    pad_id: int

    @property
    def records(self) -> list[Ranking]:
        """The kept ones without the responses that were too long."""
        return [ranking.record for ranking in self.kept]

    @property
    def num_dropped(self) -> int:
        """Rankings left out."""
        return self.num_read - len(self.kept)

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

    def padded_shape(self) -> tuple[int, int, int]:
        """P, K and R of [B, P] and [B, K, R]; raises DataError where none is left."""
        self.check_any()
        prompt_len, response_len = self.limits
        K = max(len(ranking.responses) for ranking in self.kept)
        prompts = [len(ranking.prompt) for ranking in self.kept]
        responses = [len(ids) for ranking in self.kept for ids in ranking.responses]
        R = fitted_width(responses, response_len)
        return fitted_width(prompts, prompt_len), K, R


def encode_rankings(
    rankings: Sequence[Ranking],
    tokenizer: Tokenizer,
    format: PromptFormat,
    prompt_len: int,
    response_len: int,
) -> EncodedRankings:
    """Ids of the rankings that fit.

    A response with more than response_len tokens is left out of its ranking; a ranking
    is left out when its prompt has more than prompt_len tokens, or when no two of its
    responses differ in rank. All are counted.

    Args:
        rankings: records.
        tokenizer: gives the ids.
        format: joins prompt and response.
        prompt_len: longest prompt in tokens.
        response_len: longest response in tokens with its end token.
    """
    kept, num_tied = [], 0
    longest_prompt, longest_response, num_dropped_responses = 0, 0, 0
    for ranking in rankings:
        prompt = format.encode_prompt(tokenizer, ranking.prompt)
        encoded = [
            format.encode_response(tokenizer, response, ended)
            for response, ended in zip(ranking.responses, ranking.ended, strict=True)
        ]
        longest_prompt = max(longest_prompt, len(prompt))
        longest_response = max(longest_response, *map(len, encoded))
        num_tied += len(set(ranking.ranks)) < 2
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
        kept.append(EncodedRanking(record, prompt, [encoded[k] for k in fitting]))
    limits, longest = (prompt_len, response_len), (longest_prompt, longest_response)
    counts = len(rankings), num_tied, num_dropped_responses
    return EncodedRankings(kept, *counts, limits, longest, tokenizer.pad_id)


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
    P, K, R = rankings.padded_shape()
    kept = rankings.kept

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

    return Batches(make_batch, len(kept), batch_size, seed, shard)
