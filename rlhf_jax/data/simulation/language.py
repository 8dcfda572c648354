"""Controlled English, reading side: which claims, events and acts a text contains.

`parse` reads any text. Each sentence is cut into chunks by the longest match of a small
grammar (claims in all their phrasings, events, admissions of not knowing, small talk,
lists of values, openers and connectors). A word outside every chunk is not accounted
for, and a chunk that follows another with no connector does not count as accounted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from rlhf_jax.data.simulation.grammar import (
    ADDRESS,
    ADMISSIONS,
    CLAIMS,
    CONNECTORS,
    EVENTS,
    LABELS,
    LIST,
    OPENERS,
    TALK,
)
from rlhf_jax.data.simulation.world import ATTRIBUTES, ENTITIES, PEOPLE, RUDE_WORDS

_CANONICAL = {p.lower(): p for p in PEOPLE}
_TOKEN = re.compile(r"'s\b|[a-z]+|[.,!?:;\n]|[^\sa-z.,!?:;]+")
_NO_WORDS = {*".,!?:;\n", "'s"}
_SHORT = (("n't", " not"), ("it's", "it is"), ("i'm", "i am"), ("cannot", "can not"))


@dataclass(frozen=True)
class Claim:
    """`entity` (None: the subject is not named) has `value` for `attribute`, or not."""

    entity: str | None
    attribute: str
    value: str
    negated: bool = False


@dataclass(frozen=True)
class Event:
    """Something that happened; `who` lists the entities that took part, by name."""

    who: tuple[str, ...]
    deed: str


@dataclass
class Sentence:
    """One sentence: what it says, and how many of its words are accounted for.

    `fragments` are values that a list names ("red and blue"), with their attribute;
    `unknowns` are (entity, attribute) that it admits not to know, None if not named.
    `parse` keeps sentences in a cache: they must not be changed.
    """

    text: str
    num_words: int
    accounted: int = 0
    is_question: bool = False
    claims: list[Claim] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    fragments: list[tuple[str, str]] = field(default_factory=list)
    acts: set[str] = field(default_factory=set)
    unknowns: list[tuple[str | None, str | None]] = field(default_factory=list)


def split_sentences(text: str) -> list[tuple[str, bool]]:
    """Lower-cased sentences, one space between tokens; whether each ends in "?"."""
    text = text.lower()
    for short, full in _SHORT:
        text = text.replace(short, full)
    sentences: list[tuple[str, bool]] = []
    tokens: list[str] = []
    for token in [*_TOKEN.findall(text), "."]:
        if token not in ".!?;\n":
            tokens.append("," if token == ":" else token)
        elif tokens:
            sentences.append((" ".join(tokens).strip(" ,"), token == "?"))
            tokens = []
    return [sentence for sentence in sentences if sentence[0]]


def count_words(text: str) -> int:
    """The number of tokens of a text that are words and not punctuation."""
    return sum(token not in _NO_WORDS for token in _TOKEN.findall(text.lower()))


def rude_words(text: str) -> int:
    """How many rude words a text has."""
    words = _TOKEN.findall(text.lower())
    return sum(word in RUDE_WORDS for word in words)


def canonical(value: str) -> str:
    """The spelling of a value in the world's tables (people keep their capital)."""
    return _CANONICAL.get(value, value)


@lru_cache(maxsize=65536)
def parse(text: str, subject: str | None = None) -> tuple[Sentence, ...]:
    """Reads a text.

    Args:
        text: any text.
        subject: the entity that "it" means before the text names one.

    Returns:
        Its sentences in order.
    """
    sentences = []
    for line, is_question in split_sentences(text):
        sentence = Sentence(line, count_words(line), is_question=is_question)
        subject = _read_chunks(sentence, line, subject)
        sentences.append(sentence)
    return tuple(sentences)


def _read_list(sentence: Sentence, line: str) -> None:
    words = line.split()
    sentence.accounted += count_words(line)
    for word in words:
        value = canonical(word)
        for noun, attribute in ATTRIBUTES.items():
            if value in attribute.values:
                sentence.fragments.append((noun, value))
        if word in ENTITIES:
            sentence.fragments.append(("animal", word))
        elif word in LABELS:
            sentence.fragments.append(("label", word))
    if words[0] == "not":
        sentence.acts.add("not")


def _read_chunks(sentence: Sentence, line: str, subject: str | None) -> str | None:
    """Fills in the sentence; returns the subject that "it" means from here on."""
    position, may_start = 0, True
    address = ADDRESS.fullmatch(line)
    if address:  # "good night, Anna": a name that is no part of a list of names
        line = address[1]
        sentence.accounted += 1
    while position < len(line):
        best, found = None, None
        for group, patterns in (
            ("claim", CLAIMS),
            ("unknown", ADMISSIONS),
            ("event", EVENTS),
            ("act", TALK),
        ):
            for name, pattern in patterns:
                match = pattern.match(line, position)
                if match and (best is None or match.end() > best.end()):
                    best, found = match, (group, name)
        if may_start and (best is None or best.end() < len(line)):
            if LIST.match(line, position):
                _read_list(sentence, line[position:])
                break
        joint = OPENERS.match(line, position) if may_start else None
        joint = joint or (None if may_start else CONNECTORS.match(line, position))
        if best is not None and (joint is None or best.end() >= joint.end()):
            assert found is not None
            subject = _add_chunk(sentence, best, found, subject)
            if may_start:
                sentence.accounted += count_words(best.group())
            position, may_start = best.end(), False
        elif joint is not None:
            sentence.accounted += count_words(joint.group())
            position, may_start = joint.end(), True
        else:
            space = line.find(" ", position)
            position = len(line) if space < 0 else space
        while position < len(line) and line[position] == " ":
            position += 1
    return subject


def _add_chunk(
    sentence: Sentence,
    match: re.Match[str],
    found: tuple[str, str | None],
    subject: str | None,
) -> str | None:
    groups: dict[str, str] = {}
    for key, text in match.groupdict().items():
        if text is not None:
            groups.setdefault(key.split("_")[0], text)
    named = groups.get("entity") or groups.get("second")
    subject = named or subject
    if "adjective" in groups:
        sentence.claims.append(Claim(subject, "colour", groups["adjective"]))
    group, name = found
    if group == "claim":
        assert name is not None
        negated = "negated" in groups
        for key in ("value", "more"):
            if key in groups:
                value = canonical(groups[key])
                sentence.claims.append(Claim(subject, name, value, negated))
    elif group == "unknown":
        sentence.unknowns.append((subject if name else None, name))
    elif group == "event":
        present = {subject} if subject else set()
        present |= {word for word in match.group().split() if word in ENTITIES}
        sentence.events.append(Event(tuple(sorted(present)), groups["deed"]))
    else:
        assert name is not None
        sentence.acts.add(name)
    return subject
