"""One update of a stage on some of the test's devices; processes with others."""

import math
import os

import jax
import jax.numpy as jnp

from rlhf_jax.training.mesh import AXES, jit_step, replicas, shard_batch, state_sharding
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step


def some_devices(data: int, fsdp: int, tensor: int = 1) -> jax.sharding.Mesh:
    shape = (data, fsdp, tensor)
    auto = (jax.sharding.AxisType.Auto,) * 3
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


def with_devices(count: int) -> dict[str, str]:
    """Environment of a process with so many CPU devices that compiles as tests do."""
    devices = f" --xla_force_host_platform_device_count={count}"  # the last counts
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + devices}


def by_sizes(shape: tuple[int, ...] | str | int) -> str:
    """Name of a test on a mesh, e.g. 2x1x2; of other parameters themselves."""
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)


def one_update(loss, params, batch, data=1, fsdp=1, tensor=1, num_microbatches=1):
    """Parameters and metrics after the first update on data x fsdp x tensor devices."""
    mesh = some_devices(data, fsdp, tensor)
    optimizer = OptimizerConfig(learning_rate=1e-2, eps=1e-3)
    state = init_state(params, jax.random.key(0))
    sharding = state_sharding(mesh, state)
    state = jax.tree.map(jnp.copy, jax.device_put(state, sharding))
    step = make_train_step(loss, optimizer, 10, num_microbatches, mesh=replicas(mesh))
    compiled = jit_step(step, mesh, sharding)
    state, metrics = compiled(state, shard_batch(mesh, batch), optimizer.scalars())
    metrics.pop("nonfinite")
    return jax.device_get((state.params, metrics))
