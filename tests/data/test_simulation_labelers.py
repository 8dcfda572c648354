"""Labelers rank validly, agree as people did, and write good demonstrations."""

import itertools

import numpy as np
import pytest

from rlhf_jax.data.simulation.corpus import web_answer
from rlhf_jax.data.simulation.habits import PERFECT, Habits
from rlhf_jax.data.simulation.judge import Judge
from rlhf_jax.data.simulation.labelers import Labeler, make_labelers
from rlhf_jax.data.simulation.tasks import parse_prompt, sample_prompt
from rlhf_jax.data.simulation.templates import (
    ACTS,
    CONSTRAINT_TEXTS,
    CONSTRAINT_VALUES,
)
from rlhf_jax.data.simulation.world import World, make_world
from rlhf_jax.data.simulation.writer import Writer

FAULTS = (
    Habits(wrong=1.0),
    Habits(ignores_constraints=1.0),
    Habits(rude=1.0),
    Habits(off_topic=1.0),
)


def _mixture(
    world: World, labelers: list[Labeler], prompt: str, rng: np.random.Generator
) -> tuple[list[str], list[bool]]:
    """Two demonstrations, two careless answers, and one corrupted response."""
    responses = [labelers[i].demonstrate(prompt, rng) for i in (0, 1)]
    responses += [web_answer(world, rng, prompt) for _ in range(2)]
    fault = int(rng.integers(5))
    if fault < 4:
        writer = Writer(world, rng, FAULTS[fault])
        return [*responses, writer.respond(parse_prompt(prompt))], [True] * 5
    words = Writer(world, rng, PERFECT).respond(parse_prompt(prompt)).split()
    return [*responses, " ".join(words[: (len(words) + 1) // 2])], [True] * 4 + [False]


def _agreement(seeds: range, held_out: bool) -> float:
    agree = total = 0
    for seed in seeds:
        world = make_world(seed)
        labelers = make_labelers(Judge(world), seed)
        rng = np.random.default_rng(seed)
        for _ in range(60):
            prompt = sample_prompt(world, rng)
            responses, ended = _mixture(world, labelers, prompt, rng)
            ranks = [
                labeler.rank(prompt, responses, ended, rng)
                for labeler in labelers
                if labeler.held_out == held_out
            ]
            for a, b in itertools.combinations(ranks, 2):
                for i, j in itertools.combinations(range(5), 2):
                    if a[i] != a[j] and b[i] != b[j]:
                        agree += (a[i] < a[j]) == (b[i] < b[j])
                        total += 1
    return agree / total


# 72.6 +- 1.5 % of training labelers and 77.3 +- 1.3 % of held-out ones; Ouyang et al.
# 2022, section 3.4. Samples of trained models differ less than this mixture does.
PUBLISHED = (0.711, 0.786)


@pytest.mark.parametrize("held_out", [False, True])
def test_labelers_agree_as_often_as_the_papers_did(held_out: bool) -> None:
    low, high = PUBLISHED
    assert low < _agreement(range(16), held_out) < high


def test_ranks_are_dense_with_ties_and_best_first() -> None:
    world = make_world(0)
    labelers = make_labelers(Judge(world), 0)
    rng = np.random.default_rng(0)
    ties = 0
    for _ in range(60):
        prompt = sample_prompt(world, rng)
        responses, ended = _mixture(world, labelers, prompt, rng)
        ranks = labelers[0].rank(prompt, responses, ended, rng)
        assert len(ranks) == len(responses)
        assert set(ranks) == set(range(1, max(ranks) + 1))
        ties += len(set(ranks)) < len(ranks)
    assert 0 < ties < 60


def test_equal_responses_tie() -> None:
    labeler = make_labelers(Judge(make_world(0)), 0)[0]
    prompt, rng = "What colour is the fox?", np.random.default_rng(0)
    assert labeler.rank(prompt, ["I do not know."] * 4, [True] * 4, rng) == [1] * 4


def test_ranking_needs_one_flag_per_response() -> None:
    labeler = make_labelers(Judge(make_world(0)), 0)[0]
    with pytest.raises(ValueError):
        labeler.rank("What colour is the fox?", ["a", "b"], [True], _rng())


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_labelers_follow_the_gold_score_on_average() -> None:
    world = make_world(0)
    judge = Judge(world)
    labelers = make_labelers(judge, 0)
    rng = np.random.default_rng(3)
    right = total = 0
    for _ in range(60):
        prompt = sample_prompt(world, rng)
        good = Writer(world, rng, PERFECT).respond(parse_prompt(prompt))
        bad = "What does the owl eat?\nWrite about the hen."
        for labeler in labelers:
            first, second = labeler.rank(prompt, [good, bad], [True, True], rng)
            right += first < second
            total += 1
    assert right / total > 0.95


def test_labelers_differ_in_taste_and_are_named_by_group() -> None:
    labelers = make_labelers(Judge(make_world(0)), 0, num_train=2, num_held_out=1)
    names = [labeler.name for labeler in labelers]
    assert names == ["train-0", "train-1", "held-out-0"]
    assert [labeler.held_out for labeler in labelers] == [False, False, True]
    assert labelers[0].weights != labelers[1].weights


def test_demonstrations_attempt_are_mostly_right_and_one_in_eight_has_a_mistake() -> (
    None
):
    world = make_world(0)
    judge = Judge(world)
    labelers = make_labelers(judge, 0)
    rng = np.random.default_rng(4)
    flawed = attempts = 0
    true = false = 0
    for i in range(800):
        prompt = sample_prompt(world, rng)
        response = labelers[i % 6].demonstrate(prompt, rng)
        judgement = judge.judge(prompt, response)
        best = 1.8 + (0.0 if judgement.constraints_met is None else 0.5)
        flawed += judge.gold_score(prompt, response) < best - 0.31
        attempts += judgement.attempts
        true += judgement.claims_true
        false += judgement.claims_false
    assert attempts / 800 > 0.98
    assert true / (true + false) > 0.93
    assert 0.06 < flawed / 800 < 0.16


@pytest.mark.parametrize("act", ACTS)
def test_a_perfect_answer_has_the_full_score_with_any_beginning_and_end(act) -> None:
    """Where "So, that is good" lost its "that", the writers' own answer failed."""
    world = make_world(2)
    judge = Judge(world)
    wishes = [
        f" {CONSTRAINT_TEXTS[kind][0].format(value)}"
        for kind in ("begin", "end")
        for value in CONSTRAINT_VALUES[kind]
    ]
    for wish in ["", *wishes]:
        prompt = f"Ben says: {act}. Answer Ben.{wish}"
        for seed in range(12):
            writer = Writer(world, np.random.default_rng(seed), PERFECT)
            response = writer.respond(parse_prompt(prompt))
            judgement = judge.judge(prompt, response)
            assert judgement.attempts, (prompt, response)
            assert judgement.fluent == judgement.quality == 1.0, (prompt, response)
            assert judgement.constraints_met is not False, (prompt, response)


def test_a_perfect_writer_gets_the_full_score() -> None:
    world = make_world(2)
    judge = Judge(world)
    rng = np.random.default_rng(5)
    full = 0
    for _ in range(600):
        prompt = sample_prompt(world, rng)
        response = Writer(world, rng, PERFECT).respond(parse_prompt(prompt))
        judgement = judge.judge(prompt, response)
        full += judgement.quality >= 0.7 and judgement.constraints_met is not False
        assert judgement.attempts, (prompt, response)
        assert judgement.fluent == 1.0, (prompt, response)
        assert not judgement.hallucinates, (prompt, response)
    assert full / 600 > 0.99


def test_a_labeler_prefers_what_ended():
    people = make_labelers(Judge(make_world(2)), 2, 1, 0)
    prompt = "What colour is the fox?"
    rng = np.random.default_rng(0)
    ranks = [
        people[0].rank(prompt, ["Red."] * 2, [True, False], rng) for _ in range(200)
    ]
    assert np.mean([a < b for a, b in ranks]) > np.mean([a > b for a, b in ranks]) + 0.1
