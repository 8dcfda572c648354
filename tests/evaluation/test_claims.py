import math
from typing import Any

import pytest

from rlhf_jax.evaluation.claims import (
    CLAIMS,
    Claim,
    ClaimResult,
    judge,
    judge_claims,
    verdict_above,
)
from rlhf_jax.evaluation.measurements import MissingInput, find_estimate
from rlhf_jax.evaluation.statistics import Estimate

GOOD, BAD, UNSURE = "holds", "does not hold", "inconclusive"


def est(low: float, high: float, n: int = 100) -> dict[str, Any]:
    return {"mean": (low + high) / 2, "low": low, "high": high, "n": n}


def claim(name: str) -> Claim:
    return {c.name: c for c in CLAIMS}[name]


def evaluation(judge_name: str = "simulated labelers") -> dict[str, Any]:
    """A run in which every claim holds."""

    def model(win: tuple[float, float], *metadata: float) -> dict[str, Any]:
        labels = (
            "follows_instruction",
            "meets_constraints",
            "invents_facts",
            "inappropriate",
        )
        rates = {
            label: est(rate - 0.01, rate + 0.01)
            for label, rate in zip(labels, metadata, strict=True)
        }
        return {
            "win_rate_vs_sft": est(*win),
            "kl_to_reference": est(4.0, 6.0),
            "metadata": rates,
        }

    gains = {
        "gpt_few_shot-gpt": est(0.5, 0.7),
        "sft-gpt_few_shot": est(0.2, 0.4),
        "ppo-sft": est(0.6, 0.8),
        "ppo_ptx-sft": est(0.5, 0.7),
    }
    return {
        "judge": judge_name,
        "models": {
            "gpt_few_shot": model((0.2, 0.3), 0.5, 0.3, 0.4, 0.1),
            "sft": model((0.5, 0.5), 0.8, 0.6, 0.3, 0.05),
            "ppo": model((0.6, 0.7), 0.9, 0.8, 0.1, 0.02),
            "ppo_ptx": model((0.6, 0.7), 0.9, 0.8, 0.1, 0.02),
        },
        "differences": {
            "pretrain_loss": {
                "ppo-sft_rl": est(0.2, 0.3),
                "ppo_ptx-sft_rl": est(0.0, 0.1),
                "ppo-ppo_ptx": est(0.1, 0.3),
            },
            "gold_score": gains,
            "reward": gains,
            "metadata": {
                label: {f"ppo-{x}": est(*gain) for x in ("gpt_few_shot", "sft")}
                for label, gain in (
                    ("follows_instruction", (0.1, 0.3)),
                    ("meets_constraints", (0.1, 0.3)),
                    ("invents_facts", (-0.3, -0.1)),
                    ("inappropriate", (-0.1, 0.01)),
                )
            },
        },
    }


def reward_model() -> dict[str, Any]:
    return {
        "accuracy": {
            "held_out_prompts": est(0.72, 0.76),
            "held_out_labelers": est(0.71, 0.75),
        },
        "length_baseline": {"held_out_prompts": est(0.53, 0.57)},
        "agreement": {"held_out_labelers": est(0.71, 0.75)},
        "minus_length_baseline": {"held_out_prompts": est(0.16, 0.22)},
        "minus_agreement": {"held_out_labelers": est(-0.02, 0.02)},
    }


def put(document: dict[str, Any], value: Any, *path: str) -> dict[str, Any]:
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


def verdicts(evaluated: dict[str, Any], reward: dict[str, Any]) -> dict[str, str]:
    return {r.claim.name: r.verdict for r in judge_claims(evaluated, reward)}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.51, 0.6, GOOD),
        (0.5, 0.6, UNSURE),
        (0.4, 0.6, UNSURE),
        (0.4, 0.5, BAD),
        (0.3, 0.4, BAD),
        (0.5, 0.5, BAD),
        (-math.inf, math.inf, UNSURE),
    ],
)
def test_verdict_follows_the_interval_alone(low: float, high: float, verdict: str):
    mean = 0.5 if math.isinf(low) else (low + high) / 2
    assert verdict_above(Estimate(mean, low, high, 9), 0.5) == verdict


def test_claims_have_unique_names_and_state_their_source():
    assert len({c.name for c in CLAIMS}) == len(CLAIMS)
    assert all(c.statement and c.source and c.quantity for c in CLAIMS)


def test_every_claim_can_hold():
    found = verdicts(evaluation(), reward_model())
    assert found == dict.fromkeys(found, GOOD)


CASES = [
    # claim, where its input lies, an interval that refutes it, one that leaves it open
    (
        "few_shot_beats_gpt",
        ("differences", "gold_score", "gpt_few_shot-gpt"),
        (-0.3, -0.1),
        (-0.1, 0.3),
    ),
    (
        "sft_beats_few_shot",
        ("models", "gpt_few_shot", "win_rate_vs_sft"),
        (0.55, 0.65),
        (0.45, 0.55),
    ),
    ("ppo_beats_sft", ("models", "ppo", "win_rate_vs_sft"), (0.4, 0.49), (0.48, 0.6)),
    (
        "ppo_ptx_beats_sft",
        ("models", "ppo_ptx", "win_rate_vs_sft"),
        (0.4, 0.49),
        (0.48, 0.6),
    ),
    (
        "score_order",
        ("differences", "gold_score", "sft-gpt_few_shot"),
        (-0.3, -0.1),
        (-0.1, 0.2),
    ),
    (
        "ppo_raises_reward",
        ("differences", "reward", "ppo-sft"),
        (-0.2, 0.0),
        (-0.1, 0.3),
    ),
    (
        "ppo_follows_instruction_against_sft",
        ("differences", "metadata", "follows_instruction", "ppo-sft"),
        (-0.2, -0.1),
        (-0.1, 0.2),
    ),
    (
        "ppo_meets_constraints_against_gpt_few_shot",
        ("differences", "metadata", "meets_constraints", "ppo-gpt_few_shot"),
        (-0.2, -0.1),
        (-0.1, 0.2),
    ),
    (
        "ppo_invents_facts_against_gpt_few_shot",
        ("differences", "metadata", "invents_facts", "ppo-gpt_few_shot"),
        (0.1, 0.2),
        (-0.1, 0.1),
    ),
    (
        "ppo_inappropriate_against_sft",
        ("differences", "metadata", "inappropriate", "ppo-sft"),
        (0.03, 0.1),
        (-0.01, 0.03),
    ),
    (
        "ppo_pays_alignment_tax",
        ("differences", "pretrain_loss", "ppo-sft_rl"),
        (-0.2, -0.1),
        (-0.1, 0.1),
    ),
    (
        "ptx_lowers_alignment_tax",
        ("differences", "pretrain_loss", "ppo-ppo_ptx"),
        (-0.2, -0.1),
        (-0.1, 0.1),
    ),
]


@pytest.mark.parametrize(("name", "path", "refuting", "open_"), CASES)
def test_each_claim_can_fail_and_stay_open(name, path, refuting, open_):
    for interval, verdict in ((refuting, BAD), (open_, UNSURE)):
        document = put(evaluation(), est(*interval), *path)
        assert judge(claim(name), document, {}).verdict == verdict


@pytest.mark.parametrize(("name", "path"), [case[:2] for case in CASES])
def test_a_missing_or_null_input_is_inconclusive_and_named(name, path):
    result = judge(claim(name), put(evaluation(), None, *path[:3]), {})
    assert result.verdict == UNSURE
    assert result.estimate is None
    assert f"{path[1]}.{path[2]}" in result.detail


def test_reward_model_claims_read_their_own_file():
    name = "reward_model_predicts_held_out_labelers"
    gap = ("minus_agreement", "held_out_labelers")
    document = put(reward_model(), est(-0.09, -0.06), *gap)
    assert judge(claim(name), {}, document).verdict == BAD
    # 4 points below the agreement, but known too coarsely.
    document = put(reward_model(), est(-0.08, 0.0), *gap)
    assert judge(claim(name), {}, document).verdict == UNSURE
    # Real data: nobody was held out, so nothing can be said.
    result = judge(claim(name), {}, put(reward_model(), None, "agreement"))
    assert result.verdict == UNSURE
    assert "reward_model/evaluation.json has no agreement" in result.detail

    gap = ("minus_length_baseline", "held_out_prompts")
    document = put(reward_model(), est(-0.1, -0.02), *gap)
    assert judge(claim("reward_model_beats_length"), {}, document).verdict == BAD


def test_an_empty_run_claims_nothing():
    results = judge_claims({}, {})
    assert {r.verdict for r in results} == {UNSURE}
    assert all(r.detail.startswith("not measured") for r in results)


def test_the_trained_reward_model_is_no_judge_of_ppo():
    found = verdicts(
        put(evaluation("reward model"), None, "differences", "gold_score"),
        reward_model(),
    )
    preferences = ("ppo_beats_sft", "ppo_ptx_beats_sft", "sft_beats_few_shot")
    for name in (*preferences, "score_order"):  # SFT's epoch was chosen by it
        assert found[name] == UNSURE
    result = judge(claim("ppo_beats_sft"), evaluation("reward model"), {})
    assert "proxy" in result.detail
    assert result.estimate is not None
    # What the proxy can show, it shows: PPO raised it.
    assert found["ppo_raises_reward"] == GOOD
    assert found["few_shot_beats_gpt"] == GOOD


def test_without_gold_scores_the_reward_is_compared():
    document = put(evaluation(), {"ppo-sft": None}, "differences", "gold_score")
    document = put(document, est(-2, -1), "differences", "reward", "gpt_few_shot-gpt")
    result = judge(claim("few_shot_beats_gpt"), document, {})
    assert result.verdict == BAD
    assert "reward-model score" in result.detail


def test_score_order_reports_a_step_that_surely_falls():
    document = put(
        evaluation(), est(-0.2, -0.1), "differences", "gold_score", "ppo-sft"
    )
    # Another step is known so badly that its interval reaches lower still.
    wide = est(-3.0, 4.0)
    document = put(document, wide, "differences", "gold_score", "gpt_few_shot-gpt")
    result = judge(claim("score_order"), document, {})
    assert result.verdict == BAD
    assert result.estimate is not None
    assert result.estimate.mean == pytest.approx(-0.15)


def test_sft_win_rate_is_seen_from_its_own_side():
    result = judge(claim("sft_beats_few_shot"), evaluation(), {})
    assert result.estimate is not None
    assert result.estimate.mean == pytest.approx(0.75)
    assert result.estimate.low == pytest.approx(0.7)


def test_result_json_carries_the_interval_and_the_verdict():
    result = judge(claim("ppo_beats_sft"), evaluation(), {})
    data = result.to_json()
    assert data["verdict"] == GOOD
    assert Estimate.from_json(data["estimate"]) == result.estimate
    assert "175B" in data["published"]
    assert (
        ClaimResult(claim("ppo_beats_sft"), None, UNSURE, "x").to_json()["estimate"]
        is None
    )


def test_a_malformed_estimate_names_file_and_path():
    document = put(evaluation(), {"mean": 0.5}, "models", "ppo", "win_rate_vs_sft")
    message = r"evaluate/evaluation.json: models.ppo.win_rate_vs_sft: .* lacks low"
    with pytest.raises(ValueError, match=message):
        judge_claims(document, {})


def test_find_estimate_names_the_first_thing_that_is_missing():
    with pytest.raises(MissingInput, match=r"a.json has no models.ppo$"):
        find_estimate({"models": {}}, "a.json", "models", "ppo", "reward")
