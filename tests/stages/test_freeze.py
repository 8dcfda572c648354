"""Models that PPO only reads: smaller, or out of the device's memory, but the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ppo_case as case
import pytest
from meshes import by_sizes, some_devices

from rlhf_jax.stages.experience import make_experience
from rlhf_jax.stages.ppo_state import freeze, on_device
from rlhf_jax.training.mesh import jit_step, shard_batch, state_sharding

LOW = dataclasses.replace(case.MODEL, dtype="bfloat16")
OFFLOADED = dataclasses.replace(case.CONFIG, offload_frozen=True)


def frozen(cfg, model=case.MODEL, mesh=None):
    given = case.frozen()
    if mesh is not None:
        given = jax.device_put(given, state_sharding(mesh, given))
    shapes = {"model": model, "reward_cfg": model}
    return freeze(given.reference, given.reward_model, cfg=cfg, **shapes)


def kinds(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_dense_layers_in_the_dtype_of_their_products_change_no_bit():
    small = frozen(case.CONFIG, LOW)
    dtypes = {x.dtype.name for x in jax.tree.leaves(small)}
    assert dtypes == {"float32", "bfloat16"}
    shapes = {"cfg": case.CONFIG, "model": LOW, "reward_model": LOW}
    experience = case.compiled(functools.partial(make_experience, **shapes))
    state, inputs = case.later_state(), case.make_inputs()
    scalars = case.CONFIG.scalars()
    rollout = case.rollout_fn(case.CONFIG)(state, inputs, scalars)
    expected, actual = (
        experience(state, models, inputs, rollout, scalars)
        for models in (case.frozen(), small)
    )
    case.assert_trees_equal(jax.device_get(actual), jax.device_get(expected))


def test_in_float32_nothing_is_copied():
    for ours, theirs in zip(
        *map(jax.tree.leaves, (frozen(case.CONFIG), case.frozen())), strict=True
    ):
        assert ours is theirs


@pytest.mark.parametrize(
    "shape", [(1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=by_sizes
)
def test_an_iteration_with_models_in_the_hosts_memory_is_the_same(shape):
    mesh = some_devices(*shape)
    found = []
    for cfg in (case.CONFIG, OFFLOADED):
        models = frozen(cfg, mesh=mesh)
        assert kinds(models) == {"pinned_host" if cfg.offload_frozen else "device"}
        state = case.fresh_state(cfg)
        sharding = state_sharding(mesh, state)
        state = jax.device_put(jax.tree.map(jnp.copy, state), sharding)
        inputs = shard_batch(mesh, case.make_inputs(cfg))
        step = jit_step(case.update(cfg), mesh, sharding)
        state, metrics = step(state, inputs, models, cfg.scalars())
        assert kinds(state) == kinds(metrics) == {"device"}
        found.append(jax.device_get((state.params, metrics)))
    case.assert_trees_close(*found, rtol=1e-5, atol=1e-6)


def test_what_is_brought_back_is_what_was_there():
    mesh = some_devices(1, 8)
    there = frozen(OFFLOADED, mesh=mesh)
    here = on_device(there)
    assert kinds(here) == {"device"}
    case.assert_trees_equal(jax.device_get(here), jax.device_get(case.frozen()))
    for ours, theirs in zip(*map(jax.tree.leaves, (here, there)), strict=True):
        assert ours.sharding.spec == theirs.sharding.spec
