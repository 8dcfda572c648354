"""Devices are an implementation detail: any mesh gives the same numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import by_sizes, some_devices

from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.nn.heads import init_scalar_head
from rlhf_jax.nn.sampling import Sampling, generate
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.stages.ppo_state import init_ppo_state
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.training.mesh import (
    MeshConfig,
    fill_shards,
    jit_measure,
    jit_step,
    num_local_shards,
    pad_rows,
    pmap_step,
    replicas,
    replicated,
    shard_batch,
    shard_whole_batch,
    state_sharding,
)
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

CFG = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, eps=1e-3)
ROWS, T, STEPS = 16, 6, 3


def make_batch(step: int, vocab_size: int) -> TokenBatch:
    """As of demonstrations: row i has weight on a ragged stretch, some rows on none."""
    rng = np.random.default_rng(step)
    ids = rng.integers(0, vocab_size, (ROWS, T + 1)).astype(np.int32)
    start, length = rng.integers(0, 3, (ROWS, 1)), rng.integers(0, 5, (ROWS, 1))
    mask = (np.arange(T) >= start) & (np.arange(T) < start + length)
    return TokenBatch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        weights=(mask / mask.sum()).astype(np.float32),
    )


@pytest.fixture(scope="module")
def train(tiny, random_params):
    """Runs three steps of a language model on a mesh; the same numbers are expected."""
    model = tiny(vocab_size=16)
    loss = functools.partial(lm_loss, model=model)

    def make():
        return init_state(random_params(model), jax.random.key(0))

    def on_mesh(mesh):
        step = make_train_step(loss, CFG, 10, mesh=replicas(mesh))
        sharding = state_sharding(mesh, jax.eval_shape(make))
        state = jax.device_put(make(), sharding)
        compiled = jit_step(step, mesh, sharding)
        losses = []
        for i in range(STEPS):
            batch = shard_batch(mesh, make_batch(i, model.vocab_size))
            state, metrics = compiled(state, batch, CFG.scalars())
            losses.append(float(metrics["loss"]))
        return losses, state

    def on_pmap():
        step = pmap_step(make_train_step(loss, CFG, 10, axis_name="devices"))
        state, losses = make(), []
        for i in range(STEPS):
            batch = jax.tree.map(
                lambda x: x.reshape(8, -1, *x.shape[1:]),
                make_batch(i, model.vocab_size),
            )
            state, metrics = step(state, batch, CFG.scalars())
            losses.append(float(metrics["loss"]))
        return losses, state

    return lambda mesh: on_pmap() if mesh is None else on_mesh(mesh)


@pytest.fixture(scope="module")
def on_one_device(train):
    losses, state = train(some_devices(1, 1))
    return losses, jax.device_get(state.params)


# (data, fsdp, tensor); four devices do not divide the two heads, which stay whole
MESHES = [(2, 1), (1, 2), (4, 2), (1, 1, 2), (2, 2, 2)]
MESHES += [
    pytest.param(shape, marks=pytest.mark.slow)
    for shape in [(4, 1), (2, 2), (1, 4), (8, 1), (1, 8)]
    + [(2, 1, 2), (1, 2, 2), (4, 1, 2), (1, 4, 2), (1, 1, 4)]
]


@pytest.mark.parametrize("shape", [*MESHES, "pmap"], ids=by_sizes)
def test_any_devices_learn_what_one_learns(shape, train, on_one_device):
    mesh = None if shape == "pmap" else some_devices(*shape)
    losses, state = train(mesh)
    expected_losses, expected_params = on_one_device
    assert expected_losses[0] != expected_losses[-1]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.device_get(state.params),
        expected_params,
    )
    if mesh is not None:
        whole = state.params["embed"]
        parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
        assert whole.addressable_shards[0].data.size * parts == whole.size
        assert len(whole.sharding.device_set) == math.prod(shape)


def test_leaves_are_cut_along_their_largest_axis_that_divides(tiny):
    mesh = MeshConfig(fsdp=8).make()
    like = jax.ShapeDtypeStruct
    state = {
        "wide": like((8, 3, 64), jnp.float32),
        "odd": like((7, 9), jnp.float32),
        "scalar": like((), jnp.float32),
        "small": like((4,), jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    specs = jax.tree.map(lambda s: s.spec, state_sharding(mesh, state))
    assert specs == {
        "wide": jax.P(None, None, "fsdp"),
        "odd": jax.P(),
        "scalar": jax.P(),
        "small": jax.P(),
        "key": jax.P(),
    }
    without = jax.tree.map(lambda s: s.spec, state_sharding(some_devices(1, 1), state))
    assert set(without.values()) == {jax.P()}


# what tensor cuts, and then fsdp of the rest
CUTS = {
    "attn_norm/scale": jax.P(None, "fsdp"),
    "qkv/w": jax.P(None, "fsdp", None, "tensor", None),
    "qkv/b": jax.P(None, None, "tensor", "fsdp"),
    "attn_out/w": jax.P(None, "tensor", None, "fsdp"),
    "attn_out/b": jax.P(None, "fsdp"),
    "mlp_up/w": jax.P(None, "fsdp", "tensor"),
    "mlp_up/b": jax.P("fsdp", "tensor"),
    "mlp_down/w": jax.P(None, "tensor", "fsdp"),
    "mlp_down/b": jax.P(None, "fsdp"),
    "embed": jax.P("tensor", "fsdp"),
    "pos_embed": jax.P("fsdp", None),
    "final_norm/scale": jax.P("fsdp"),
    "head/w": jax.P("fsdp"),
    "head/b": jax.P(),
}


def test_tensor_cuts_by_names_wherever_a_model_stands(tiny):
    """Policy, value model, average and both models' moments of Adam."""
    cfg = tiny(vocab_size=12)
    policy = jax.eval_shape(lambda: init_params(jax.random.key(0), cfg))
    value = {
        "transformer": policy,
        "head": jax.eval_shape(lambda: init_scalar_head(jax.random.key(0), 16)),
    }
    make = functools.partial(init_ppo_state, kl_coef=0.1, key=jax.random.key(0))
    state = jax.eval_shape(make, policy, value)
    sharding = state_sharding(some_devices(1, 2, 2), state)
    seen = dict.fromkeys(CUTS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(sharding):
        names = [getattr(part, "key", "") for part in path]
        for name in {"/".join(names[-2:]), names[-1]} & CUTS.keys():
            assert leaf.spec == CUTS[name], (path, leaf.spec)
            seen[name] += 1
    assert {seen.pop("head/w"), seen.pop("head/b")} == {3}  # value model, two moments
    assert set(seen.values()) == {7}  # two models with two moments each, the average


def test_what_tensor_does_not_divide_stays_whole_along_it(tiny):
    cfg = tiny(vocab_size=11)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), cfg))
    sharding = state_sharding(some_devices(1, 1, 4), shapes)
    assert sharding["embed"].spec == jax.P()
    assert sharding["blocks"]["qkv"]["w"].spec == jax.P()
    assert sharding["blocks"]["mlp_up"]["w"].spec == jax.P(None, None, "tensor")


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_an_fsdp_that_does_not_divide_names_what_does(fsdp):
    with pytest.raises(ValueError, match=r"8 devices; valid: \[1, 2, 4, 8\]"):
        MeshConfig(fsdp=fsdp).make()


@pytest.mark.parametrize(
    ("fsdp", "tensor", "named"),
    [
        (1, 0, r"tensor = 0 does not divide the 8 devices; valid: \[1, 2, 4, 8\]"),
        (1, 3, r"tensor = 3 does not divide the 8 devices; valid: \[1, 2, 4, 8\]"),
        (8, 2, r"fsdp = 8 .* the 4 groups of 2 devices; valid: \[1, 2, 4\]"),
    ],
)
def test_a_tensor_that_does_not_divide_names_what_does(fsdp, tensor, named):
    with pytest.raises(ValueError, match=named):
        MeshConfig(fsdp=fsdp, tensor=tensor).make()


def test_tensor_stays_within_a_process(monkeypatch):
    """Each process makes rows of its own, which devices along tensor would share."""
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"2 devices of a process; valid: \[1, 2\]"):
        MeshConfig(tensor=4).make()


def test_devices_along_tensor_are_those_of_one_process(monkeypatch):
    """In whatever order JAX lists them."""
    mixed = [jax.devices()[i] for i in (5, 0, 3, 6, 1, 4, 7, 2)]
    monkeypatch.setattr(jax, "devices", lambda: mixed)
    mesh = MeshConfig(tensor=2).make()
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(4, 1, 2))


def test_rows_that_cannot_be_dealt_are_refused():
    mesh = MeshConfig().make()
    with pytest.raises(ValueError, match="12 rows per process .* over 8 local parts"):
        shard_batch(mesh, {"x": np.zeros((12, 2))})
    shard_batch(MeshConfig(tensor=2).make(), {"x": np.zeros((12, 2))})


def test_stages_that_measure_the_same_share_one_program():
    traces = []

    def scaled(x, factor):
        traces.append(factor)
        return factor * x

    one, two = some_devices(1, 1), some_devices(2, 1)
    for mesh, factor in ((one, 2.0), (one, 2.0), (one, 3.0), (two, 2.0), (one, 2.0)):
        result = jit_measure(scaled, mesh, factor=factor)(jnp.ones(2))
        np.testing.assert_array_equal(result, factor)
        assert result.sharding.mesh == mesh
    assert traces == [2.0, 3.0, 2.0]


@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 2)], ids=by_sizes
)
def test_any_devices_sample_the_same_tokens(shape, tiny, random_params):
    model = tiny(vocab_size=16)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 16, (4, 5)).astype(np.int32)
    ids = (prompts, np.arange(1, 5, dtype=np.int32))
    static = {"eos_id": 3, "pad_id": 3, "sampling": Sampling(response_len=6)}

    def sample(mesh):
        params = random_params(model)
        params = jax.device_put(params, state_sharding(mesh, params))
        compiled = jit_measure(generate, mesh, model=model, **static)
        batch = shard_whole_batch(mesh, ids)
        return compiled(params, *batch, jax.random.key(1), jnp.float32(1.0))

    rollout, expected = sample(some_devices(*shape)), sample(some_devices(1, 1))
    assert len(set(np.asarray(expected.lengths))) > 1
    np.testing.assert_array_equal(rollout.responses, expected.responses)
    np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (4, 1), (1, 2), (2, 2)])
def test_a_sharded_batch_keeps_its_rows_in_order(fsdp, tensor):
    mesh = MeshConfig(fsdp=fsdp, tensor=tensor).make()
    rows = np.arange(32, dtype=np.int32).reshape(16, 2)
    batch = shard_batch(mesh, rows)
    np.testing.assert_array_equal(batch, rows)
    shards = [s.data.shape for s in batch.addressable_shards]
    assert shards == [(2 * tensor, 2)] * 8
    shards = num_local_shards(mesh)
    assert shards == 8 // tensor
    assert [fill_shards(n, mesh) for n in (1, 8, 9)] == [shards, 8, 9 + -9 % shards]
    assert replicated(mesh).is_fully_replicated


def test_rows_that_fill_up_for_the_devices_weigh_nothing():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, (3, 4)).astype(np.int32)
    batch = TokenBatch(tokens, tokens + 1, np.full((3, 4), 1 / 12, np.float32))
    wide = pad_rows(batch, 8)
    assert [x.shape for x in (wide.tokens, wide.targets, wide.weights)] == [(8, 4)] * 3
    np.testing.assert_array_equal(wide.tokens[:3], tokens)
    assert wide.weights[3:].sum() == 0 and wide.weights.dtype == np.float32
    assert len(pad_rows(wide, 4).tokens) == 8


def test_rows_that_fill_up_change_neither_loss_nor_gradient_nor_dropout(tiny):
    """Whatever the number of devices, rows draw the masks that they draw alone."""
    cfg = tiny(dropout=0.3)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, cfg.vocab_size, (3, T)).astype(np.int32)
    weights = np.full((3, T), 1 / (3 * T), np.float32)
    batch = TokenBatch(tokens, tokens[:, ::-1].copy(), weights)
    params = init_params(jax.random.key(0), cfg)

    def loss(params, batch):
        return lm_loss(params, batch, jax.random.key(2), model=cfg)[0]

    alone, padded = (
        jax.jit(jax.value_and_grad(loss))(params, jax.tree.map(jnp.asarray, b))
        for b in (batch, pad_rows(batch, 8))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        alone,
        padded,
    )


def test_a_level_of_optimisation_that_the_user_asks_for_is_left_alone(monkeypatch):
    """Otherwise CPU programs are compiled at level 1: sooner, and as fast."""
    mesh, options = some_devices(2, 1), []
    monkeypatch.setattr(
        jax, "jit", lambda step, **how: options.append(how["compiler_options"])
    )
    for flags in (
        "--xla_gpu_deterministic_ops=true",
        "--xla_backend_optimization_level=3",
    ):
        monkeypatch.setenv("XLA_FLAGS", flags)
        jit_step(len, mesh, None)
    assert options == [{"xla_backend_optimization_level": 1}, None]
