"""From a command line to stages: presets and options by tyro, devices, the context."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tyro

from experiments.presets import PRESETS, InstructGPT
from rlhf_jax.data.inputs import Inputs, cache_dir
from rlhf_jax.data.sources import DataError
from rlhf_jax.stages.common import Context
from rlhf_jax.stages.invariants import InvariantError
from rlhf_jax.training.checkpoint import CheckpointError
from rlhf_jax.training.host import keep_freed_memory
from rlhf_jax.training.metrics import NonFiniteError
from rlhf_jax.training.run_dir import RunDirError


def make_context(cfg: InstructGPT) -> Context:
    """Opens the data and the devices of a run."""
    cfg.run.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(cfg.data, cfg.files, cfg.simulation, cfg.run)
    return Context(run=cfg.run, inputs=inputs, mesh=cfg.mesh.make(), seed=cfg.seed)


def parse(
    description: str, presets: dict[str, tuple[str, Any]], argv: Sequence[str]
) -> Any:
    """Reads `[preset] [--field value ...]`; without a preset, "default"."""
    args = list(argv)
    if not args or args[0].startswith("-"):
        if args[:1] not in (["-h"], ["--help"]):
            args = ["default", *args]
    return tyro.extras.overridable_config_cli(
        presets,
        description=description,
        args=args,
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


def main(
    description: str,
    stages: Callable[[InstructGPT, Context], None],
    fields: Sequence[str] | None = None,
) -> None:
    """Runs stages as a command: the whole of every module in `experiments`.

    Args:
        description: shown by `--help`.
        stages: what to run.
        fields: parts of `InstructGPT` the command shows; None shows all.
    """
    presets = PRESETS if fields is None else _narrow(fields)
    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    cfg = parse(description, presets, sys.argv[1:])
    if fields is not None:
        cfg = InstructGPT(**{f: getattr(cfg, f) for f in _common(fields)})
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()
    try:
        stages(cfg, make_context(cfg))
    except (
        DataError,
        RunDirError,
        CheckpointError,
        NonFiniteError,
        InvariantError,
    ) as error:
        raise SystemExit(f"error: {error}") from error


def _common(fields: Sequence[str]) -> list[str]:
    return ["run", "data", "seed", "files", "simulation", "mesh", *fields]


def _narrow(fields: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """The presets with only some parts of the configuration."""
    whole = {f.name: f for f in dataclasses.fields(InstructGPT)}
    kept = [(name, whole[name].type, whole[name]) for name in _common(fields)]
    narrow = dataclasses.make_dataclass(
        "Options",
        [(n, t, dataclasses.field(default=f.default)) for n, t, f in kept],
        frozen=True,
        kw_only=True,
    )
    return {
        name: (text, narrow(**{n: getattr(cfg, n) for n, _, _ in kept}))
        for name, (text, cfg) in PRESETS.items()
    }
