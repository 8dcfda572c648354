"""Rankings whose prompts and responses follow each other in rows that they share.

Padded rows (`ranking_batches`) hold K (R + 1) positions however short responses are.
"""

import math

import flax.struct
import numpy as np

from rlhf_jax.data.batches import Array
from rlhf_jax.data.packing import all_batches, fullest_rows, shared_rows
from rlhf_jax.data.ranking_batches import EncodedRankings
from rlhf_jax.data.schedule import Batches, Shard
from rlhf_jax.data.widths import WIDTH_STEP


@flax.struct.dataclass
class PackedRankings:
    """Rows `[prompt, response 1, ..., response K, next prompt, ...]`."""

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


def packed_ranking_batches(
    rankings: EncodedRankings,
    batch_size: int,
    seed: int,
    num_epochs: int,
    multiple: int = 1,
    shard: Shard = (0, 1),
) -> Batches[PackedRankings] | None:
    """Batches of rankings in rows [N, T] that they share.

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
    P, K, R = rankings.padded_shape()
    kept = rankings.kept
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

    return Batches(make_batch, len(kept), batch_size, seed, shard)


def _cost(keys: int) -> float:
    """Of a position, in that of its products alone, roughly.

    On a CPU attention to 700 (4 layers of 192) and 1100 keys (3 of 64) took as long as
    the rest; in wider models it takes more.
    """
    return 1.0 + keys / 1024
