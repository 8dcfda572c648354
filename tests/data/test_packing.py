"""Sequences share rows without loss, in as many rows as the fullest batch needs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.packing import all_batches, first_fit, fullest_rows, shared_rows
from rlhf_jax.data.schedule import Batches

SIZES = st.lists(st.integers(1, 10), min_size=1, max_size=60)


@given(SIZES, st.integers(10, 25))
def test_every_sequence_is_in_one_row_and_no_row_is_too_full(lengths, width):
    rows = first_fit(lengths, width)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert max(loads) <= width
    for earlier, row in itertools.combinations(range(len(rows)), 2):
        before = sum(lengths[i] for i in rows[earlier])
        assert before + lengths[rows[row][-1]] > width  # it had no room for the last


def test_the_longest_go_first():
    """In the order given these would fill four rows, the first with 3 + 3 + 3."""
    assert first_fit([3, 3, 3, 7, 7, 7], 10) == [[3, 0], [4, 1], [5, 2]]


# Of three epochs of seven batches, only the second holds one that needs five rows.
LENGTHS = np.random.default_rng(0).integers(1, 30, 50)
WIDTH, SIZE, SEED, EPOCHS, FULLEST = 45, 8, 13, 3, 5
ORDERS = Batches(lambda mine, batch, size: batch, len(LENGTHS), SIZE, SEED)


def test_the_fullest_batch_here_is_in_a_later_epoch():
    batches = all_batches(len(LENGTHS), SIZE, SEED, EPOCHS)
    steps = range(EPOCHS * ORDERS.steps_per_epoch)
    np.testing.assert_array_equal(batches, [ORDERS(step) for step in steps])
    rows = [first_fit(LENGTHS[batch], WIDTH) for batch in batches]
    needed = [len(batch) for batch in rows]
    assert max(needed) == FULLEST and FULLEST not in needed[: ORDERS.steps_per_epoch]
    shared = max(len(row) for batch in rows for row in batch)
    assert shared > max(len(row) for row in rows[needed.index(FULLEST)])

    assert fullest_rows(LENGTHS, WIDTH, batches, FULLEST) == (FULLEST, shared)
    assert fullest_rows(LENGTHS, WIDTH, batches, FULLEST - 1) is None
    once = all_batches(len(LENGTHS), SIZE, SEED, num_epochs=1)
    found = fullest_rows(LENGTHS, WIDTH, once, FULLEST - 1)
    assert found is not None and found[0] == FULLEST - 1


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_batches_have_the_rows_of_the_fullest_and_lose_nothing(processes):
    shards = [(p, processes) for p in range(processes)]
    of = [shared_rows(LENGTHS, WIDTH, FULLEST, shard) for shard in shards]
    for step in range(EPOCHS * ORDERS.steps_per_epoch):
        batch = ORDERS(step)
        dealt = [rows_of(batch) for rows_of in of]
        assert {len(rows) for rows in dealt} == {-(-FULLEST // processes)}
        rows = [row.tolist() for part in dealt for row in part]
        assert sorted(itertools.chain(*rows)) == sorted(batch.tolist())
        alone = [batch[row].tolist() for row in first_fit(LENGTHS[batch], WIDTH)]
        assert [row for row in rows if row] == alone  # whoever holds them


def test_a_later_batch_with_more_rows_is_refused_not_cut():
    rows_of = shared_rows(LENGTHS, WIDTH, FULLEST - 1)
    with pytest.raises(IndexError, match=f"needs {FULLEST} rows, more than the 4"):
        for step in range(EPOCHS * ORDERS.steps_per_epoch):
            rows_of(ORDERS(step))
