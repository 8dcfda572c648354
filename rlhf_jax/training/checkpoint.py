"""Orbax checkpoints: the whole state of a stage, and the parameters it hands on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written, with the way out."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises many types where a disk is full
        raise CheckpointError(
            f"{path}: cannot be written ({type(error).__name__}: {str(error)[:300]}). "
            "What was saved before is kept: free some space or mend the permissions, "
            "and run the same command to go on"
        ) from error


class Checkpoints:
    """Keeps the last states of a stage in `directory/checkpoints`, saved in background.

    A save is atomic: it appears under its step number only when it is whole.
    """

    def __init__(self, directory: Path, keep: int = 2):
        """Opens or makes the folder.

        Args:
            directory: of the stage.
            keep: newest checkpoints to keep.
        """
        import orbax.checkpoint as ocp

        self.path = directory.resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            step_prefix="step",
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def save(self, step: int, state: Any) -> None:
        """Copies the state off the devices and writes it in background."""
        import orbax.checkpoint as ocp

        with _writing(self.path):  # of this save, or of the one before
            self._manager.save(step, args=ocp.args.StandardSave(state))

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
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
            except Exception as error:  # Orbax raises many types for a broken file
                problem = f"{self.path}/step_{step}: {type(error).__name__}: {error}"
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
        checkpointer.save(path.resolve(), params, force=True)


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
            params = checkpointer.restore(path.resolve(), like)
    except Exception as error:  # Orbax raises many types for a broken file
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error)[:500]}). The "
            "files are damaged or belong to a model of another shape; delete the "
            "stage's folder and run the stage again"
        ) from error
    expected = [x.shape for x in jax.tree.leaves(like)]
    if [x.shape for x in jax.tree.leaves(params)] != expected:
        raise CheckpointError(f"{path}: holds a model of another shape than its config")
    return params
