"""What a run measured: its evaluations as estimates, and the quantities claims need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_jax.evaluation.statistics import Estimate, format_estimate

Document = Mapping[str, Any]
Curve = tuple[np.ndarray, np.ndarray]
"""Steps and the values of one metric at them."""


EVALUATION = "evaluate/evaluation.json"
REWARD_MODEL_EVALUATION = "reward_model/evaluation.json"

MODEL_LABELS = {
    "gpt": "GPT",
    "gpt_few_shot": "GPT (few-shot)",
    "sft": "SFT",
    "sft_rl": "SFT (RL init)",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
}
METADATA_LABELS = {
    "follows_instruction": "follows the instruction",
    "meets_constraints": "meets explicit constraints",
    "invents_facts": "invents facts",
    "inappropriate": "inappropriate",
}
MORE_IS_BETTER = frozenset({"follows_instruction", "meets_constraints"})


class MissingInput(LookupError):
    """What a claim or a figure needs was not measured in this run."""


@dataclass(frozen=True)
class Measurement:
    """What a run says about one claim.

    Attributes:
        estimate: the claimed quantity.
        detail: the numbers behind it, in words.
        doubt: why no interval of this run can decide the claim, where that is so.
    """

    estimate: Estimate
    detail: str
    doubt: str | None = None


Measure = Callable[[Document, Document], Measurement]


def find_estimate(document: Document, file: str, *path: str) -> Estimate:
    """The estimate at `path` of a parsed evaluation.

    Raises:
        MissingInput: the path is absent or null; the message names file and path.
        ValueError: what is there is no estimate; the message names file and path.
    """
    node: Any = document
    for depth, key in enumerate(path):
        if not isinstance(node, Mapping) or node.get(key) is None:
            where = ".".join(path[: depth + 1])
            raise MissingInput(f"not measured: {file} has no {where}")
        node = node[key]
    try:
        return Estimate.from_json(node)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {'.'.join(path)}: {error}") from error


@dataclass(frozen=True)
class RunData:
    """What a run left behind to be drawn.

    Attributes:
        evaluation: the parsed `evaluate/evaluation.json`; {} where there is none.
        reward_model: the parsed `reward_model/evaluation.json`; {} likewise.
        curves: stage -> metric -> curve, as far as the stages ran.
    """

    evaluation: Document
    reward_model: Document
    curves: Mapping[str, Mapping[str, Curve]]


def optional_estimate(document: Document, file: str, *path: str) -> Estimate | None:
    """`find_estimate`, with None for what was not measured."""
    try:
        return find_estimate(document, file, *path)
    except MissingInput:
        return None


def model_estimate(run: RunData, model: str, *path: str) -> Estimate | None:
    """An estimate of one model, None where it was not measured."""
    return optional_estimate(run.evaluation, EVALUATION, "models", model, *path)


def estimates_by_model(run: RunData, quantity: str) -> dict[str, Estimate]:
    """The quantity of every model that has it, in the order of the stages.

    Raises:
        MissingInput: no model has it.
    """
    found = {
        name: estimate
        for name in MODEL_LABELS
        if (estimate := model_estimate(run, name, quantity)) is not None
    }
    if not found:
        raise MissingInput(f"no model of {EVALUATION} has {quantity}")
    return found


def _estimate(evaluation: Document, *path: str) -> Estimate:
    return find_estimate(evaluation, EVALUATION, *path)


def _score_kind(evaluation: Document) -> tuple[str, str]:
    """Which score of the responses is nearest to a human: its key and its name."""
    gold = (evaluation.get("differences") or {}).get("gold_score") or {}
    if any(difference is not None for difference in gold.values()):
        return "gold_score", "gold score"
    return "reward", "reward-model score"


def _proxy_doubt(evaluation: Document) -> str | None:
    if evaluation.get("judge") != "reward model":
        return None
    return (
        "The judge is the reward model that PPO was trained on, so this shows "
        "optimisation of the proxy, not quality."
    )


def _win_detail(evaluation: Document, pair: str) -> str:
    judge_name = f"Judge: {evaluation.get('judge')}."
    kind, kind_name = _score_kind(evaluation)
    gain = _estimate(evaluation, "differences", kind, pair)
    return (
        f"{judge_name} Difference in mean {kind_name} on the same prompts: "
        f"{format_estimate(gain)}."
    )


def win_rate_over_sft(model: str) -> Measure:
    """Win rate of a model against SFT on the same prompts."""

    def measure(evaluation: Document, _: Document) -> Measurement:
        rate = _estimate(evaluation, "models", model, "win_rate_vs_sft")
        detail = _win_detail(evaluation, f"{model}-sft")
        return Measurement(rate, detail, _proxy_doubt(evaluation))

    return measure


def sft_over_few_shot(evaluation: Document, _: Document) -> Measurement:
    """Win rate of SFT against few-shot GPT: the complement of theirs against SFT."""
    rate = _estimate(evaluation, "models", "gpt_few_shot", "win_rate_vs_sft")
    doubt = None
    if evaluation.get("judge") == "reward model":
        doubt = "The judge is the reward model, which also chose SFT's epoch."
    detail = _win_detail(evaluation, "sft-gpt_few_shot")
    return Measurement(rate.complement(), detail, doubt)


def few_shot_over_gpt(evaluation: Document, _: Document) -> Measurement:
    """Score of few-shot GPT minus that of GPT, by the gold score where there is one."""
    kind, kind_name = _score_kind(evaluation)
    gain = _estimate(evaluation, "differences", kind, "gpt_few_shot-gpt")
    return Measurement(gain, f"Difference in {kind_name} on the same prompts.")


def score_order(evaluation: Document, _: Document) -> Measurement:
    """Weakest score difference along GPT, few-shot GPT, SFT, PPO."""
    kind, kind_name = _score_kind(evaluation)
    steps = ("gpt_few_shot-gpt", "sft-gpt_few_shot", "ppo-sft")
    gains = [_estimate(evaluation, "differences", kind, step) for step in steps]
    # The order breaks at its weakest step: one that surely does not rise, where there
    # is one, and the one nearest to not rising otherwise.
    falling = [gain for gain in gains if gain.high <= 0]
    weakest = min(falling or gains, key=lambda gain: gain.low)
    each = "; ".join(
        f"{step} {format_estimate(gain)}"
        for step, gain in zip(steps, gains, strict=True)
    )
    doubt = None if kind == "gold_score" else _proxy_doubt(evaluation)
    return Measurement(weakest, f"Differences in {kind_name}: {each}.", doubt)


def reward_gain(evaluation: Document, _: Document) -> Measurement:
    """Reward of PPO minus that of SFT, beside the KL it was bought with."""
    gain = _estimate(evaluation, "differences", "reward", "ppo-sft")
    kl = _estimate(evaluation, "models", "ppo", "kl_to_reference")
    return Measurement(
        gain, f"At a KL to the reference of {format_estimate(kl)} nats per response."
    )


def metadata_gain(label: str, baseline: str) -> Measure:
    """How much better PPO's rate of a metadata label is than a baseline's."""

    def measure(evaluation: Document, _: Document) -> Measurement:
        ours, theirs = (
            _estimate(evaluation, "models", model, "metadata", label)
            for model in ("ppo", baseline)
        )
        gain = _estimate(
            evaluation, "differences", "metadata", label, f"ppo-{baseline}"
        )
        return Measurement(
            gain if label in MORE_IS_BETTER else gain.negated(),
            f"PPO {format_estimate(ours, unit='%')}, {MODEL_LABELS[baseline]} "
            f"{format_estimate(theirs, unit='%')}; the difference is taken prompt by "
            "prompt.",
        )

    return measure


def loss_difference(pair: str) -> Measure:
    """Difference in held-out pre-training loss, nats per token, of `pair` = "a-b"."""

    def measure(evaluation: Document, _: Document) -> Measurement:
        difference = _estimate(evaluation, "differences", "pretrain_loss", pair)
        return Measurement(difference, "Both models on the same held-out batches.")

    return measure


def accuracy_gap(yardstick: str, yardstick_name: str, split: str) -> Measure:
    """Reward-model accuracy minus a `yardstick`, over the same pairs of `split`."""

    def measure(_: Document, reward_model: Document) -> Measurement:
        accuracy, other, gap = (
            find_estimate(reward_model, REWARD_MODEL_EVALUATION, key, split)
            for key in ("accuracy", yardstick, f"minus_{yardstick}")
        )
        return Measurement(
            gap,
            f"Accuracy {format_estimate(accuracy, unit='%')} over all ordered "
            f"pairs, {yardstick_name} {format_estimate(other, unit='%')}; the "
            "difference is taken pair by pair where both are defined.",
        )

    return measure
