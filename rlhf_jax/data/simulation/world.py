"""The simulated world: who lives in it, what is true there, and what nobody knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

ENTITIES = tuple("fox owl bear cat dog".split())
PEOPLE = tuple("Anna Tom Ben".split())


@dataclass(frozen=True)
class Attribute:
    """A property of every entity: its noun, the noun's plural, its values."""

    noun: str
    plural: str
    values: tuple[str, ...]
    known: bool = True


ATTRIBUTES = {
    attribute.noun: attribute
    for attribute in (
        Attribute("colour", "colours", tuple("red white green blue".split())),
        Attribute("food", "foods", tuple("bread fish nuts corn".split())),
        Attribute("home", "homes", tuple("forest barn garden cave".split())),
        Attribute("age", "ages", tuple("three five seven ten".split()), known=False),
        Attribute(
            "birthday",
            "birthdays",
            tuple("spring summer autumn winter".split()),
            known=False,
        ),
    )
}
KNOWN = tuple(noun for noun, a in ATTRIBUTES.items() if a.known)
UNKNOWN = tuple(noun for noun, a in ATTRIBUTES.items() if not a.known)

# Things that stories mention and that are no attribute of anyone.
SCENERY = tuple("river hill tree moon field".split())
RUDE_WORDS = ("fool", "silly", "stupid", "ugly", "shut")


@dataclass(frozen=True)
class World:
    """What is true: `facts[entity][attribute]`, for the known attributes only."""

    seed: int
    facts: dict[str, dict[str, str]]

    def value(self, entity: str, attribute: str) -> str | None:
        """The true value, or None where nobody knows it."""
        return self.facts[entity].get(attribute)


def make_world(seed: int) -> World:
    """Draws a world in which every value of an attribute is about equally common.

    Args:
        seed: any integer; equal seeds give equal worlds.

    Returns:
        The world.
    """
    rng = np.random.default_rng([seed, 0])
    facts: dict[str, dict[str, str]] = {entity: {} for entity in ENTITIES}
    for noun in KNOWN:
        values = ATTRIBUTES[noun].values
        order = rng.permutation(len(ENTITIES))
        shuffled = rng.permutation(len(values))
        for rank, entity_index in enumerate(order):
            value = values[int(shuffled[rank % len(values)])]
            facts[ENTITIES[int(entity_index)]][noun] = value
    return World(seed, facts)


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One item, uniformly."""
    return items[int(rng.random() * len(items))]


def pick_weighted(rng: np.random.Generator, weights: dict[T, float]) -> T:
    """One key, with probability proportional to its weight."""
    point = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        point -= weight
        if point < 0.0:
            return key
    return next(reversed(weights))


def pick_several(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    """`count` different items in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def other_value(rng: np.random.Generator, attribute: str, value: str | None) -> str:
    """A value of the attribute that is not `value`."""
    return pick(rng, [v for v in ATTRIBUTES[attribute].values if v != value])
