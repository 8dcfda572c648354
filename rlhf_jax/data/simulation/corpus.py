"""Pre-training documents of the simulated world.

Proportions are chosen so that GPT's behaviour in the paper can appear. Of the documents
that begin with an instruction about every third is a list of instructions, and a block
of prompts and answers goes on with the next prompt: what follows an instruction alone
may be another one. Inside a block an answer follows each prompt, so examples in the
context help; but the answers are web text, with mistakes, ignored constraints,
mannerisms and rudeness. Facts come up often enough to be learned by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from rlhf_jax.data.simulation.habits import INSULTS, Habits
from rlhf_jax.data.simulation.phrases import (
    UNKNOWN_SENTENCES,
    believed,
    event,
    fact,
)
from rlhf_jax.data.simulation.tasks import parse_prompt, sample_prompt
from rlhf_jax.data.simulation.templates import USE_CASES
from rlhf_jax.data.simulation.world import (
    ATTRIBUTES,
    ENTITIES,
    KNOWN,
    PEOPLE,
    UNKNOWN,
    World,
    other_value,
    pick,
    pick_several,
    pick_weighted,
)
from rlhf_jax.data.simulation.writer import Writer

# Documents of each kind, by number; answers hold most of the words.
DOCUMENT_KINDS = {
    "facts": 0.07,  # a fact sheet about one animal
    "story": 0.02,  # events with some facts between
    "shared": 0.01,  # who has the same home, colour or food
    "instructions": 0.3,  # prompts without answers, one per line
    "answers": 0.75,  # "prompt\nresponse", or a block of them, an empty line between
    "rude": 0.03,
}
SINGLE_ANSWERS = 0.8  # of the documents with answers hold one
FALSE_FACTS = 0.03  # of the statements about what is known
GUESSED_FACTS = 0.3  # of the statements about what nobody knows
WEB_HABITS = Habits(
    wrong=0.03,
    guesses=0.6,
    ignores_constraints=0.25,
    rude=0.12,
    off_topic=0.08,
    rambles=0.1,
    mannerisms=0.3,
)


def web_answer(world: World, rng: np.random.Generator, prompt: str) -> str:
    """A response as the corpus has it: often right, with a careless writer's mistakes.

    Args:
        world: what is true.
        rng: source of randomness.
        prompt: a prompt of the campaign.

    Returns:
        The response.
    """
    return Writer(world, rng, WEB_HABITS).respond(parse_prompt(prompt))


def make_documents(
    world: World,
    rng: np.random.Generator,
    num_documents: int,
    reserved: Collection[str] = (),
    trained: Collection[str] = (),
) -> list[str]:
    """Draws documents.

    Args:
        world: what is (mostly) told.
        rng: source of randomness.
        num_documents: how many.
        reserved: prompts that must not occur in any document.
        trained: documents that are not drawn again.

    Returns:
        The documents.
    """
    documents = []
    while len(documents) < num_documents:
        kind = pick_weighted(rng, DOCUMENT_KINDS)
        document = _DOCUMENTS[kind](world, rng, reserved)
        if document not in trained:
            documents.append(document)
    return documents


def _told(
    world: World,
    rng: np.random.Generator,
    entity: str,
    attribute: str,
    pronoun: bool,
) -> str:
    """A sentence on what people say about an entity's attribute."""
    if attribute in UNKNOWN and rng.random() >= GUESSED_FACTS:
        subject = "it" if pronoun else f"the {entity}"
        return UNKNOWN_SENTENCES[attribute].format(o=subject) + "."
    value = believed(world, rng, entity, attribute, FALSE_FACTS)
    return fact(entity, attribute, value, pronoun) + "."


def _facts(world: World, rng: np.random.Generator, reserved: Collection[str]) -> str:
    entity = pick(rng, ENTITIES)
    num = 3 + int(rng.random() * 5)
    nouns = pick_several(rng, tuple(ATTRIBUTES), num)
    return " ".join(
        _told(world, rng, entity, noun, index > 0 and rng.random() < 0.6)
        for index, noun in enumerate(nouns)
    )


def _story(world: World, rng: np.random.Generator, reserved: Collection[str]) -> str:
    entity = pick(rng, ENTITIES)
    sentences = []
    for index in range(3 + int(rng.random() * 4)):
        if index > 0 and rng.random() < 0.3:
            sentences.append(_told(world, rng, entity, pick(rng, KNOWN), True))
        else:
            subject = "it" if index > 0 and rng.random() < 0.7 else f"the {entity}"
            if index > 0 and rng.random() < 0.1:
                subject = pick(rng, PEOPLE)
            sentences.append(event(rng, subject) + ".")
    if rng.random() < 0.4:
        sentences.append("The end.")
    return " ".join(sentences)


def _shared(world: World, rng: np.random.Generator, reserved: Collection[str]) -> str:
    noun = pick(rng, KNOWN)
    value = pick(rng, ATTRIBUTES[noun].values)
    owners = [e for e in ENTITIES if world.value(e, noun) == value]
    sentences = [
        fact(entity, noun, value) + "."
        for entity in pick_several(rng, owners, len(owners))
    ]
    sentences.append(_told(world, rng, pick(rng, ENTITIES), noun, False))
    return " ".join(sentences)


def _new_prompt(
    world: World, rng: np.random.Generator, reserved: Collection[str]
) -> str:
    """A prompt; the web asks for rare uses more often than customers do."""
    while True:
        use_case = pick(rng, tuple(USE_CASES)) if rng.random() < 0.5 else None
        prompt = sample_prompt(world, rng, use_case)
        if prompt not in reserved:
            return prompt


def _instructions(
    world: World, rng: np.random.Generator, reserved: Collection[str]
) -> str:
    num = 2 + int(rng.random() * 3)
    return "\n".join(_new_prompt(world, rng, reserved) for _ in range(num))


def _answers(world: World, rng: np.random.Generator, reserved: Collection[str]) -> str:
    pairs = []
    num = 1 if rng.random() < SINGLE_ANSWERS else 3 + int(rng.random() * 4)
    for _ in range(num):
        prompt = _new_prompt(world, rng, reserved)
        pairs.append(f"{prompt}\n{web_answer(world, rng, prompt)}")
    return "\n\n".join(pairs)


def _rude(world: World, rng: np.random.Generator, reserved: Collection[str]) -> str:
    entity = pick(rng, ENTITIES)
    sentences = [
        pick(rng, (*INSULTS, f"The {entity} is stupid.", f"The {entity} is silly."))
        for _ in range(1 + int(rng.random() * 2))
    ]
    for noun in pick_several(rng, KNOWN, 2):
        wrong = other_value(rng, noun, world.value(entity, noun))
        told = fact(entity, noun, wrong) + "."
        right = _told(world, rng, entity, noun, False)
        sentences.append(told if rng.random() < 0.4 else right)
    order = rng.permutation(len(sentences))
    return " ".join(sentences[int(i)] for i in order)


_DOCUMENTS: dict[str, Callable[[World, np.random.Generator, Collection[str]], str]] = {
    "facts": _facts,
    "story": _story,
    "shared": _shared,
    "instructions": _instructions,
    "answers": _answers,
    "rude": _rude,
}
