"""The few pieces of Markdown that a report is made of."""

import html
from collections.abc import Iterable, Sequence

MAX_CHARACTERS = 1000


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that may hold HTML but no line breaks."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "&#124;") for cell in line) + " |"
        for line in lines
    )


def code(text: str) -> str:
    """A name as inline code, whatever it holds."""
    return f"<code>{visible(text)}</code>"


def visible(text: str) -> str:
    """Text of a model as HTML on one line, whole up to `MAX_CHARACTERS`."""
    shown = text[:MAX_CHARACTERS]
    escaped = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in shown
    )
    more = len(text) - len(shown)
    tail = f" <i>[{more} more characters]</i>" if more else ""
    body = html.escape(escaped).replace("\n", "<br>")
    return (body or "<i>[empty]</i>") + tail
