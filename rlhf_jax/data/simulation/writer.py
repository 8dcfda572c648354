"""Writes responses: good ones, and ones with the mistakes of a careless writer."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_jax.data.simulation.evidence import passage_claims
from rlhf_jax.data.simulation.grading import label_answer
from rlhf_jax.data.simulation.habits import INSULTS, MAX_TOKENS, assemble
from rlhf_jax.data.simulation.open_writer import OpenWriter
from rlhf_jax.data.simulation.phrases import (
    VERB_PHRASES,
    believed,
    capitalize,
)
from rlhf_jax.data.simulation.tasks import Task
from rlhf_jax.data.simulation.templates import CONSTRAINT_VALUES
from rlhf_jax.data.simulation.world import ENTITIES, KNOWN, other_value, pick

_PLACES = ("begin", "end")


class Writer(OpenWriter):
    """Writes a response to any task."""

    def respond(self, task: Task) -> str:
        """Writes a response to a task.

        Args:
            task: what the prompt asks for.

        Returns:
            The response.
        """
        if self.happens(self.habits.off_topic):
            return self._off_topic()
        keeps = not self.happens(self.habits.ignores_constraints)
        wishes = {c.kind: c.value for c in task.constraints} if keeps else {}
        if self.happens(self.habits.mannerisms):
            place = "begin" if "sentences" in wishes else pick(self.rng, _PLACES)
            wishes.setdefault(place, pick(self.rng, CONSTRAINT_VALUES[place]))
        sentences = _WRITERS[task.kind](self, task, wishes)
        if self.happens(self.habits.rambles):
            entity = task.entity or pick(self.rng, ENTITIES)
            sentences += self._content(entity, 2)
        if self.happens(self.habits.rude):
            insult = pick(self.rng, INSULTS)
            place = 0 if self.happens(0.5) else len(sentences)
            sentences.insert(place, insult[:-1])
        while sum(len(s.split()) + 1 for s in sentences) > MAX_TOKENS:
            sentences.pop()
        return assemble(sentences, wishes)

    def _off_topic(self) -> str:
        entity = pick(self.rng, ENTITIES)
        return assemble(self._content(entity, 1), {})

    def from_passage(self, task: Task, wishes: dict[str, str]) -> list[str]:
        """Answers a question about a passage."""
        asked = task.slots["attribute"]
        claims = passage_claims(task)
        subject = next(c.entity for c in claims if c.entity)
        if asked == "animal":
            return [pick(self.rng, (f"The {subject}", capitalize(subject)))]
        found = [c.value for c in claims if c.attribute == asked]
        if not found and not self.happens(self.habits.guesses):
            return [pick(self.rng, ("The text does not say", "I do not know"))]
        truth = found[0] if found else None
        if truth is None or self.happens(self.habits.wrong):
            truth = other_value(self.rng, asked, truth)
        if task.kind == "find":
            return [capitalize(truth)]
        return self._state(subject, asked, truth)

    def swap(self, task: Task, wishes: dict[str, str]) -> list[str]:
        claim = next(iter(passage_claims(task)))
        text = task.slots["text"][:-1]
        if self.happens(self.habits.wrong):
            return [text]
        return [text.replace(str(claim.entity), task.slots["other"])]

    def summary(self, task: Task, wishes: dict[str, str]) -> list[str]:
        claims = sorted(passage_claims(task), key=lambda c: KNOWN.index(c.attribute))
        phrases = []
        for claim in claims:
            value = claim.value
            if self.happens(self.habits.wrong):
                value = other_value(self.rng, claim.attribute, value)
            phrases.append(VERB_PHRASES[claim.attribute].format(v=value))
        if self.happens(self.habits.ignores_constraints):
            phrases = phrases[:1]
        return [f"The {claims[0].entity} " + " and ".join(phrases)]

    def label(self, task: Task, wishes: dict[str, str]) -> list[str]:
        answer = label_answer(self.world, task)
        if self.happens(self.habits.wrong):
            pairs = (("polite", "rude"), ("true", "false"))
            options = next(pair for pair in pairs if answer in pair)
            answer = options[1 - options.index(answer)]
        if self.happens(0.5):
            return [capitalize(answer)]
        return [f"It is {answer}"]

    def repeat(self, task: Task, wishes: dict[str, str]) -> list[str]:
        return [task.slots["text"][:-1]]

    def greet(self, task: Task, wishes: dict[str, str]) -> list[str]:
        name = task.slots["person"]
        return [pick(self.rng, ("Hello, {}", "Good morning, {}")).format(name)]

    def finish(self, task: Task, wishes: dict[str, str]) -> list[str]:
        entity, asked = task.slots["entity"], task.slots["attribute"]
        value = believed(self.world, self.rng, entity, asked, self.habits.wrong)
        if self.happens(0.5):
            return [f"The {entity} {VERB_PHRASES[asked].format(v=value)}"]
        return [capitalize(f"the {value}" if asked == "home" else value)]


_WRITERS: dict[str, Callable[[Writer, Task, dict[str, str]], list[str]]] = {
    "about": Writer.about,
    "story": Writer.story,
    "ask": Writer.answer,
    "list": Writer.list,
    "facts": Writer.facts,
    "talk": Writer.talk,
    "swap": Writer.swap,
    "summary": Writer.summary,
    "polite": Writer.label,
    "true": Writer.label,
    "repeat": Writer.repeat,
    "greet": Writer.greet,
    "finish": Writer.finish,
    "read": Writer.from_passage,
    "find": Writer.from_passage,
}
