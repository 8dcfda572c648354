import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from rlhf_jax.nn import transformer as transformer_module
from rlhf_jax.nn.attention import causal_attention
from rlhf_jax.nn.heads import lm_logits
from rlhf_jax.nn.responses import forward_responses, last_response_states
from rlhf_jax.nn.transformer import (
    block,
    forward,
    init_params,
)

NORMS = ["pre", "post"]
PROMPT_LENGTHS = np.array([1, 3, 5], np.int32)
RESPONSE_LENGTHS = np.array([[4, 1], [2, 4], [0, 3]])  # [B, K]
B, P, K, R = 3, 5, 2, 4


@pytest.fixture(scope="module")
def ragged():
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 11, (B, P)).astype(np.int32)
    responses = rng.integers(0, 11, (B, K, R)).astype(np.int32)
    return prompts, responses


def real_states() -> np.ndarray:
    """True on the states of forward_responses that have read real tokens only."""
    return np.arange(R + 1) <= RESPONSE_LENGTHS[..., None]


def spoil_padding(prompts, responses):
    """Other tokens wherever there is padding, the same ones elsewhere."""
    prompt_pad = np.arange(P) >= PROMPT_LENGTHS[:, None]
    response_pad = np.arange(R) >= RESPONSE_LENGTHS[..., None]
    return (
        np.where(prompt_pad, (prompts + 3) % 11, prompts),
        np.where(response_pad, (responses + 5) % 11, responses),
    )


# --------------------------------------------------------------------- one sequence


@pytest.mark.parametrize("norm", NORMS)
def test_forward_is_the_published_model(mode, tiny, random_params, norm):
    cfg = tiny(norm=norm)
    params = random_params(cfg)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9)).astype(np.int32)
    hidden = mode(lambda params, tokens: forward(params, tokens, cfg))(params, tokens)
    for row in range(2):
        expected = oracle.hidden_states(params, tokens[row], norm)
        np.testing.assert_allclose(hidden[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_no_state_depends_on_later_tokens_and_each_on_all_before(
    tiny, random_params, norm
):
    cfg = tiny(norm=norm)
    params = random_params(cfg)
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    direction = jax.random.normal(jax.random.key(1), (16,))

    def read(positions):  # every position has its own embedding to differentiate
        return forward({**params, "pos_embed": positions}, tokens, cfg)[0] @ direction

    jacobian = jax.jit(jax.jacrev(read))(params["pos_embed"])  # [T, max_len, D]
    influence = np.max(np.abs(jacobian), axis=-1)
    for t in range(6):
        assert np.all(influence[t, : t + 1] > 1e-5)
        assert np.all(influence[t, t + 1 :] == 0.0)


def test_right_padding_changes_no_real_state(tiny, random_params):
    cfg = tiny()
    params = random_params(cfg)
    run = jax.jit(lambda tokens: forward(params, tokens, cfg))
    tokens = np.arange(6, dtype=np.int32)[None]
    padded = np.concatenate([tokens, np.full((1, 4), 7, np.int32)], axis=1)
    np.testing.assert_allclose(run(padded)[:, :6], run(tokens), atol=1e-5)


def test_positions_beyond_the_model_are_refused_with_advice(tiny, random_params):
    cfg = tiny(max_len=4)
    params = random_params(cfg)
    with pytest.raises(ValueError, match="max_len 4; shorten"):
        forward(params, jnp.zeros((1, 5), jnp.int32), cfg)
    with pytest.raises(ValueError, match="max_len 4; shorten"):
        forward_responses(
            params,
            jnp.zeros((1, 3), jnp.int32),
            jnp.ones((1,), jnp.int32),
            jnp.zeros((1, 1, 2), jnp.int32),
            cfg,
        )


# ----------------------------------------------------------------- many responses


@pytest.mark.parametrize("norm", NORMS)
def test_shared_prompt_gives_the_states_of_separate_sequences(
    mode, tiny, random_params, ragged, norm
):
    cfg = tiny(norm=norm)
    params = random_params(cfg)
    prompts, responses = ragged
    run = mode(lambda params, *batch: forward_responses(params, *batch, cfg))
    hidden = run(params, prompts, jnp.asarray(PROMPT_LENGTHS), responses)
    assert hidden.shape == (B, K, R + 1, 16)
    for b in range(B):
        for k in range(K):
            start, length = PROMPT_LENGTHS[b], RESPONSE_LENGTHS[b, k]
            sequence = np.concatenate([prompts[b, :start], responses[b, k, :length]])
            expected = oracle.hidden_states(params, sequence, norm)[start - 1 :]
            np.testing.assert_allclose(
                hidden[b, k, : length + 1], expected, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("few", [True, False], ids=["unrolled", "looped"])
@pytest.mark.parametrize("norm", NORMS)
def test_last_states_and_their_gradients_are_those_of_all_states(
    monkeypatch, tiny, random_params, ragged, norm, few
):
    if not few:
        monkeypatch.setattr(transformer_module, "MAX_UNROLLED", 0)
    cfg = tiny(norm=norm)
    params, lengths = random_params(cfg), jnp.asarray(RESPONSE_LENGTHS)
    prompts, responses = ragged
    batch = prompts, jnp.asarray(PROMPT_LENGTHS), responses
    cotangent = jax.random.normal(jax.random.key(5), (B, K, 16))

    def from_all(params):
        hidden = forward_responses(params, *batch, cfg)
        index = lengths[:, :, None, None]
        last = jnp.take_along_axis(hidden, index, axis=2)[:, :, 0]
        return jnp.sum(last * cotangent), last

    def alone(params):
        last = last_response_states(params, *batch, lengths, cfg)
        return jnp.sum(last * cotangent), last

    grads = [jax.jit(jax.grad(f, has_aux=True))(params) for f in (alone, from_all)]
    assert_trees_close(grads[0][1], grads[1][1], atol=1e-5, rtol=1e-5)
    assert_trees_close(grads[0][0], grads[1][0], atol=1e-4, rtol=1e-4)


def response_loss(params, prompts, responses, cfg):
    cotangent = jax.random.normal(jax.random.key(5), (B, K, R + 1, 16))
    lengths = jnp.asarray(PROMPT_LENGTHS)
    hidden = forward_responses(params, prompts, lengths, responses, cfg)
    real = jnp.asarray(real_states())[..., None]
    return jnp.sum(jnp.where(real, hidden * cotangent, 0.0))


def separate_loss(params, prompts, responses, cfg):
    """The same loss from one right-padded sequence for each response."""
    cotangent = jax.random.normal(jax.random.key(5), (B, K, R + 1, 16))
    sequences = np.zeros((B, K, P + R), np.int32)
    reads = np.zeros((B, K, P + R, R + 1), np.float32)  # which state is which
    for b, k in np.ndindex(B, K):
        start, length = PROMPT_LENGTHS[b], RESPONSE_LENGTHS[b, k]
        sequences[b, k, :start] = prompts[b, :start]
        sequences[b, k, start : start + length] = responses[b, k, :length]
        reads[b, k, start - 1 : start + length, : length + 1] = np.eye(length + 1)
    hidden = forward(params, jnp.asarray(sequences.reshape(B * K, -1)), cfg)
    states = jnp.einsum("bktd,bktr->bkrd", hidden.reshape(B, K, P + R, 16), reads)
    return jnp.sum(states * cotangent)


def assert_trees_close(actual, expected, **tolerance):
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            a, e, err_msg=jax.tree_util.keystr(path), **tolerance
        )


@pytest.fixture(scope="module")
def response_grad(tiny):
    """Compiled gradient of one fixed loss over the real states of `ragged` shapes."""
    return jax.jit(
        lambda params, *batch: jax.grad(response_loss)(params, *batch, tiny())
    )


def test_shared_prompt_gives_the_gradients_of_separate_sequences(
    tiny, random_params, ragged, response_grad
):
    params = random_params(tiny())
    separate = jax.jit(jax.grad(lambda params: separate_loss(params, *ragged, tiny())))
    actual, expected = response_grad(params, *ragged), separate(params)
    assert_trees_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_what_stands_in_padding_touches_no_gradient(
    tiny, random_params, ragged, response_grad
):
    params = random_params(tiny())
    actual = response_grad(params, *spoil_padding(*ragged))
    assert_trees_close(actual, response_grad(params, *ragged), atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def compiled_responses(tiny, random_params):
    cfg = tiny()
    run = jax.jit(lambda params, *batch: forward_responses(params, *batch, cfg))
    params = random_params(cfg)
    return lambda *batch: np.asarray(run(params, *batch))


def test_what_stands_in_padding_touches_no_real_state(ragged, compiled_responses):
    prompts, responses = ragged
    lengths = jnp.asarray(PROMPT_LENGTHS)
    clean = compiled_responses(prompts, lengths, responses)
    spoiled_prompts, spoiled_responses = spoil_padding(*ragged)
    spoiled = compiled_responses(spoiled_prompts, lengths, spoiled_responses)
    np.testing.assert_array_equal(spoiled[real_states()], clean[real_states()])


def test_order_of_responses_only_permutes_the_states(ragged, compiled_responses):
    prompts, responses = ragged
    lengths = jnp.asarray(PROMPT_LENGTHS)
    forwards = compiled_responses(prompts, lengths, responses)
    backwards = compiled_responses(prompts, lengths, responses[:, ::-1])
    np.testing.assert_allclose(backwards[:, ::-1], forwards, atol=1e-5)


def test_wider_padding_changes_no_real_state(ragged, compiled_responses):
    prompts, responses = ragged
    lengths = jnp.asarray(PROMPT_LENGTHS)
    narrow = compiled_responses(prompts, lengths, responses)
    wide = compiled_responses(
        np.pad(prompts, ((0, 0), (0, 3)), constant_values=9),
        lengths,
        np.pad(responses, ((0, 0), (0, 0), (0, 2)), constant_values=9),
    )
    real = real_states()
    np.testing.assert_allclose(wide[:, :, : R + 1][real], narrow[real], atol=1e-5)


# ------------------------------------------------------- remat, dropout, dtype, init


@pytest.mark.parametrize("remat", ["elementwise", "block"])
def test_recomputing_changes_neither_value_nor_gradient(tiny, random_params, remat):
    params = random_params(tiny())
    tokens = jnp.arange(6, dtype=jnp.int32)[None]

    def run(cfg):
        return jax.jit(
            jax.value_and_grad(
                lambda params: jnp.sum(
                    jnp.sin(forward(params, tokens, cfg, jax.random.key(3)))
                )
            )
        )(params)

    plain, recomputed = run(tiny(dropout=0.3)), run(tiny(dropout=0.3, remat=remat))
    assert_trees_close(recomputed, plain, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def dropped_sums(tiny, random_params):
    """Sums of three blocks' outputs, 1 for each before dropout of 0.4: [B, T, D]."""
    cfg = tiny(num_layers=3, dropout=0.4)
    params = jax.tree.map(jnp.zeros_like, random_params(cfg))
    del params["final_norm"]  # the residual stream itself
    for name in ("attn_out", "mlp_down"):
        params["blocks"][name]["b"] += 1.0
    tokens = jnp.zeros((20, 30), jnp.int32)
    return jax.jit(lambda key: forward(params, tokens, cfg, key))


def test_dropout_is_off_without_a_key(dropped_sums):
    np.testing.assert_array_equal(dropped_sums(None), 6.0)


def test_dropout_keeps_the_mean_and_draws_each_sublayer_apart(dropped_sums):
    rate, sublayers = 0.4, 6
    sums = np.asarray(dropped_sums(jax.random.key(2)))
    kept = sums * (1 - rate)  # a binomial number of sub-layers
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-5)
    variance = sublayers * rate * (1 - rate)
    assert np.mean(kept) == pytest.approx(
        sublayers * (1 - rate), abs=4 * math.sqrt(variance / kept.size)
    )
    assert np.var(kept) == pytest.approx(variance, rel=0.06)  # equal masks: 6 times


def test_dropout_follows_its_key(dropped_sums):
    one, two, again = (dropped_sums(jax.random.key(seed)) for seed in (1, 2, 1))
    np.testing.assert_array_equal(one, again)
    assert np.any(np.asarray(one) != np.asarray(two))


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_states_stay_near_float32(tiny, random_params, norm):
    params = random_params(tiny())
    if norm == "post":
        params = {name: leaf for name, leaf in params.items() if name != "final_norm"}
    tokens = np.random.default_rng(0).integers(0, 11, (4, 12)).astype(np.int32)

    def run(dtype):
        cfg = tiny(norm=norm, dtype=dtype)
        return jax.jit(lambda tokens: forward(params, tokens, cfg))(tokens)

    full, half = run("float32"), run("bfloat16")
    assert half.dtype == jnp.bfloat16
    error = np.asarray(half, np.float32) - np.asarray(full)
    relative = np.sqrt(np.mean(error**2) / np.mean(np.asarray(full) ** 2))
    assert relative < 4 * 2**-8  # 4 units in the last place of bfloat16, r.m.s.
    assert relative > 1e-5  # the activations really were bfloat16


@pytest.fixture(scope="module")
def untrained(tiny):
    cfg = tiny(num_layers=3, model_dim=64, num_heads=4, max_len=128, vocab_size=500)
    return cfg, jax.jit(lambda key: init_params(key, cfg))(jax.random.key(0))


def test_initial_leaves_have_their_stated_distribution(untrained):
    cfg, params = untrained
    blocks = params["blocks"]
    residual = 0.02 / math.sqrt(2 * cfg.num_layers)
    stds = [
        (params["embed"], 0.02),
        (params["pos_embed"], 0.01),
        (blocks["qkv"]["w"], 0.02),
        (blocks["mlp_up"]["w"], 0.02),
        (blocks["attn_out"]["w"], residual),
        (blocks["mlp_down"]["w"], residual),
    ]
    for leaf, std in stds:
        assert float(jnp.std(leaf)) == pytest.approx(std, rel=0.05)
        assert abs(float(jnp.mean(leaf))) < 4 * std / math.sqrt(leaf.size)
    for name in ("qkv", "attn_out", "mlp_up", "mlp_down"):
        assert not np.any(blocks[name]["b"])
    for norm in (blocks["attn_norm"], blocks["mlp_norm"], params["final_norm"]):
        assert np.all(np.asarray(norm["scale"]) == 1.0) and not np.any(norm["bias"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    layers = np.asarray(blocks["qkv"]["w"])
    assert not np.allclose(layers[0], layers[1])  # layers are drawn apart


def test_embed_std_scales_the_token_embeddings_alone(untrained):
    cfg, params = untrained
    wide = init_params(jax.random.key(0), dataclasses.replace(cfg, embed_std=0.1))
    np.testing.assert_allclose(wide["embed"], 5.0 * params["embed"], rtol=1e-5)
    rest = [{k: v for k, v in p.items() if k != "embed"} for p in (wide, params)]
    chex.assert_trees_all_close(*rest, rtol=1e-6)


def test_untrained_model_predicts_all_tokens_alike(untrained):
    cfg, params = untrained
    tokens = np.random.default_rng(0).integers(0, 500, (4, 32)).astype(np.int32)
    run = jax.jit(lambda tokens: lm_logits(params, forward(params, tokens, cfg)))
    logits = np.asarray(run(tokens))
    losses = [
        -oracle.log_softmax(logits[b, t])[tokens[b, t + 1]]
        for b, t in np.ndindex(4, 31)
    ]
    assert np.mean(losses) == pytest.approx(math.log(500), abs=0.05)


def test_untrained_blocks_pass_the_stream_on_or_normalise_it(untrained):
    cfg, params = untrained
    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x = np.random.default_rng(1).normal(size=(1, 3, 64)).astype(np.float32)
    pre, post = (
        block(layer, x, causal_attention, dataclasses.replace(cfg, norm=norm))
        for norm in NORMS
    )
    np.testing.assert_allclose(np.mean(post, axis=-1), 0.0, atol=1e-5)
    assert float(jnp.max(jnp.abs(pre - x))) < 0.1 < float(jnp.max(jnp.abs(post - x)))


def test_unrolled_layers_and_a_loop_over_layers_agree(monkeypatch, tiny, random_params):
    cfg = tiny()
    params = random_params(cfg)
    tokens = np.random.default_rng(3).integers(0, cfg.vocab_size, (2, 5), np.int32)

    def value_and_grad(max_unrolled):
        monkeypatch.setattr(transformer_module, "MAX_UNROLLED", max_unrolled)

        def loss(params):
            return jnp.mean(jnp.sin(forward(params, tokens, cfg)))

        (scan,) = (
            e for e in jax.make_jaxpr(loss)(params).eqns if "scan" in str(e.primitive)
        )
        assert scan.params["unroll"] == (cfg.num_layers if max_unrolled else 1)
        return jax.value_and_grad(loss)(params)

    unrolled, looped = value_and_grad(cfg.num_layers), value_and_grad(0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        unrolled,
        looped,
    )
