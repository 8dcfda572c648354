"""Controlled English, writing side: sentences on facts and on events."""

from __future__ import annotations

import numpy as np

from rlhf_jax.data.simulation.world import (
    KNOWN,
    PEOPLE,
    SCENERY,
    World,
    other_value,
    pick,
    pick_several,
)

VERB_PHRASES = {
    "colour": "is {v}",
    "food": "eats {v}",
    "home": "lives in the {v}",
    "age": "is {v} years old",
    "birthday": "was born in {v}",
}
UNKNOWN_SENTENCES = {
    "age": "Nobody knows how old {o} is",
    "birthday": "Nobody knows when {o} was born",
}
WHEN = ("One day", "At night")
DEEDS = (
    "went to the {w}",
    "ran to the {w}",
    "slept by the {w}",
    "saw the {w}",
    "found the {w}",
)
SOCIAL_DEEDS = ("met {p}", "saw {p}", "played with {p}")
MOODS = ("happy", "sad", "tired", "hungry")


def capitalize(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def fact(entity: str, attribute: str, value: str, pronoun: bool = False) -> str:
    """A sentence that says that the entity has the value, without the full stop."""
    subject = "It" if pronoun else f"The {entity}"
    return f"{subject} {VERB_PHRASES[attribute].format(v=value)}"


def event(
    rng: np.random.Generator,
    subject: str,
    when: bool = True,
) -> str:
    """A sentence of a story, without the full stop.

    Args:
        rng: source of randomness.
        subject: "the fox", "it" or a person.
        when: whether it may begin with a time.

    Returns:
        The sentence.
    """
    draw = rng.random()
    if draw < 0.2:
        deed = pick(rng, SOCIAL_DEEDS).format(p=pick(rng, PEOPLE))
    elif draw < 0.35:
        deed = f"was {pick(rng, MOODS)}"
    elif draw < 0.42:
        deed = "sang a song"
    else:
        deed = pick(rng, DEEDS).format(w=pick(rng, SCENERY))
    opener = f"{pick(rng, WHEN)} " if when and rng.random() < 0.5 else ""
    return capitalize(f"{opener}{subject} {deed}")


def believed(
    world: World,
    rng: np.random.Generator,
    entity: str,
    attribute: str,
    error: float,
) -> str:
    """The true value, or with probability `error` a wrong one."""
    truth = world.value(entity, attribute)
    if truth is None or rng.random() < error:
        return other_value(rng, attribute, truth)
    return truth


def two_facts(
    world: World, rng: np.random.Generator, entity: str, error: float
) -> tuple[list[str], list[str]]:
    """Two sentences about an entity and the attributes that they speak of."""
    nouns = pick_several(rng, KNOWN, 2)
    first, second = (believed(world, rng, entity, noun, error) for noun in nouns)
    return [
        fact(entity, nouns[0], first) + ".",
        fact(entity, nouns[1], second, pronoun=True) + ".",
    ], nouns
