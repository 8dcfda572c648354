"""What a response achieves: one small function for each kind of task."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_jax.data.simulation.evidence import (
    Reading,
    complete_fragments,
    is_true,
    passage_claims,
    read,
    source_of,
    subject_of,
)
from rlhf_jax.data.simulation.language import (
    Claim,
    Sentence,
    count_words,
    split_sentences,
)
from rlhf_jax.data.simulation.tasks import Task
from rlhf_jax.data.simulation.templates import ACTS, CATEGORIES, COUNTS
from rlhf_jax.data.simulation.world import RUDE_WORDS, World


@dataclass
class Grade:
    """Outcome of one task: see `judge.Judgement`; `accounted` overrides `fluent`."""

    attempts: bool
    quality: float
    claims_true: int = 0
    claims_false: int = 0
    accounted: float | None = None


# Quality of a text about an animal that tells what it did, and nothing that is
# known of it: safe, but not informative.
NO_FACTS = 0.7

# (world, task, reading) -> (attempts, quality)
Grader = Callable[[World, Task, Reading], tuple[bool, float]]


def grade(
    world: World, task: Task, response: str, sentences: tuple[Sentence, ...]
) -> Grade:
    """Grades a response to a task.

    Args:
        world: what is true where the prompt quotes no text.
        task: what the prompt asks for.
        response: the response.
        sentences: `parse(response, subject_of(task))`.

    Returns:
        The grade.
    """
    reading = read(response, sentences)
    if task.kind in _ASKED:
        complete_fragments(task, reading)
    attempts, quality = _GRADERS[task.kind](world, task, reading)
    result = Grade(attempts, min(max(quality, 0.0), 1.0))
    source = source_of(task)
    if task.kind != "repeat":
        result.claims_true = sum(is_true(world, c, source) for c in reading.claims)
        result.claims_false = len(reading.claims) - result.claims_true
    if task.use_case == "classification" and attempts and quality == 0.0:
        result.claims_false += 1  # a wrong label is a false statement about the text
    if task.kind == "repeat" and quality == 1.0:
        result.accounted = 1.0
    return result


def _informs(world: World, claim: Claim) -> bool:
    """Whether a claim says what is the case; denials come too cheap to count."""
    return not claim.negated and is_true(world, claim, None)


def _content(
    world: World, reading: Reading, entity: str | None
) -> tuple[int, int, int]:
    """Counts (said of the entity and not false, said of it, said of others)."""
    claims = [c for c in reading.claims if c.entity == entity]
    true = sum(_informs(world, c) for c in claims)
    events = [e for e in reading.events if entity in e.who]
    distinct = len({e.deed for e in events})
    about = true + distinct
    others = len(reading.claims) - len(claims) + len(reading.events) - len(events)
    return about, len(claims) + len(events), others


def _wanted(task: Task) -> int:
    """How many things to say: two, unless a number of sentences is asked for."""
    for constraint in task.constraints:
        if constraint.kind == "sentences":
            return COUNTS[constraint.value]
    return 2


def _about(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    good, said, others = _content(world, reading, task.entity)
    share = good / max(good + others, 1)
    quality = min(good / _wanted(task), 1.0) * share
    if not reading.claims:
        quality *= NO_FACTS
    return said > 0, quality


def _story(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    good, _, others = _content(world, reading, task.entity)
    happens = any(task.entity in e.who for e in reading.events)
    quality = min(good / _wanted(task), 1.0) * good / max(good + others, 1)
    return happens, quality


def _ask(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    """Questions about one attribute, of the world or of a passage."""
    subject, asked = subject_of(task), task.slots["attribute"]
    source = passage_claims(task) if "text" in task.slots else None
    if asked == "animal":
        named = {value for attribute, value in reading.fragments if attribute == asked}
        named |= {c.entity for c in reading.claims if c.entity is not None}
        return bool(named), float(subject in named) / max(len(named), 1)
    answers = [c for c in reading.claims if (c.entity, c.attribute) == (subject, asked)]
    admits = any(
        entity in (subject, None) and attribute in (asked, None)
        for entity, attribute in reading.unknowns
    )
    if source is None:
        knowable = subject is not None and world.value(subject, asked) is not None
    else:
        knowable = any(c.attribute == asked for c in source)
    right = [c for c in answers if is_true(world, c, source)]
    if len(right) < len(answers):
        return True, 0.0
    if not knowable:
        return admits or bool(answers), float(admits)
    if any(not c.negated for c in right):
        return True, 0.5 if admits else 1.0
    return bool(answers) or admits, 0.3 if right else 0.0


def _enumeration(found: int, wanted: int) -> float:
    return min(found, wanted) / max(found, wanted)


def _list(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    category = CATEGORIES[task.slots["category"]]
    items = {value for attribute, value in reading.fragments if attribute == category}
    strangers = {
        v for a, v in reading.fragments if a != category and v not in items
    } | {c.value for c in reading.claims}
    found = len(items)
    purity = found / max(found + len(strangers), 1)
    return found > 0, _enumeration(found, task.count) * purity


def _facts(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    claims = [c for c in reading.claims if c.entity == task.entity]
    true = sum(_informs(world, c) for c in claims)
    return bool(claims), _enumeration(true, task.count) if true else 0.0


def _talk(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    fits = bool(reading.acts & set(ACTS[task.slots["act"]]))
    social = reading.acts - {"insult", "not", "close"}
    named = task.slots["person"].lower() in reading.words
    return bool(social), (1.0 if named else 0.75) if fits else 0.0


def _transformed(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    """Rewrites with one right content: the passage's claim, moved to another."""
    target = source_of(task)
    assert target is not None
    copied = split_sentences(reading.text) == split_sentences(task.slots["text"])
    said = set(reading.claims)
    entities = {c.entity for c in target}
    attempts = not copied and any(c.entity in entities for c in said)
    return attempts, len(said & target) / max(len(said | target), 1)


def _summary(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    source = passage_claims(task)
    subject = subject_of(task)
    about = any(c.entity == subject for c in reading.claims)
    about |= any(subject in e.who for e in reading.events)
    kept = len(set(reading.claims) & source) / len(source)
    short = len(reading.words) < count_words(task.slots["text"])
    return about, kept if short else 0.3 * kept


def label_answer(world: World, task: Task) -> str:
    """The right label of a classification task."""
    text = task.slots["text"]
    if task.kind == "polite":
        words = set(re.findall(r"[a-z]+", text.lower()))
        return "rude" if words & {*RUDE_WORDS, "away"} else "polite"
    claims = passage_claims(task)
    return "true" if all(is_true(world, c, None) for c in claims) else "false"


_OPTIONS = {
    "polite": ("polite", "rude"),
    "true": ("true", "false"),
}


def _label(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    options = _OPTIONS[task.kind]
    given = {value for noun, value in reading.fragments if noun == "label"}
    if "not" in reading.acts and len(given) == 1:
        given = set(options) - given
    attempts = len(given) == 1 and given <= set(options)
    return attempts, float(given == {label_answer(world, task)})


def _repeat(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    words = re.findall(r"[a-z]+", task.slots["text"].lower())
    exact = words == reading.words
    shared = len(set(words) & set(reading.words)) / max(
        len(set(words) | set(reading.words)), 1
    )
    return exact or shared >= 0.6, 1.0 if exact else 0.0


def _greet(world: World, task: Task, reading: Reading) -> tuple[bool, float]:
    name = task.slots["person"].lower()
    return "greet" in reading.acts, 1.0 if name in reading.words else 0.3


_ASKED = ("ask", "read", "find", "finish")
_GRADERS: dict[str, Grader] = {
    "about": _about,
    "story": _story,
    "ask": _ask,
    "list": _list,
    "facts": _facts,
    "talk": _talk,
    "swap": _transformed,
    "polite": _label,
    "summary": _summary,
    "true": _label,
    "repeat": _repeat,
    "greet": _greet,
    "finish": _ask,
    "read": _ask,
    "find": _ask,
}
