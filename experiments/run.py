"""From a command line to stages: presets and options by tyro, devices, the context."""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import jax
import tyro

from experiments.config import InstructGPT
from experiments.presets import PRESETS
from rlhf_jax.data.inputs import Inputs, cache_dir
from rlhf_jax.data.sources import DataError
from rlhf_jax.stages.common import Context
from rlhf_jax.stages.invariants import InvariantError
from rlhf_jax.training.checkpoint import CheckpointError
from rlhf_jax.training.host import (
    all_processes_agree,
    keep_freed_memory,
    of_several,
)
from rlhf_jax.training.metrics import NonFiniteError
from rlhf_jax.training.room import MemoryLimitError
from rlhf_jax.training.run_dir import RunDirError, lock_run


def make_context(cfg: InstructGPT) -> Context:
    """Opens the data and the devices of a run."""
    cfg.run.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(cfg.data, cfg.files, cfg.simulation, cfg.run)
    try:
        mesh = cfg.mesh.make()
    except ValueError as error:
        raise DataError(f"mesh: {error}") from error
    return Context(
        run=cfg.run, inputs=inputs, mesh=mesh, seed=cfg.seed, profile=cfg.profile
    )


def parse(module: str, description: str, argv: Sequence[str]) -> InstructGPT:
    """Reads `[preset] [--field value ...]`; without a preset, "default".

    Every command takes the options of the whole run, so that one line of options fits
    all of them.

    Args:
        module: of the command, for the usage line.
        description: of the command.
        argv: arguments after the module.
    """
    args = list(argv)
    name = "default"
    if args and not args[0].startswith("-"):
        name = args.pop(0)
    if name not in PRESETS:
        raise SystemExit(f"error: no preset {name!r}; the presets are:\n{_presets()}")
    for before, arg in itertools.pairwise(args):
        if arg in PRESETS and not (before.startswith("--") and "=" not in before):
            raise SystemExit(
                f"error: the preset comes first: python -m {module} {arg} ..."
            )
    return tyro.cli(
        InstructGPT,
        prog=f"python -m {module} [preset]",
        description=f"{description}\nPresets (shown below: {name}):\n{_presets()}",
        args=args,
        default=PRESETS[name][1],
    )


def _presets() -> str:
    width = max(map(len, PRESETS))
    return "\n".join(f"  {name:{width}}  {text}" for name, (text, _) in PRESETS.items())


def _stop(number: int, _frame: object = None) -> NoReturn:
    raise SystemExit(
        f"stopped by {signal.Signals(number).name}; finished steps are kept, run the "
        "same command to go on"
    )


def _number_from(variable: str) -> int | None:
    value = os.environ.get(variable)
    if value is not None and not value.isdecimal():
        raise SystemExit(
            f"error: {variable} is {value!r}, not a number; mend or unset it"
        )
    return None if value is None else int(value)


def main(
    module: str, description: str, stages: Callable[[InstructGPT, Context], None]
) -> None:
    """Runs stages as a command: the whole of every module in `experiments`.

    Args:
        module: of the command, e.g. "experiments.ppo".
        description: shown by `--help`.
        stages: what to run.
    """
    cfg = parse(module, description, sys.argv[1:])
    signal.signal(signal.SIGTERM, _stop)  # a training loop saves first
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        # JAX finds the other two numbers itself on SLURM and TPU pods
        jax.distributed.initialize(
            num_processes=_number_from("JAX_NUM_PROCESSES"),
            process_id=_number_from("JAX_PROCESS_ID"),
        )
    try:
        cfg.check(jax.device_count(), jax.process_count())
        with _locked(cfg.run):
            stages(cfg, make_context(cfg))
    except (
        DataError,
        RunDirError,
        CheckpointError,
        MemoryLimitError,
        NonFiniteError,
        InvariantError,
    ) as error:
        _fail(f"error: {error}", error)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        alone = jax.process_count() == 1
        if alone or (isinstance(error, ValueError) and not of_several(error)):
            raise
        _fail(
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go "
            f"on: {str(error)[:500]}\nWhere that is not about this process, another "
            "process of this run has ended or cannot be reached. Start the same "
            "command on every host again: it goes on from the newest checkpoint",
            error,
        )
    except OSError as error:
        _fail(
            f"error: {error}. What was saved before is kept: free some space, or mend "
            "the path or its permissions, and run the same command to go on",
            error,
        )
    except KeyboardInterrupt:
        _stop(signal.SIGINT)


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """The run is this command's alone, or no process of it goes on."""
    lock, refused = None, None
    if jax.process_index() == 0:
        try:
            lock = lock_run(run)
        except RunDirError as error:
            refused = error
    if not all_processes_agree(refused is None):
        raise refused or RunDirError(f"{run}: refused to the first process, see there")
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _fail(text: str, cause: Exception) -> NoReturn:
    with suppress(OSError):  # the full disk may hold the log too
        # whole lines in one write: threads of Orbax may be in the middle of theirs
        print(f"\n{text}\n", end="", file=sys.stderr, flush=True)
    if jax.process_count() > 1:  # an exit in order would wait for the others
        os._exit(1)
    raise SystemExit(1) from cause
