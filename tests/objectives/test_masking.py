import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.objectives.masking import (
    masked_mean,
    masked_sum,
    masked_variance,
    masked_whiten,
    normalize_weights,
    response_mask,
)


def masked_example(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 5)) < 0.6
    mask[0, 0] = True
    return (3 * rng.normal(size=(3, 5)) + 1).astype(np.float32), mask


REDUCTIONS = {
    "mean": masked_mean,
    "variance": masked_variance,
    "whiten": lambda x, mask: jnp.sum(masked_whiten(x, mask) * WEIGHTS),
    "whiten_keeping_mean": lambda x, mask: jnp.sum(
        masked_whiten(x, mask, shift_mean=False) * WEIGHTS
    ),
}
WEIGHTS = jnp.float32(np.random.default_rng(9).normal(size=(3, 5)))
reductions = pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)


# --------------------------------------------------------------------------- weights


@given(seed=st.integers(0, 10**6))
def test_weights_are_the_mask_divided_by_its_sum(seed):
    _, mask = masked_example(seed)
    weights = normalize_weights(jnp.asarray(mask))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, mask / np.sum(mask), rtol=1e-6)
    assert float(jnp.sum(weights)) == pytest.approx(1.0, abs=1e-6)


def test_weights_of_a_soft_mask_keep_its_proportions():
    weights = normalize_weights(jnp.array([0.5, 0.0, 1.5]))
    np.testing.assert_allclose(weights, [0.25, 0.0, 0.75])


def test_weights_of_an_empty_mask_are_zero():
    np.testing.assert_array_equal(normalize_weights(jnp.zeros((2, 3), bool)), 0.0)


def test_sums_over_parts_of_a_batch_add_up_to_the_whole():
    x, mask = masked_example(4)
    weights = normalize_weights(jnp.asarray(mask))
    parts = sum(float(masked_sum(x[i], weights[i])) for i in range(3))
    expected = oracle.mean(oracle.masked_values(x, mask))
    assert parts == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------ value and gradient


@pytest.mark.parametrize("seed", range(3))
def test_mean_and_variance_match_the_oracle(mode, seed):
    x, mask = masked_example(seed)
    values = oracle.masked_values(x, mask)
    mean, variance = mode(masked_mean)(x, mask), mode(masked_variance)(x, mask)
    assert float(mean) == pytest.approx(oracle.mean(values), abs=1e-5)
    assert float(variance) == pytest.approx(oracle.variance(values), rel=1e-5, abs=1e-6)


@reductions
def test_garbage_outside_the_mask_touches_neither_value_nor_gradient(reduction):
    x, mask = masked_example(1)
    clean = jax.value_and_grad(reduction)(jnp.asarray(x), jnp.asarray(mask))
    for garbage in (np.nan, np.inf, -np.inf, 3e38):
        spoiled = jnp.asarray(np.where(mask, x, np.float32(garbage)))
        value, grad = jax.value_and_grad(reduction)(spoiled, jnp.asarray(mask))
        np.testing.assert_array_equal(value, clean[0])
        np.testing.assert_array_equal(grad, clean[1])
        np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)


@reductions
def test_an_empty_mask_gives_zero_and_no_gradient(reduction):
    x = jnp.full((3, 5), jnp.nan)
    value, grad = jax.value_and_grad(reduction)(x, jnp.zeros((3, 5), bool))
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_gradient_of_whitening_is_that_of_the_formula(shift_mean):
    x, mask = masked_example(2)

    def whitened(x):
        return float(np.sum(oracle.whiten(x, mask, shift_mean) * np.asarray(WEIGHTS)))

    grads = jax.grad(
        lambda x: jnp.sum(masked_whiten(x, jnp.asarray(mask), shift_mean) * WEIGHTS)
    )(jnp.asarray(x))
    expected = oracle.numerical_gradient(whitened, x)
    np.testing.assert_allclose(grads, expected, atol=1e-4)


# ------------------------------------------------------------------------- whitening


def test_whitening_of_the_published_example(mode):
    """x = 1 2 3 4 5 9 of the formula sheet: biased variance, with and without mean."""
    x, mask = jnp.array([1.0, 2, 3, 4, 5, 9]), jnp.ones(6, bool)
    expected = [-1.161895, -0.774597, -0.387298, 0.0, 0.387298, 1.936492]
    shifted = mode(masked_whiten)(x, mask)
    kept = mode(lambda x, mask: masked_whiten(x, mask, shift_mean=False))(x, mask)
    np.testing.assert_allclose(shifted, expected, atol=1e-6)
    np.testing.assert_allclose(kept, np.array(expected) + 4, atol=1e-6)


def test_whitening_without_shift_reproduces_the_tensorflow_numbers():
    """Huang et al., N implementation details: 1.2 .. 2.0 give .0508 .. 3.1492."""
    x = jnp.arange(1.2, 2.05, 0.1).reshape(3, 3)
    white = masked_whiten(x, jnp.ones((3, 3), bool), shift_mean=False)
    assert float(white[0, 0]) == pytest.approx(0.0508, abs=5e-5)
    assert float(white[2, 2]) == pytest.approx(3.1492, abs=5e-5)


@given(seed=st.integers(0, 10**6), shift_mean=st.booleans())
def test_whitening_matches_the_oracle_and_is_zero_outside(seed, shift_mean):
    x, mask = masked_example(seed)
    white = masked_whiten(jnp.asarray(x), jnp.asarray(mask), shift_mean)
    np.testing.assert_allclose(white, oracle.whiten(x, mask, shift_mean), atol=2e-3)
    np.testing.assert_array_equal(np.asarray(white)[~mask], 0.0)


def test_whitening_one_value_gives_its_mean_and_stays_finite():
    mask = jnp.array([True, False])
    x = jnp.array([5.0, jnp.nan])
    np.testing.assert_array_equal(masked_whiten(x, mask), [0.0, 0.0])
    np.testing.assert_array_equal(masked_whiten(x, mask, shift_mean=False), [5.0, 0.0])


# ------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_response_mask_marks_the_first_positions(shape):
    lengths = np.random.default_rng(0).integers(0, 5, shape).astype(np.int32)
    mask = response_mask(jnp.asarray(lengths), 4)
    assert mask.shape == (*shape, 4) and mask.dtype == bool
    for index in np.ndindex(shape):
        expected = [t < lengths[index] for t in range(4)]
        np.testing.assert_array_equal(mask[index], expected)
