"""Sequences share rows without loss, and in few rows."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.packing import first_fit, shared_rows

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


def fewest_rows(lengths, width):
    """Of all ways to assign sequences to rows, by trying them."""
    for count in range(1, len(lengths) + 1):
        for row_of in itertools.product(range(count), repeat=len(lengths)):
            loads = np.bincount(row_of, weights=lengths, minlength=count)
            if loads.max() <= width:
                return count
    raise AssertionError


@given(st.lists(st.integers(1, 10), min_size=1, max_size=5), st.integers(10, 14))
def test_rows_are_few(lengths, width):
    """Dosa 2007: 11/9 of the fewest and 2/3 of a row more, at most."""
    fewest = fewest_rows(lengths, width)
    assert len(first_fit(lengths, width)) <= 11 / 9 * fewest + 2 / 3


def test_all_batches_have_the_rows_of_the_fullest():
    lengths = np.array([1] * 30 + [9] * 10)
    rows_of = shared_rows(lengths, 10, 8, 0, num_epochs=2)
    assert rows_of is not None
    found = {len(rows_of(np.arange(at, at + 8))) for at in (0, 8, 16)}
    assert len(found) == 1
    assert [len(r) for r in rows_of(np.arange(8))] == [8] + [0] * (found.pop() - 1)


def test_rows_do_not_depend_on_the_processes():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 100)
    batch = rng.permutation(100)[:16]
    whole = shared_rows(lengths, 64, 16, 0, 2)
    assert whole is not None
    filled = [row.tolist() for row in whole(batch) if len(row)]
    for count in (2, 4, 8):
        parts = [shared_rows(lengths, 64, 16, 0, 2, (p, count)) for p in range(count)]
        dealt = [part(batch) for part in parts if part is not None]
        assert len({len(rows) for rows in dealt}) == 1
        together = [row.tolist() for rows in dealt for row in rows if len(row)]
        assert together == filled
