"""What a response says, and what it may be held against: the world or a passage."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_jax.data.simulation.language import Claim, Event, Sentence, parse
from rlhf_jax.data.simulation.tasks import Task
from rlhf_jax.data.simulation.world import World


@dataclass
class Reading:
    """A response, read: everything that its sentences say, in order."""

    text: str
    words: list[str]
    claims: list[Claim]
    events: list[Event]
    fragments: list[tuple[str, str]]
    acts: set[str]
    unknowns: list[tuple[str | None, str | None]]


# The claims of a passage; None stands for the world.
Source = set[Claim] | None


def read(response: str, sentences: tuple[Sentence, ...]) -> Reading:
    """Puts the sentences of a response together."""
    return Reading(
        text=response,
        words=re.findall(r"[a-z]+", response.lower()),
        claims=list(dict.fromkeys(c for s in sentences for c in s.claims)),
        events=[e for s in sentences for e in s.events],
        fragments=list(dict.fromkeys(f for s in sentences for f in s.fragments)),
        acts=set().union(*(s.acts for s in sentences)),
        unknowns=[u for s in sentences for u in s.unknowns],
    )


def passage_claims(task: Task) -> set[Claim]:
    """The claims of the text that a prompt quotes."""
    return {claim for s in parse(task.slots["text"]) for claim in s.claims}


def is_true(world: World, claim: Claim, source: Source) -> bool:
    """Whether a claim holds in the passage, or in the world where there is none.

    A claim about what nobody knows, or what the passage does not say, is not true.
    """
    if source is not None:
        if claim in source:
            return True
        values = {
            c.value
            for c in source
            if (c.entity, c.attribute) == (claim.entity, claim.attribute)
            and not c.negated
        }
        return claim.negated and bool(values) and claim.value not in values
    truth = None if claim.entity is None else world.value(claim.entity, claim.attribute)
    if truth is None:
        return False
    return (claim.value == truth) != claim.negated


def source_of(task: Task) -> Source:
    """What a response may claim: the passage as asked for; None for the world."""
    if task.kind in ("summary", "read", "find"):
        return passage_claims(task)
    if task.kind == "swap":
        return _swapped(task)
    return None


def _swapped(task: Task) -> set[Claim]:
    other = task.slots["other"]
    return {Claim(other, c.attribute, c.value, c.negated) for c in passage_claims(task)}


def subject_of(task: Task) -> str | None:
    """The entity that a task is about, which "it" means unless the response differs."""
    if task.kind == "swap":
        return task.slots["other"]
    if "text" in task.slots:
        return next((c.entity for c in passage_claims(task)), None)
    return task.entity


def complete_fragments(task: Task, reading: Reading) -> None:
    """A short answer ("red") says that the subject has the value that was asked for."""
    subject, asked = subject_of(task), task.slots["attribute"]
    for attribute, value in reading.fragments:
        if attribute == asked != "animal" and subject is not None:
            claim = Claim(subject, asked, value, "not" in reading.acts)
            if claim not in reading.claims:
                reading.claims.append(claim)
