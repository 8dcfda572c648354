"""What the compiler must be told where parameters are cut: that rows stay put.

An array's type names the axes of its mesh, also while it is traced, so that no mesh is
handed down here; on one device, and within `shard_map`, nothing is changed. Decoding is
left to the compiler: one token a row is less to move than the weights are.
"""

import math
from typing import Any

import jax

Array = jax.Array
OPEN = jax.P.UNCONSTRAINED  # how this axis is cut is left to the compiler


def on_tensor_axis(w: Array) -> bool:
    """Whether parameters [...] are on a mesh with several devices along `tensor`."""
    return jax.typeof(w).sharding.mesh.shape.get("tensor", 1) > 1


def keep_rows_dealt(x: Array) -> Array:
    """Activations [B, T, D] with their rows where the batch has them.

    Weights that fsdp has cut and rows that it has dealt leave a choice, and in a loop
    over layers XLA gathers the rows. A B that cannot be dealt is left alone.
    """
    mesh = jax.typeof(x).sharding.mesh
    rows = tuple(name for name in mesh.axis_names if name != "tensor")
    if x.shape[1] == 1 or x.shape[0] % math.prod(mesh.shape[name] for name in rows):
        return x
    return _constrained(x, rows, OPEN, OPEN)


def embedding_table(table: Array, ids: Array) -> Array:
    """The table [V, D] to look up ids [B, T] in, its columns in one piece.

    Where tensor has cut its rows and fsdp its columns XLA gathers what it looks up.
    """
    if not on_tensor_axis(table) or ids.shape[1] == 1:
        return table
    return _constrained(table, OPEN, None)


def _constrained(x: Array, *axes: Any) -> Array:
    mesh = jax.typeof(x).sharding.mesh
    automatic = set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    if mesh.size == mesh.shape.get("tensor", 1) or not automatic:
        return x
    return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P(*axes)))
