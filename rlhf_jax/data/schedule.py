"""Which examples a step holds: a pure function of the step, shared by processes.

Row r = step * batch_size + i of an endless table is example `order[epoch][r mod N]`,
where Grain gives the order of each epoch from the seed. There is no iterator state:
to resume is to ask for the next step. Process p of n holds the rows
`[p B / n, (p + 1) B / n)` of every global batch, unless examples share rows.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

Shard = tuple[int, int]
BatchT = TypeVar("BatchT")
ItemT = TypeVar("ItemT")


def evenly(items: Sequence[ItemT], most: int) -> list[ItemT]:
    """At most so many of the items, evenly spread over all in order.

    Examples come file by file and text document by document: the first of them alone
    would speak of one file.
    """
    count, kept = len(items), min(len(items), most)
    return [items[i * count // kept] for i in range(kept)]


class Batches(Generic[BatchT]):
    """Batches by step: `batches(step)` gives this process's rows, and nothing else.

    With a seed, every epoch holds each example once, in an order of its own, and a
    batch may begin in one epoch and end in the next. With `seed=None` the examples come
    in order, once; rows past the last example are padding (weights and ranks 0), which
    `real_rows` counts.

    Attributes:
        num_examples: examples of an epoch.
        num_dropped: examples left out because they are too long (of rankings
            `EncodedRankings` knows).
        steps_per_epoch: steps until every example was seen, ceil(num_examples / B).
    """

    def __init__(
        self,
        make_batch: Callable[[np.ndarray, np.ndarray, int], BatchT],
        num_examples: int,
        batch_size: int,
        seed: int | None,
        shard: Shard = (0, 1),
        num_dropped: int = 0,
    ):
        """Prepares the order of the examples.

        Args:
            make_batch: makes the batch from the examples of this process's rows, those
                of the global batch, and the number of this process's rows (the rows
                beyond its examples are padding). One that lays examples into shared
                rows reads those of the global batch alone.
            num_examples: examples of an epoch.
            batch_size: rows of the global batch, B.
            seed: of the order; None reads in order.
            shard: (index, count) of this process.
            num_dropped: examples left out before.

        Raises:
            ValueError: the batch cannot be cut evenly over the processes.
        """
        import grain

        index, count = shard
        if not 0 <= index < count:
            raise ValueError(f"shard {shard} must be (index, count), index < count")
        if batch_size < 1 or batch_size % count:
            raise ValueError(
                f"batch_size {batch_size} must be a positive multiple of the number "
                f"of processes, {count}"
            )
        order = grain.MapDataset.range(num_examples)
        if seed is not None:
            # Grain's epochs count up from the seed: neighbouring seeds would repeat
            # each other's orders one epoch apart, so the seed is mixed first.
            mixed = np.random.SeedSequence(seed).generate_state(1)[0]
            order = order.shuffle(seed=int(mixed))
        self._order = order
        self._make_batch = make_batch
        self._batch_size = batch_size
        self._shuffled = seed is not None
        self._shard = shard
        self.num_examples = num_examples
        self.num_dropped = num_dropped
        self.steps_per_epoch = -(-num_examples // batch_size)

    def real_rows(self, step: int) -> int:
        """Rows of the global batch that hold an example (the others are padding)."""
        left = self.num_examples - step * self._batch_size
        return self._batch_size if self._shuffled else min(self._batch_size, left)

    def __call__(self, step: int) -> BatchT:
        """Makes the batch of a step.

        Args:
            step: from 0; with `seed=None` below `steps_per_epoch`.

        Returns:
            This process's rows of the batch, B / n of them.

        Raises:
            IndexError: no such step.
        """
        if step < 0 or not (self._shuffled or step < self.steps_per_epoch):
            raise IndexError(f"step {step} of {self.steps_per_epoch} unshuffled steps")
        first = step * self._batch_size
        rows = range(first, first + self.real_rows(step))
        examples = np.array([self._order[row] for row in rows], np.int64)
        index, count = self._shard
        size = self._batch_size // count
        return self._make_batch(
            examples[index * size : (index + 1) * size], examples, size
        )
