"""A rollout in slots is the rollout of all rows at once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.nn import decoding, refill
from rlhf_jax.nn.refill import generate_refilled
from rlhf_jax.nn.sampling import Sampling, generate

N, P, R, EOS, PAD = 9, 6, 8, 7, 7


@pytest.fixture
def case(tiny, random_params):
    cfg = tiny()
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, P + 1, N).astype(np.int32)
    prompts = rng.integers(0, cfg.vocab_size, (N, P)).astype(np.int32)
    args = random_params(cfg), jnp.asarray(prompts), jnp.asarray(lengths)
    static = {"eos_id": EOS, "pad_id": PAD, "model": cfg}
    return args, static


def sampler(case, slots, sampling=None):
    (params, prompts, lengths), static = case
    sampling = Sampling(response_len=R) if sampling is None else sampling
    fn, more = generate, {}
    if slots is not None:
        fn, more = generate_refilled, {"num_slots": slots}
    fn = jax.jit(functools.partial(fn, **static, **more, sampling=sampling))
    return lambda seed: fn(params, prompts, lengths, jax.random.key(seed), 0.8)


def run(case, slots, seed, sampling=None):
    return sampler(case, slots, sampling)(seed)


@pytest.mark.parametrize("slots", [1, 2, 4, N, N + 5])
def test_slots_draw_the_tokens_of_all_rows_at_once(case, slots):
    at_once, in_slots = sampler(case, None), sampler(case, slots)
    for seed in range(4):
        expected, actual = at_once(seed), in_slots(seed)
        assert len(set(map(int, expected.lengths))) > 2  # slots do end apart
        chex.assert_trees_all_close(actual, expected, atol=2e-5)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_slots_draw_the_same_with_one_cache_for_all_layers(case, monkeypatch, backend):
    """Of layers written out, as on GPUs, and of a loop over them, as where they are
    many."""
    expected, model = run(case, 2, 0), case[1]["model"]
    assert decoding.caches_apart(model)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert not decoding.caches_apart(model)
    assert decoding.written_out(model) == (backend == "gpu")
    chex.assert_trees_all_close(run(case, 2, 0), expected, atol=2e-5)


def test_a_contract_holds_in_slots(case):
    sampling = Sampling(response_len=R, top_k=3, top_p=0.9)
    expected, actual = run(case, None, 0, sampling), run(case, 2, 0, sampling)
    chex.assert_trees_all_close(actual, expected, atol=2e-5)


def test_prompts_without_a_stem_and_responses_of_one_token(case):
    (params, prompts, lengths), static = case
    one = (params, prompts[:, :1], jnp.ones_like(lengths)), static
    chex.assert_trees_all_close(run(one, 4, 1), run(one, None, 1), atol=2e-5)
    short = Sampling(response_len=1)
    expected = run(case, None, 1, short)
    chex.assert_trees_all_close(run(case, 4, 1, short), expected, atol=2e-5)


def test_free_slots_are_filled_at_once(case, monkeypatch):
    """Four slots take as many steps as the same queue worked off by hand."""
    steps, decode = [], refill.decode_step
    monkeypatch.setattr(
        refill, "decode_step", lambda *args: steps.append(1) or decode(*args)
    )
    (params, prompts, lengths), static = case
    with jax.disable_jit():
        rollout = generate_refilled(
            params,
            prompts,
            lengths,
            jax.random.key(0),
            0.8,
            num_slots=4,
            **static,
            sampling=Sampling(response_len=R),
        )
    busy_until = [0] * 4
    for length in map(int, rollout.lengths):
        slot = busy_until.index(min(busy_until))
        busy_until[slot] += length
    assert len(steps) == max(busy_until) < R * 3  # three batches without slots


def test_slots_that_cannot_be_are_refused(case):
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        run(case, 0, 0)
    with pytest.raises(ValueError, match="max_len 32; shorten"):
        run(case, 2, 0, Sampling(response_len=27))
