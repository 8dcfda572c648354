"""Which positions of a batch the head is computed at: those that have a loss."""

from collections.abc import Callable

import jax
import numpy as np

from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.training.host import most_of_processes

Array = jax.Array


def with_loss_positions(
    batches: Callable[[int], TokenBatch],
    num_steps: int,
    num_shards: int = 1,
    num_microbatches: int = 1,
) -> Callable[[int], TokenBatch]:
    """Batches [B, T] with `TokenBatch.loss_positions`, as many as the fullest needs.

    Looks through all batches once. A part of the rows is what one device computes of
    one microbatch (see `accumulate_gradients`), so that nothing moves between devices.

    Args:
        batches: step -> rows of this process, a multiple of shards times microbatches.
        num_steps: how many batches will be read.
        num_shards: devices, or groups along `tensor`, that share this process's rows.
        num_microbatches: parts that follow each other.

    Returns:
        step -> the batch, with positions unless they are more than three quarters.

    Raises:
        IndexError: by the result, for a later batch that has a loss in more positions.
    """

    def absent(batch: TokenBatch) -> np.ndarray:
        """Where there is no loss, by part: bool [shards microbatches, ...]."""
        rows = np.asarray(batch.weights) == 0
        rows = rows.reshape(num_shards, -1, num_microbatches, rows.shape[1])
        return rows.swapaxes(1, 2).reshape(num_shards * num_microbatches, -1)

    def most(batch: TokenBatch) -> int:
        return int(np.max(np.sum(~absent(batch), axis=1)))

    size = most_of_processes(max(most(batches(step)) for step in range(num_steps)))
    if 4 * size > 3 * absent(batches(0)).shape[1]:
        return batches

    def batch(step: int) -> TokenBatch:
        made = batches(step)
        if most(made) > size:
            raise IndexError(f"a loss at more positions than any of {num_steps} steps")
        order = np.argsort(absent(made), axis=1, kind="stable")
        chosen = np.sort(order[:, :size], axis=1).astype(np.int32)
        return made.replace(loss_positions=chosen)  # type: ignore

    return batch


def at_loss_positions(hidden: Array, batch: TokenBatch) -> tuple[Array, Array, Array]:
    """What the loss is on: hidden states, targets and weights.

    Args:
        hidden: [B, T, D].
        batch: [B, T], with or without `loss_positions` [G, S].

    Returns:
        [G, S, D], [G, S], [G, S]; without positions all of them, [B, T, D] and so on.
    """
    arrays, positions = (hidden, batch.targets, batch.weights), batch.loss_positions
    if positions is None:
        return arrays

    @jax.vmap
    def take(x, index):
        return x.at[index].get(
            unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
        )

    parts = positions.shape[0]
    joined = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[2:]), arrays)
    return jax.tree.map(lambda x: take(x, positions), joined)
