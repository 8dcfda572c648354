"""Prompts: the ten use cases of InstructGPT's Table 1, written and read by one table.

Every prompt is one line: a core from `templates.TEMPLATES` and at most two constraint
sentences. `sample_prompt` writes prompts; `parse_prompt` reads them back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from rlhf_jax.data.simulation.passages import passage
from rlhf_jax.data.simulation.templates import (
    ACTS,
    ALLOWED_CONSTRAINTS,
    CATEGORIES,
    CLASHES,
    CONSTRAINT_TEXTS,
    CONSTRAINT_VALUES,
    COUNTS,
    KIND_WEIGHTS,
    ONE_CONSTRAINT,
    PLAIN_QUESTIONS,
    TEMPLATES,
    TWO_CONSTRAINTS,
    USE_CASES,
    Template,
)
from rlhf_jax.data.simulation.world import (
    ATTRIBUTES,
    ENTITIES,
    KNOWN,
    PEOPLE,
    World,
    pick,
    pick_several,
    pick_weighted,
)


@dataclass(frozen=True)
class Constraint:
    """An explicit constraint; `value` is a phrase or a number."""

    kind: str
    value: str


@dataclass(frozen=True)
class Task:
    """What a prompt asks for.

    `slots` may hold: entity, other (a second entity), attribute, person, count,
    category, act, text (the passage that the prompt quotes).
    """

    use_case: str
    kind: str
    slots: dict[str, str] = field(hash=False)
    constraints: tuple[Constraint, ...] = ()

    @property
    def entity(self) -> str | None:
        """The animal that the prompt is about."""
        return self.slots.get("entity")

    @property
    def count(self) -> int:
        """How many things are asked for (1 where the prompt names no number)."""
        return COUNTS[self.slots.get("count", "one")]


_SLOTS = {
    "entity": "the (?P<entity>{})".format("|".join(ENTITIES)),
    "other": "the (?P<other>{})".format("|".join(ENTITIES)),
    "animal": "(?P<animal>{})".format("|".join(ENTITIES)),
    "attribute": "(?P<attribute>{})".format("|".join(ATTRIBUTES)),
    "person": "(?P<person>{})".format("|".join(PEOPLE)),
    "count": "(?P<count>two|three)",
    "category": "(?P<category>{})".format("|".join(CATEGORIES)),
    "act": "(?P<act>{})".format("|".join(ACTS)),
    "text": "(?P<text>[A-Z].*[.!])",
}


_KINDS: dict[str, dict[str, list[Template]]] = {name: {} for name in USE_CASES}
for _template in TEMPLATES:
    _KINDS[_template.use_case].setdefault(_template.kind, []).append(_template)


def _compile(template: str) -> re.Pattern[str]:
    pattern, seen = "", set()
    for part in re.split(r"(\{\w+\})", template):
        slot = part.strip("{}")
        if not part.startswith("{"):
            pattern += re.escape(part)
        elif slot in seen:
            pattern += f"(?P={slot})"
        else:
            pattern += _SLOTS[slot]
            seen.add(slot)
    return re.compile(pattern)


_PATTERNS = [(template, _compile(template.text)) for template in TEMPLATES]
_CONSTRAINT_PATTERNS = [
    (
        kind,
        re.compile(
            r"(.*[.?]) "
            + re.escape(text).replace(
                r"\{\}", "({})".format("|".join(CONSTRAINT_VALUES[kind]))
            )
        ),
    )
    for kind, texts in CONSTRAINT_TEXTS.items()
    for text in texts
]


@lru_cache(maxsize=65536)
def parse_prompt(prompt: str) -> Task:
    """Reads a prompt of the simulated campaign.

    Args:
        prompt: one line, as `render` writes it.

    Returns:
        What it asks for.

    Raises:
        ValueError: if the prompt is not of the campaign's grammar.
    """
    core, constraints = prompt.strip(), []
    stripped = True
    while stripped:
        stripped = False
        for kind, pattern in _CONSTRAINT_PATTERNS:
            match = pattern.fullmatch(core)
            if match:
                core, stripped = match[1], True
                constraints.append(Constraint(kind, match[2]))
    for template, pattern in _PATTERNS:
        match = pattern.fullmatch(core)
        if match:
            slots = dict(template.fixed) | match.groupdict()
            if "animal" in slots:
                slots["entity"] = slots.pop("animal")
            if template.kind == "summary":
                constraints.append(Constraint("sentences", "one"))
            return Task(
                template.use_case, template.kind, slots, tuple(reversed(constraints))
            )
    raise ValueError(
        f"not a prompt of the simulated campaign: {prompt!r}; its judge can only score "
        "prompts that rlhf_jax.data.simulation wrote (see tasks.TEMPLATES)"
    )


def is_prompt(text: str) -> bool:
    """Whether a text reads as a prompt of the campaign."""
    try:
        parse_prompt(text)
    except ValueError:
        return False
    return True


def sample_prompt(
    world: World, rng: np.random.Generator, use_case: str | None = None
) -> str:
    """Draws one prompt.

    Args:
        world: supplies true values for passages.
        rng: source of randomness.
        use_case: one of `USE_CASES`; None draws it in Table 1's proportions.

    Returns:
        The prompt.
    """
    use_case = pick_weighted(rng, USE_CASES) if use_case is None else use_case
    kinds = _KINDS[use_case]
    kind = pick_weighted(rng, {k: KIND_WEIGHTS.get(k, 1.0) for k in kinds})
    template = pick(rng, kinds[kind])
    entity, other = pick_several(rng, ENTITIES, 2)
    slots = dict(template.fixed)
    slots.setdefault("attribute", pick(rng, tuple(ATTRIBUTES)))
    if kind == "find" and slots["attribute"] not in KNOWN:
        slots["attribute"] = pick(rng, KNOWN)
    slots |= {
        "person": pick(rng, PEOPLE),
        "count": pick(rng, ("two", "three")),
        "category": pick(rng, tuple(CATEGORIES)),
        "act": pick(rng, tuple(ACTS)),
        "animal": entity,
    }
    text = template.text
    if "{text}" in text:
        slots["text"] = passage(world, rng, kind, slots, entity)
    names = {"entity": f"the {entity}", "other": f"the {other}"}
    for slot, value in (slots | names).items():
        text = text.replace(f"{{{slot}}}", value)
    return " ".join([text, *_sample_constraints(rng, kind)])


def _sample_constraints(rng: np.random.Generator, kind: str) -> list[str]:
    allowed = ALLOWED_CONSTRAINTS.get(kind, ())
    draw, num = rng.random(), 0
    if allowed and draw < TWO_CONSTRAINTS + ONE_CONSTRAINT:
        num = 2 if draw < TWO_CONSTRAINTS else 1
    if kind in ("ask", "talk") and rng.random() < PLAIN_QUESTIONS:
        num = 0
    chosen = pick_several(rng, allowed, num)
    if any(clash <= set(chosen) for clash in CLASHES):
        chosen = chosen[:1]
    sentences = []
    for constraint in sorted(chosen, key=list(CONSTRAINT_TEXTS).index):
        value = pick(rng, CONSTRAINT_VALUES[constraint])
        texts = CONSTRAINT_TEXTS[constraint]
        if constraint == "sentences":
            texts = texts[:1] if value == "one" else texts[1:]
        sentences.append(pick(rng, texts).format(value))
    return sentences
