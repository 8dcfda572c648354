"""The grammar of controlled English: patterns of lower-cased text, one token apart.

In a pattern of a claim "@" stands for a noun phrase, "#" for a value of the attribute
and "!" for an optional "not". Named groups are numbered, because a name may occur in a
pattern only once: "entity" becomes "entity_3".
"""

from __future__ import annotations

import re
from itertools import count

from rlhf_jax.data.simulation.world import ATTRIBUTES, ENTITIES, PEOPLE, SCENERY


def _any(words: tuple[str, ...]) -> str:
    return "|".join(word.lower() for word in words)


_VALUES = {noun: _any(a.values) for noun, a in ATTRIBUTES.items()}
_ENTITY = _any(ENTITIES)
_PERSON = _any(PEOPLE)
_NP = (
    rf"(?:(?:the|a|an|our|my)(?: (?P<adjective>{_VALUES['colour']}))?"
    rf" (?P<entity>{_ENTITY})|(?P<pronoun>it))"
)
_OWNED = r"(?:the {noun} of @|@ 's {noun}|(?P<its>its) {noun})"
_NOT = r"(?:(?P<negated>not) )?"
_ADVERB = r"(?:(?:also|always|often|really|only) )?"

# What can be said of a subject; "#" stands for the value, "!" for an optional "not".
_PREDICATES = {
    "colour": (
        "is !(?:a )?#(?: animal)?",
        "has (?:a )?# (?:coat|hair)",
        "does (?P<negated>not) have (?:a )?# (?:coat|hair)",
    ),
    "food": (
        "(?:eats|likes|loves|enjoys) #",
        "(?:likes|loves) to eat #",
        "does (?P<negated>not) (?:eat|like|like to eat) #",
        "(?P<negated>never) eats #",
    ),
    "home": (
        "lives in (?:the|a) #",
        "does (?P<negated>not) live in (?:the|a) #",
        "has (?:its|a) home in the #",
        "is at home in the #",
    ),
    "age": ("is !#(?: years old)?",),
    "birthday": ("was !born in (?:the )?#",),
}
_INVERTED = {
    "food": ("# (?:is|are) !what @ eats", "what @ eats is !#"),
    "home": ("(?:in )?the # is !where @ lives",),
}
_HOW_UNKNOWN = (
    ("age", "how old @ is"),
    ("birthday", "when @ was born"),
    *((noun, _OWNED.format(noun=noun)) for noun in ATTRIBUTES),
)
_ADMITS = "(?:nobody knows|no one knows|i do not know|i am not sure)"
_SIMPLE_UNKNOWN = (
    rf"{_ADMITS}(?: that| this| it| the answer)?",
    "i can not (?:say|tell)(?: that| you)?",
    "(?:that|this|it) is not known",
    "unknown",
    "the text does not (?:say|tell)(?: that| it| us)?",
)

_THINGS = "|".join((_any(SCENERY), _VALUES["home"]))
_OBJECT = rf"(?:(?:the|a|an) (?:{_THINGS}|{_ENTITY})|{_PERSON}|it)"
_MOOD = "happy|sad|tired|hungry"
_DEEDS = (
    rf"(?:went|walked|ran) (?:to|with) {_OBJECT}",
    rf"(?:sat|slept|played) (?:by|with|in) {_OBJECT}",
    rf"(?:saw|found|met|looked at) {_OBJECT}",
    rf"(?:was|is|felt|were) (?:very )?(?:{_MOOD})",
    "sang a song",
    "said hello",
    f"(?:liked|likes|loved) {_OBJECT}",
)
_WHEN = "one day|one morning|at night|today|once|then|later|in the morning"
_OPENER = (
    rf"(?:(?:{_WHEN}|well|yes|no|sure|so|oh|sorry|i am sorry|i think|please|ok)(?: ,)?"
    rf"|hello(?: (?:{_PERSON}))?(?: ,)?|(?:{_PERSON}) ,)(?: that(?! is\b))?"
)
_CONNECTOR = r"(?:, )?(?:and|but|so|because)(?: then| also)?|,"
_FRAGMENT_VALUES = "|".join(
    sorted((*_VALUES.values(), _ENTITY, "polite|rude|true|false|food|home"), key=len)
)
_ITEM = rf"(?:in )?(?:(?:the|a|an) )?(?:{_FRAGMENT_VALUES})(?: years old)?"
LABELS = ("polite", "rude", "true", "false", "food", "home")
_LIST_LEAD = (
    "(?:not|it is|that is|this is|try|i like|you can try|how about|give it"
    "|here are some|(?:it|this|the text) is about|the answer is|some are"
    "|you can give it|they are)"
)
LIST = re.compile(
    rf"(?:{_LIST_LEAD} )?{_ITEM}(?:(?: ,| and| , and) {_ITEM})*$"  # the whole sentence
)
_SMALL_TALK = {
    "greet": rf"(?:hello|good morning|hi)(?:(?: ,)? (?:{_PERSON}|the (?:{_ENTITY}))$)?",
    "wellness": r"how are you",
    "fine": r"i am (?:fine|well|very well)(?: , thank you| today)?",
    "comfort": (
        r"(?:oh , )?i am sorry(?: to hear that)?|i hope you feel better(?: soon)?"
        r"|(?:do not be|you are not) (?:sad|alone)|you can rest now|please rest"
    ),
    "joy": r"i am (?:so |very )?(?:happy|glad)(?: too| for you| to hear that)?"
    r"|that is (?:very )?good(?: to hear)?",
    "welcome": r"you are (?:very )?welcome|it was nothing|i am glad to help",
    "thanks": r"thank you(?: very much| so much)?",
    "night": rf"good night(?:(?: ,)? (?:{_PERSON}))?|sleep well|good bye",
    "close": "the end|that is all",
    "yes": "yes|sure|well|of course|ok",
    "insult": (
        "(?:you are|what) (?:a|an|so)? ?(?:very )?(?:silly|stupid|ugly|fool)"
        rf"(?: (?:fool|animal|person|{_ENTITY}))?|shut up(?: , fool)?"
        "|that is (?:a )?(?:stupid|silly)(?: question)?|go away(?: , fool)?|you fool"
        rf"|the (?:{_ENTITY}) is (?:a |so |very )?(?:stupid|silly|ugly)(?: fool)?"
    ),
}


def _compile(pattern: str, attribute: str | None = None) -> re.Pattern[str]:
    if attribute is not None:
        values = _VALUES[attribute]
        pattern = pattern.replace(
            "#",
            rf"(?P<value>{values})\b(?: and (?:a |the |in the )?(?P<more>{values})\b)?",
        )
    pattern = re.sub(r"(?<!\?)!", lambda _: _NOT, pattern.replace("@", _NP))
    number = count()  # a name may occur once in a pattern: entity becomes entity_3
    pattern = re.sub(r"\(\?P<(\w+)>", lambda m: f"(?P<{m[1]}_{next(number)}>", pattern)
    return re.compile(rf"(?:{pattern})(?![a-z'])")


def _claim_patterns() -> list[tuple[str, re.Pattern[str]]]:
    patterns = []
    for noun, predicates in _PREDICATES.items():
        for predicate in predicates:
            patterns.append((noun, _compile(f"@ {_ADVERB}{predicate}", noun)))
            patterns.append((noun, _compile(f"{_ADVERB}{predicate}", noun)))
        owned = _OWNED.format(noun=noun)
        link = "(?:is|are) !(?:the |a |in the |in |called |named )?"
        patterns.append((noun, _compile(f"{owned} {link}#(?: years)?", noun)))
        patterns.append((noun, _compile(f"(?:the |a )?# (?:is|are) !{owned}", noun)))
        patterns += [(noun, _compile(p, noun)) for p in _INVERTED.get(noun, ())]
    return patterns


CLAIMS = _claim_patterns()
ADMISSIONS = [
    (attribute, _compile(rf"{_ADMITS} {how}")) for attribute, how in _HOW_UNKNOWN
]
ADMISSIONS += [
    (noun, _compile(rf"{_OWNED.format(noun=noun)} is not known")) for noun in ATTRIBUTES
]
ADMISSIONS += [(None, _compile(pattern)) for pattern in _SIMPLE_UNKNOWN]
_ACTOR = rf"(?:{_NP}(?: and (?:the (?:{_ENTITY})|{_PERSON}))?|(?:{_PERSON})(?: and the "
_ACTOR += rf"(?P<second>{_ENTITY}))?|they|he|she|i|we)"
EVENTS = [
    ("event", _compile(rf"(?:{_ACTOR} )?(?:also |often )?(?P<deed>{deed})"))
    for deed in _DEEDS
]
TALK = [(act, _compile(pattern)) for act, pattern in _SMALL_TALK.items()]
OPENERS = _compile(_OPENER)
CONNECTORS = _compile(_CONNECTOR)
ADDRESS = re.compile(
    rf"(?!(?:well|so|sure|oh|yes|no) , (?:{_PERSON})$)"
    rf"(.*\b(?!(?:{_PERSON})\b)[a-z]+) , (?:{_PERSON})"
)
