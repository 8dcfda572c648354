"""Schedules hit published numbers; AdamW is Optax's; numbers are data, not programs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.nn.transformer import init_params
from rlhf_jax.training.optimizers import (
    OptimizerConfig,
    adamw,
    decayed,
    init_optimizer,
    learning_rate,
)

MATRICES = {"qkv", "attn_out", "mlp_up", "mlp_down"}


def rates(cfg: OptimizerConfig, num_steps: int, steps) -> list[float]:
    scalars = cfg.scalars()
    return [
        float(learning_rate(jnp.int32(step), cfg, scalars, num_steps)) for step in steps
    ]


def test_warm_up_is_instructgpts():
    cfg = OptimizerConfig(
        learning_rate=1.0, schedule="constant", warmup_steps=10, warmup_fraction=0.1
    )
    expected = [0.1, 0.19, 0.28, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82, 0.91, 1.0, 1.0]
    np.testing.assert_allclose(rates(cfg, 100, range(12)), expected, rtol=1e-6)


def test_cosine_ends_at_ten_per_cent():
    cfg = OptimizerConfig(learning_rate=1.0, schedule="cosine")
    expected = [1.0, 0.86820, 0.55, 0.23180, 0.1, 0.1]
    found = rates(cfg, 8, (0, 2, 4, 6, 8, 20))
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_cosine_starts_after_the_warm_up():
    cfg = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=4)
    found = rates(cfg, 12, (0, 1, 2, 4, 8, 12))
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 2.0, 1.1, 0.2], rtol=1e-6)


def test_linear_goes_straight_to_its_final_fraction():
    cfg = OptimizerConfig(learning_rate=1.0, schedule="linear", final_fraction=0.0)
    found = rates(cfg, 4, range(5))
    np.testing.assert_allclose(found, [1.0, 0.75, 0.5, 0.25, 0.0], rtol=1e-6)


def test_a_warm_up_as_long_as_the_run_gives_finite_rates():
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=5)
    assert all(map(math.isfinite, rates(cfg, 5, range(6))))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"max_grad_norm": 0.0}, "inf"),
        ({"max_grad_norm": math.nan}, "inf"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"final_fraction": 1.1}, "final_fraction"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
        ({"eps": -1e-3}, "eps"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"schedule": "cosin"}, "one of"),
    ],
)
def test_impossible_numbers_are_named(change, name):
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**change)


def test_decay_is_on_matrices_and_embeddings_only(tiny):
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), tiny()))
    expected = {
        "embed": True,
        "pos_embed": True,
        "blocks": {
            name: {leaf: name in MATRICES and leaf == "w" for leaf in block}
            for name, block in params["blocks"].items()
        },
        "final_norm": {"scale": False, "bias": False},
    }
    assert decayed(params) == expected
    head = {"w": jnp.ones(3), "b": jnp.zeros(()), "shift": jnp.zeros(())}
    reward_model = decayed({"transformer": params, "head": head})
    assert reward_model["transformer"] == expected
    assert reward_model["head"] == {"w": False, "b": False, "shift": False}


def small_params(seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    norm = {"scale": draw(2, 3), "bias": draw(2, 3)}
    return {
        "embed": draw(5, 3),
        "blocks": {"mlp_up": {"w": draw(2, 3, 4), "b": draw(2, 4)}, "mlp_norm": norm},
    }


@pytest.mark.parametrize("max_grad_norm", [0.5, math.inf])
def test_updates_are_those_of_optax_adamw(max_grad_norm):
    cfg = OptimizerConfig(
        learning_rate=0.1,
        warmup_steps=2,
        warmup_fraction=0.5,
        eps=1e-2,  # large, or Adam's invariance to scale would hide the clipping
        b1=0.8,
        b2=0.9,
        weight_decay=0.3,
        max_grad_norm=max_grad_norm,
    )
    mask = {
        "embed": True,
        "blocks": {
            "mlp_up": {"w": True, "b": False},
            "mlp_norm": {"scale": False, "bias": False},
        },
    }
    schedule = [0.05, 0.075] + [
        0.1 * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 4))) for t in range(3)
    ]
    theirs = optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(
            lambda count: jnp.asarray(schedule)[count],
            0.8,
            0.9,
            1e-2,
            weight_decay=0.3,
            mask=mask,
        ),
    )

    @jax.jit
    def our_step(params, state, grads, step):
        rate = learning_rate(step, cfg, cfg.scalars(), 6)
        updates, state = adamw(cfg.scalars(), rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def their_step(params, state, grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = expected = small_params(0)
    state, expected_state = init_optimizer(params), theirs.init(expected)
    for step in range(5):
        grads = small_params(step + 1)
        params, state = our_step(params, state, grads, jnp.int32(step))
        expected, expected_state = their_step(expected, expected_state, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        params,
        expected,
    )


def test_a_sweep_over_the_numbers_compiles_once_and_vmaps():
    traces = []
    cfg = OptimizerConfig()
    params, grads = small_params(0), small_params(1)
    state = init_optimizer(params)

    def new_params(scalars, step):
        traces.append(None)
        rate = learning_rate(step, cfg, scalars, 10)
        updates, _ = adamw(scalars, rate).update(grads, state, params)
        return optax.apply_updates(params, updates)

    compiled = jax.jit(new_params)
    sweep = [
        dataclasses.replace(cfg, learning_rate=r, weight_decay=d, b1=b).scalars()
        for r, d, b in ((1e-3, 0.0, 0.9), (1.0, 0.1, 0.5), (0.1, 0.2, 0.95))
    ]
    one_by_one = [compiled(scalars, jnp.int32(i)) for i, scalars in enumerate(sweep)]
    assert len(traces) == 1
    stack = functools.partial(jax.tree.map, lambda *xs: jnp.stack(xs))
    at_once = jax.jit(jax.vmap(new_params))(stack(*sweep), jnp.arange(3))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        at_once,
        stack(*one_by_one),
    )
