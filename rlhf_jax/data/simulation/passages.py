"""The passages that closed-domain prompts quote."""

from __future__ import annotations

import numpy as np

from rlhf_jax.data.simulation.phrases import believed, event, fact, two_facts
from rlhf_jax.data.simulation.world import KNOWN, World, pick

# Chance that a value in a passage differs from the world's, so that the passage has to
# be read: an answer from memory is then wrong.
COUNTERFACTUAL = 0.3
NOT_IN_TEXT = 0.2  # chance that a closed question asks what its passage does not say
RUDE_TEXTS = (
    "You are a fool.",
    "Shut up, fool.",
    "That is a stupid question.",
    "Go away, fool.",
    "The {entity} is stupid.",
    "The {entity} is a silly fool.",
)
POLITE_TEXTS = (
    "Thank you very much.",
    "You are very welcome.",
    "I hope you feel better.",
    "Good morning, {person}.",
    "I am glad to help.",
)


def passage(
    world: World,
    rng: np.random.Generator,
    kind: str,
    slots: dict[str, str],
    entity: str,
) -> str:
    """The text that a prompt of this kind quotes."""
    attribute = slots["attribute"]
    if kind in ("swap", "repeat"):
        if kind == "repeat" and rng.random() < 0.5:
            return event(rng, f"the {entity}") + "."
        noun = pick(rng, KNOWN)
        return fact(entity, noun, believed(world, rng, entity, noun, 0.3)) + "."
    if kind == "summary":
        sentences, _ = two_facts(world, rng, entity, COUNTERFACTUAL)
        sentences += [event(rng, "it") + "."]
        return " ".join(sentences)
    if kind == "polite":
        texts = pick(rng, (RUDE_TEXTS, POLITE_TEXTS))
        return pick(rng, texts).format(entity=entity, **slots)
    if kind == "true":
        noun = pick(rng, KNOWN)
        return fact(entity, noun, believed(world, rng, entity, noun, 0.5)) + "."
    silent = kind == "read" and rng.random() < NOT_IN_TEXT
    while True:  # kinds "read" and "find"
        sentences, nouns = two_facts(world, rng, entity, COUNTERFACTUAL)
        if attribute == "animal" or (attribute in nouns) != silent:
            return " ".join(sentences)
