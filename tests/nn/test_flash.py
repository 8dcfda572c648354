"""Attention by the TPU's kernel: interpreted, and lowered to what a TPU is given."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from meshes import by_sizes, one_update, some_devices

from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.nn import attention
from rlhf_jax.nn.attention import causal_attention, flash_attention
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.devices import on_each_device
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.stages.pretrain import lm_loss


def inputs(B, T, N=2, H=16):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32) for _ in range(3)]
    documents = jnp.asarray(np.sort(rng.integers(0, 4, (B, T)), axis=1), jnp.int32)
    return arrays, documents


def value_and_gradients(attend, arrays, documents):
    def loss(q, k, v):
        out = attend(q, k, v, documents)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [128, 130, 384])
def test_the_kernel_equals_attention_written_out(length, packed):
    """A block, one and a bit that is filled up, three; states and gradients."""
    arrays, documents = inputs(2, length)
    given = (arrays, documents if packed else None)
    with pltpu.force_tpu_interpret_mode():
        actual = value_and_gradients(flash_attention, *given)
    expected = value_and_gradients(causal_attention, *given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        actual,
        expected,
    )


def program_for_tpu(monkeypatch, shape, **changes):
    """Gradient of the loss on packed text, in bfloat16, layers in a loop, remat."""
    monkeypatch.setattr(attention, "flash", lambda q: q.shape[1] >= 128)
    sizes = {"num_layers": 6, "model_dim": 128, "num_heads": 2, "max_len": 256}
    how = {"dtype": "bfloat16", "document_end": 3, "remat": "block"}
    model = TransformerConfig(**sizes | changes, **how, vocab_size=256)
    mesh = some_devices(*shape)
    like = jax.eval_shape(lambda: init_params(jax.random.key(0), model))

    def loss(params, batch):
        return lm_loss(params, batch, jax.random.key(0), model=model)[0]

    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    shaped = functools.partial(jax.ShapeDtypeStruct, (8, 256), sharding=rows)
    batch = TokenBatch(shaped(jnp.int32), shaped(jnp.int32), shaped(jnp.float32))
    traced = jax.jit(jax.grad(loss)).trace(like, batch)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)], ids=by_sizes)
def test_a_gradient_lowers_for_a_tpu_with_a_kernel_for_each_pass(monkeypatch, shape):
    """Forward, the same again in the backward pass, and two for the gradients."""
    text = program_for_tpu(monkeypatch, shape)
    assert text.count("@tpu_custom_call") == 4


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_published_head_sizes_lower(monkeypatch, head_dim):
    text = program_for_tpu(monkeypatch, (1, 1, 1), model_dim=2 * head_dim)
    assert text.count("@tpu_custom_call") == 4


@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)], ids=by_sizes
)
def test_each_device_computes_its_rows_and_heads_alone(shape):
    """Four devices do not divide two heads, which they then all compute."""
    arrays, documents = inputs(8, 12)
    mesh = some_devices(*shape)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    dealt = [jax.device_put(x, rows) for x in (*arrays, documents)]
    run = jax.jit(functools.partial(on_each_device, causal_attention))
    np.testing.assert_allclose(
        run(*dealt), causal_attention(*arrays, documents), rtol=1e-5, atol=1e-6
    )
    assert "all-" not in run.lower(*dealt).compile().as_text()


def test_rows_that_cannot_be_dealt_stay_whole():
    arrays, documents = inputs(3, 12)
    mesh = some_devices(2, 2, 2)
    dealt = [jax.device_put(x, jax.NamedSharding(mesh, jax.P())) for x in arrays]
    found = jax.jit(functools.partial(on_each_device, causal_attention))(*dealt)
    np.testing.assert_allclose(found, causal_attention(*arrays), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_update_with_the_kernel_is_the_update(tiny, random_params, monkeypatch):
    """Under `shard_map` over two replicas, interpreted."""
    cfg = tiny(max_len=128)
    params = random_params(cfg)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (2, 129)).astype(np.int32)
    weights = np.full((2, 128), 1 / 256, np.float32)
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], weights)
    loss = functools.partial(lm_loss, model=cfg)
    expected = one_update(loss, params, batch)
    seen = []
    monkeypatch.setattr(attention, "flash", lambda q: seen.append(q.shape) or True)
    with pltpu.force_tpu_interpret_mode():
        actual = one_update(lambda *a: loss(*a), params, batch, data=2)
    assert (1, 128, cfg.num_heads, cfg.head_dim) in seen  # a row for each device
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        actual,
        expected,
    )


def test_what_takes_the_kernel(monkeypatch):
    """bfloat16 rows of a block at least, of head sizes that the kernel knows."""

    def taken(T=128, H=64, dtype=jnp.bfloat16):
        return attention.flash(jnp.zeros((1, T, 2, H), dtype))

    assert not taken()  # on this machine
    tpu = types.SimpleNamespace(platform="tpu")
    monkeypatch.setattr(jax, "devices", lambda: [tpu])
    assert taken() and taken(H=80) and taken(H=256)
    assert not any((taken(T=127), taken(H=192), taken(dtype=jnp.float32)))
