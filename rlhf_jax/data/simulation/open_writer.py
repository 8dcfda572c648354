"""Writes responses to tasks about the world: texts, answers, lists and talk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_jax.data.simulation.habits import REPLIES, Habits
from rlhf_jax.data.simulation.phrases import (
    UNKNOWN_SENTENCES,
    believed,
    capitalize,
    event,
    fact,
)
from rlhf_jax.data.simulation.tasks import Task
from rlhf_jax.data.simulation.templates import CATEGORIES, COUNTS
from rlhf_jax.data.simulation.world import (
    ATTRIBUTES,
    ENTITIES,
    KNOWN,
    World,
    pick,
    pick_several,
)


@dataclass
class OpenWriter:
    """Writes about the world; a method for each kind of task returns sentences."""

    world: World
    rng: np.random.Generator
    habits: Habits

    def happens(self, probability: float) -> bool:
        """Draws whether something with this probability happens."""
        return bool(self.rng.random() < probability)

    def _fact(self, entity: str, attribute: str, pronoun: bool) -> str:
        value = believed(self.world, self.rng, entity, attribute, self.habits.wrong)
        return fact(entity, attribute, value, pronoun)

    def _content(self, entity: str, num: int, events: float = 0.25) -> list[str]:
        """`num` sentences about an entity: facts, and events in this proportion."""
        sentences: list[str] = []
        for index, noun in enumerate(pick_several(self.rng, KNOWN, num)):
            pronoun = index > 0
            if pronoun and self.happens(events):
                sentence = event(self.rng, "it")
            else:
                sentence = self._fact(entity, noun, pronoun)
            if sentence not in sentences:
                sentences.append(sentence)
        return sentences

    def _number(self, wishes: dict[str, str]) -> int:
        return COUNTS[wishes.get("sentences", "two")]

    def about(self, task: Task, wishes: dict[str, str]) -> list[str]:
        entity = task.slots["entity"]
        num = self._number(wishes)
        return self._content(entity, num)

    def story(self, task: Task, wishes: dict[str, str]) -> list[str]:
        num = self._number(wishes)
        sentences = []
        for index in range(num):
            subject = "it" if index else f"the {task.slots['entity']}"
            when = index > 0 or "begin" not in wishes
            sentence = event(self.rng, subject, when=when)
            while any(s.split()[-2:] == sentence.split()[-2:] for s in sentences):
                sentence = event(self.rng, subject)
            sentences.append(sentence)
        if "end" not in wishes and "sentences" not in wishes and self.happens(0.3):
            sentences.append("The end")
        return sentences

    def answer(self, task: Task, wishes: dict[str, str]) -> list[str]:
        """Answers a question about the world."""
        asked = task.slots["attribute"]
        entity = task.slots["entity"]
        if asked not in KNOWN and not self.happens(self.habits.guesses):
            texts = ("Nobody knows", UNKNOWN_SENTENCES[asked])
            return [pick(self.rng, texts).format(o=f"the {entity}")]
        value = believed(self.world, self.rng, entity, asked, self.habits.wrong)
        return self._state(entity, asked, value)

    def _state(self, entity: str, asked: str, value: str) -> list[str]:
        if self.happens(self.habits.short_answers):
            place = {"home": "The {v}", "age": "{v} years old"}
            return [capitalize(place.get(asked, "{v}").format(v=value))]
        return [fact(entity, asked, value, pronoun=self.happens(0.4))]

    def list(self, task: Task, wishes: dict[str, str]) -> list[str]:
        category = CATEGORIES[task.slots["category"]]
        values = ENTITIES if category == "animal" else ATTRIBUTES[category].values
        return [self._enumerate(values, self._miscount(task))]

    def _miscount(self, task: Task) -> int:
        if self.happens(self.habits.wrong):
            return pick(self.rng, [n for n in (1, 2, 3) if n != task.count])
        return task.count

    def _enumerate(self, values: tuple[str, ...], num: int) -> str:
        items = pick_several(self.rng, values, num)
        head = ", ".join(items[:-1])
        return capitalize(f"{head} and {items[-1]}" if head else items[-1])

    def facts(self, task: Task, wishes: dict[str, str]) -> list[str]:
        num = self._miscount(task)
        return self._content(task.slots["entity"], num, events=0.0)

    def talk(self, task: Task, wishes: dict[str, str]) -> list[str]:
        reply = REPLIES[task.slots["act"]]
        if self.happens(self.habits.wrong):
            reply = pick(self.rng, tuple(REPLIES.values()))
        return [reply.format(p=task.slots["person"])]
