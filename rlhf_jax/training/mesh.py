"""Devices: a mesh (data, fsdp, tensor), and the shardings names and shapes imply."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

AXES = ("data", "fsdp", "tensor")

TENSOR_CUTS = {
    "qkv/w": -2,  # [..., D, 3, N, H]: heads
    "qkv/b": -2,
    "attn_out/w": -3,  # [..., N, H, D]: the same heads
    "mlp_up/w": -1,  # [..., D, F]
    "mlp_up/b": -1,
    "mlp_down/w": -2,  # [..., F, D]
    "embed": -2,  # [V, D]
}
"""Last names of a parameter -> its axis that `tensor` cuts, counted from the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are used; the results do not depend on it."""

    fsdp: int = 1
    """Devices, or groups of `tensor` of them, that share one copy of the parameters;
    the others hold replicas."""
    tensor: int = 1
    """Devices of one process that share each layer's work on the same rows: attention
    heads, the MLP's width and the vocabulary are dealt over them, and between products
    the positions. What it does not divide stays whole: make `pretrain.model.num_heads`,
    `tokenizer.vocab_size` and the lengths of rows multiples of it."""

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        """Sizes of the axes (data, fsdp, tensor) on so many devices.

        Raises:
            ValueError: if tensor does not divide the devices, or fsdp what is left.
        """
        _check_divides("tensor", self.tensor, num_devices, "devices")
        rest = num_devices // self.tensor
        what = "devices" if self.tensor == 1 else f"groups of {self.tensor} devices"
        _check_divides("fsdp", self.fsdp, rest, what)
        return rest // self.fsdp, self.fsdp, self.tensor

    def make(self) -> Mesh:
        """All devices of all processes as (data, fsdp, tensor).

        Raises:
            ValueError: see `shape`; if a process has no whole number of groups along
                tensor: each process makes rows of its own.
        """
        shape, axis_types = self.shape(jax.device_count()), (AxisType.Auto,) * 3
        if self.tensor == 1:
            return jax.make_mesh(shape, AXES, axis_types=axis_types)
        _check_divides(
            "tensor", self.tensor, jax.local_device_count(), "devices of a process"
        )
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        return Mesh(np.reshape(devices, shape), AXES, axis_types=axis_types)


def _check_divides(name: str, size: int, count: int, what: str) -> None:
    if size < 1 or count % size:
        raise ValueError(
            f"{name} = {size} does not divide the {count} {what}; "
            f"valid: {[n for n in range(1, count + 1) if count % n == 0]}"
        )


def replicas(mesh: Mesh) -> Mesh | None:
    """The mesh, if it has several devices that hold all parameters each; else None."""
    return mesh if 1 < mesh.size == mesh.shape["data"] else None


def fill_shards(rows: int, mesh: Mesh) -> int:
    """Rows of a batch [rows, ...] rounded up to a multiple of data x fsdp."""
    shards = mesh.size // mesh.shape["tensor"]
    return -(-rows // shards) * shards


def num_local_shards(mesh: Mesh) -> int:
    """Parts, of data x fsdp in all, that this process's devices hold of a batch."""
    return len(mesh.local_devices) // mesh.shape["tensor"]


def num_holders(mesh: Mesh) -> int:
    """Devices that hold one copy of the parameters between them: fsdp x tensor."""
    return mesh.size // mesh.shape["data"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, jax.P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are dealt over data and fsdp; devices along tensor hold the same ones."""
    return NamedSharding(mesh, jax.P(("data", "fsdp")))


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Cuts every leaf: over tensor by its name, over fsdp by its shape.

    Tensor cuts the axis of `TENSOR_CUTS`, if it divides it; a moment of Adam or an
    average has the name of its parameter. Fsdp cuts the largest other axis that it
    divides.

    Args:
        mesh: of `MeshConfig.make`.
        state: pytree of arrays or shapes.

    Returns:
        The same tree of `NamedSharding`; leaves that cannot be cut are replicated.
    """

    def spec(path, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return replicated(mesh)
        axes: list[str | None] = [None] * x.ndim

        def cut(axis, candidates):
            size = mesh.shape[axis]
            fits = [i for i in candidates if x.shape[i] and x.shape[i] % size == 0]
            if size > 1 and fits:
                axes[max(fits, key=lambda i: x.shape[i])] = axis

        cut("tensor", _tensor_axes(path, x.ndim))
        cut("fsdp", [i for i in range(x.ndim) if axes[i] is None])
        return NamedSharding(mesh, jax.P(*axes) if any(axes) else jax.P())

    return jax.tree.map_with_path(spec, state)


def _tensor_axes(path: tuple, ndim: int) -> list[int]:
    """The axis of a leaf that tensor may cut, none or one."""
    names = [str(getattr(part, "key", "")) for part in path]
    found = (TENSOR_CUTS.get("/".join(names[-count:])) for count in (1, 2))
    return [ndim + axis for axis in found if axis is not None]


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Puts this process's rows of a NumPy batch on its devices, as one global array.

    Raises:
        ValueError: if the rows cannot be dealt evenly over the devices.
    """
    sharding = batch_sharding(mesh)
    shards = num_local_shards(mesh)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % shards:
        raise ValueError(
            f"{rows} rows per process cannot be dealt over {shards} local parts "
            "(data x fsdp); make the batch size a multiple of their number"
        )
    if jax.process_count() == 1:  # all arrays at once: half the time
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def shard_whole_batch(mesh: Mesh, batch: Any) -> Any:
    """Deals the rows of a NumPy batch that every process holds whole.

    For batches in order, whose results every process needs: evaluation and sampling.
    Their number is one of `fill_shards`.
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
        static: keyword arguments of `measure` that the program is made for, hashable.
    """
    return jax.jit(
        functools.partial(measure, **static),
        out_shardings=replicated(mesh),
        compiler_options=_compiler_options(mesh),
    )


def _compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    # LLVM's level 1 compiles sooner (PPO's update: 17 s, not 23) and, on CPU, programs
    # are as fast: the work is in library calls and in loops that XLA has fused before.
    level = "xla_backend_optimization_level"
    asked = level in os.environ.get("XLA_FLAGS", "")
    cpu = mesh.devices.flat[0].platform == "cpu"
    return {level: 1} if cpu and not asked else None


def pmap_step(step: Callable) -> Callable:
    """The `pmap` twin of `jit_step`, for code that still maps over devices.

    Args:
        step: of `make_train_step(..., axis_name="devices")`; takes a batch with a
            leading device axis, whose weights sum to 1 over all devices.
    """
    return jax.pmap(step, axis_name="devices", in_axes=(None, 0, None), out_axes=None)
