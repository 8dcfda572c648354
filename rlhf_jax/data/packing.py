"""Which sequences share a row, so that little of a batch is padding."""

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.data.schedule import Batches, Shard


def first_fit(lengths: Sequence[int] | np.ndarray, width: int) -> list[list[int]]:
    """Puts sequences into rows: the longest first, each into the first with room.

    Args:
        lengths: tokens of each sequence, [N], none over the width.
        width: tokens of a row, T.

    Returns:
        Indices of the sequences in each row. At most 11/9 of the fewest rows possible,
        and 2/3 of a row (first-fit decreasing; Dosa 2007).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[i])
        row = next((r for r, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= length
    return rows


def all_batches(
    num_examples: int, batch_size: int, seed: int | None, num_epochs: int
) -> list[np.ndarray]:
    """The examples of every global batch [B] that will be read, see `Batches`."""
    read = Batches(lambda mine, batch, size: batch, num_examples, batch_size, seed)
    return [read(step) for step in range(num_epochs * read.steps_per_epoch)]


def fullest_rows(
    lengths: np.ndarray, width: int, batches: Sequence[np.ndarray], most: int
) -> tuple[int, int] | None:
    """What the fullest of all batches needs, so that all can have one shape.

    Args:
        lengths: tokens of each sequence, [N].
        width: tokens of a row, T.
        batches: of `all_batches`; 32 sequences take 0.05 ms.
        most: rows that are worth sharing.

    Returns:
        Most rows of a global batch, and most sequences of a row; None where a batch
        needs more rows than `most`.
    """
    num_rows, num_shared = 0, 0
    for batch in batches:
        rows = first_fit(lengths[batch], width)
        num_rows = max(num_rows, len(rows))
        num_shared = max(num_shared, *map(len, rows))
        if num_rows > most:
            return None
    return num_rows, num_shared


def shared_rows(
    lengths: np.ndarray, width: int, num_rows: int, shard: Shard = (0, 1)
) -> Callable[[np.ndarray], list[np.ndarray]]:
    """How the sequences of each batch share its rows.

    Processes hold the rows of the whole batch in turn, so these are the same however
    many processes there are; rows without a sequence come last.

    Args:
        lengths: tokens of each sequence, [N].
        width: tokens of a row, T.
        num_rows: of every global batch.
        shard: (index, count) of this process.

    Returns:
        Sequences of the global batch -> those of each row of this process, equally many
        rows for every batch.

    Raises:
        IndexError: by the result, for a batch that needs more rows.
    """
    index, count = shard
    num_mine = -(-num_rows // count)

    def rows_of(batch: np.ndarray) -> list[np.ndarray]:
        rows = [batch[row] for row in first_fit(lengths[batch], width)]
        if len(rows) > num_mine * count:
            raise IndexError(
                f"a batch needs {len(rows)} rows, more than the {num_rows} that the "
                "epochs asked for need"
            )
        rows += [batch[:0]] * (num_mine * count - len(rows))
        return rows[index * num_mine : (index + 1) * num_mine]

    return rows_of
