"""A stage's directory: what it was made from, and what it hands to the next stage."""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from rlhf_jax.data.files import write_atomically
from rlhf_jax.nn.config import TransformerConfig

_COMMANDS = {"sft_rl": "sft", "sft_selected": "sft", "ppo_ptx": "ppo"}
"""Modules of `experiments` that run a stage of another name."""


class RunDirError(RuntimeError):
    """A stage directory that does not fit the command, with the way out."""


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none of it.

    Every process of a run writes its files: the same text, so that none waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Writes records as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def lock_run(run: Path) -> TextIO:
    """Makes a run this process's own until the process ends, however it ends.

    Args:
        run: directory of the run; made if it is not there.

    Returns:
        The open lock file; closing it gives the run free.

    Raises:
        RunDirError: another process is writing the run, it is a file, or Orbax would
            take its path for a pattern.
    """
    if "[" in str(run.resolve()):  # orbax 0.12: what it saves there cannot be read
        raise RunDirError(f"{run.resolve()}: has a '['; give a --run without one")
    if run.is_file():
        raise RunDirError(f"{run} is a file; give a directory as --run")
    run.mkdir(parents=True, exist_ok=True)
    file = (run / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "its process is not known"
        file.close()
        raise RunDirError(
            f"{run}: another command is writing this run ({owner}). Wait until it has "
            "ended, stop it, or use another --run"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, 16 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def to_json(value: Any) -> Any:
    """A config (dataclasses, paths, tuples) as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: to_json(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = {str(index): inner for index, inner in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: value}
    flat = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


class StageDir:
    """Directory of one stage of a run.

    `config.json` says what made it (config, data, parents by their fingerprints),
    `done.json` appears last. Both are compared, never assumed.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def done(self) -> bool:
        """True once the stage has finished."""
        return (self.path / "done.json").exists()

    def open(
        self, stage: str, config: Any, data: Any, parents: Mapping[str, "StageDir"]
    ) -> None:
        """Makes the directory, or checks that it was made by the same command.

        A stage of one process that was refused before it wrote anything, as for the
        memory of its step, is made anew; several compare their commands by this file.
        Says so where nothing is left to do.

        Args:
            stage: name of the stage.
            config: options of the stage, as a dict by their names on the command line.
            data: fingerprint of the data it reads, any JSON value.
            parents: earlier stages it reads, which must be done.

        Raises:
            RunDirError: if a parent is missing, or the directory belongs to another
                config, data or parent.
        """
        for name, parent in parents.items():
            if not parent.done:
                raise RunDirError(
                    f"{stage} needs the finished stage {name} in {parent.path}; run "
                    f"`python -m experiments.{_COMMANDS.get(name, name)} "
                    f"--run {parent.path.parent}` with the same preset and options "
                    "first"
                )
        made_from = {
            "stage": stage,
            "config": to_json(config),
            "data": to_json(data),
            "parents": {name: p.fingerprint() for name, p in parents.items()},
        }
        path = self.path / "config.json"
        blank = path.exists() and list(self.path.iterdir()) == [path]
        if not path.exists() or (blank and jax.process_count() == 1):
            write_text(path, json.dumps(made_from, indent=2) + "\n")
            return
        before = _flat(read_json(path))
        now = _flat(json.loads(json.dumps(made_from)))
        changed = [
            f"  {key.removeprefix('config.')}: {before.get(key, 'absent')!r} there, "
            f"{now.get(key, 'absent')!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise RunDirError(
                f"{self.path} was made by another command. Use another --run, repeat "
                "the old preset and options, or delete that folder (and those of later "
                "stages). "
                "Differences:\n" + "\n".join(changed)
            )
        if self.done:
            print(f"{stage}: finished before, see {self.path}")

    def fingerprint(self) -> str:
        """Hash of everything the stage was made from, its parents included."""
        return file_hash(self.path / "config.json")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the stage as finished, with what it measured, and tells its numbers."""
        write_text(self.path / "done.json", json.dumps(summary, indent=2) + "\n")
        if jax.process_index() == 0:
            told = "".join(
                f", {name} {x if isinstance(x, int) else round(x, 4)}"
                for name, x in summary.items()
                if isinstance(x, int | float)
            )
            print(f"{self.path}: finished{told}", file=sys.stderr)

    def summary(self) -> dict[str, Any]:
        """What `finish` was given."""
        return read_json(self.path / "done.json")


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run; an error names it and the way out."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunDirError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); delete the stage's folder "
            "and run the stage again"
        ) from error


def model_from_json(path: Path) -> TransformerConfig:
    """The `model.json` of a stage as a config; an error names the file."""
    values = {k: v for k, v in read_json(path).items() if k != "kind"}
    names = {f.name for f in dataclasses.fields(TransformerConfig)}
    if set(values) != names:
        raise RunDirError(
            f"{path}: fields {sorted(set(values) ^ names)} are of another version"
        )
    try:
        return TransformerConfig(**values)
    except ValueError as error:
        raise RunDirError(
            f"{path}: {error}; it is of another version: run the stage again"
        ) from error
