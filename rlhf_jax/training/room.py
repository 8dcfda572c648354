"""Tells what a stage will hold on each device, or refuses it before it is compiled."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.training.activations import Row, on_accelerator
from rlhf_jax.training.memory import Memory, sampling, train_step
from rlhf_jax.training.mesh import num_holders

GIB = 2**30


class MemoryLimitError(ValueError):
    """A step cannot fit its devices; the message names what to change."""


def device_limit(device: Any) -> int | None:
    """Bytes a device may use, on CPU its share of the process's; None if unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limits = group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([whole, *limits]) // jax.local_device_count()


def group_limits(groups: Path, mounted: Path) -> list[int]:
    """Bytes that the control groups of a process allow it, as containers and jobs do.

    Args:
        groups: lines `number:controllers:path`, of version 2 without controllers.
        mounted: where the groups are folders.
    """
    found = []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        root, name = mounted, "memory.max"
        if controllers:
            root, name = mounted / "memory", "memory.limit_in_bytes"
        if controllers and "memory" not in controllers.split(","):
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # each is held by those around it
            file = folder / name
            if folder.is_relative_to(root) and file.exists():
                found.append(file.read_text().strip())
    return [int(limit) for limit in found if limit.isdecimal()]  # or "max"


def describe(name: str, memory: Memory, limit: int | None) -> str:
    """One line: `name: 0.42 GiB per device (parameters 0.05, ...) of 23 GiB`."""
    parts = dataclasses.asdict(memory)
    del parts["least"]
    shown = ((part, f"{x / GIB:.2f}") for part, x in parts.items())
    text = ", ".join(f"{part} {x}" for part, x in shown if x != "0.00")
    line = f"{name}: {memory.total / GIB:.2f} GiB per device"
    line += f" ({text})" if text else ""
    if limit is None:
        return line
    doubt = "; it may not fit" if memory.total > limit else ""
    return f"{line} of {limit / GIB:.4g} GiB{doubt}"


def require_room(
    name: str,
    memory: Memory,
    model: TransformerConfig,
    lengths: tuple[str, ...],
    mesh: jax.sharding.Mesh,
    rows: float,
) -> None:
    """Prints `describe` once, or raises.

    Only `Memory.least`, a lower bound, refuses.

    Args:
        name: of the stage, as in the config.
        memory: of its step.
        model: shape of the model that is trained.
        lengths: fields that set T of its rows [B, T].
        mesh: of the run.
        rows: [rows, T] at a time on all devices; of a microbatch where it trains.

    Raises:
        MemoryLimitError: with fields to change, the most useful first.
    """
    limit = device_limit(mesh.local_devices[0])
    line = describe(name, memory, limit)
    if limit is None or memory.least <= limit:
        if jax.process_index() == 0:
            print(line, file=sys.stderr)
        return
    shards = mesh.size // mesh.shape["tensor"]
    helps = advice(name, memory, model, lengths, limit, rows > shards)
    raise MemoryLimitError(
        f"{line}: at least {memory.least / GIB:.2f} GiB is needed. What helps, the "
        f"most useful first: {'; '.join(helps)}"
    )


def require_room_to_train(
    name: str,
    model: TransformerConfig,
    row: Row,
    batch_size: int,
    num_microbatches: int,
    lengths: tuple[str, ...],
    mesh: jax.sharding.Mesh,
) -> None:
    """`require_room` for steps of pre-training, SFT or the reward model.

    Args:
        name, model, lengths, mesh: see `require_room`.
        row: what is computed of each row.
        batch_size: rows [B, T] of a step on all devices.
        num_microbatches: parts they are cut into.
    """
    rows = batch_size / mesh.size
    memory = train_step(model, row, rows, num_microbatches, num_holders(mesh))
    require_room(name, memory, model, lengths, mesh, batch_size / num_microbatches)


def require_room_to_sample(
    name: str,
    model: TransformerConfig,
    models: int,
    shape: tuple[int, int, int],
    mesh: jax.sharding.Mesh,
    measured: bool = False,
) -> None:
    """`require_room` for samples of collection or evaluation.

    Args:
        name: of the stage.
        model: shape of its models.
        models: how many of them it keeps on the device.
        shape: prompts at a time on all devices, P and R.
        mesh: see `require_room`.
        measured: whether the KL of the samples is.
    """
    rows, prompt, length = shape
    held = num_holders(mesh), on_accelerator(), measured
    memory = sampling(model, models, rows / mesh.size, prompt, length, *held)
    fields = ("prompt_len", "few_shot_len", "sampling.response_len")
    lengths = tuple(f"{name}.{field}" for field in fields)
    require_room(name, memory, model, lengths, mesh, rows)


def advice(
    name: str,
    memory: Memory,
    model: TransformerConfig,
    lengths: tuple[str, ...],
    limit: int,
    divisible: bool,
) -> list[str]:
    """What to change of a stage's config, for the arguments see `require_room`.

    Unless `divisible` a microbatch has but a row for each device that takes some.
    """
    trained = memory.parameters > 0
    movable = trained and memory.frozen and on_accelerator()
    offload = [f"set {name}.offload_frozen"] if movable else []
    if memory.arguments + memory.optimizer / 2 > limit:  # gradients are half as much
        shape = ("num_layers", "model_dim")
        return [
            *offload,
            "raise mesh.fsdp or mesh.tensor (more devices)",
            *(f"lower pretrain.model.{field}" for field in shape),
        ]
    smaller = f"lower {name}.batch_size"
    finer = [f"raise {name}.num_microbatches"] if divisible else []
    steps = finer if trained else [smaller]
    if trained and memory.cache:  # sampling is the fullest moment
        steps = [f"set or lower {name}.num_slots"]
    if trained and model.remat != "block":
        steps.append("set pretrain.model.remat to block (a new run)")
    steps += offload
    steps.append("raise mesh.fsdp or mesh.tensor (more devices)")
    steps += [f"shorten {field}" for field in lengths]
    steps += [smaller] if trained and (divisible or memory.frozen) else []
    if model.dtype == "float32":
        steps.append("set pretrain.model.dtype to bfloat16 (a new run)")
    return steps


def tell_allocated(name: str, step_fn: Any, *args: Any) -> None:
    """Prints what XLA allocates on each device for a jitted step of given arguments."""
    found = step_fn.lower(*args).compile().memory_analysis()
    if found is None or jax.process_index():
        return
    given, held = found.argument_size_in_bytes, found.temp_size_in_bytes
    print(
        f"{name}: compiled: {(given + held) / GIB:.2f} GiB per device (arguments "
        f"{given / GIB:.2f}, temporaries {held / GIB:.2f})",
        file=sys.stderr,
    )
