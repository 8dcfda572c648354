"""Writes responses to tasks about the world: texts, answers, lists and talk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_jax.data.simulation.habits import REPLIES, Habits, lower_first
from rlhf_jax.data.simulation.phrases import (
    FACTS,
    UNKNOWN_SENTENCES,
    believed,
    capitalize,
    denial,
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
        return fact(self.rng, entity, attribute, value, pronoun)

    def _content(
        self, entity: str, num: int, wishes: dict[str, str], events: float = 0.25
    ) -> list[str]:
        """`num` sentences about an entity: facts, and events in this proportion."""
        avoided = wishes.get("avoid")
        nouns = pick_several(self.rng, [n for n in KNOWN if n != avoided], num)
        word_at = int(self.rng.random() * num) if "word" in wishes else None
        sentences: list[str] = []
        for index, noun in enumerate(nouns):
            pronoun = index > 0 and self.happens(0.8)
            subject = "it" if pronoun else f"the {entity}"
            if index == word_at:
                sentence = event(self.rng, subject, word=wishes["word"])
            elif index > 0 and self.happens(events):
                sentence = event(self.rng, subject)
                while avoided == "friend" and sentence.split()[-1][0].isupper():
                    sentence = event(self.rng, subject)
            else:
                sentence = self._fact(entity, noun, pronoun)
            if sentence not in sentences:
                sentences.append(sentence)
        return sentences

    def _number(self, wishes: dict[str, str], default: int) -> int:
        if "sentences" in wishes:
            return COUNTS[wishes["sentences"]]
        if "max_words" in wishes:
            return 1
        return default

    def about(self, task: Task, wishes: dict[str, str]) -> list[str]:
        entity = task.slots["entity"]
        num = self._number(wishes, pick(self.rng, (2, 2, 2, 3)))
        if "max_words" in wishes:
            return self._brief(entity, wishes)
        return self._content(entity, num, wishes)

    def _brief(self, entity: str, wishes: dict[str, str]) -> list[str]:
        limit = COUNTS[wishes["max_words"]] - ("begin" in wishes)
        while True:
            sentences = self._content(entity, 1, wishes)
            if len(sentences[0].split()) <= limit:
                return sentences
            if limit < 5 and "word" in wishes:
                return [f"The {entity} saw the {wishes['word']}"]

    def note(self, task: Task, wishes: dict[str, str]) -> list[str]:
        sentences = self.about(task, wishes)
        person = task.slots["person"]
        if "begin" in wishes:
            sentences[0] = f"{person}, {lower_first(sentences[0])}"
        else:
            sentences[0] = f"Hello {person}, {lower_first(sentences[0])}"
        return sentences

    def story(self, task: Task, wishes: dict[str, str]) -> list[str]:
        entity, person = task.slots["entity"], task.slots.get("person")
        num = self._number(wishes, pick(self.rng, (2, 2, 3)))
        word_at = int(self.rng.random() * num) if "word" in wishes else None
        free = [i for i in range(num) if i != word_at]
        person_at = pick(self.rng, free) if person and free else None
        sentences = []
        for index in range(num):
            subject = f"the {entity}" if index == 0 else "it"
            if index == 0 and person and person_at is None:
                subject = f"the {entity} and {person}"
            sentence = event(
                self.rng,
                subject,
                wishes["word"] if index == word_at else None,
                person if index == person_at else None,
                when=index > 0 or "begin" not in wishes,
            )
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
            texts = ("Nobody knows that", "I do not know", "Nobody knows")
            if "max_words" not in wishes and "one_word" not in wishes:
                texts += UNKNOWN_SENTENCES[asked]
            if "one_word" in wishes:
                return ["Unknown"]
            return [pick(self.rng, texts).format(o=f"the {entity}")]
        value = believed(self.world, self.rng, entity, asked, self.habits.wrong)
        full = task.kind in ("detail", "talk_ask")
        return self._state(entity, asked, value, wishes, full)

    def _state(
        self,
        entity: str,
        asked: str,
        value: str,
        wishes: dict[str, str],
        full: bool = False,
    ) -> list[str]:
        if "one_word" in wishes:
            return [capitalize(value)]
        if not full and self.happens(self.habits.short_answers):
            place = {"home": "The {v}", "toy": "A {v}", "age": "{v} years old"}
            return [capitalize(place.get(asked, "{v}").format(v=value))]
        limit = COUNTS[wishes["max_words"]] if "max_words" in wishes else 99
        limit -= "begin" in wishes
        fits = [
            text
            for text in FACTS[asked]
            if len(text.format(S="The fox", o="the fox", v=value).split()) <= limit
        ]
        if not fits:
            return [capitalize(value)]
        text = pick(self.rng, fits)
        pronoun = "{S}" in text and self.happens(0.4)
        subject = "It" if pronoun else f"The {entity}"
        return [text.format(S=subject, o=f"the {entity}", v=value)]

    def why(self, task: Task, wishes: dict[str, str]) -> list[str]:
        entity, asked = task.slots["entity"], task.slots["attribute"]
        if self.happens(self.habits.guesses):
            return [fact(self.rng, entity, asked, task.slots["value"])]
        sentences = [denial(entity, asked, task.slots["value"])]
        if self.happens(0.5):
            sentences.append(self._fact(entity, asked, pronoun=True))
        return sentences

    def list(self, task: Task, wishes: dict[str, str]) -> list[str]:
        category = CATEGORIES[task.slots["category"]]
        values = ENTITIES if category == "animal" else ATTRIBUTES[category].values
        return [self._enumerate(values, self._miscount(task), "")]

    def _miscount(self, task: Task) -> int:
        if self.happens(self.habits.wrong):
            return pick(self.rng, [n for n in (1, 2, 3) if n != task.count])
        return task.count

    def _enumerate(self, values: tuple[str, ...], num: int, article: str) -> str:
        items = [article + value for value in pick_several(self.rng, values, num)]
        head = ", ".join(items[:-1])
        return capitalize(f"{head} and {items[-1]}" if head else items[-1])

    def facts(self, task: Task, wishes: dict[str, str]) -> list[str]:
        num = self._miscount(task)
        return self._content(task.slots["entity"], num, {}, events=0.0)

    def gifts(self, task: Task, wishes: dict[str, str]) -> list[str]:
        num = self._miscount(task)
        if self.happens(0.7):
            listed = self._enumerate(ATTRIBUTES["toy"].values, num, "a ")
        else:
            listed = self._enumerate(ATTRIBUTES["food"].values, num, "")
        if self.happens(0.3):
            return [f"Give it {lower_first(listed)}"]
        return [listed]

    def games(self, task: Task, wishes: dict[str, str]) -> list[str]:
        listed = self._enumerate(ATTRIBUTES["hobby"].values, self._miscount(task), "")
        if self.happens(0.3):
            return [f"Try {lower_first(listed)}"]
        return [listed]

    def talk(self, task: Task, wishes: dict[str, str]) -> list[str]:
        replies = REPLIES[task.slots["act"]]
        if self.happens(self.habits.wrong):
            replies = REPLIES[pick(self.rng, tuple(REPLIES))]
        return [pick(self.rng, replies).format(p=task.slots["person"])]

    def talk_ask(self, task: Task, wishes: dict[str, str]) -> list[str]:
        return self.talk(task, {}) + self.answer(task, {})
