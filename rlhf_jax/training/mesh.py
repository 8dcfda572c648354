"""Devices: a mesh with data and fsdp axes, and the shardings shapes imply."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are used; the results do not depend on it."""

    fsdp: int = 1
    """Devices that share one copy of the parameters; the others hold replicas."""

    def make(self) -> Mesh:
        """All devices of all processes as (data, fsdp)."""
        count = jax.device_count()
        if self.fsdp < 1 or count % self.fsdp:
            raise ValueError(
                f"fsdp = {self.fsdp} does not divide the {count} devices; "
                f"valid: {[n for n in range(1, count + 1) if count % n == 0]}"
            )
        shape = (count // self.fsdp, self.fsdp)
        auto = (AxisType.Auto, AxisType.Auto)
        return jax.make_mesh(shape, ("data", "fsdp"), axis_types=auto)


def replicas(mesh: Mesh) -> Mesh | None:
    """The mesh, if it has several devices that hold all parameters each; else None."""
    return mesh if mesh.size > 1 and mesh.shape["fsdp"] == 1 else None


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, jax.P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are dealt over all devices."""
    return NamedSharding(mesh, jax.P(("data", "fsdp")))


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Cuts every leaf along its largest axis that the fsdp axis divides.

    Args:
        mesh: of `MeshConfig.make`.
        state: pytree of arrays or shapes.

    Returns:
        The same tree of `NamedSharding`; leaves that cannot be cut are replicated.
    """
    size = mesh.shape["fsdp"]

    def spec(x):
        if size == 1 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return replicated(mesh)
        fits = [i for i, n in enumerate(x.shape) if n % size == 0 and n >= size]
        if not fits:
            return replicated(mesh)
        best = max(fits, key=lambda i: x.shape[i])
        axes = ("fsdp" if i == best else None for i in range(x.ndim))
        return NamedSharding(mesh, jax.P(*axes))

    return jax.tree.map(spec, state)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Puts this process's rows of a NumPy batch on its devices, as one global array.

    Raises:
        ValueError: if the rows cannot be dealt evenly over the devices.
    """
    sharding = batch_sharding(mesh)
    devices = len(mesh.local_devices)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % devices:
        raise ValueError(
            f"{rows} rows per process cannot be dealt over {devices} local devices; "
            "make the batch size a multiple of the number of devices"
        )
    if jax.process_count() == 1:  # all arrays at once: half the time
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def shard_whole_batch(mesh: Mesh, batch: Any) -> Any:
    """Deals the rows of a NumPy batch that every process holds whole over all devices.

    For batches in order, whose results every process needs: evaluation and sampling.
    """
    sharding = batch_sharding(mesh)

    def deal(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(deal, batch)


def pad_rows(batch: Any, multiple: int) -> Any:
    """Repeats the last row with weight 0, up to a multiple, e.g. of the devices.

    Args:
        batch: NumPy arrays with a leading axis of rows, among them `weights`.
        multiple: of which the number of rows shall be one.
    """
    rows = len(batch.weights)
    index = np.minimum(np.arange(rows + -rows % multiple), rows - 1)
    padded = jax.tree.map(lambda x: x[index], batch)
    padded.weights[rows:] = 0.0
    return padded


def place(sharding: Any, tree: Any) -> Any:
    """Moves a pytree of host or device arrays to the given shardings."""
    return jax.tree.map(jax.device_put, tree, sharding)


def jit_step(step: Callable, mesh: Mesh, sharding: Any) -> Callable:
    """Compiles `(state, batch, *rest) -> (state, metrics)`; the old state is donated.

    Args:
        step: the pure update.
        mesh: where the batch lies.
        sharding: of the state, kept by the result.
    """
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(sharding, replicated(mesh)),
        compiler_options=_compiler_options(mesh),
    )


@functools.cache  # stages that measure the same share the program
def jit_measure(measure: Callable, mesh: Mesh, **static: Any) -> Callable:
    """Compiles a function of arrays whose whole result every process gets.

    Args:
        measure: of the module, not made anew for each caller.
        mesh: of the run.
        static: keyword arguments of `measure` that the program is made for.
    """
    return jax.jit(
        functools.partial(measure, **static),
        out_shardings=replicated(mesh),
        compiler_options=_compiler_options(mesh),
    )


def _compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    # LLVM's level 1 compiles sooner (PPO's update: 17 s, not 23) and, on CPU, programs
    # are as fast: the work is in library calls and in loops that XLA has fused before.
    cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 1} if cpu else None


def pmap_step(step: Callable) -> Callable:
    """The `pmap` twin of `jit_step`, for code that still maps over devices.

    Args:
        step: of `make_train_step(..., axis_name="devices")`; takes a batch with a
            leading device axis, whose weights sum to 1 over all devices.
    """
    return jax.pmap(step, axis_name="devices", in_axes=(None, 0, None), out_axes=None)
