"""Hints to the compiler where arrays lie on several devices.

An array's type names the axes of its mesh, also while it is traced, so that no mesh is
handed down here; on one device, and within `shard_map`, nothing is changed. Decoding
is left to the compiler: one token a row is less to move than the weights are.
"""

import math
from typing import Any

import jax

Array = jax.Array
Auto = jax.sharding.AxisType.Auto
OPEN = jax.P.UNCONSTRAINED  # how this axis is cut is left to the compiler


def on_tensor_axis(w: Array) -> bool:
    """Whether parameters are on a mesh with several devices along `tensor`."""
    return jax.typeof(w).sharding.mesh.shape.get("tensor", 1) > 1


def keep_rows_dealt(x: Array) -> Array:
    """Activations [B, T, ...] whose rows stay dealt over the devices: weights move.

    Weights that fsdp has cut and rows that it has dealt leave the compiler a choice,
    and it would gather the rows of some layers. B that cannot be dealt is left alone.
    """
    mesh = jax.typeof(x).sharding.mesh
    rows = tuple(name for name in mesh.axis_names if name != "tensor")
    if x.shape[1] == 1 or x.shape[0] % math.prod(mesh.shape[name] for name in rows):
        return x
    return _pin(x, rows, *[OPEN] * (x.ndim - 1))


def whole_columns(table: Array, ids: Array) -> Array:
    """The table [V, D] of ids [B, T]; no device holds a part of a row only."""
    return table if ids.shape[1] == 1 else _pin(table, OPEN, None)


def _pin(x: Array, *axes: Any) -> Array:
    mesh = jax.typeof(x).sharding.mesh
    rows_are_dealt = mesh.size > mesh.shape.get("tensor", 1)
    if not rows_are_dealt or set(mesh.axis_types) != {Auto}:
        return x
    return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P(*axes)))
