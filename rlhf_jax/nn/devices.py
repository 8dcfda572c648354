"""What the compiler must be told where parameters are cut: what stays where.

It also keeps out the one product that XLA's partitioner (jax 0.10 to 0.12) gets wrong
where data, fsdp and tensor all cut: x [rows, K / tensor] w [K / tensor, N / fsdp] laid
out as [rows, N / tensor], rows over data and fsdp. Whatever dense layers write to the
residual stream, and its cotangent, is whole along D. Decoding, where nothing demands
it, was found without.

An array's type names the axes of its mesh, also while it is traced, so that no mesh is
handed down here; on one device, and within `shard_map`, nothing is changed. Decoding is
left to the compiler: one token a row is less to move than the weights are.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
OPEN = jax.P.UNCONSTRAINED  # how this axis is cut is left to the compiler


def on_tensor_axis(w: Array) -> bool:
    """Whether an array [...] is on a mesh with several devices along `tensor`."""
    return jax.typeof(w).sharding.mesh.shape.get("tensor", 1) > 1


def keep_dealt(x: Array) -> Array:
    """Residual stream [B, T, D] with its rows where the batch has them, and, along
    tensor, its positions dealt over the devices that share a layer.

    Weights that fsdp has cut and rows that it has dealt leave a choice, and in a loop
    over layers XLA gathers the rows. A sum of the devices' parts, as a product's, needs
    `whole_rows` first, or XLA gathers weights instead; a compiler that makes a
    reduce-scatter of the two moves as much as without. A B or T that cannot be dealt is
    left alone.

    Source of dealt positions: Korthikanti et al. 2022, sequence parallelism.
    """
    rows = _dealt_rows(x)
    if rows is None:
        return x
    tensor = jax.typeof(x).sharding.mesh.shape.get("tensor", 1)
    if tensor == 1 or x.shape[1] % tensor:
        return _constrained(x, rows, OPEN, OPEN)
    return _constrained(x, rows, "tensor", None)


def whole_rows(x: Array) -> Array:
    """Activations [B, T, D] with all positions of a row on each device that has it."""
    rows = _dealt_rows(x)
    if rows is None or not on_tensor_axis(x):
        return x
    return _constrained(x, rows, None, None)


def _dealt_rows(x: Array) -> tuple[str, ...] | None:
    """Axes that deal B of [B, T, D]; None where they cannot, or for one position."""
    mesh = jax.typeof(x).sharding.mesh
    rows = tuple(name for name in mesh.axis_names if name != "tensor")
    uneven = x.shape[0] % math.prod(mesh.shape[name] for name in rows)
    return None if x.shape[1] == 1 or uneven else rows


def embedding_table(table: Array, ids: Array) -> Array:
    """The table [V, D] to look up ids [B, T] in, its columns in one piece.

    Where tensor has cut its rows and fsdp its columns XLA gathers what it looks up.
    """
    if not on_tensor_axis(table) or ids.shape[1] == 1:
        return table
    return _constrained(table, OPEN, None)


def on_each_device(kernel: Callable[..., Array], *arrays: Array) -> Array:
    """Runs a kernel that the compiler cannot cut on the rows and heads of each device.

    Args:
        kernel: function of the arrays; like the first, [B, T, N, H].
        arrays: [B, T, N, H] or [B, T]. A B or N that cannot be dealt stays whole.
    """
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if mesh.empty or mesh.size == 1 or not _automatic(mesh):
        return kernel(*arrays)
    B, _, N, _ = arrays[0].shape
    rows = tuple(name for name in mesh.axis_names if name != "tensor")
    whole_rows = B % math.prod(mesh.shape[name] for name in rows)
    whole_heads = N % mesh.shape["tensor"]
    axes = (None if whole_rows else rows, None, None if whole_heads else "tensor")
    specs = tuple(jax.P(*axes[: x.ndim]) for x in arrays)
    return jax.shard_map(
        kernel, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
    )(*arrays)


def sum_over_devices(
    part: Callable[..., Array], embedding: Array, *arrays: Array
) -> Array:
    """Sums what each device makes of its rows: they meet once, after all its loops.

    Args:
        part: `(embedding, *arrays) -> scalar`, a sum over rows.
        embedding: [V, D], whole on every device meanwhile, as its gradient is.
        arrays: [B, ...] or [G, ...]; where one cannot be dealt evenly, all is left to
            the compiler.
    """
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if mesh.empty or mesh.size == 1 or not _automatic(mesh):
        return part(embedding, *arrays)
    rows = tuple(name for name in mesh.axis_names if name != "tensor")
    shards = math.prod(mesh.shape[name] for name in rows)
    if any(x.shape[0] % shards for x in arrays):
        return part(embedding, *arrays)
    of_devices = jax.shard_map(
        lambda *args: part(*args)[None],
        mesh=mesh,
        in_specs=(jax.P(), *(jax.P(rows) for _ in arrays)),
        out_specs=jax.P(rows),
        check_vma=False,
    )
    return jnp.sum(of_devices(embedding, *arrays))


def _automatic(mesh: Any) -> bool:
    return set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def _constrained(x: Array, *axes: Any) -> Array:
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size == 1 or not _automatic(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P(*axes)))
