"""The reward model beside labelers and length: the same pairs on both sides."""

import dataclasses
import itertools

import numpy as np
import pytest

from rlhf_jax.data.records import Ranking, parse_comparison
from rlhf_jax.evaluation.rankings import Pairs, labeler_agreement, ranking_report


def ranking(labeler: str, *ranks: int, prompt: str = "p") -> Ranking:
    responses = tuple(f"r{k}" for k in range(len(ranks)))
    return Ranking(prompt, responses, ranks, (True,) * len(ranks), labeler)


def test_a_pair_that_one_labeler_ties_counts_on_neither_side():
    # a and b order (0, 1) alike; b ties (0, 2) and (1, 2) is disputed
    rankings = [ranking("a", 1, 2, 3), ranking("b", 1, 2, 1)]
    scores = [np.array([2.0, 1.0, 0.0])] * 2  # as a says
    found = labeler_agreement(rankings, scores)
    assert found is not None
    agreement, gap = found
    assert agreement.mean == pytest.approx(1 / 2)
    # (0, 1): right for both. (1, 2): right for a alone, one half
    assert gap.mean == pytest.approx((1 + 1 / 2) / 2 - 1 / 2)


def test_agreement_and_gap_equal_a_loop_over_pairs_of_labelers():
    rng = np.random.default_rng(0)
    rankings, scores = [], []
    agree, predicted = [], []
    for prompt in range(40):
        K = int(rng.integers(2, 6))
        values = rng.normal(size=K)
        group = [rng.integers(1, 4, K) for _ in range(3)]
        for name, ranks in zip("abc", group, strict=True):
            rankings.append(ranking(name, *map(int, ranks), prompt=str(prompt)))
            scores.append(values)
        for x, y in itertools.combinations(group, 2):
            for i in range(K):
                for j in range(i):
                    if x[i] != x[j] and y[i] != y[j]:
                        agree.append((x[i] < x[j]) == (y[i] < y[j]))
                        for z in (x, y):
                            predicted.append((z[i] < z[j]) == (values[i] > values[j]))
    found = labeler_agreement(rankings, scores)
    assert found is not None
    agreement, gap = found
    assert agreement.mean == pytest.approx(np.mean(agree))
    assert gap.mean == pytest.approx(np.mean(predicted) - np.mean(agree))
    assert gap.low < gap.mean < gap.high


def test_scores_of_the_true_utility_do_better_than_labelers_do_between_themselves():
    rng = np.random.default_rng(1)
    rankings, scores = [], []
    for prompt in range(300):
        utility = rng.normal(size=5)
        for name in ("a", "b"):
            order = np.argsort(-(utility + rng.normal(size=5)))
            ranks = np.empty(5, int)
            ranks[order] = np.arange(1, 6)
            rankings.append(ranking(name, *map(int, ranks), prompt=str(prompt)))
            scores.append(utility)
    found = labeler_agreement(rankings, scores)
    assert found is not None and found[1].low > 0.0


def test_nobody_agrees_with_himself_or_about_other_responses():
    twice = [ranking("a", 1, 2), ranking("a", 1, 2)]
    other = [ranking("a", 1, 2), ranking("b", 1, 2, prompt="q")]
    for rankings in (twice, other):
        assert labeler_agreement(rankings, [np.array([1.0, 0.0])] * 2) is None


def test_accuracy_minus_length_is_taken_pair_by_pair():
    rankings = [ranking("a", 1, 2), ranking("a", 1, 2, prompt="q")]
    scores = [np.array([1.0, 0.0]), np.array([0.0, 0.0])]
    lengths = np.array([3, 5, 7, 4])
    pairs = Pairs((rankings, scores, lengths))
    gap = pairs.minus_length_baseline()
    assert gap is not None
    # the first: right, shorter (1 - 0); the second: no opinion, longer (1/2 - 1)
    assert gap.mean == pytest.approx((1.0 - 0.5) / 2)


@pytest.mark.parametrize("agree", [True, False])
def test_few_pairs_decide_nothing(agree: bool):
    """Two prompts on which all are alike: no width would let any claim hold."""
    ranks = (1, 2) if agree else (2, 1)
    rankings = [
        ranking(name, *order, prompt=prompt)
        for prompt in "pq"
        for name, order in (("a", (1, 2)), ("b", ranks))
    ]
    found = labeler_agreement(rankings, [np.array([1.0, 0.0])] * 4)
    assert found is not None and found[0].mean == agree
    assert found[1].high - found[1].low > 0.5
    right = Pairs((rankings[:1] * 2, [np.array([1.0, 0.0])] * 2, np.array([1, 2] * 2)))
    gap = right.minus_length_baseline()
    assert gap is not None and gap.mean == 1.0 and gap.low < 0.5


def test_labelers_who_saw_the_responses_in_another_order_agree_as_much():
    rng = np.random.default_rng(2)
    rankings, shuffled, scores, moved = [], [], [], []
    for prompt, name in itertools.product("pqrstu", "ab"):
        ranks, values = rng.integers(1, 5, 4), rng.normal(size=4)
        row = ranking(name, *map(int, ranks), prompt=prompt)
        order = rng.permutation(4)
        rankings.append(row)
        scores.append(values)
        shuffled.append(
            dataclasses.replace(
                row,
                responses=tuple(row.responses[k] for k in order),
                ranks=tuple(row.ranks[k] for k in order),
            )
        )
        moved.append(values[order])
    assert labeler_agreement(rankings, scores) == labeler_agreement(shuffled, moved)


def test_equal_responses_are_one_wherever_they_stand():
    """Two of three are the same text: who saw them swapped says the same."""
    a = Ranking("p", ("x", "x", "y"), (1, 3, 2), (True,) * 3, "a")
    b = dataclasses.replace(a, ranks=(3, 1, 2), labeler="b")
    found = labeler_agreement([a, b], [np.array([1.0, 1.0, 0.0])] * 2)
    assert found is not None
    assert (found[0].mean, found[1].mean) == (1.0, -0.5)  # x, y: ordered both ways
    cut = dataclasses.replace(b, ended=(True, False, True))  # other responses
    assert labeler_agreement([a, cut], [np.zeros(3)] * 2) is None


def test_labelers_who_prefer_the_other_response_of_a_comparison_disagree():
    """A comparison puts the chosen response first, whichever that is."""
    fields = {"prompt": "p", "chosen": "x", "rejected": "y", "labeler": "a"}
    other = fields | {"chosen": "y", "rejected": "x", "labeler": "b"}
    rankings = [parse_comparison(row, "here") for row in (fields, other)]
    found = labeler_agreement(rankings, [np.array([1.0, 0.0]), np.array([0.0, 1.0])])
    assert found is not None
    assert (found[0].mean, found[0].n) == (0.0, 1)
    assert found[1].mean == 0.5  # right for one of the two


def test_pairs_of_one_prompt_are_one_trial_whatever_was_ranked():
    rankings = [
        *(ranking("a", 1, 2), ranking("b", 1, 2)),
        *(ranking("a", 1, 2, 3), ranking("b", 3, 2, 1)),  # other responses to it
    ]
    scores = [np.array([1.0, 0.0])] * 2 + [np.array([2.0, 1.0, 0.0])] * 2
    found = labeler_agreement(rankings, scores)
    assert found is not None and found[1].n == 1


def scored(*rankings: Ranking):
    """With margins and lengths that all differ."""
    scores = [np.array([0.1 * n, -1.0]) for n in range(len(rankings))]
    return rankings, scores, np.arange(2 * len(rankings)) ** 2


def test_a_prompt_that_two_splits_hold_is_one_trial():
    valid = [ranking("a", 1, 2, prompt=f"p{n}") for n in range(10)]
    test = [ranking("c", 2, 1, prompt=f"p{n}") for n in range(10)]
    parts = {"held_out_prompts": scored(*valid), "test": scored(*test)}
    report = ranking_report(parts, {}, {"a"})
    # each prompt has a margin of its own, in both splits
    assert [row["accuracy"]["n"] for row in report["by_margin"]] == [2] * 5
    assert report["by_labeler"]["c"]["n"] == 10


@pytest.mark.parametrize(
    ("known", "name"),
    [
        ({"a"}, "held_out_labelers"),
        ({"a", "c"}, "test"),  # c ranked something that no part shows
        ({"a", None}, "test"),  # whoever was not named may be c
    ],
)
def test_held_out_labelers_ranked_nothing_else_at_all(known, name):
    parts = {
        "train": scored(ranking("a", 1, 2)),
        "test": scored(ranking("c", 1, 2), ranking("d", 1, 2)),
    }
    parts["held_out_prompts"] = scored(ranking("a", 1, 2, prompt="q"))
    report = ranking_report(parts, {}, known)
    assert set(report["accuracy"]) == {"train", "held_out_prompts", name}
    assert report["agreement"][name]["mean"] == 1.0  # of c and d


def test_bins_and_labelers_are_of_what_is_held_out():
    rng = np.random.default_rng(0)

    def part(names, ranks, count):
        rows = [ranking(x, *ranks, prompt=f"p{n}") for n in range(count) for x in names]
        lengths = rng.integers(1, 9, 2 * len(rows)) * 1.0
        lengths[0::2] = 1.0  # the better one is shorter
        lengths[1::2] += 1.0
        return rows, [np.array([n % 7 + 1.0, 0.0]) for n in range(len(rows))], lengths

    parts = {
        "train": (
            [ranking("a", 1, 2, prompt="q"), ranking("z", 2, 1, prompt="q")],
            [np.array([9.0, 0.0])] * 2,
            np.array([50, 1, 50, 1]),
        ),
        "held_out_prompts": part("ab", (1, 2), 20),
    }
    report = ranking_report(parts, {}, {"a", "b"})
    assert report["agreement"]["train_labelers"]["mean"] == 1.0  # in training they part
    assert set(report["by_labeler"]) == {"a", "b"}
    assert max(row["high"] for row in report["by_margin"]) == 7.0
    assert all(row["high"] < 0 for row in report["by_length"])
