"""Padded rows are as wide as their data needs, and prompts are grouped by width."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from letters import FORM, LETTERS

from rlhf_jax.data.batches import demonstration_batches, prompt_batches
from rlhf_jax.data.ranking_batches import encode_rankings, ranking_batches
from rlhf_jax.data.records import Demonstration, Prompt, Ranking
from rlhf_jax.data.widths import advise_width, fitted_width, width_bounds, width_groups


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_width_holds_the_longest_row_and_wastes_less_than_a_step(longest, limit):
    longest = min(longest, limit)
    width = fitted_width([1, longest, 1], limit)
    assert longest <= width <= limit
    if width < limit:
        assert width % 64 == 0
        assert width - longest < 64
        assert width <= 0.75 * limit
    else:
        assert longest > 0.75 * limit - 64


def grouped(lengths, limit, size, num_calls=1):
    return width_groups(lengths, width_bounds(lengths, limit, size, num_calls))


@given(st.lists(st.integers(1, 700), min_size=1, max_size=400), st.integers(1, 6))
def test_every_prompt_is_in_one_group_none_longer_than_those_of_the_next(lengths, size):
    groups = grouped(lengths, 700, size)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    sizes = np.array(lengths)
    for group, following in zip(groups[:-1], groups[1:], strict=True):
        assert len(group) >= 8 * size  # a program is worth so many batches
        assert sizes[group].max() < sizes[following].min()
        assert list(group) == sorted(group)


def test_short_prompts_are_not_padded_to_the_longest_unless_they_are_few():
    lengths = [100, *[10] * 16, 300, *[60] * 16, 120]
    short, long = grouped(lengths, 512, 4)
    assert list(short) == [*range(1, 17), *range(18, 34)]
    assert list(long) == [0, 17, 34]  # 100 and 120 are too few for one of their own
    assert len(grouped(lengths, 512, 5)) == 1
    assert len(grouped(lengths, 512, 5, num_calls=2)) == 2


def test_later_prompts_go_by_the_widths_of_the_first():
    bounds = width_bounds([10] * 32 + [200] * 3, 512, 4)
    assert bounds == [64]
    short, long = width_groups([90, 20, 64], bounds)  # too few to make a bound
    assert (list(short), list(long)) == ([1, 2], [0])
    (only,) = width_groups([90, 70], bounds)
    assert list(only) == [0, 1]


def test_a_group_that_would_be_as_wide_as_the_rest_is_none():
    assert len(grouped([60] * 100 + [68] * 100, 68, 2)) == 1


def test_few_long_prompts_that_widen_all_are_told():
    lengths = [20] * 95 + [65] * 4 + [200, 900]
    told = advise_width(lengths, 512, "ppo.prompt_len")
    assert told is not None
    assert "100 prompts are padded to 256 tokens for 5 of more than 64" in told
    assert "ppo.prompt_len 64" in told
    assert advise_width([*lengths, 65], 512, "") is not None  # of 128, for one of 200
    assert advise_width([20] * 95 + [65] * 6, 512, "") is None  # more than a few
    assert advise_width([20] * 99 + [70], 72, "") is None  # narrower by too little
    assert advise_width([900], 512, "") is None  # none is kept: an error elsewhere


def test_batches_are_as_wide_as_the_longest_kept_record():
    long = "a" * 199  # with the colon after it 200 tokens
    prompts = [Prompt("ab"), Prompt(long), Prompt("c" * 900)]
    made = prompt_batches(prompts, LETTERS, FORM, 1, 500, None)
    assert [made(step).prompts.shape for step in range(2)] == [(1, 256)] * 2
    made = prompt_batches(prompts, LETTERS, FORM, 2, 300, None)
    assert made(0).prompts.shape == (2, 300)
    made = prompt_batches(prompts[:1], LETTERS, FORM, 1, 500, None)
    assert made(0).prompts.shape == (1, 64)

    records = [Demonstration("ab", "c" * 70), Demonstration("ab", "c" * 900)]
    made = demonstration_batches(records, LETTERS, FORM, 1, 200, None)
    assert made(0).tokens.shape == made(0).weights.shape == (1, 128)

    ranking = Ranking(long, ("a" * 65, "b", "c" * 900), (1, 2, 3), (True,) * 3)
    encoded = encode_rankings([ranking], LETTERS, FORM, 500, 500)
    made = ranking_batches(encoded, 1, None)
    assert made(0).prompts.shape == (1, 256)
    assert made(0).responses.shape == (1, 2, 128)
    assert made(0).ranks.shape == (1, 2)


@pytest.mark.parametrize("step", [0, 1])
def test_processes_agree_on_the_width_whoever_holds_the_longest_record(step):
    records = [Prompt("a" * n) for n in (3, 150, 5, 7)]
    shapes = {
        prompt_batches(records, LETTERS, FORM, 2, 500, None, shard=(i, 2))(
            step
        ).prompts.shape
        for i in range(2)
    }
    assert shapes == {(1, 192)}
