"""The formulas count what XLA counts in the compiled programs, to 5 %."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.nn import transformer
from rlhf_jax.nn.config import PUBLISHED_SIZES, TransformerConfig
from rlhf_jax.nn.decoding import decode_step, layers_apart, prefill
from rlhf_jax.nn.heads import lm_logits
from rlhf_jax.nn.responses import forward_responses, last_response_states
from rlhf_jax.nn.transformer import cast_once, init_params
from rlhf_jax.stages.pretrain import lm_loss, sum_logprobs
from rlhf_jax.training import costs

CFG = TransformerConfig(
    num_layers=3, model_dim=128, num_heads=2, max_len=256, vocab_size=640
)


def flops_of(function, *shapes) -> float:
    compiled = jax.jit(function).lower(*shapes).compile()
    return compiled.cost_analysis()["flops"]  # type: ignore[index]


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(lambda: init_params(jax.random.key(0), CFG))


@pytest.fixture(scope="module")
def batch():
    weights = jax.ShapeDtypeStruct((4, 160), jnp.float32)
    return TokenBatch(ids(4, 160), ids(4, 160), weights)  # type: ignore[arg-type]


def test_a_forward_pass_with_logits(params, batch):
    counted = flops_of(functools.partial(sum_logprobs, model=CFG), params, batch)
    assert costs.forward(CFG, 640, 160, 640).flops == pytest.approx(counted, rel=0.05)


def test_a_backward_pass_is_two_forwards(params, batch):
    def grad(params, batch):
        return jax.grad(lambda p: lm_loss(p, batch, None, model=CFG)[0])(params)  # type: ignore[arg-type]

    formula = 3 * costs.forward(CFG, 640, 160, 640).flops
    assert formula == pytest.approx(flops_of(grad, params, batch), rel=0.05)


@pytest.mark.parametrize("responses", [1, 4])
def test_responses_that_share_a_prompt(params, responses):
    B, P, R = 2, 96, 64
    shapes = params, ids(B, P), ids(B), ids(B, responses, R)
    counted = flops_of(functools.partial(forward_responses, cfg=CFG), *shapes)
    work = costs.shared_prompt(CFG, P, responses, R, scored=False)
    assert B * work.flops == pytest.approx(counted, rel=0.05)

    lengths = ids(B, responses)
    scored = functools.partial(last_response_states, cfg=CFG)
    work = costs.shared_prompt(CFG, P, responses, R, scored=True)
    assert B * work.flops == pytest.approx(flops_of(scored, *shapes, lengths), rel=0.05)


def test_layers_in_a_loop_are_all_computed(monkeypatch):
    monkeypatch.setattr(transformer, "MAX_UNROLLED", 0)
    looped, whole = (costs.shared_prompt(CFG, 9, 2, 7, s).flops for s in (True, False))
    assert looped == whole


def test_prefill_is_a_loop_of_equal_layers_and_keys_and_values(params):
    """XLA counts the body of its loop once: one layer, and the last one's cache."""
    B, P = 4, 97
    prefilled = functools.partial(prefill, cfg=CFG, num_columns=1)
    two_layers = dataclasses.replace(CFG, num_layers=2)
    counted = flops_of(prefilled, params, ids(B, P))
    formula = costs.prefill(two_layers, B, P).flops
    assert formula == pytest.approx(counted, rel=0.05)


def test_a_decoding_step_reads_weights_and_cache(params):
    """FLOPs as XLA counts them, with the head; bytes as the arrays have."""
    B, S = 4, 96
    P, R = S - 3, 4  # `generate` makes a cache of P - 1 + R columns
    cache = jax.eval_shape(lambda p, x: prefill(p, x, CFG, R), params, ids(B, P))
    layers = jax.eval_shape(lambda p: layers_apart(p, CFG), params)

    def step(layers, cache, tokens, positions, mask):
        hidden, _ = decode_step(
            layers, cache, tokens, positions, jnp.int32(S - 1), mask, CFG
        )
        return lm_logits(layers, hidden)

    mask = jax.ShapeDtypeStruct((B, S), jnp.bool_)
    counted = flops_of(step, layers, cache, ids(B), ids(B), mask)
    whole = costs.decoding(CFG, B, P, R)
    assert whole.flops / R == pytest.approx(counted, rel=0.05)
    weights = 4 * (costs.block_params(CFG) + 640 * 128)
    held = sum(x.size * 4 for x in jax.tree.leaves(cache))
    assert whole.bytes / 4 == pytest.approx(weights + held)


def test_decoding_reads_what_its_stretch_may_fill():
    """128 tokens in two parts that read 64 and 128 columns and the prompt."""
    whole = costs.decoding(CFG, 4, 33, 128)
    rows = 4 * 2 * CFG.num_layers * CFG.model_dim * 4  # bytes of a column
    weights = 4 * (costs.block_params(CFG) + 640 * 128)
    assert whole.bytes == 128 * (weights + rows * (32 + 96))
    attention = 4 * CFG.num_layers * CFG.model_dim * 4 * 128 * (32 + 96)
    products = 2 * 4 * 128 * (costs.block_params(CFG) + 640 * 128)
    assert whole.flops == attention + products


def test_a_longer_iteration_costs_in_proportion():
    """Doubling episodes doubles FLOPs; the weights are read once for all of them."""
    one = costs.ppo_iteration(CFG, CFG, 8, 32, 16, 1)
    two = costs.ppo_iteration(CFG, CFG, 16, 32, 16, 1)
    for phase in ("prefill", "decoding", "scores", "update"):
        assert two[phase].flops == pytest.approx(2 * one[phase].flops)
    assert one["decoding"].bytes < two["decoding"].bytes < 2 * one["decoding"].bytes
    four = costs.ppo_iteration(CFG, CFG, 8, 32, 16, 4)
    assert four["update"].flops == pytest.approx(4 * one["update"].flops)


def test_the_papers_pretraining_is_what_it_says():
    """GPT-3 of 175B on 300B tokens took 3 640 petaflop/s-days, at 6 FLOPs a parameter
    and token, attention's products left out (InstructGPT section 4.1)."""
    cfg = PUBLISHED_SIZES["gpt3-175b"]
    days = 6 * costs.block_params(cfg) * 300e9 / (1e15 * 86400)
    assert days == pytest.approx(3640, rel=0.01)
    whole = 3 * costs.forward(cfg, 300e9, 2048, 300e9).flops / (1e15 * 86400)
    assert 1.0 < whole / days < 1.05


def test_bytes_are_those_of_the_arrays():
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), CFG))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert costs.param_bytes(CFG) == costs.frozen_bytes(CFG) == size
    low = dataclasses.replace(CFG, dtype="bfloat16")
    frozen = jax.eval_shape(lambda p: cast_once(p, low)[0], params)
    size_low = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    assert costs.frozen_bytes(low) == size_low < size
    assert costs.training_bytes(CFG, 4) == size
    cache = jax.eval_shape(lambda p, x: prefill(p, x, CFG, 5), params, ids(3, 11))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert costs.cache_bytes(CFG, 3, 15) == held
