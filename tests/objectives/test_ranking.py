import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.objectives.ranking import (
    preferred_pairs,
    ranking_accuracy,
    ranking_loss,
)

K = 5
loss_and_grad = jax.jit(
    jax.value_and_grad(lambda scores, ranks: jnp.sum(ranking_loss(scores, ranks)))
)
loss_of, accuracy_of = jax.jit(ranking_loss), jax.jit(ranking_accuracy)
# ranks 1 .. 3 among 5 responses tie often; 0 is absent
ranks_of_prompt = st.lists(st.integers(0, 3), min_size=K, max_size=K)
scores_of_prompt = st.lists(
    st.integers(-12, 12).map(lambda n: n / 4), min_size=K, max_size=K
)


def one_prompt(scores, ranks) -> tuple[jax.Array, jax.Array]:
    return jnp.float32(scores)[None], jnp.int32(ranks)[None]


def test_loss_of_the_published_example(mode):
    """r = 2, 1, 0.5, -1 from best to worst: the mean over 6 pairs is .227613."""
    scores, ranks = one_prompt([2, 1, 0.5, -1], [1, 2, 3, 4])
    np.testing.assert_allclose(mode(ranking_loss)(scores, ranks), [0.227613], atol=1e-6)
    np.testing.assert_array_equal(mode(ranking_accuracy)(scores, ranks), [1.0])


@given(scores=scores_of_prompt, ranks=ranks_of_prompt)
def test_pairs_loss_and_accuracy_match_brute_force(scores, ranks):
    spoiled = [s if r else math.nan for s, r in zip(scores, ranks, strict=True)]
    args = one_prompt(spoiled, ranks)
    preferred = np.argwhere(preferred_pairs(args[1])[0])
    assert {(int(i), int(j)) for i, j in preferred} == set(oracle.ordered_pairs(ranks))
    loss, accuracy = loss_of(*args), accuracy_of(*args)
    assert loss.dtype == accuracy.dtype == jnp.float32
    assert float(loss[0]) == pytest.approx(oracle.ranking_loss(scores, ranks), abs=1e-5)
    assert float(accuracy[0]) == pytest.approx(
        oracle.ranking_accuracy(scores, ranks), abs=1e-6
    )


@given(scores=scores_of_prompt, ranks=ranks_of_prompt)
def test_gradient_matches_finite_differences_and_skips_the_absent(scores, ranks):
    spoiled = [s if r else math.nan for s, r in zip(scores, ranks, strict=True)]
    _, grads = loss_and_grad(*one_prompt(spoiled, ranks))
    expected = oracle.numerical_gradient(
        lambda scores: oracle.ranking_loss(scores, ranks), np.array(scores)
    )
    np.testing.assert_allclose(grads[0], expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(grads[0])[np.array(ranks) == 0], 0.0)


@given(scores=scores_of_prompt, ranks=ranks_of_prompt, order=st.permutations(range(K)))
def test_order_of_responses_does_not_matter(scores, ranks, order):
    value, grads = loss_and_grad(*one_prompt(scores, ranks))
    order = np.array(order)
    moved, moved_grads = loss_and_grad(
        *one_prompt(np.array(scores)[order], np.array(ranks)[order])
    )
    assert float(moved) == pytest.approx(float(value), abs=1e-6)
    np.testing.assert_allclose(moved_grads[0], grads[0][order], atol=1e-6)


@given(scores=scores_of_prompt, ranks=ranks_of_prompt, shift=st.integers(-8, 8))
def test_a_constant_added_to_all_scores_changes_nothing(scores, ranks, shift):
    value, grads = loss_and_grad(*one_prompt(scores, ranks))
    moved, moved_grads = loss_and_grad(*one_prompt(np.array(scores) + shift, ranks))
    assert float(moved) == pytest.approx(float(value), abs=1e-6)
    np.testing.assert_allclose(moved_grads, grads, atol=1e-6)
    assert float(jnp.sum(grads)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("margin", [-3.0, 0.0, 0.7])
def test_two_responses_give_the_bradley_terry_loss(margin):
    scores, ranks = one_prompt([1.0, 1.0 + margin], [2, 1])
    expected = -math.log(1 / (1 + math.exp(-margin)))
    assert float(ranking_loss(scores, ranks)[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_responses", [2, 4, 9])
def test_equal_scores_cost_log_two_for_any_number_of_responses(num_responses):
    args = one_prompt(np.full(num_responses, 1.3), np.arange(num_responses) + 1)
    np.testing.assert_allclose(ranking_loss(*args), [math.log(2)], atol=1e-6)
    np.testing.assert_array_equal(ranking_accuracy(*args), [0.5])


@pytest.mark.parametrize("ranks", [[0, 0, 0], [1, 1, 1], [2, 0, 0], [2, 2, 0]])
def test_without_an_ordered_pair_there_is_nothing_to_learn(ranks):
    scores = np.where(np.array(ranks) > 0, [3.0, -1.0, 2.0], np.nan)
    args = one_prompt(scores, ranks)
    value, grads = loss_and_grad(*args)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grads, 0.0)
    np.testing.assert_array_equal(ranking_accuracy(*args), [0.0])


def test_prompts_count_alike_whatever_their_number_of_pairs():
    scores = jnp.array([[2.0, 1.0, 0.5, -1.0], [0.0, 1.0, jnp.nan, jnp.nan]])
    ranks = jnp.array([[1, 2, 3, 4], [1, 2, 0, 0]])
    losses = ranking_loss(scores, ranks)
    np.testing.assert_allclose(losses, [0.227613, math.log1p(math.e)], atol=1e-6)


def test_wrong_orders_of_large_margin_stay_finite():
    args = one_prompt([-500.0, 500.0], [1, 2])
    value, grads = loss_and_grad(*args)
    assert float(value) == pytest.approx(1000.0)
    np.testing.assert_allclose(grads, [[-1.0, 1.0]])


def test_shapes_that_differ_are_refused():
    with pytest.raises(AssertionError):
        ranking_loss(jnp.zeros((2, 3)), jnp.ones((2, 4), jnp.int32))
