"""Samples come back in the order of their prompts, however they were batched."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import ppo_case as case
import pytest
from letters import FORM, LETTERS
from meshes import some_devices

from rlhf_jax.data import widths
from rlhf_jax.data.records import DataError
from rlhf_jax.stages.common import Context, Model
from rlhf_jax.stages.sampler import Sampler, fitting

PROMPTS = ["abcdefg", "a", "ccc", "bad", "gg", "hifa", "dcba", "e", "abcd", "i"]


def prompt_sum(prompts, prompt_lengths, rollout):
    """A measure that tells prompts apart."""
    inside = jnp.arange(prompts.shape[1])[None] < prompt_lengths[:, None]
    return jnp.sum(jnp.where(inside, prompts, 0), axis=1) + rollout.lengths


@pytest.fixture
def sampler(tmp_path):
    """Of two prompts at a time, greedy, on one device."""
    inputs = types.SimpleNamespace()
    ctx = Context(tmp_path, inputs, some_devices(1, 1), 0)  # type: ignore[arg-type]
    params = case.moved(case.transformer(9), 0.3)  # whose responses differ
    model = Model("language_model", params, case.MODEL, LETTERS, FORM)
    sampling = dataclasses.replace(case.CONFIG.sampling, top_k=1)
    return Sampler(model, sampling, 8, 2, ctx)


def test_groups_of_prompts_give_the_samples_of_each_prompt_alone(sampler, monkeypatch):
    key, params = jax.random.key(1), sampler.model.params
    alone = [
        sampler.measured(params, [prompt], key, {"sum": prompt_sum})
        for prompt in PROMPTS
    ]
    monkeypatch.setattr(widths, "WIDTH_STEP", 2)
    monkeypatch.setattr(widths, "MIN_BATCHES", 1)
    sampler._bounds = None  # as before the first call
    assert sampler.width(PROMPTS) == 8
    shapes = []

    def seen(prompts, prompt_lengths, rollout):
        shapes.append(prompts.shape)
        return prompt_sum(prompts, prompt_lengths, rollout)

    responses, values = sampler.measured(params, PROMPTS, key, {"sum": seen})
    assert shapes == [(2, 2)] * 2 + [(2, 4)] * 2 + [(2, 8)] * 2
    shapes.clear()
    sampler.measured(params, ["abcdefg", "a"], key, {"sum": seen})
    assert shapes == [(2, 2), (2, 8)]  # no new ones where there are fewer prompts
    assert len({r.text for r in responses}) > 4
    for response, value, (one, measured) in zip(
        responses, values["sum"], alone, strict=True
    ):
        np.testing.assert_array_equal(response.ids, one[0].ids)
        assert response.ended == one[0].ended
        assert value == measured["sum"][0]


def test_the_device_draws_the_next_samples_while_the_host_decodes(sampler, monkeypatch):
    events = []

    def seen(owner, name, event):
        original = getattr(owner, name)
        told = lambda *args: (events.append(event), original(*args))[1]  # noqa: E731
        monkeypatch.setattr(owner, name, told)

    seen(sampler, "_generate", "draw")
    seen(jax, "device_get", "read")
    seen(sampler, "_responses", "decode")
    sampler(sampler.model.params, PROMPTS[:6], jax.random.key(0))
    events.remove("read")  # of nothing, before the first
    assert events == [
        *("draw", "read", "draw", "decode"),  # one cache at a time
        *("read", "draw", "decode", "read", "decode"),
    ]


def test_prompts_too_long_are_refused_before_any_is_sampled(sampler):
    for ask in (sampler.width, lambda p: sampler(None, p, jax.random.key(0))):
        with pytest.raises(DataError, match="1 of 2 prompts are longer than 8 tokens"):
            ask(["abc", "abcdefghi"])


def test_no_prompts_are_an_error_that_names_the_limit(sampler):
    with pytest.raises(DataError, match="no prompt of at most 8 tokens"):
        sampler(sampler.model.params, [], jax.random.key(0))


def test_batches_of_equal_prompts_do_not_repeat_each_other(sampler):
    drawn = dataclasses.replace(sampler.sampling, top_k=None, temperature=1.0)
    free = Sampler(sampler.model, drawn, 8, 2, sampler._ctx)
    responses = free(sampler.model.params, ["abc"] * 16, jax.random.key(0))
    pairs = [tuple(r.text for r in responses[i : i + 2]) for i in range(0, 16, 2)]
    assert len(set(pairs)) > 4


def test_a_prompt_as_long_as_the_limit_fits(sampler):
    assert fitting(["abc", "abcd"], sampler.model, 4) == ["abc"]  # and its ":"
