"""How careful a writer is, set phrases, and how sentences become a response."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_jax.data.simulation.world import PEOPLE

INSULTS = (
    "Shut up, fool.",
    "You are a fool.",
    "That is a stupid question.",
    "You are stupid.",
    "Go away, fool.",
)


MAX_TOKENS = 17  # words and full stops of a response, before its begin and end


@dataclass(frozen=True)
class Habits:
    """How carefully somebody writes: probabilities of each mistake, per response.

    `mannerisms` is the chance of a begin or an end that nobody asked for (no mistake),
    `wrong` is per claim, `guesses` is the chance to invent an answer that nobody knows,
    `short_answers` the chance of "red" in place of a sentence (no mistake).
    """

    wrong: float = 0.0
    guesses: float = 0.0
    ignores_constraints: float = 0.0
    rude: float = 0.0
    off_topic: float = 0.0
    rambles: float = 0.0
    mannerisms: float = 0.0
    short_answers: float = 0.2


PERFECT = Habits()


REPLIES = {
    "Hello": "Hello, {p}.",
    "Good morning": "Good morning, {p}.",
    "How are you": "I am fine, {p}.",
    "I am sad": "I am sorry, {p}.",
    "I am tired": "Good night, {p}.",
    "I am happy": "That is good, {p}.",
    "Thank you": "You are welcome, {p}.",
    "Good night": "Good night, {p}.",
}


def lower_first(sentence: str) -> str:
    """The sentence with a small first letter, unless it begins with a name."""
    names = PEOPLE
    if sentence.split()[0].strip(",.") in names or sentence.startswith("I "):
        return sentence
    return sentence[0].lower() + sentence[1:]


def assemble(sentences: list[str], wishes: dict[str, str]) -> str:
    """Joins sentences into a text that begins and ends as wished."""
    begin = wishes.get("begin")
    if begin is not None and not sentences[0].startswith(begin):
        sentences[0] = f"{begin}, {lower_first(sentences[0])}"
    if "end" in wishes:
        sentences = [*sentences, wishes["end"]]
    return " ".join(s if s[-1] in ".?!" else f"{s}." for s in sentences)
