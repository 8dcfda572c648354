"""What the devices say to each other, read from the compiled program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import some_devices

from rlhf_jax.data.batches import TokenBatch
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
def program(tiny, random_params):
    """Text of a train step on 8 devices: two microbatches, the head in three chunks."""
    model = tiny(vocab_size=16)
    params = random_params(model)
    ids = np.zeros((32, 7), np.int32)
    weights = np.full((32, 6), 1 / 192, np.float32)
    mesh = some_devices(8, 1)
    batch = shard_batch(mesh, TokenBatch(ids[:, :-1], ids[:, 1:], weights))

    def compile_with(local: bool) -> str:
        opt = OptimizerConfig()
        loss = functools.partial(lm_loss, model=model)
        where = replicas(mesh) if local else None
        step = make_train_step(loss, opt, 10, num_microbatches=2, mesh=where)
        state = init_state(jax.tree.map(jnp.copy, params), jax.random.key(0))
        sharding = state_sharding(mesh, state)
        state = jax.device_put(state, sharding)
        compiled = jit_step(step, mesh, sharding)
        return compiled.lower(state, batch, opt.scalars()).compile().as_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_modeling, "MAX_LOGITS", 2 * 2 * 16)  # rows, steps, V
        return {local: compile_with(local) for local in (True, False)}


def test_gradients_meet_once_and_after_all_loops(program):
    """Each device adds up its microbatches and chunks; no batch is gathered."""
    assert collectives_in_loops(program[True]) == []
    assert set(COLLECTIVES.findall(program[True])) == {"all-reduce"}


def test_left_to_the_compiler_they_meet_in_every_chunk(program):
    """What the mesh argument is for, and that the test above can fail."""
    assert collectives_in_loops(program[False])
