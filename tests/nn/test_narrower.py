"""Decoding goes on with fewer rows as they end, and draws the same tokens."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.nn import decoding, refill, sampling
from rlhf_jax.nn.decoding import narrower
from rlhf_jax.nn.refill import generate_refilled
from rlhf_jax.nn.sampling import Sampling, generate

N, P, R, EOS, PAD = 19, 5, 10, 7, 7


@pytest.fixture
def rollouts(monkeypatch, tiny, random_params):
    """Makes `(slots, widths, jit) -> seed -> rollout` of 19 prompts; None: no slots.

    The cache has two stretches.
    """
    monkeypatch.setattr(decoding, "MIN_STRETCH", R // 2)
    assert len(decoding.stretches(R)) == 2
    cfg = tiny()
    rng = np.random.default_rng(0)
    lengths = jnp.asarray(rng.integers(1, P + 1, N), jnp.int32)
    prompts = jnp.asarray(rng.integers(0, cfg.vocab_size, (N, P)), jnp.int32)
    params = random_params(cfg)
    static = {"eos_id": EOS, "pad_id": PAD, "model": cfg}
    static["sampling"] = Sampling(response_len=R)

    def make(slots, widths, mode=jax.jit):
        for module in (sampling, refill):
            monkeypatch.setattr(module, "narrower", lambda rows, length: widths)
        fn = generate
        if slots is not None:
            fn = functools.partial(generate_refilled, num_slots=slots)
        fn = mode(functools.partial(fn, **static))
        return lambda seed: fn(params, prompts, lengths, jax.random.key(seed), 0.7)

    return make


WIDTHS = [(None, [9, 4]), (None, [18]), (None, [3]), (8, [4, 2]), (8, [3]), (1, [])]


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize(("slots", "widths"), WIDTHS)
def test_fewer_rows_draw_the_tokens_of_all_rows(
    rollouts, monkeypatch, slots, widths, backend
):
    """With a cache for each layer, and with one for all, as where they are many."""
    whole = rollouts(None, [])
    expected = [whole(seed) for seed in range(4)]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    narrow = rollouts(slots, widths)
    for seed, want in enumerate(expected):
        chex.assert_trees_all_close(narrow(seed), want, atol=2e-5)


@pytest.mark.parametrize(("slots", "widths"), WIDTHS)
def test_a_step_has_as_many_rows_as_have_not_ended(
    rollouts, monkeypatch, slots, widths
):
    """Rows of each step, against the same queue worked off by hand."""
    seen = []

    def counted(layers, cache, tokens, *args):
        seen.append(len(tokens))
        return decoding.decode_step(layers, cache, tokens, *args)

    for module in (sampling, refill):
        monkeypatch.setattr(module, "decode_step", counted)
    with jax.disable_jit():
        lengths = list(map(int, rollouts(slots, widths, lambda fn: fn)(3).lengths))

    width = N if slots is None else slots
    left, queue, expected, narrow = lengths[:width], lengths[width:], [], [*widths]
    while True:
        while queue and len(left) < width:
            left.append(queue.pop(0))
        while not queue and narrow and len(left) <= narrow[0]:
            width = narrow.pop(0)
        if not left:
            break
        expected.append(width)
        left = [n - 1 for n in left if n > 1]
    assert seen == expected
    assert set(widths) <= set(seen)  # each was reached


def test_no_row_ends_early(rollouts, monkeypatch):
    """All last to R: the narrower loops find nothing to do and lose nothing."""
    monkeypatch.setattr(sampling, "sample_tokens", never_ending)
    monkeypatch.setattr(refill, "sample_tokens", never_ending)
    expected = rollouts(None, [])(0)
    assert set(map(int, expected.lengths)) == {R}
    for slots, widths in WIDTHS:
        chex.assert_trees_all_equal(
            rollouts(slots, widths)(0).responses, expected.responses
        )


def never_ending(uniforms, logits):
    return jnp.full(uniforms.shape, EOS + 1, jnp.int32), jnp.zeros(uniforms.shape)


def test_rows_are_halved_where_it_pays(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert narrower(32, 64) == [16, 8]
    assert narrower(100, 128) == [50, 25]
    assert narrower(15, 64) == [7]
    assert narrower(7, 64) == []
    assert narrower(32, 63) == []  # short responses: their programs are compiled longer
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        assert narrower(32, 64) == []
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert narrower(32, 64) == []
