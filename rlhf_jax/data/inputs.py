"""Where a run's text comes from: a directory of files, or the embedded simulation."""

import dataclasses
import functools
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data import simulation
from rlhf_jax.data.records import SPLITS
from rlhf_jax.data.simulation import SimulationConfig
from rlhf_jax.data.sources import (
    DataError,
    Kind,
    NoFilesError,
    Split,
    find_files,
    load,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Which files of the data directory are what: globs, relative to it.

    The split is the end of a file's name: `_valid`, `_test`, else train, where a name
    in another style (`x.test.jsonl`, `dev/x.txt`) is refused. A glob `tfds:NAME` stands
    for a TFDS data set with the same fields.
    """

    corpus: tuple[str, ...] = ("corpus/*.txt", "corpus/*.txt.gz")
    """Pre-training text."""
    demonstrations: tuple[str, ...] = (
        "demonstrations/*.jsonl",
        "demonstrations/*.jsonl.gz",
    )
    """Prompts with the response a labeler wrote."""
    rankings: tuple[str, ...] = ("rankings/*.jsonl", "rankings/*.jsonl.gz")
    """Prompts with K ranked responses; where there are none, they are collected."""
    comparisons: tuple[str, ...] = ("comparisons/*.jsonl", "comparisons/*.jsonl.gz")
    """Prompts with a chosen and a rejected response."""
    ranking_prompts: tuple[str, ...] = (
        "prompts/*rank*.jsonl",
        "prompts/*rank*.jsonl.gz",
    )
    """Prompts to collect rankings for."""
    ppo_prompts: tuple[str, ...] = ("prompts/*ppo*.jsonl", "prompts/*ppo*.jsonl.gz")
    """Prompts of PPO (train)."""
    eval_prompts: tuple[str, ...] = (
        "prompts/*eval*_test.jsonl",
        "prompts/*eval*_test.jsonl.gz",
    )
    """Held-out prompts of the evaluation (test); demonstration files will do."""


_KINDS: dict[str, Kind] = {
    "corpus": "corpus",
    "demonstrations": "demonstrations",
    "rankings": "rankings",
    "comparisons": "comparisons",
    "ranking_prompts": "prompts",
    "ppo_prompts": "prompts",
    "eval_prompts": "prompts",
}


def cache_dir() -> Path:
    """Folder of prepared data and compiled programs: `RLHF_JAX_CACHE` or a default."""
    default = Path.home() / ".cache" / "rlhf_jax"
    return Path(os.environ.get("RLHF_JAX_CACHE", default))


class Inputs:
    """The records of a run by their purpose (a field of `FilesConfig`) and split."""

    def __init__(
        self,
        data: Path | None,
        files: FilesConfig,
        simulated: SimulationConfig,
        run: Path,
    ):
        """Opens a data directory, or writes the simulated campaign to RUN/data.

        Args:
            data: directory; None for the embedded simulation.
            files: globs in it.
            simulated: the campaign, where `data` is None.
            run: directory of the run.
        """
        self.files = files
        self.simulated = data is None
        self.root = run / "data" if data is None else data
        if data is None:
            if not (self.root / simulation.CONFIG_FILE).exists():
                try:
                    simulation.write_campaign(simulated, self.root)
                except ValueError as error:
                    raise DataError(f"simulation: {error}") from error
            try:
                written = simulation.load_campaign(self.root)[0]
            except ValueError as error:  # of another version, or cut short
                raise DataError(str(error)) from error
            if written != simulated:
                old, new = map(dataclasses.asdict, (written, simulated))
                differences = ", ".join(
                    f"{name} {old[name]} there, {new[name]} now"
                    for name in old
                    if old[name] != new[name]
                )
                raise DataError(
                    f"{self.root}: belongs to another simulation ({differences}). Use "
                    "another --run, or the preset and --simulation options of this one"
                )
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such directory; give --data DIR")

    def read(self, purpose: str, split: Split) -> Sequence[Any]:
        """Validated records, e.g. `read("demonstrations", "train")`.

        Raises:
            DataError: naming what is missing or malformed, with file and line.
        """
        patterns = getattr(self.files, purpose)
        kind = _KINDS[purpose]
        return load(kind, self.root, patterns, split, cache_dir() / "data")

    def read_by_file(self, purpose: str, split: Split) -> dict[str, Sequence[Any]]:
        """The same records, file by file; a TFDS data set goes by purpose and split."""
        patterns = getattr(self.files, purpose)
        if self._tfds(purpose):
            return {f"{purpose} ({split})": self.read(purpose, split)}
        kind, cache = _KINDS[purpose], cache_dir() / "data"
        return {
            str(path.relative_to(self.root)): load(
                kind, path.parent, (glob.escape(path.name),), split, cache
            )
            for path in find_files(self.root, patterns, split)
        }

    def has(self, purpose: str, split: Split) -> bool:
        """Whether the run's data has any such records."""
        try:
            if self._tfds(purpose):
                return len(self.read(purpose, split)) > 0
            return bool(find_files(self.root, getattr(self.files, purpose), split))
        except NoFilesError:
            return False

    def _tfds(self, purpose: str) -> str | None:
        """The name of the TFDS data set that holds the records, if one does."""
        patterns = getattr(self.files, purpose)
        names = [p for p in patterns if p.startswith("tfds:")]
        return names[0].removeprefix("tfds:") if names else None

    def check(self, required: Sequence[tuple[str, Split]]) -> None:
        """Reads everything a run will read, so that bad input stops it at once.

        Args:
            required: purposes and splits that must be there; others are read if they
                are.

        Raises:
            DataError: naming file, line and field, or what is missing.
        """
        for purpose in _KINDS:
            for split in SPLITS if purpose != "eval_prompts" else ("test",):
                if (purpose, split) in required or self.has(purpose, split):
                    records = self.read(purpose, split)
                    if self._tfds(purpose):  # files were checked when prepared
                        for _ in records:
                            pass

    def shared_prompts(self) -> list[str]:
        """Says which held-out prompts are trained on too, and so are not held out."""

        @functools.cache
        def prompts(purpose: str, split: Split) -> set[str]:
            if not self.has(purpose, split):
                return set()
            return {record.prompt for record in self.read(purpose, split)}

        ranked = ("rankings", "comparisons")
        if not any(self.has(purpose, "train") for purpose in ranked):
            ranked = ("ranking_prompts",)
        pairs: list[tuple[str, Split, tuple[str, ...]]] = [
            ("demonstrations", "valid", ("demonstrations",)),
            *((purpose, "valid", ranked) for purpose in ranked),
            *((purpose, "test", ranked) for purpose in ranked),
            ("eval_prompts", "test", ("demonstrations", *ranked, "ppo_prompts")),
        ]
        lines = []
        for purpose, split, others in pairs:
            held_out = prompts(purpose, split)
            for other in others:
                both = held_out & prompts(other, "train")
                if both:
                    lines.append(
                        f"{len(both)} of {len(held_out)} prompts of {purpose} ({split})"
                        f" are in {other} (train) too: what is measured on them is not "
                        "held out"
                    )
        return lines

    def fingerprint(self, *purposes_and_splits: tuple[str, Split]) -> dict[str, str]:
        """Content hash of each source a stage reads, to notice when it changes."""
        hashes = {}
        for purpose, split in purposes_and_splits:
            digest = hashlib.sha256()
            name = self._tfds(purpose)
            if name is None:
                files = find_files(self.root, getattr(self.files, purpose), split)
            else:
                from rlhf_jax.data import builders  # slow to import

                below = builders.dataset_path(self.root, name).rglob("*")
                files = sorted(path for path in below if path.is_file())
            for path in files:
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    while block := file.read(2**20):
                        digest.update(block)
            hashes[f"{purpose}/{split}"] = digest.hexdigest()[:16]
        return hashes
