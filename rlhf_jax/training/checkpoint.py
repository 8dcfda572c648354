"""Orbax checkpoints: the whole state of a stage, and the parameters it hands on.

Orbax does not notice a bit that flips in the numbers it has stored, so every tree is
saved beside the checksums of its leaves and compared with them when it is read.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from rlhf_jax.training.host import all_processes_agree, of_several

Array = jax.Array


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written, with the way out."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises many types where a disk is full
        if of_several(error):
            raise  # the disk is not to blame
        raise CheckpointError(
            f"{path}: cannot be written ({type(error).__name__}: {str(error)[:300]}). "
            "What was saved before is kept: free some space or mend the permissions, "
            "and run the same command to go on"
        ) from error


def checksum(x: Array) -> Array:
    """A number that changes with any bit of an array: uint32 [].

    sum_i mix(bits_i xor 0x9E3779B1 i) modulo 2^32, where mix is a bijection (the end of
    MurmurHash3): one flipped bit always shows, several all but surely. Sums over the
    axes as they are, so that a leaf that is cut over devices stays so.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place += index * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits ^= place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> jnp.uint32(16)), dtype=jnp.uint32)


def _everywhere(tree: Any) -> Sharding | None:
    """Where the checksums lie: on all devices that the leaves are on."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, jax.P())
    return sharding


@functools.cache
def _compiled_checksum(sharding: Sharding | None) -> Callable[[Array], Array]:
    return jax.jit(checksum, out_shardings=sharding)


def checksums(tree: Any) -> Array:
    """The checksum of every leaf: uint32 [leaves].

    Compiled for each shape of a leaf: all stages have nearly the same ones. One at a
    time: many small programs under way whose devices wait for each other hang on CPU.
    """
    one = _compiled_checksum(_everywhere(tree))
    return jnp.stack([one(x).block_until_ready() for x in jax.tree.leaves(tree)])


def _sealed(tree: Any) -> dict[str, Any]:
    return {"tree": tree, "checksums": checksums(tree)}


def _sealed_like(like: Any) -> dict[str, Any]:
    """Shapes of `_sealed`, for trees of shapes."""
    count = len(jax.tree.leaves(like))
    sums = jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=_everywhere(like))
    return {"tree": like, "checksums": sums}


def _opened(sealed: Any) -> Any:
    """The tree of `_sealed`; raises ValueError, naming leaves that are not as saved."""
    tree = sealed["tree"]
    same = jax.device_get(checksums(tree)) == jax.device_get(sealed["checksums"])
    if not same.all():
        paths, _ = jax.tree_util.tree_flatten_with_path(tree)
        names = [
            jax.tree_util.keystr(path)
            for (path, _), ok in zip(paths, same, strict=True)
            if not ok
        ]
        raise ValueError(f"wrong checksum: {names[0]} is not as it was saved")
    return tree


class Checkpoints:
    """Keeps the last states of a stage in `directory/checkpoints`, saved in background.

    A save is atomic: it appears under its step number only when it is whole.
    """

    def __init__(self, directory: Path):
        """Opens or makes the folder.

        Args:
            directory: of the stage.
        """
        import orbax.checkpoint as ocp

        self.path = directory.resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=True,
            step_prefix="step",
        )
        # told, for else Orbax takes it from the newest folder, be that one damaged
        handler = ocp.StandardCheckpointHandler()
        self._manager = ocp.CheckpointManager(
            self.path, options=options, item_handlers=handler
        )

    def save(self, step: int, state: Any) -> None:
        """Copies the state off the devices and writes it in background."""
        import orbax.checkpoint as ocp

        with _writing(self.path):  # of this save, or of the one before
            self._manager.save(step, args=ocp.args.StandardSave(_sealed(state)))

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """Reads the newest whole checkpoint; None if there is none.

        A damaged checkpoint is reported on stderr and the one before it is read.

        Args:
            like: pytree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
            CheckpointError: if there are checkpoints but none can be read.
        """
        import orbax.checkpoint as ocp

        steps = sorted(self._manager.all_steps(), reverse=True)
        errors = []
        for step in steps:
            state, problem = None, None
            try:
                args = ocp.args.StandardRestore(_sealed_like(like))
                state = _opened(self._manager.restore(step, args=args))
            except Exception as error:  # Orbax raises many types for a broken file
                if of_several(error):
                    raise
                problem = f"{self.path}/step_{step}: {type(error).__name__}: {error}"
            if not all_processes_agree(problem is None):
                problem = problem or f"{self.path}/step_{step}: another process failed"
                errors.append(problem[:2000])
                print(f"warning: damaged checkpoint {problem}", file=sys.stderr)
                continue
            if errors:
                print(f"warning: going on from step {step} instead", file=sys.stderr)
                for bad in (s for s in steps if s > step):
                    self._manager.delete(bad)
            return step, state
        if errors:
            raise CheckpointError(
                f"no checkpoint in {self.path} can be read; delete that folder to "
                "start this stage again. What went wrong: " + " | ".join(errors)
            )
        return None

    def close(self) -> None:
        """Waits for saves under way."""
        with _writing(self.path):
            self._manager.wait_until_finished()
            self._manager.close()


def save_params(path: Path, params: Any) -> None:
    """Writes parameters for the next stage, replacing what is there."""
    import orbax.checkpoint as ocp

    with _writing(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), _sealed(params), force=True)


def load_params(path: Path, like: Any) -> Any:
    """Reads parameters saved by `save_params`.

    Args:
        path: folder of the parameters.
        like: pytree of shapes, with shardings where they matter.

    Raises:
        CheckpointError: if the folder is missing, damaged or of another shape.
    """
    import orbax.checkpoint as ocp

    if not path.exists():
        raise CheckpointError(f"{path}: no parameters here; run that stage first")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            sealed = checkpointer.restore(path.resolve(), _sealed_like(like))
        expected = [x.shape for x in jax.tree.leaves(like)]
        if [x.shape for x in jax.tree.leaves(sealed["tree"])] != expected:
            raise ValueError("another shape than its config")
        return _opened(sealed)
    except Exception as error:  # Orbax raises many types for a broken file
        if of_several(error):
            raise  # nor are the files
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error)[:500]}). The "
            "files are damaged or belong to a model of another shape; delete the "
            "stage's folder and run the stage again"
        ) from error
