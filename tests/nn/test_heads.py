import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.nn.heads import init_scalar_head, lm_logits, scalar_head


def test_logits_are_products_with_the_token_embedding():
    rng = np.random.default_rng(0)
    embed, hidden = rng.normal(size=(7, 4)), rng.normal(size=(2, 3, 4))
    logits = lm_logits({"embed": jnp.float32(embed)}, jnp.float32(hidden))
    for b in range(2):
        for t in range(3):
            for v in range(7):
                expected = float(np.dot(hidden[b, t], embed[v]))
                assert float(logits[b, t, v]) == pytest.approx(expected, abs=1e-5)


def test_logits_of_bfloat16_states_are_float32():
    params = {"embed": jnp.ones((5, 4))}
    assert lm_logits(params, jnp.ones((4,), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scalar_head_is_affine_for_any_leading_axes(leading, dtype):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(*leading, 4)), dtype)
    w = rng.normal(size=4)
    head = {"w": jnp.float32(w), "b": jnp.float32(0.5), "shift": jnp.float32(2.0)}
    scores = scalar_head(head, hidden)
    expected = np.asarray(hidden, np.float64) @ w + 0.5 - 2.0
    assert scores.shape == leading and scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_shift_is_never_trained():
    head = init_scalar_head(jax.random.key(0), 4)
    grads = jax.grad(lambda head: jnp.sum(scalar_head(head, jnp.ones((3, 4)))))(head)
    assert float(grads["shift"]) == 0.0
    assert float(grads["b"]) == 3.0
    np.testing.assert_array_equal(grads["w"], np.full(4, 3.0))


def test_initial_weights_have_variance_one_over_width_plus_one():
    head = init_scalar_head(jax.random.key(0), 4096)
    assert float(jnp.var(head["w"])) == pytest.approx(1 / 4097, rel=0.1)
    assert abs(float(jnp.mean(head["w"]))) < 4 / 4096
    assert float(head["b"]) == float(head["shift"]) == 0.0


def test_a_head_of_wrong_rank_is_refused():
    head = {"w": jnp.ones((4, 1)), "b": jnp.zeros(()), "shift": jnp.zeros(())}
    with pytest.raises(AssertionError):
        scalar_head(head, jnp.ones((3, 4)))
