"""The head is computed where the loss is; nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ppo_case as case
import pytest
from meshes import one_update

from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.stages.loss_positions import with_loss_positions
from rlhf_jax.stages.pretrain import lm_loss, sum_logprobs

ROWS, T, STEPS = 16, 7, 5


def ragged(step: int) -> TokenBatch:
    """As of demonstrations: a stretch of each row has a loss, of some rows none."""
    rng = np.random.default_rng(step)
    ids = rng.integers(0, case.V, (ROWS, T + 1)).astype(np.int32)
    start, length = rng.integers(0, 4, (ROWS, 1)), rng.integers(0, 5, (ROWS, 1))
    mask = (np.arange(T) >= start) & (np.arange(T) < start + length)
    weights = (mask / mask.sum()).astype(np.float32)
    return TokenBatch(ids[:, :-1], ids[:, 1:], weights)


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_every_loss_is_named_once_in_the_part_of_its_device_and_microbatch(
    shards, parts
):
    batches = with_loss_positions(ragged, STEPS, shards, parts)
    fullest, shapes = 0, set()
    for step in range(STEPS):
        plain, made = ragged(step), batches(step)
        jax.tree.map(
            np.testing.assert_array_equal, made.replace(loss_positions=None), plain
        )
        shapes.add(made.loss_positions.shape)
        for part, named in enumerate(made.loss_positions):
            device, microbatch = divmod(part, parts)
            rows = np.arange(ROWS).reshape(shards, -1)[device, microbatch::parts]
            found = [(rows[place // T], place % T) for place in named]
            assert found == sorted(set(found))
            expected = [(r, t) for r in rows for t in range(T) if plain.weights[r, t]]
            assert [at for at in found if plain.weights[at]] == expected
            fullest = max(fullest, len(expected))
    assert shapes == {(shards * parts, fullest)}


def test_a_batch_with_a_loss_at_most_positions_is_left_as_it_is():
    def everywhere(step: int) -> TokenBatch:
        batch = ragged(step)
        return batch.replace(weights=np.full_like(batch.weights, 1 / (ROWS * T)))  # type: ignore

    read = with_loss_positions(lambda step: (ragged, everywhere)[step](step), 2)
    assert read(0).loss_positions is None


def test_a_later_batch_that_needs_more_positions_is_refused_not_cut():
    counts = [int((ragged(step).weights > 0).sum()) for step in range(STEPS)]
    order = np.argsort(counts)
    assert counts[order[0]] < counts[order[-1]]
    read = with_loss_positions(lambda step: ragged(int(order[step])), 1)
    read(0)
    with pytest.raises(IndexError, match="a loss at more positions"):
        read(STEPS - 1)


LOSS = functools.partial(lm_loss, model=case.MODEL)


@functools.cache
def expected_update():
    return one_update(LOSS, case.transformer(0), ragged(0))


@pytest.mark.parametrize(
    "how",
    [
        {"num_microbatches": 2},
        {"data": 4, "fsdp": 2},
        {"data": 4, "num_microbatches": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8, "num_microbatches": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda how: " ".join(f"{name}{n}" for name, n in how.items()) or "alone",
)
def test_an_update_is_that_of_the_loss_at_all_positions(how):
    shards = how.get("data", 1) * how.get("fsdp", 1)
    read = with_loss_positions(ragged, STEPS, shards, how.get("num_microbatches", 1))
    batch = read(0)
    assert batch.loss_positions is not None
    found = one_update(LOSS, case.transformer(0), batch, **how)
    case.assert_trees_close(found, expected_update(), rtol=1e-4, atol=1e-5)


def test_sums_and_gradient_are_those_of_all_positions():
    params, key = case.transformer(0), jax.random.key(0)
    sums = case.compiled(functools.partial(sum_logprobs, model=case.MODEL))
    grad = case.compiled(jax.grad(LOSS, has_aux=True))
    plain = jax.tree.map(jnp.asarray, ragged(0))
    named = jax.tree.map(jnp.asarray, with_loss_positions(ragged, STEPS)(0))
    for a, b in zip(sums(params, named), sums(params, plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    case.assert_trees_close(
        grad(params, named, key)[0], grad(params, plain, key)[0], rtol=1e-4, atol=1e-6
    )
