"""Records and their files: every line is checked field by field as it is read.

Bad input stops here with a `DataError` that names file, line, field and the way out.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_jax.data.files import DataError, read_lines

Kind = Literal["corpus", "demonstrations", "rankings", "comparisons", "prompts"]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

SEPARATOR = "<|endoftext|>"
"""A line of its own between two documents of a corpus file."""

_MAX_RANK = 2**31 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and the response that a labeler wrote for it."""

    prompt: str
    response: str


@dataclasses.dataclass(frozen=True)
class Ranking:
    """K responses to one prompt and their ranks.

    Ranks are positive, 1 is best, equal ranks are a tie and carry no pair. All ranks
    may be tied: such a ranking is valid and holds nothing to learn a preference from.
    """

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    ended: tuple[bool, ...]
    """Whether each response ended by itself (and is followed by the end token)."""
    labeler: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt without a response."""

    prompt: str


def read_corpus(path: Path | str) -> Iterator[str]:
    """Yields the documents of a text file, separated by a line `<|endoftext|>`.

    The line break before a separator belongs to the separator; a Windows line end is
    read as a newline; documents of white space only are skipped.

    Args:
        path: `*.txt` or `*.txt.gz`, UTF-8.

    Raises:
        DataError: the file is missing, not UTF-8, a bad gzip, or holds a NUL or
            text beside a separator.
    """
    path = Path(path)
    lines: list[str] = []
    for number, line in read_lines(path):
        if "\0" in line:
            raise DataError(
                f"{path}:{number}: field 'text': holds the character U+0000. "
                "Remove it: it cannot be tokenized."
            )
        if line == SEPARATOR:
            yield from _document(lines)
            lines = []
        elif line.strip().startswith(SEPARATOR) or line.strip().endswith(SEPARATOR):
            raise DataError(
                f"{path}:{number}: field 'text': {SEPARATOR} beside other characters "
                "would be read as text. Give the separator a line of its own."
            )
        else:
            lines.append(line)
    yield from _document(lines)


def read_demonstrations(path: Path | str) -> Iterator[Demonstration]:
    """Yields the records `{"prompt", "response"}` of a JSON-lines file.

    Raises:
        DataError: the first bad line, by file, line and field.
    """
    return _read(Path(path), parse_demonstration)


def read_rankings(path: Path | str) -> Iterator[Ranking]:
    """Yields the records `{"prompt", "responses", "ranks"}` of a JSON-lines file.

    Optional fields: `ended`, a list of booleans (default all true), and `labeler`.

    Raises:
        DataError: the first bad line, by file, line and field.
    """
    return _read(Path(path), parse_ranking)


def read_file(kind: Kind, path: Path) -> Iterator[Any]:
    """Yields the records of a file of a kind; see the readers of each kind."""
    return read_corpus(path) if kind == "corpus" else _read(path, PARSERS[kind])


def parse_document(fields: dict[str, Any], where: str) -> str:
    """Checks a record `{"text"}` and returns the document."""
    return _text(fields, "text", where)


def parse_demonstration(fields: dict[str, Any], where: str) -> Demonstration:
    """Checks a record `{"prompt", "response"}`; `where` opens the error message."""
    return Demonstration(
        _text(fields, "prompt", where), _text(fields, "response", where)
    )


def parse_prompt(fields: dict[str, Any], where: str) -> Prompt:
    """Checks a record `{"prompt"}`; `where` opens the error message."""
    return Prompt(_text(fields, "prompt", where))


def parse_comparison(fields: dict[str, Any], where: str) -> Ranking:
    """Checks a record `{"prompt", "chosen", "rejected"}` and returns it as K = 2."""
    prompt = _text(fields, "prompt", where)
    responses = tuple(
        _text(fields, name, where, may_be_empty=True) for name in ("chosen", "rejected")
    )
    ended = _ended(fields, responses, where)
    return Ranking(prompt, responses, (1, 2), ended, _labeler(fields, where))


def parse_ranking(fields: dict[str, Any], where: str) -> Ranking:
    """Checks a record `{"prompt", "responses", "ranks"}` with its optional fields."""
    prompt = _text(fields, "prompt", where)
    values = _list(fields, "responses", where)
    if len(values) < 2:
        raise _bad(
            where,
            "responses",
            f"holds {len(values)} response(s)",
            "A ranking compares at least 2; remove the line",
        )
    responses = tuple(
        _checked_text(value, f"responses[{i}]", where, may_be_empty=True)
        for i, value in enumerate(values)
    )
    ranks = _list(fields, "ranks", where)
    _same_length("ranks", ranks, responses, where)
    for i, rank in enumerate(ranks):
        if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
            raise _bad(
                where,
                f"ranks[{i}]",
                f"is {_shown(rank)}, not a positive integer",
                "Ranks are 1 (best), 2, 3, ...; equal ranks are a tie",
            )
    ended = _ended(fields, responses, where)
    return Ranking(prompt, responses, tuple(ranks), ended, _labeler(fields, where))


PARSERS: dict[Kind, Callable[[dict[str, Any], str], Any]] = {
    "corpus": parse_document,
    "demonstrations": parse_demonstration,
    "rankings": parse_ranking,
    "comparisons": parse_comparison,
    "prompts": parse_prompt,
}


def _document(lines: list[str]) -> list[str]:
    text = "\n".join(lines)
    return [text] if text.strip() else []


def _read(path: Path, parse: Callable[[dict[str, Any], str], Any]) -> Iterator[Any]:
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield parse(_json_object(line, where), where)


def _json_object(line: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _bad(where, twice, "is given twice", "Keep one of the two")
        return fields

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(line, object_pairs_hook=unique, parse_constant=refuse)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: malformed JSON: {error}. Write one JSON object per line."
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: is {_shown(value)}, not a JSON object. Write one object "
            'such as {"prompt": "..."} per line.'
        )
    return value


def _bad(where: str, field: str, wrong: str, remedy: str) -> DataError:
    return DataError(f"{where}: field '{field}': {wrong}. {remedy}.")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _present(fields: dict[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        there = ", ".join(f"'{key}'" for key in fields) or "no field"
        raise _bad(where, name, f"is missing; the line has {there}", "Add it")
    return fields[name]


def _text(
    fields: dict[str, Any], name: str, where: str, *, may_be_empty: bool = False
) -> str:
    value = _present(fields, name, where)
    return _checked_text(value, name, where, may_be_empty=may_be_empty)


def _checked_text(value: Any, name: str, where: str, *, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        raise _bad(where, name, f"is {_shown(value)}, not a string", "Give its text")
    if not may_be_empty and not value.strip():
        raise _bad(where, name, "is empty", "Fill it in or remove the line")
    if "\0" in value:
        raise _bad(where, name, "holds the character U+0000", "Remove it")
    if _SURROGATE.search(value):
        raise _bad(
            where,
            name,
            "holds half of a surrogate pair (\\ud800 to \\udfff)",
            "Write the whole pair or the character itself",
        )
    return value


def _list(fields: dict[str, Any], name: str, where: str) -> list[Any]:
    value = _present(fields, name, where)
    if not isinstance(value, list):
        raise _bad(where, name, f"is {_shown(value)}, not a list", "Give a list")
    return value


def _same_length(
    name: str, values: list[Any], responses: tuple[str, ...], where: str
) -> None:
    if len(values) != len(responses):
        raise _bad(
            where,
            name,
            f"has {len(values)} entries for {len(responses)} responses",
            "Give one for each response, in the same order",
        )


def _ended(
    fields: dict[str, Any], responses: tuple[str, ...], where: str
) -> tuple[bool, ...]:
    if "ended" not in fields:
        return (True,) * len(responses)
    values = _list(fields, "ended", where)
    _same_length("ended", values, responses, where)
    for i, (value, response) in enumerate(zip(values, responses, strict=True)):
        if type(value) is not bool:
            wrong = f"is {_shown(value)}, not true or false"
            raise _bad(where, f"ended[{i}]", wrong, "Give true or false")
        if not value and not response:
            raise _bad(
                where,
                f"ended[{i}]",
                "is false for an empty response, which then has no token",
                "Set it to true or remove the response",
            )
    return tuple(values)


def _labeler(fields: dict[str, Any], where: str) -> str | None:
    if fields.get("labeler") is None:
        return None
    return _text(fields, "labeler", where)
