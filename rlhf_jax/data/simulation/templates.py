"""The prompts' wording: templates by use case and kind, and explicit constraints.

Source of the use cases and their proportions: Ouyang et al. 2022, arXiv:2203.02155,
Table 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_jax.data.simulation.world import ATTRIBUTES, KNOWN

USE_CASES = {  # fractions of the prompts; Table 1
    "generation": 0.456,
    "open_qa": 0.124,
    "brainstorming": 0.112,
    "chat": 0.084,
    "rewrite": 0.066,
    "summarization": 0.042,
    "classification": 0.035,
    "other": 0.035,
    "closed_qa": 0.026,
    "extract": 0.019,
}
COUNTS = {"one": 1, "two": 2, "three": 3}

TWO_CONSTRAINTS = 0.2  # of the prompts that may have constraints
ONE_CONSTRAINT = 0.5
PLAIN_QUESTIONS = 0.65  # of the questions and the talk, whatever else is drawn


@dataclass(frozen=True)
class Template:
    """The core of a prompt; `{slot}` is filled by a task's slot of that name."""

    use_case: str
    kind: str
    text: str
    fixed: tuple[tuple[str, str], ...] = ()


_QUESTIONS = {
    "colour": ("What colour is {entity}?",),
    "food": ("What does {entity} eat?", "Tell me what {entity} eats."),
    "home": ("Where does {entity} live?", "Tell me where {entity} lives."),
    "age": ("How old is {entity}?", "Tell me how old {entity} is."),
    "birthday": ("When was {entity} born?", "Tell me when {entity} was born."),
}
ACTS = {  # what a person says in a chat, and the acts that answer it
    "Hello": ("greet",),
    "Good morning": ("greet",),
    "How are you": ("fine", "joy"),
    "I am sad": ("comfort",),
    "I am tired": ("comfort", "night"),
    "I am happy": ("joy",),
    "Thank you": ("welcome",),
    "Good night": ("night",),
}
CATEGORIES = {a.plural: a.noun for a in ATTRIBUTES.values() if a.known} | {
    "animals": "animal"
}


def _templates() -> tuple[Template, ...]:
    rows: list[Template] = []

    def add(use_case: str, kind: str, *texts: str, **fixed: str) -> None:
        rows.extend(Template(use_case, kind, t, tuple(fixed.items())) for t in texts)

    add(
        "generation",
        "about",
        "Write about {entity}.",
        "Tell me about {entity}.",
    )
    add(
        "generation",
        "story",
        "Write a story about {entity}.",
        "Tell a story about {entity}.",
    )
    for noun, texts in _QUESTIONS.items():
        add("open_qa", "ask", *texts, attribute=noun)
    add("open_qa", "ask", "What is the {attribute} of {entity}?")
    add(
        "brainstorming",
        "list",
        "List {count} {category}.",
    )
    add(
        "brainstorming",
        "facts",
        "List {count} facts about {entity}.",
    )
    add(
        "chat",
        "talk",
        "{person} says: {act}. Answer {person}.",
    )
    add("rewrite", "swap", "Write this about {other}: {text}")
    add(
        "summarization",
        "summary",
        "Sum this up in one sentence: {text}",
    )
    add(
        "classification",
        "polite",
        "Is this polite or rude? {text}",
    )
    add(
        "classification",
        "true",
        "Is this true or false? {text}",
    )
    add("other", "repeat", "Repeat this: {text}")
    add("other", "greet", "Say hello to {person}.", "Please greet {person}.")
    add("other", "finish", "Finish this: The {animal} lives in", attribute="home")
    add("other", "finish", "Finish this: The {animal} eats", attribute="food")
    for noun, texts in _QUESTIONS.items():
        if noun in KNOWN:
            add("closed_qa", "read", f"Read this: {{text}} {texts[0]}", attribute=noun)
    add("extract", "find", "Find the {attribute} in this text: {text}")
    add("extract", "find", "Find the animal in this text: {text}", attribute="animal")
    return tuple(rows)


TEMPLATES = _templates()
KIND_WEIGHTS = {"repeat": 2.0}  # within its use case; the default is 1
_NUMBERS = ("one", "two")
CONSTRAINT_TEXTS = {
    "sentences": ("Use {} sentence.", "Use {} sentences."),
    "begin": ("Begin with {}.",),
    "end": ("End with {}.",),
}
CONSTRAINT_VALUES = {
    "sentences": _NUMBERS,
    "begin": ("Well", "Sure", "So"),
    "end": ("The end", "Good night", "Thank you"),
}
ALLOWED_CONSTRAINTS = {
    "about": ("sentences", "begin", "end"),
    "story": ("sentences", "begin", "end"),
    "ask": ("begin", "end"),
    "talk": ("begin", "end"),
    "facts": ("begin", "end"),
    "list": ("begin", "end"),
}
CLASHES = ({"sentences", "end"},)
