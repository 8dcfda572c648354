"""What the devices say to each other, read from the compiled program."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import by_sizes, some_devices

from rlhf_jax.data.batches import TokenBatch, put_loss_first
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.objectives import language_modeling
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.training.mesh import jit_step, replicas, shard_batch, state_sharding
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)"
    r"(?:-start)?\("
)
# of `tensor_program`: B, T, B T and their parts are no other size; an odd length stays
# whole along tensor
B, T, V = 40, 7, 96


def computations(hlo: str) -> dict[str, str]:
    """Name -> body of every computation of a program's text."""
    found = re.finditer(r"^(?:ENTRY )?(%[\w.\-]+) .*?\{\n(.*?)^\}", hlo, re.M | re.S)
    return {match[1]: match[2] for match in found}


def collectives_in_loops(hlo: str) -> list[str]:
    """Collectives within the body of a while loop, nested calls included."""
    bodies = computations(hlo)
    todo = re.findall(r"body=(%[\w.\-]+)", hlo)
    assert todo, "the program has no loop at all"
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += re.findall(
                r"(?:calls|to_apply|body|condition)=(%[\w.\-]+)", bodies[name]
            )
    return [kind for name in seen for kind in COLLECTIVES.findall(bodies[name])]


@pytest.fixture(scope="module")
def compile_step(tiny, random_params):
    """Text of a train step on 8 devices, the loss at half of the positions, which come
    first or not; the head in chunks."""

    def compile_step(
        mesh, local: bool, loss_first: bool, num_microbatches=2, dropout=0.0
    ) -> str:
        model = tiny(vocab_size=16, dropout=dropout)
        params = random_params(model)
        ids = np.zeros((32, 7), np.int32)
        weights = np.tile(np.float32([0, 0, 0, 1, 1, 1]) / 96, (32, 1))
        batch = TokenBatch(ids[:, :-1], ids[:, 1:], weights)
        if loss_first:
            batch = put_loss_first(batch, 8, num_microbatches)
        batch = shard_batch(mesh, batch)
        opt = OptimizerConfig()
        loss = functools.partial(lm_loss, model=model)
        where = replicas(mesh) if local else None
        step = make_train_step(loss, opt, 10, num_microbatches, mesh=where)
        state = init_state(jax.tree.map(jnp.copy, params), jax.random.key(0))
        sharding = state_sharding(mesh, state)
        state = jax.device_put(state, sharding)
        compiled = jit_step(step, mesh, sharding)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(language_modeling, "MAX_LOGITS", 2 * 2 * 16)  # B, steps, V
            patch.setattr(language_modeling, "MIN_CHUNK", 4)  # of 2 x 6 a device
            lowered = compiled.lower(state, batch, opt.scalars())
        return lowered.compile().as_text()

    return compile_step


@pytest.mark.parametrize("loss_first", [False, True])
def test_gradients_meet_once_and_after_all_loops(compile_step, loss_first):
    """Each device adds up its microbatches and chunks; no batch is gathered."""
    hlo = compile_step(some_devices(8, 1), True, loss_first)
    assert collectives_in_loops(hlo) == []
    assert set(COLLECTIVES.findall(hlo)) == {"all-reduce"}


def test_left_to_the_compiler_they_meet_in_every_chunk(compile_step):
    """What the mesh argument is for, and that the test above can fail."""
    assert collectives_in_loops(compile_step(some_devices(8, 1), False, False))


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)], ids=by_sizes)
def test_with_dropout_devices_stop_the_head_early_without_a_word(compile_step, shape):
    """SFT leaves dropout to the compiler: no chunk of the head may wait for others."""
    hlo = compile_step(some_devices(*shape), False, True, 1, dropout=0.2)
    assert collectives_in_loops(hlo) == []
    weights = {"all-gather"} if shape[1] > 1 else set()  # that fsdp has cut
    assert set(COLLECTIVES.findall(hlo)) == {"all-reduce"} | weights


def shapes(hlo: str, kind: str) -> list[tuple[int, ...]]:
    """Shapes of the results of one kind of collective, in the order of the text."""
    lines = re.findall(rf"= (.*?) {kind}(?:-start)?\(", hlo)
    found = [re.findall(r"\w+\[([\d,]*)\]", line) for line in lines]
    return [tuple(int(n) for n in dims.split(",") if n) for f in found for dims in f]


@functools.cache
def tensor_program(
    shape: tuple[int, int, int], part="step", num_layers=2, length=T, remat="none"
) -> str:
    """Text of a train step, or of its loss alone, on (data, fsdp, tensor) devices."""
    model = TransformerConfig(
        num_layers=num_layers,
        model_dim=16,
        num_heads=4,
        max_len=32,
        vocab_size=V,
        remat=remat,
    )
    mesh, opt = some_devices(*shape), OptimizerConfig()
    ids = np.zeros((B, length + 1), np.int32)
    weights = np.full((B, length), 1 / (B * length), np.float32)
    batch = shard_batch(mesh, TokenBatch(ids[:, :-1], ids[:, 1:], weights))
    state = init_state(init_params(jax.random.key(0), model), jax.random.key(0))
    sharding = state_sharding(mesh, state)
    state = jax.device_put(state, sharding)
    loss = functools.partial(lm_loss, model=model)
    if part == "loss":
        compiled = jax.jit(loss).lower(state.params, batch, state.key)
    else:
        step = jit_step(make_train_step(loss, opt, 10), mesh, sharding)
        compiled = step.lower(state, batch, opt.scalars())
    return compiled.compile().as_text()


on_one_or_two_groups = pytest.mark.parametrize(
    "shape",
    [pytest.param((1, 1, 2), marks=pytest.mark.slow), (2, 1, 2)],
    ids=by_sizes,
)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 2)], ids=by_sizes)
def test_devices_that_share_layers_meet_twice_a_layer(shape):
    """After attention and after the MLP, and once for the embeddings; the head's are
    numbers of each token. Nothing else but all-reduces: no weights, rows or logits."""
    hlo = tensor_program(shape, "loss")
    assert set(COLLECTIVES.findall(hlo)) == {"all-reduce"}
    rows = B // shape[0]
    sizes = shapes(hlo, "all-reduce")
    assert sizes.count((rows, T, 16)) == 2 * 2 + 1
    numbers = {(rows * T,), ()}  # maximum and sums of each token's logits; the loss
    assert set(sizes) - numbers == {(rows, T, 16)}


@on_one_or_two_groups
def test_an_update_gathers_nothing_along_tensor(shape):
    """And rows meet over data as gradients, each in the piece its device holds."""
    hlo = tensor_program(shape)
    looped = tensor_program(shape, num_layers=6)
    assert set(COLLECTIVES.findall(hlo + looped)) == {"all-reduce"}
    sizes, rows = shapes(hlo, "all-reduce"), B // shape[0]
    # twice a layer forward and backward, the embeddings, and back from the head
    assert sizes.count((rows, T, 16)) == 4 * 2 + 1
    assert sizes.count((rows * T, 16)) == 1
    gradient = [2, 3, 4, 16]  # of a layer's qkv: two of four heads, in any order
    assert [sorted(x) for x in sizes].count(gradient) == (2 if shape[0] > 1 else 0)
    assert f"f32[{rows * T},{V // 2}]" in hlo and f"f32[{rows * T},{V}]" not in hlo


@on_one_or_two_groups
def test_positions_are_dealt_between_products(shape):
    """Before each layer's two pairs of products and the head a row is put together;
    the residual streams that a loop keeps are dealt; no weight moves."""
    T, rows = 14, B // shape[0]
    for num_layers in (2, 6):
        hlo = tensor_program(shape, "loss", num_layers, T)
        assert set(COLLECTIVES.findall(hlo)) == {"all-reduce", "all-gather"}
        bodies = 1 if num_layers == 6 else num_layers
        assert shapes(hlo, "all-gather") == [(rows, T, 16)] * (2 * bodies + 1)
    hlo = tensor_program(shape, "step", 6, T, "block")
    assert f"f32[6,{rows},{T // 2},16]" in hlo and f"f32[6,{rows},{T},16]" not in hlo
    assert set(shapes(hlo, "all-gather")) == {(rows, T, 16)}


@pytest.mark.parametrize("num_layers", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_where_fsdp_cuts_weights_move_and_positions_meet(num_layers):
    """What is gathered of the batch are whole rows of the devices that share them."""
    T, rows = 14, B // 2
    hlo = tensor_program((1, 2, 2), "step", num_layers, T)
    of_rows = {T, T // 2, B, rows, B * T, rows * T, rows * T // 2}
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        found = {size for size in shapes(hlo, kind) if of_rows & set(size)}
        assert found == ({(rows, T, 16)} if kind == "all-gather" else set()), kind


@pytest.mark.parametrize(
    ("shape", "num_layers"),  # layers written out, and a loop
    [
        ((1, 2, 2), 2),
        ((2, 2, 1), 6),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [((1, 2, 2), 6), ((2, 2, 1), 2), ((2, 2, 2), 2), ((2, 2, 2), 6)]
        ),
    ],
    ids=by_sizes,
)
def test_where_fsdp_cuts_weights_move_and_the_batch_stays(shape, num_layers):
    """Gathers are of parameters' shapes, in the piece that tensor leaves of them."""
    hlo = tensor_program(shape, num_layers=num_layers)
    data, fsdp, tensor = shape
    rows = B // (data * fsdp)
    gathered = shapes(hlo, "all-gather")
    assert (16, 64 // tensor) in gathered  # mlp_up of a layer
    of_rows = {T, B, B // data, rows, B * T, B * T // data, rows * T}
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert not of_rows & {n for size in shapes(hlo, kind) for n in size}, kind
    own = (rows * T, V // tensor)
    assert f"f32[{own[0]},{own[1]}]" in hlo
    for size in itertools.product((rows * T, B // data * T, B * T), (own[1], V)):
        assert size == own or f"f32[{size[0]},{size[1]}]" not in hlo, size
