"""One train step for every stage: a loss and an optimizer composed into an update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax.training.optimizers import (
    OptimizerConfig,
    OptimizerScalars,
    adamw,
    learning_rate,
)
from rlhf_jax.training.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]
LossFn = Callable[[Any, Any, Array], tuple[Array, Any]]


def accumulate_gradients(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    key: Array,
    num_microbatches: int = 1,
    mesh: Mesh | None = None,
) -> tuple[tuple[Array, Any], Any]:
    """Value, extras and gradient of a loss over a batch, one part at a time.

    Losses are weighted sums whose weights sum to 1 over the whole batch, so the parts
    are added and never averaged.

    Args:
        loss_fn: `(params, batch, key) -> (loss, extras)`. Scalars among the extras are
            weighted sums too and are added; arrays have one row per row of the batch
            and are put together again.
        params: to differentiate by.
        batch: pytree of arrays [B, ...], or [G, ...] of G equal parts of the rows, in
            the order of `put_loss_first`.
        key: of dropout; part m uses `fold_in(key, m)`.
        num_microbatches: M; B must be divisible by it. Part m holds the rows m, m + M,
            ...: a batch that is sharded over devices stays on them.
        mesh: of devices that hold all parameters each, see `replicas`: every device
            adds up its own rows, where they can be dealt evenly, and the sums meet
            once, after all loops. It cuts them into M parts, or the next number that
            divides them, but no more than there are rows. The loss must not draw by
            `key`. None leaves all to XLA.

    Returns:
        ((loss, extras), gradient).

    Raises:
        ValueError: when traced, if B is not divisible by M.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    M = num_microbatches
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    if num_rows % M:
        raise ValueError(
            f"a batch of {num_rows} rows cannot be cut into {M} microbatches; "
            "choose a divisor"
        )
    if mesh is not None and num_rows % mesh.size == 0:
        mine = num_rows // mesh.size
        parts = next(n for n in range(min(M, mine), mine + 1) if mine % n == 0)
        local = functools.partial(accumulate_gradients, loss_fn, num_microbatches=parts)
        return _on_each_device(local, params, batch, key, mesh)
    if M == 1:
        return grad_fn(params, batch, jax.random.fold_in(key, 0))

    def part(carry, part_and_index):
        rows, index = part_and_index
        (loss, extras), grads = grad_fn(params, rows, jax.random.fold_in(key, index))
        scalars, arrays = _split(extras)
        return jax.tree.map(jnp.add, carry, (loss, scalars, grads)), arrays

    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, M, *x.shape[1:]), 0, 1), batch
    )
    xs = (parts, jnp.arange(M))
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], parts), key)
    (loss, extras), grads = shapes
    sums = loss, _split(extras)[0], grads
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    (loss, scalars, grads), arrays = jax.lax.scan(part, zeros, xs)
    arrays = jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), arrays
    )
    return (loss, _joined(scalars, arrays)), grads


def _split(extras):
    """Scalars, which are sums, and arrays of the rows; None where the other has it."""
    return (
        jax.tree.map(lambda x: x if x.ndim == 0 else None, extras),
        jax.tree.map(lambda x: x if x.ndim else None, extras),
    )


def _joined(scalars, arrays):
    either = lambda x, y: y if x is None else x  # noqa: E731
    return jax.tree.map(either, scalars, arrays, is_leaf=lambda x: x is None)


def _on_each_device(local, params, batch, key, mesh):
    """`local` on the rows of each device; scalars and gradients added up once."""
    axes = mesh.axis_names

    def on_device(params, batch, key):
        (loss, extras), grads = local(params, batch, key)
        scalars, arrays = _split(extras)
        loss, scalars, grads = jax.lax.psum((loss, scalars, grads), axes)
        return (loss, _joined(scalars, arrays)), grads

    # Shapes alone: parameters that name the mesh here belong to no single device.
    def shapes(tree, parts=1):
        cut = lambda x: (x.shape[0] // parts, *x.shape[1:]) if x.ndim else ()  # noqa: E731
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(cut(x), x.dtype), tree)

    (_, extras), _ = jax.eval_shape(
        local, shapes(params), shapes(batch, mesh.size), key
    )
    extra_specs = jax.tree.map(lambda x: jax.P(axes) if x.ndim else jax.P(), extras)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(axes), jax.P()),
        out_specs=((jax.P(), extra_specs), jax.P()),
        check_vma=False,
    )(params, batch, key)


def nonfinite_leaves(tree: Any) -> Array:
    """Which leaves hold a NaN or an infinity: bool, [number of leaves]."""
    return jnp.stack([~jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])


def leaf_names(tree: Any) -> list[str]:
    """Paths of the leaves in the order of `nonfinite_leaves`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in paths]


def make_train_step(
    loss_fn: LossFn,
    optimizer: OptimizerConfig,
    num_steps: int,
    num_microbatches: int = 1,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Any, OptimizerScalars], tuple[TrainState, Metrics]]:
    """Composes a loss and AdamW into one pure update.

    Args:
        loss_fn: see `accumulate_gradients`; its extras are a dict of scalars.
        optimizer: shape of the schedule; its floats arrive with each call.
        num_steps: length of the schedule.
        num_microbatches: sequential parts of each batch.
        axis_name: mapped axis to sum over under `pmap`; None under `jit`, where the
            batch is global already.
        mesh: see `accumulate_gradients`.

    Returns:
        `(state, batch, scalars) -> (state, metrics)`, not compiled here.
    """

    def train_step(state, batch, scalars):
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        total = accumulate_gradients(
            loss_fn, state.params, batch, key, num_microbatches, mesh
        )
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        (loss, metrics), grads = total
        lr = learning_rate(state.step, optimizer, scalars, num_steps)
        updates, opt_state = adamw(scalars, lr).update(
            grads, state.opt_state, state.params
        )
        new_state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
        metrics = metrics | {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(state.params),
            "learning_rate": lr,
            "nonfinite": nonfinite_leaves(grads),
        }
        return new_state, metrics

    return train_step
