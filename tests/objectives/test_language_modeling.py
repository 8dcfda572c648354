import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.objectives import language_modeling
from rlhf_jax.objectives.language_modeling import (
    logprobs_and_entropy,
    next_token_head,
    next_token_loss,
    token_logprobs,
    token_loss,
)
from rlhf_jax.objectives.masking import normalize_weights

B, T, D, V = 2, 7, 5, 11


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    embedding = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return hidden, embedding, targets


def halved(logits):
    return logits / 0.5


def identity(logits):
    return logits


# -------------------------------------------------------------- one position at a time


def test_logprobs_and_entropies_match_the_oracle(mode):
    rng = np.random.default_rng(1)
    logits = (4 * rng.normal(size=(3, 4, V))).astype(np.float32)
    targets = rng.integers(0, V, (3, 4)).astype(np.int32)
    logprobs, entropies = mode(logprobs_and_entropy)(logits, targets)
    for index in np.ndindex(3, 4):
        expected = oracle.logprob_and_entropy(logits[index], targets[index])
        actual = float(logprobs[index]), float(entropies[index])
        assert actual == pytest.approx(expected, abs=2e-5)


def test_logprobs_are_minus_the_cross_entropy_of_optax():
    rng = np.random.default_rng(2)
    logits = jnp.float32(4 * rng.normal(size=(6, V)))
    targets = jnp.int32(rng.integers(0, V, 6))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    logprobs, _ = logprobs_and_entropy(logits, targets)
    np.testing.assert_allclose(-logprobs, expected, atol=1e-5)


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]))
def test_entropy_lies_between_zero_and_log_vocabulary(seed, scale):
    logits = jnp.float32(scale * np.random.default_rng(seed).normal(size=(4, V)))
    _, entropy = logprobs_and_entropy(logits, jnp.zeros((4,), jnp.int32))
    assert np.all(entropy >= 0) and np.all(entropy <= math.log(V) + 1e-6)


def test_impossible_tokens_add_nothing_to_the_entropy():
    logits = jnp.array([1.0, 1.0, -1e9, -1e9])
    logprob, entropy = logprobs_and_entropy(logits, jnp.int32(0))
    assert float(entropy) == pytest.approx(math.log(2), abs=1e-6)
    assert float(logprob) == pytest.approx(-math.log(2), abs=1e-6)


def test_gradients_match_finite_differences():
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(size=(3, V)), rng.integers(0, V, 3)
    mix = rng.normal(size=(2, 3))

    def slow(logits):
        pairs = [oracle.logprob_and_entropy(logits[i], targets[i]) for i in range(3)]
        return sum(mix[0, i] * pairs[i][0] + mix[1, i] * pairs[i][1] for i in range(3))

    def fast(logits):
        logprobs, entropy = logprobs_and_entropy(logits, jnp.int32(targets))
        return jnp.sum(jnp.float32(mix[0]) * logprobs + jnp.float32(mix[1]) * entropy)

    grads = jax.grad(fast)(jnp.float32(logits))
    np.testing.assert_allclose(
        grads, oracle.numerical_gradient(slow, logits), atol=1e-5
    )


# ------------------------------------------------------------------ from hidden states


@pytest.mark.parametrize("contract", [identity, halved])
def test_states_decide_their_target_under_the_contract(mode, example, contract):
    hidden, embedding, targets = example
    run = mode(functools.partial(token_logprobs, contract=contract))
    logprobs, entropies = run(hidden, embedding, targets)
    for b, t in np.ndindex(B, T):
        logits = contract(embedding.astype(np.float64) @ hidden[b, t])
        expected = oracle.logprob_and_entropy(logits, targets[b, t])
        actual = float(logprobs[b, t]), float(entropies[b, t])
        assert actual == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_gradients_are_those_of_the_cross_entropy_of_optax(example, dtype, error):
    """By hidden states and by embedding, in bfloat16 up to its rounding (2^-9)."""
    hidden, embedding, targets = example
    weights = np.random.default_rng(1).uniform(size=(B, T)).astype(np.float32)

    def ours(hidden, embedding):
        hidden = hidden.astype(dtype)
        logprobs, _ = token_logprobs(hidden, embedding, targets, identity)
        return -jnp.sum(weights * logprobs)

    def theirs(hidden, embedding):
        logits = jnp.einsum("btd,vd->btv", hidden, embedding, precision="highest")
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(weights * nll)

    rounded = [jnp.asarray(x, dtype).astype(jnp.float32) for x in (hidden, embedding)]
    actual, expected = (jax.grad(f, argnums=(0, 1))(*rounded) for f in (ours, theirs))
    for a, e in zip(actual, expected, strict=True):
        assert float(jnp.linalg.norm(e)) > 0.1
        assert float(jnp.linalg.norm(a - e) / jnp.linalg.norm(e)) < error


@pytest.mark.parametrize("max_logits", [1, 2 * V, 3 * B * V, 4 * B * V, B * T * V - 1])
def test_chunks_change_neither_values_nor_gradients(monkeypatch, example, max_logits):
    """From one position a chunk to all but one; 7 positions divide by none of them."""
    hidden, embedding, targets = example
    mix = jnp.float32(np.random.default_rng(5).normal(size=(2, B, T)))

    def run():
        def mixed(hidden, embedding):
            outs = token_logprobs(hidden, embedding, targets, halved)
            return jnp.sum(mix * jnp.stack(outs)), outs

        return jax.jit(jax.grad(mixed, argnums=(0, 1), has_aux=True))(hidden, embedding)

    whole = run()
    monkeypatch.setattr(language_modeling, "MAX_LOGITS", max_logits)
    for cut, full in zip(jax.tree.leaves(run()), jax.tree.leaves(whole), strict=True):
        assert cut.shape == full.shape
        np.testing.assert_allclose(cut, full, atol=1e-5)


def largest_array(jaxpr) -> int:
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes.append(largest_array(inner))
    return max(sizes, default=0)


def test_no_array_of_all_logits_exists_forward_or_backward(monkeypatch):
    B, T, D, V = 2, 16, 3, 64
    monkeypatch.setattr(language_modeling, "MAX_LOGITS", B * V * 4)
    hidden, embedding = jnp.zeros((B, T, D)), jnp.zeros((V, D))
    targets = jnp.zeros((B, T), jnp.int32)

    def total(hidden, embedding):
        logprobs, entropy = token_logprobs(hidden, embedding, targets, identity)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    def largest():
        jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, embedding)
        return largest_array(jaxpr.jaxpr)

    assert largest() <= B * V * 4
    monkeypatch.setattr(language_modeling, "MAX_LOGITS", B * T * V)
    assert largest() == B * T * V  # the measure does see such an array


def test_bfloat16_states_give_float32_logprobs(example):
    hidden, embedding, targets = example
    args = (jnp.asarray(hidden, jnp.bfloat16), embedding, targets, identity)
    logprobs, entropies = token_logprobs(*args)
    assert logprobs.dtype == entropies.dtype == jnp.float32
    full, _ = token_logprobs(hidden, embedding, targets, identity)
    np.testing.assert_allclose(logprobs, full, atol=0.1)


# ------------------------------------------------- a loss with its gradient on the way


def squares(logprobs, entropies, weights):  # no linear function of the log-probability
    return jnp.sum(weights * (jnp.square(logprobs) + 0.3 * entropies))


@pytest.mark.parametrize("max_logits", [1, 2 * V, 3 * B * V, 4 * B * V, B * T * V - 1])
def test_a_loss_in_chunks_has_the_value_and_gradient_of_the_whole(
    monkeypatch, example, max_logits
):
    hidden, embedding, targets = example
    weights = jnp.float32(np.random.default_rng(5).normal(size=(B, T)))

    def whole(hidden, embedding):
        outs = token_logprobs(hidden, embedding, targets, halved)
        return 3.0 * squares(*outs, weights), outs

    def cut(hidden, embedding):
        loss, outs = token_loss(hidden, embedding, targets, halved, squares, weights)
        return 3.0 * loss, outs

    grad = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    expected = jax.jit(grad(whole))(hidden, embedding)
    one = jax.jit(grad(cut))(hidden, embedding)
    monkeypatch.setattr(language_modeling, "MAX_LOGITS", max_logits)
    for actual in (one, jax.jit(grad(cut))(hidden, embedding)):
        chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_log_probabilities_beside_a_loss_carry_no_gradient(monkeypatch, example):
    hidden, embedding, targets = example

    def beside(hidden, weights):
        args = (hidden, embedding, targets, identity, squares, weights)
        return jnp.sum(token_loss(*args)[1][0])

    for max_logits in (2**25, 2 * V):
        monkeypatch.setattr(language_modeling, "MAX_LOGITS", max_logits)
        grads = jax.grad(beside, argnums=(0, 1))(hidden, jnp.ones((B, T)))
        chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


def test_a_loss_in_chunks_holds_no_array_of_all_logits(monkeypatch):
    B, T, D, V = 2, 16, 3, 64
    hidden, embedding = jnp.zeros((B, T, D)), jnp.zeros((V, D))
    targets, weights = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))

    def total(hidden, embedding):
        args = (hidden, embedding, targets, identity, squares, weights)
        return token_loss(*args)[0]

    def largest():
        jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, embedding)
        return largest_array(jaxpr.jaxpr)

    monkeypatch.setattr(language_modeling, "MAX_LOGITS", B * V * 4)
    assert largest() <= B * V * 4
    monkeypatch.setattr(language_modeling, "MAX_LOGITS", B * T * V)
    assert largest() == B * T * V


# ------------------------------------------- the head as far as there is a loss


def in_parts(array, parts):
    return array.reshape(parts, -1, *array.shape[2:])


@pytest.mark.parametrize("max_logits", [2**25, 3 * V])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 25, 80])
def test_positions_with_a_loss_first_change_neither_loss_nor_gradient(
    monkeypatch, count, parts, max_logits
):
    """And other states are not multiplied, beyond what fills the last chunk."""
    monkeypatch.setattr(language_modeling, "MAX_LOGITS", max_logits)
    monkeypatch.setattr(language_modeling, "MIN_CHUNK", 4)
    rng = np.random.default_rng(count)
    rows, length = 4, 20
    hidden = jnp.float32(rng.normal(size=(rows, length, D)))
    embedding = jnp.float32(rng.normal(size=(V, D)))
    targets = rng.integers(0, V, (rows, length)).astype(np.int32)
    chosen = rng.permutation(rows * length)[:count]
    weights = np.zeros(rows * length, np.float32)
    weights[chosen] = rng.uniform(0.1, 1.0, len(chosen))
    weights = weights.reshape(rows, length)
    order = np.argsort(in_parts(weights, parts) == 0, axis=1, kind="stable")

    def loss(order, hidden, embedding):
        return 3.0 * next_token_head(hidden, embedding, targets, weights, order)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)))
    expected = grad(None, hidden, embedding)
    found = grad(jnp.int32(order), hidden, embedding)
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)

    least = language_modeling.loss_chunks(order.shape[1])
    _, width = language_modeling.logit_chunks(order.shape, V, False, least)
    assert width < order.shape[1]
    most = int((in_parts(weights, parts) != 0).sum(axis=1).max())
    unread = order[:, -(-most // width) * width :]
    states = np.array(in_parts(hidden, parts))
    for part in range(parts):
        states[part, unread[part]] = np.nan
    assert count == 80 or np.isnan(states).any()
    poisoned = jnp.asarray(states.reshape(hidden.shape))
    _, gradient = grad(jnp.int32(order), poisoned, embedding)
    chex.assert_trees_all_equal(gradient, found[1])


# ------------------------------------------------------------------------- the loss


def test_loss_is_the_mean_over_the_mask():
    rng = np.random.default_rng(0)
    logprobs, mask = -rng.random((B, T)), rng.random((B, T)) < 0.5
    loss = next_token_loss(jnp.float32(logprobs), normalize_weights(jnp.asarray(mask)))
    expected = -oracle.mean(oracle.masked_values(logprobs, mask))
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_loss_is_linear_in_the_weights():
    rng = np.random.default_rng(1)
    logprobs = jnp.float32(-rng.random((B, T)))
    one, two = (jnp.float32(rng.random((B, T))) for _ in range(2))
    together = float(next_token_loss(logprobs, 2.0 * one + 3.0 * two))
    apart = [float(next_token_loss(logprobs, w)) for w in (one, two)]
    assert together == pytest.approx(2 * apart[0] + 3 * apart[1], rel=1e-5)


def test_loss_without_weights_is_zero_whatever_the_logprobs():
    logprobs = jnp.full((B, T), jnp.nan)
    value, grad = jax.value_and_grad(next_token_loss)(logprobs, jnp.zeros((B, T)))
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, 0.0)
