"""A batch may be cut anywhere; one step serves all losses and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import some_devices

from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import (
    accumulate_gradients,
    leaf_names,
    make_train_step,
    nonfinite_leaves,
)

CFG = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, eps=1e-3)


def make_batch(rows: int = 8, width: int = 5) -> dict:
    """Ragged: row i has i + 1 real entries, the rest is garbage."""
    rng = np.random.default_rng(0)
    lengths = 1 + np.arange(rows) % width
    mask = np.arange(width)[None] < lengths[:, None]
    x = np.where(mask[..., None], rng.normal(size=(rows, width, 3)), 1e6)
    return {
        "x": jnp.asarray(x, jnp.float32),
        "y": jnp.asarray(rng.normal(size=(rows, width)), jnp.float32),
        "weights": jnp.asarray(mask / mask.sum(), jnp.float32),
    }


def make_params() -> dict:
    return {"b": jnp.float32(0.3), "embed": jnp.asarray([0.5, -1.0, 2.0], jnp.float32)}


def squared_error(params, batch, key):
    """Weighted sum with a scalar and a per-row extra."""
    del key
    predicted = jnp.einsum("btd,d->bt", batch["x"], params["embed"]) + params["b"]
    errors = jnp.where(batch["weights"] > 0, predicted - batch["y"], 0.0)
    loss = jnp.sum(batch["weights"] * jnp.square(errors))
    mae = jnp.sum(batch["weights"] * jnp.abs(errors))
    return loss, {"mae": mae, "errors": errors}


def noisy_error(params, batch, key):
    """Multiplies inputs by a dropout mask drawn from the key."""
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    x = jnp.where(keep, 2.0 * batch["x"], 0.0)
    loss, _ = squared_error(params, batch | {"x": x}, key)
    return loss, {}


def without_arrays(params, batch, key):
    loss, extras = squared_error(params, batch, key)
    return loss, {"mae": extras["mae"]}


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_change_nothing(num_microbatches, mode):
    params, batch, key = make_params(), make_batch(), jax.random.key(0)

    def run(m):
        return mode(
            lambda params, batch: accumulate_gradients(
                squared_error, params, batch, key, m
            )
        )(params, batch)

    (loss, extras), grads = run(1)
    (other_loss, other_extras), other_grads = run(num_microbatches)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    np.testing.assert_allclose(extras["mae"], other_extras["mae"], rtol=1e-6)
    np.testing.assert_array_equal(extras["errors"], other_extras["errors"])
    for name in grads:
        np.testing.assert_allclose(grads[name], other_grads[name], rtol=1e-5)


def test_the_gradient_is_that_of_the_whole_batch():
    params, batch = make_params(), make_batch()
    x, y, w = (np.asarray(batch[n], np.float64) for n in ("x", "y", "weights"))
    total, slope, offset = 0.0, np.zeros(3), 0.0
    for row, t in zip(*np.nonzero(w), strict=True):
        error = x[row, t] @ np.asarray(params["embed"], np.float64)
        error += float(params["b"]) - y[row, t]
        total += w[row, t] * error**2
        slope += 2 * w[row, t] * error * x[row, t]
        offset += 2 * w[row, t] * error
    (loss, _), grads = accumulate_gradients(
        squared_error, params, batch, jax.random.key(0), 4
    )
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(grads["embed"], slope, rtol=1e-5)
    np.testing.assert_allclose(grads["b"], offset, rtol=1e-4)


@pytest.mark.parametrize(
    ("num_rows", "num_microbatches", "rows_a_part"),
    [(32, 2, 4), (32, 8, 1), (32, 32, 1), (48, 16, 1), (48, 8, 1), (48, 3, 4)],
)
def test_replicas_cut_no_further_than_a_row_a_device(
    num_rows, num_microbatches, rows_a_part
):
    """More parts than rows would be filled up, and computed, on every device; fewer
    parts than asked for would hold more than was planned."""
    mesh, params, batch = some_devices(4, 1), make_params(), make_batch(num_rows)
    seen = []

    def loss_fn(params, batch, key):
        seen.append(batch["x"].shape[0])
        return squared_error(params, batch, key)

    (loss, extras), grads = accumulate_gradients(
        loss_fn, params, batch, jax.random.key(0), num_microbatches, mesh
    )
    assert set(seen) == {rows_a_part}
    (expected, told), other = accumulate_gradients(
        squared_error, params, batch, jax.random.key(0)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(extras["errors"], told["errors"])
    np.testing.assert_allclose(grads["embed"], other["embed"], rtol=1e-5)


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="8 rows cannot be cut into 3 microbatches"):
        accumulate_gradients(
            squared_error, make_params(), make_batch(), jax.random.key(0), 3
        )


def test_microbatches_draw_different_dropout_masks():
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), make_batch(4))
    batch["weights"] = batch["weights"] / 2
    params, key = make_params(), jax.random.key(1)
    half = jax.tree.map(lambda x: x[:4], batch)
    run = jax.jit(accumulate_gradients, static_argnums=(0, 4))
    (cut, _), _ = run(noisy_error, params, batch, key, 2)
    (same_mask, _), _ = run(noisy_error, params, half, key, 1)
    assert not np.isclose(float(cut), 2 * float(same_mask), rtol=1e-3)


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_parameters_after_steps_do_not_depend_on_microbatches(num_microbatches):
    def train(m):
        step = jax.jit(make_train_step(without_arrays, CFG, 10, m))
        state = init_state(make_params(), jax.random.key(0))
        for _ in range(3):
            state, metrics = step(state, make_batch(), CFG.scalars())
        return state, metrics

    state, metrics = train(1)
    other, other_metrics = train(num_microbatches)
    for name in state.params:
        np.testing.assert_allclose(state.params[name], other.params[name], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], other_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["mae"], other_metrics["mae"], rtol=1e-5)


def test_one_program_serves_every_step_and_every_rate():
    traces = []

    def counted(params, batch, key):
        traces.append(None)
        return without_arrays(params, batch, key)

    step = jax.jit(make_train_step(counted, CFG, 10), donate_argnums=0)
    state = init_state(make_params(), jax.random.key(0))
    scalars = CFG.scalars()
    for i in range(4):
        scalars = scalars.replace(learning_rate=jnp.float32(0.1 / (i + 1)))
        state, _ = step(state, make_batch(), scalars)
    assert len(traces) == 1
    assert int(state.step) == 4


def test_each_step_draws_its_own_mask_from_a_key_that_stays():
    step = jax.jit(make_train_step(noisy_error, CFG, 10))
    state = init_state(make_params(), jax.random.key(5))
    still = CFG.scalars().replace(
        learning_rate=jnp.float32(0.0), weight_decay=jnp.float32(0.0)
    )
    losses = []
    for _ in range(3):
        state, metrics = step(state, make_batch(), still)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    assert jnp.array_equal(
        jax.random.key_data(state.key), jax.random.key_data(jax.random.key(5))
    )
    again = init_state(make_params(), jax.random.key(5)).replace(step=jnp.int32(2))
    _, metrics = step(again, make_batch(), still)
    assert float(metrics["loss"]) == losses[2]


def test_norms_are_of_gradient_update_and_parameters_before_it():
    params, batch = make_params(), make_batch()
    state, metrics = jax.jit(make_train_step(without_arrays, CFG, 10))(
        init_state(params, jax.random.key(0)), batch, CFG.scalars()
    )
    _, grads = accumulate_gradients(without_arrays, params, batch, jax.random.key(0))

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))

    change = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, params)
    np.testing.assert_allclose(metrics["grad_norm"], norm(grads), rtol=1e-6)
    np.testing.assert_allclose(metrics["update_norm"], norm(change), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], norm(params), rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bad", ["['blocks']['b']", "['embed']"])
def test_the_flag_of_a_broken_leaf_has_its_name(bad, value):
    tree = {"embed": np.ones((2, 2)), "blocks": {"b": np.ones(3), "w": np.ones((3, 3))}}
    names = leaf_names(tree)
    leaves, structure = jax.tree.flatten(tree)
    leaves[names.index(bad)] = np.where(leaves[names.index(bad)] > 0, value, 0.0)
    broken = jax.tree.unflatten(structure, leaves)
    assert (broken["embed"] is not tree["embed"]) == (bad == "['embed']")
    flags = nonfinite_leaves(jax.tree.map(jnp.asarray, broken))
    assert [n for n, flag in zip(names, flags, strict=True) if flag] == [bad]


def test_a_step_flags_the_gradient_that_is_not_finite():
    def root(params, batch, key):  # the slope of a square root at 0 is infinite
        del batch, key
        return jnp.sum(jnp.sqrt(params["b"])) + jnp.sum(params["embed"]), {}

    params = {"b": jnp.float32(0.0), "embed": jnp.ones(3)}
    _, metrics = jax.jit(make_train_step(root, CFG, 10))(
        init_state(params, jax.random.key(0)), make_batch(), CFG.scalars()
    )
    assert list(metrics["nonfinite"]) == [True, False]


def test_each_microbatch_draws_its_own_mask():
    def drawn(params, batch, key):
        keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return params * 0.0, {"keep": keep}

    batch = {"x": jnp.zeros((8, 16))}
    key = jax.random.key(0)
    (_, extras), _ = accumulate_gradients(drawn, jnp.float32(1.0), batch, key, 2)
    assert np.any(extras["keep"][0::2] != extras["keep"][1::2])
