"""Which files of a data directory belong to which split, by their names."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from rlhf_jax.data.files import NoFilesError
from rlhf_jax.data.records import DataError, Split

_HELD_OUT = re.compile(
    "(test|valid|val|dev|eval)(s|set|ing|ate|ation|uate|uation)?|h[eo]ldouts?"
)


def find_files(root: Path | str, patterns: Sequence[str], split: Split) -> list[Path]:
    """Finds the files of one split, sorted by path.

    A file belongs to `valid` or `test` when its stem (without `.gz` and the suffix) is
    that word or ends in `_valid` or `_test`; every other file belongs to `train`.
    Hidden files, whose names begin with a dot, are none of them.

    Args:
        root: Directory that the patterns start from.
        patterns: Globs relative to `root`.
        split: The split wanted.

    Raises:
        NoFilesError: nothing matches; the message lists what is there.
        DataError: a pattern or a link leaves `root`, a file is there twice, or one of
            `train` seems to be held out by its name.
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be a tuple of globs, got the text {patterns!r}")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory. Give the directory of the data.")
    found: set[Path] = set()
    for pattern in patterns:
        check_below(root, pattern)
        matches = (path for path in root.glob(pattern) if path.is_file())
        found.update(path for path in matches if not path.name.startswith("."))
    for path in sorted(found):
        if path.with_name(f"{path.name}.gz") in found:
            raise DataError(
                f"{path}: is there with and without .gz, and would be read twice. "
                "Remove one of them."
            )
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(
                f"{path}: is a link to {path.resolve()}, outside {root}. "
                "Copy the file into the data directory."
            )
    files = sorted(path for path in found if _split_of(path) == split)
    if split == "train":
        _check_names(root, files)
    if not files:
        there = sorted(found) or sorted(p for p in root.rglob("*") if p.is_file())
        names = [str(path.relative_to(root)) for path in there[:12]]
        more = f" and {len(there) - 12} more" if len(there) > 12 else ""
        raise NoFilesError(
            f"{root}: no file of split {split!r} matches {', '.join(patterns)}. "
            f"There: {', '.join(names) or 'nothing'}{more}. A file's name ends in "
            "_valid or _test (before the suffix) to belong to that split; every other "
            "file is train."
        )
    return files


def check_below(root: Path | str, pattern: str) -> None:
    """Refuses a pattern that is empty or leaves the data directory."""
    parts = PurePath(pattern).parts
    if not parts or ".." in parts or PurePath(pattern).is_absolute():
        raise DataError(
            f"{root}: pattern {pattern!r} is not a path below the data directory. "
            "Use a glob relative to it, without '..'."
        )


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.rpartition(".")[0] or name


def _check_names(root: Path, train: Sequence[Path]) -> None:
    """Refuses to train on what a name in another style than `_split_of` holds out."""
    for path in train:
        names = [*path.relative_to(root).parts[:-1], _stem(path)]
        joined = [
            re.sub("(h[eo]ld)[-_. ]out", r"\1out", name.lower()) for name in names
        ]
        words = re.findall("[a-z]+", joined[-1])
        held_out = [x for x in (*words, *joined[:-1]) if _HELD_OUT.fullmatch(x)]
        if held_out and words[-1:] != ["train"]:
            raise DataError(
                f"{path}: would be trained on, though its name says "
                f"{held_out[0]!r}. Let it end in _valid, _test or _train (before "
                "the suffix), or leave it out of the patterns (--files)."
            )


def _split_of(path: Path) -> Split:
    stem = _stem(path)
    for split in ("valid", "test"):
        if stem == split or stem.endswith(f"_{split}"):
            return split
    return "train"
