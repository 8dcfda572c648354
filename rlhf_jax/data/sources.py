"""Files to random-access records: found by glob, checked, kept as ArrayRecord.

The records of a split are written once to a cache directory named by the content of
the files, so that a second run, or a second process, opens them at once.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.files import NoFilesError, unfinished_path
from rlhf_jax.data.records import (
    PARSERS,
    DataError,
    Demonstration,
    Kind,
    Prompt,
    Ranking,
    Split,
    read_corpus,
    read_demonstrations,
    read_file,
    read_rankings,
)
from rlhf_jax.data.splits import check_below, find_files

__all__ = [
    "DataError",
    "Demonstration",
    "Kind",
    "NoFilesError",
    "Prompt",
    "Ranking",
    "Records",
    "Split",
    "find_files",
    "load",
    "read_corpus",
    "read_demonstrations",
    "read_rankings",
]

_SCHEMA = 2  # part of the cache key: raise it when features or checks change
_BLOCK = 1024  # records read at a time where all are read


def load(
    kind: Kind,
    root: Path | str,
    patterns: Sequence[str],
    split: Split,
    cache_dir: Path | str,
) -> Sequence[Any]:
    """Opens the records of one split, in the order of the files.

    Files are checked and written once as ArrayRecord below `cache_dir`, in a directory
    named by their content; later calls open that. The one pattern `tfds:NAME` instead
    opens the prepared TFDS dataset `root/NAME` (or the only version below it), whose
    features are named as the fields of the files (a corpus: `text`).

    Args:
        kind: What the files hold.
        root: Data directory.
        patterns: Globs relative to `root`, or one `tfds:NAME`.
        split: The split; `valid` of a TFDS dataset may be named `validation`.
        cache_dir: Directory for the prepared records; made if missing.

    Returns:
        A random-access sequence of documents (`str`), `Demonstration`, `Ranking` (also
        for comparisons) or `Prompt`.

    Raises:
        DataError: bad input, an empty file, or a damaged cache.
    """
    if kind not in PARSERS:
        raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(PARSERS)}")
    if any(pattern.startswith("tfds:") for pattern in patterns):
        from rlhf_jax.data import builders

        if len(patterns) > 1:
            raise DataError(
                f"{root}: a tfds: pattern stands alone, got {', '.join(patterns)}. "
                "Use either files or one TFDS dataset."
            )
        name = patterns[0].removeprefix("tfds:")
        check_below(root, name)
        return Records(builders.find_dataset(Path(root), name, kind, split), kind, name)

    files = find_files(root, patterns, split)
    directory = Path(cache_dir) / f"{kind}-{_content_key(kind, split, files)}"
    if not directory.exists():
        _prepare(directory, kind, split, files)
    return _open(directory, kind, split)


class Records(Sequence[Any]):
    """Random access to the records of one TFDS split, checked as they are read."""

    def __init__(self, source: Sequence[dict[str, Any]], kind: Kind, name: str):
        self._source = source
        self._kind: Kind = kind
        self._name = name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self._name}")
        index = index % len(self)
        with self._damage_told():
            fields = self._source[index]
        return self._checked(index, fields)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _BLOCK):
            block = range(first, min(first + _BLOCK, len(self)))
            with self._damage_told():
                rows = self._source.__getitems__(block)  # type: ignore[attr-defined]
            for index, fields in zip(block, rows, strict=True):
                yield self._checked(index, fields)

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # ArrayRecord's checksums
            raise DataError(
                f"{self._name}: the prepared records are damaged ({error}). If this is "
                "a directory of the cache, delete it and run again: it is made anew. "
                "A data set of your own must be prepared again."
            ) from error

    def _checked(self, index: int, features: dict[str, Any]) -> Any:
        where = f"{self._name}:{index}"
        try:
            fields = {name: _plain(value) for name, value in features.items()}
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: holds text that is not UTF-8 ({error}). Prepare it again."
            ) from error
        if fields.get("labeler") == "":  # TFDS has no absent text
            del fields["labeler"]
        return PARSERS[self._kind](fields, where)


def _content_key(kind: Kind, split: Split, files: Sequence[Path]) -> str:
    """A name for the records: hash of the schema, the kind and every byte read."""
    digest = hashlib.sha256(f"{_SCHEMA} {kind} {split}".encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:20]


def _fields(kind: Kind, path: Path) -> Iterator[dict[str, Any]]:
    """Yields the checked records of a file as the features that are stored."""
    for record in read_file(kind, path):
        if kind == "corpus":
            yield {"text": record}
            continue
        fields = dataclasses.asdict(record)
        if kind == "comparisons":
            del fields["ranks"]
            fields["chosen"], fields["rejected"] = fields.pop("responses")
        if "labeler" in fields and fields["labeler"] is None:
            fields["labeler"] = ""  # TFDS has no absent text
        yield fields


def _prepare(directory: Path, kind: Kind, split: Split, files: Sequence[Path]) -> None:
    """Writes the records to a new directory, which gets its name when it is whole."""
    from rlhf_jax.data import builders

    def examples() -> Iterator[dict[str, Any]]:
        for path in files:
            count = 0
            for fields in _fields(kind, path):
                count += 1
                yield fields
            if count == 0:
                raise DataError(f"{path}: holds no record. Fill the file or remove it.")

    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_path(directory)
    unfinished.mkdir()
    try:
        builders.write_records(unfinished, kind, split, examples())
        sizes = {
            str(path.relative_to(unfinished)): path.stat().st_size
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        (unfinished / "sizes.json").write_text(json.dumps(sizes, indent=1))
        try:
            os.rename(unfinished, directory)
        except OSError:
            # Another process finished the same content first: use its records.
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone where it was renamed


def _open(directory: Path, kind: Kind, split: Split) -> Records:
    from rlhf_jax.data import builders

    damage = _damage(directory)
    if damage is not None:
        raise DataError(
            f"{directory}: the prepared records are damaged ({damage}). Delete this "
            "directory and run again: it is made anew from the files."
        )
    source = builders.read_records(directory, kind, split)
    return Records(source, kind, str(directory))


def _damage(directory: Path) -> str | None:
    """Says which file is missing or has another size than when it was written."""
    manifest = directory / "sizes.json"
    if not manifest.is_file():
        return "sizes.json is missing"
    try:
        sizes = json.loads(manifest.read_text())
    except ValueError:
        return "sizes.json is not JSON"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def _plain(value: Any) -> Any:
    """Turns TFDS's NumPy scalars, bytes and lists into what JSON would give."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value
