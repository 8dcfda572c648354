"""Files, line by line in and whole or not at all out."""

import contextlib
import gzip
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

MAX_LINE = 2**28
"""Longest line in bytes; a longer one is refused before it fills the memory."""


class DataError(ValueError):
    """An input that cannot be used; the message names file, line, field, way out."""


class NoFilesError(DataError):
    """The data has no file, or no TFDS split, of the kind asked for."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line without its end) of a UTF-8 file, gzip if `*.gz`.

    Raises:
        DataError: the file is missing, not UTF-8 or a bad gzip, by file and line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                if len(raw) > MAX_LINE:
                    raise DataError(
                        f"{path}:{number}: the line has more than {MAX_LINE} bytes. "
                        "Break it into several lines."
                    )
                line = raw.removesuffix(b"\n").removesuffix(b"\r")
                yield number, _decoded(line, path, number)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}:{number + 1}: the gzip data cannot be read ({error}). "
                "The file is truncated or not gzip; copy it again, or name it "
                "without .gz if it is plain text."
            ) from error


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` only when the block succeeds."""
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def unfinished_path(path: Path) -> Path:
    """A name beside `path` that no other process uses; a crash may leave it."""
    return path.with_name(f".unfinished-{uuid.uuid4().hex}-{path.name}")


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: byte {error.start + 1} of the line "
            f"(0x{line[error.start]:02x}) is not UTF-8. Save the file as UTF-8; name "
            "it *.gz if it is gzip."
        ) from error
    if number == 1 and text.startswith("\ufeff"):
        raise DataError(
            f"{path}:1: starts with a byte-order mark. Save the file as UTF-8 "
            "without one."
        )
    return text
