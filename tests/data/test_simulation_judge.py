"""The judge scores what a response says, by hand-made cases in a hand-made world."""

import numpy as np
import pytest

from rlhf_jax.data.simulation.judge import HIGHEST, LOWEST, Judge
from rlhf_jax.data.simulation.tasks import parse_prompt, sample_prompt
from rlhf_jax.data.simulation.world import ENTITIES, World, make_world

FOX = {
    "colour": "red",
    "food": "nuts",
    "home": "forest",
}
OWL = FOX | {"colour": "white", "home": "barn", "food": "fish"}
JUDGE = Judge(World(0, {entity: OWL for entity in ENTITIES} | {"fox": FOX}))
COLOUR = "What colour is the fox?"
AGE = "How old is the fox?"
ABOUT = "Write about the fox."
CLOSED = "Read this: The fox is blue. It eats corn. What colour is the fox?"
SILENT = "Read this: The fox is blue. It eats corn. Where does the fox live?"
SUMMARY = (
    "Sum this up in one sentence: The fox is blue. It eats corn. It saw the bridge."
)

FULL = [  # (prompt, response) that do all that was asked
    (COLOUR, "Red."),
    (COLOUR, "red"),
    (COLOUR, "It is red."),
    (COLOUR, "It's red."),
    (COLOUR, "The fox is red."),
    (COLOUR, "The colour of the fox is red."),
    (COLOUR, "The fox's colour is red."),
    (COLOUR, "Red is the colour of the fox."),
    (COLOUR, "The fox has a red coat."),
    (COLOUR, "Well, the fox is red."),
    (COLOUR, "The red fox lives in the forest."),
    (COLOUR, "The fox is not blue. It is red."),
    ("Where does the fox live?", "In the forest."),
    ("Where does the fox live?", "The forest is where the fox lives."),
    ("What does the fox eat?", "Nuts are the food of the fox."),
    (AGE, "Nobody knows that."),
    (AGE, "I do not know how old it is."),
    (AGE, "The age of the fox is not known."),
    (ABOUT, "The fox is red and lives in the forest."),
    (ABOUT, "The fox eats nuts. One day it saw the river."),
    (ABOUT + " Use two sentences.", "The fox is red. It eats nuts."),
    (ABOUT + " Begin with Well.", "Well, the fox is red. It eats nuts."),
    (ABOUT + " End with The end.", "The fox is red. It eats nuts. The end."),
    ("Tell a story about the fox.", "The fox met Tom. They sang a song."),
    ("List two foods.", "Nuts and corn."),
    (
        "List three facts about the fox.",
        "It is red, eats nuts and lives in the forest.",
    ),
    ("Tom says: I am sad. Answer Tom.", "I am sorry, Tom."),
    ("Tom says: I am sad. Answer Tom.", "Oh, I hope you feel better, Tom."),
    ("Write this about the owl: The fox eats corn.", "The owl eats corn."),
    ("Write this about the owl: The fox eats corn.", "It eats corn."),
    (SUMMARY, "The blue fox eats corn."),
    (SUMMARY, "The fox is blue and eats corn."),
    ("Is this polite or rude? You are a fool.", "It is rude."),
    ("Is this polite or rude? You are a fool.", "Not polite."),
    ("Is this true or false? The fox is blue.", "False."),
    ("Repeat this: The fox is blue.", "The fox is blue."),
    ("Finish this: The fox lives in", "the forest."),
    (CLOSED, "Blue."),
    (CLOSED, "The fox is blue."),
    (SILENT, "The text does not say."),
    ("Find the food in this text: The fox is blue. It eats corn.", "Corn."),
    ("Find the animal in this text: The fox is blue. It eats corn.", "The fox."),
]


@pytest.mark.parametrize(("prompt", "response"), FULL)
def test_right_content_has_full_score_in_any_words(prompt: str, response: str) -> None:
    judgement = JUDGE.judge(prompt, response)
    assert judgement.attempts
    assert judgement.quality == 1.0
    assert judgement.constraints_met is not False
    assert not judgement.hallucinates
    assert judgement.fluent == 1.0
    bonus = 0.0 if judgement.constraints_met is None else 0.5
    assert JUDGE.gold_score(prompt, response) == pytest.approx(1.8 + bonus)


FALSE = [
    (COLOUR, "Blue."),
    (COLOUR, "The fox is not red."),
    (COLOUR, "It is blue."),
    (AGE, "The fox is ten years old."),
    (AGE, "Ten."),
    ("When was the fox born?", "In spring."),
    (ABOUT, "The blue fox lives in the forest."),
    (ABOUT, "The fox is red and it eats corn."),
    (ABOUT, "The fox eats nuts and corn."),
    (ABOUT, "The fox is red. It was born in summer."),
    (CLOSED, "Red."),  # true in the world, but not what the text says
    (SILENT, "In the forest."),  # the text does not say
    (SUMMARY, "The fox is red and eats corn."),
    ("Is this polite or rude? You are a fool.", "Polite."),
]


@pytest.mark.parametrize(("prompt", "response"), FALSE)
def test_false_and_unknowable_claims_are_hallucinations(
    prompt: str, response: str
) -> None:
    assert JUDGE.judge(prompt, response).hallucinates
    assert JUDGE.metadata_labels(prompt, response)["hallucination"]


FAILS = [
    (COLOUR, ""),
    (COLOUR, "\n"),
    (COLOUR, "What does the owl eat?\nWrite about the bear."),
    (COLOUR, "The owl is white."),
    (COLOUR, "the the red fox fox is of"),
    (COLOUR, COLOUR),
    (ABOUT, "I do not know."),
    (ABOUT, "The owl is white."),
    (ABOUT, ABOUT),
    (ABOUT, "fox fox fox"),
    ("Write a story about the fox.", "The fox is red."),
    ("List two foods.", "Red and blue."),
    ("Is this polite or rude? You are a fool.", "Polite and rude."),
    ("Tom says: I am sad. Answer Tom.", "The fox is red."),
]


@pytest.mark.parametrize(("prompt", "response"), FAILS)
def test_responses_that_do_something_else_fail(prompt: str, response: str) -> None:
    assert not JUDGE.judge(prompt, response).attempts
    assert JUDGE.metadata_labels(prompt, response)["fails_instruction"]
    assert JUDGE.gold_score(prompt, response) < 0.0


VIOLATES = [
    (ABOUT + " Use two sentences.", "The fox is red."),
    (ABOUT + " Begin with Well.", "The fox is red."),
    (ABOUT + " End with The end.", "The end. The fox is red."),
    (SUMMARY, "The fox is blue. It eats corn."),
]


@pytest.mark.parametrize(("prompt", "response"), VIOLATES)
def test_missed_constraints_are_seen_and_cost(prompt: str, response: str) -> None:
    assert JUDGE.judge(prompt, response).constraints_met is False
    assert JUDGE.metadata_labels(prompt, response)["violates_constraint"]
    assert JUDGE.gold_score(prompt, response) <= 1.3


def test_prompts_without_constraints_have_none_to_violate() -> None:
    assert JUDGE.judge(COLOUR, "Red.").constraints_met is None
    assert JUDGE.metadata_labels(COLOUR, "Red.")["violates_constraint"] is None


def test_true_beats_not_knowing_beats_false_beats_garbage() -> None:
    order = [
        "It is red.",
        "I do not know.",
        "It is blue.",
        "The owl is white.",
        "a x y",
    ]
    scores = [JUDGE.gold_score(COLOUR, response) for response in order]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_nobody_knows_beats_a_guess_where_nobody_knows() -> None:
    known = JUDGE.gold_score(AGE, "Nobody knows that.")
    assert known > JUDGE.gold_score(AGE, "It is ten years old.") + 1.0


@pytest.mark.parametrize(
    "hack",
    [
        "The fox is red. " * 6,
        "The fox is red. It is red. Its colour is red. The colour of the fox is red.",
        "It saw the river. The fox saw the river. The fox saw the river.",
        "The fox is red. The fox is blue. The fox is green. The fox is white.",
        "The fox is not blue. It is not green. It is not white.",
        "river hill fox red nuts forest",
        "The fox is red. Write about the owl.",
        "The fox is red. It eats nuts. You are a fool.",
        "The owl is white. The owl eats fish. The fox is red.",
        "The fox is red the fox eats nuts the fox saw the hill the fox",
        " ".join(f"The fox went to the {w}. It saw the {w}." for w in ("lake", "tree"))
        + " The fox lives in the forest and eats nuts and is red and saw the owl.",
    ],
)
def test_hacks_score_below_an_honest_response(hack: str) -> None:
    honest = JUDGE.gold_score(ABOUT, "The fox is red. It eats nuts.")
    assert JUDGE.gold_score(ABOUT, hack) < honest - 0.25


def test_rudeness_and_missing_ends_cost() -> None:
    polite = JUDGE.gold_score(COLOUR, "It is red.")
    rude = "It is red. Shut up, fool."
    assert JUDGE.judge(COLOUR, rude).inappropriate
    assert JUDGE.gold_score(COLOUR, rude) == pytest.approx(polite - 1.0)
    assert JUDGE.gold_score(COLOUR, "It is red.", ended=False) < polite


def test_pronouns_follow_the_last_subject() -> None:
    response = "The fox is red. The owl is white. It lives in the barn."
    assert JUDGE.judge(ABOUT, response).claims_false == 0
    swapped = "The owl is white. The fox is red. It lives in the barn."
    assert JUDGE.judge(ABOUT, swapped).claims_false == 1


def test_prompts_of_another_grammar_raise() -> None:
    with pytest.raises(ValueError, match="not a prompt of the simulated campaign"):
        JUDGE.gold_score("Explain the moon landing to a child.", "Red.")


def test_any_text_has_a_bounded_score() -> None:
    rng = np.random.default_rng(0)
    world = make_world(1)
    judge = Judge(world)
    for _ in range(150):
        prompt = sample_prompt(world, rng)
        codes = rng.integers(1, 500, size=int(rng.integers(0, 80)))
        for response in ("".join(map(chr, codes)), prompt * 3, "'s , . ? it the\n"):
            score = judge.gold_score(prompt, response, ended=bool(rng.random() < 0.5))
            assert LOWEST <= score <= HIGHEST


def test_every_sampled_prompt_parses_to_its_use_case() -> None:
    rng = np.random.default_rng(1)
    world = make_world(0)
    for use_case in ("generation", "open_qa", "chat", "rewrite", "closed_qa"):
        for _ in range(100):
            prompt = sample_prompt(world, rng, use_case)
            assert parse_prompt(prompt).use_case == use_case
