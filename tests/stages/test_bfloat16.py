"""Computing in bfloat16 changes loss, gradient and update by a stated bound only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ppo_case as case
import pytest

from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.data.ranking_batches import RankingBatch
from rlhf_jax.objectives.masking import normalize_weights
from rlhf_jax.stages.ppo_loss import ppo_loss
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.stages.reward_model import WeightedRankings, reward_loss

ULP = 2.0**-8  # the relative spacing of bfloat16


def ppo_case(dtype):
    model = dataclasses.replace(case.MODEL, dtype=dtype)
    state, scalars = case.later_state(), case.CONFIG.scalars()
    experience, _ = case.experience_fn(case.CONFIG)(
        state, case.frozen(), case.make_inputs(), case.stored_rollout(), scalars
    )
    weights = normalize_weights(experience.mask)
    loss = functools.partial(
        ppo_loss,
        scalars=scalars,
        cfg=case.CONFIG,
        model=model,
        reward_model=model,
    )
    return loss, state.params, (experience, weights)


def tokens():
    """Rows whose learned stretch is ragged, as of packed text or demonstrations."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, case.V, (8, 12)), jnp.int32)
    mask = np.arange(11) < rng.integers(1, 12, (8, 1))
    return TokenBatch(ids[:, :-1], ids[:, 1:], jnp.float32(mask / mask.sum()))


def rankings():
    rng, shape = np.random.default_rng(0), (4, 3)
    draw = lambda low, high, *s: jnp.asarray(rng.integers(low, high, s), jnp.int32)  # noqa: E731
    batch = RankingBatch(
        prompts=draw(0, case.V, 4, case.P),
        prompt_lengths=draw(1, case.P + 1, 4),
        responses=draw(0, case.V, *shape, case.R),
        response_lengths=draw(1, case.R + 1, *shape),
        ranks=jnp.asarray([[1, 2, 3], [3, 1, 1], [2, 1, 0], [1, 2, 2]], jnp.int32),
    )
    return WeightedRankings(batch, jnp.full((4,), 0.25))


def supervised(loss, params, batch):
    def make(dtype):
        model = dataclasses.replace(case.MODEL, dtype=dtype)
        return functools.partial(loss, model=model), params(), batch()

    return make


CASES = {
    "pretrain and sft": supervised(lm_loss, lambda: case.transformer(0), tokens),
    "reward_model": supervised(reward_loss, lambda: case.scalar_model(1), rankings),
    "ppo": ppo_case,
}


@pytest.mark.parametrize("stage", CASES)
def test_loss_and_gradient_in_bfloat16_stay_near_float32(stage):
    """Loss within 8 units in the last place, gradient within 16 in its norm. PPO's
    advantages sum to 0: its loss is near 0, and within a unit of its terms' size."""

    def run(dtype):
        loss, params, batch = CASES[stage](dtype)
        fn = case.compiled(jax.value_and_grad(loss, has_aux=True))
        (value, _), grads = fn(params, batch, jax.random.key(0))
        return float(value), grads, batch

    (full, full_grads, batch), (half, half_grads, _) = run("float32"), run("bfloat16")
    bound = 8 * ULP * abs(full)
    if stage == "ppo":
        experience, weights = batch
        bound = ULP * float(jnp.sum(weights * jnp.abs(experience.advantages)))
    assert half != full  # bfloat16 really was used
    assert abs(half - full) < bound
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half_grads))
    error = jax.tree.map(jnp.subtract, half_grads, full_grads)
    relative = float(optax.tree.norm(error) / optax.tree.norm(full_grads))
    assert 1e-5 < relative < 16 * ULP
