"""How well scores predict rankings, beside length alone and the labelers themselves."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.sources import Ranking
from rlhf_jax.evaluation.statistics import Estimate, mean_estimate

Scored = tuple[Sequence[Ranking], Sequence[np.ndarray], np.ndarray]
"""Rankings, the scores of each [K], and all response lengths flattened, in tokens."""


class Pairs:
    """Every strictly ordered pair of some rankings, as flat arrays [num_pairs]."""

    def __init__(self, scored: Scored):
        rankings, scores, lengths = scored
        rows: list[tuple[int, float, float, str | None]] = []
        offset = 0
        for index, (ranking, values) in enumerate(zip(rankings, scores, strict=True)):
            ranks = ranking.ranks
            for i, j in itertools.permutations(range(len(ranks)), 2):
                if ranks[i] < ranks[j]:
                    margin = float(values[i] - values[j])
                    longer = float(lengths[offset + i] - lengths[offset + j])
                    rows.append((index, margin, longer, ranking.labeler))
            offset += len(ranks)
        # pairs of one prompt belong together, whoever ranked it
        prompts = {r.prompt: n for n, r in enumerate(rankings)}
        self.prompt = np.array([prompts[rankings[r[0]].prompt] for r in rows])
        self.margin = np.array([r[1] for r in rows])
        self.longer = np.array([r[2] for r in rows])
        self.labeler = [r[3] for r in rows]

    def accuracy(self, keep: np.ndarray | None = None) -> Estimate | None:
        """Share of pairs whose better response scores higher; equal counts half."""
        return _share(self.margin, self.prompt, keep)

    def length_baseline(self) -> Estimate | None:
        """The same for "the longer one is better"; equal lengths count half."""
        return _share(self.longer, self.prompt, None)


def _share(
    margin: np.ndarray, prompt: np.ndarray, keep: np.ndarray | None
) -> Estimate | None:
    if keep is not None:
        margin, prompt = margin[keep], prompt[keep]
    if margin.size == 0:
        return None
    right = np.where(margin > 0, 1.0, np.where(margin == 0, 0.5, 0.0))
    return mean_estimate(right, clusters=prompt)


def labeler_agreement(rankings: Iterable[Ranking]) -> Estimate | None:
    """How often two labelers order a pair alike, over pairs that neither ties.

    Args:
        rankings: of the same prompts and responses by several labelers.

    Returns:
        The rate, clustered by prompt; None where no two labelers ranked the same.
    """
    groups: dict[Any, list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        if ranking.labeler is not None:
            groups[ranking.prompt, ranking.responses].append(ranking)
    agree: list[float] = []
    prompts: list[int] = []
    for number, group in enumerate(groups.values()):
        for a, b in itertools.combinations(group, 2):
            if a.labeler == b.labeler:
                continue
            for i, j in itertools.combinations(range(len(a.ranks)), 2):
                first = np.sign(a.ranks[i] - a.ranks[j])
                second = np.sign(b.ranks[i] - b.ranks[j])
                if first and second:
                    agree.append(float(first == second))
                    prompts.append(number)
    return mean_estimate(agree, clusters=prompts) if agree else None


def ranking_report(
    parts: dict[str, Scored], by_file: dict[str, Scored]
) -> dict[str, Any]:
    """Everything the report says of a reward model, as JSON.

    Args:
        parts: "train", "held_out_prompts" and "test", as far as they exist. Where the
            test rankings come from labelers that ranked nothing else they are reported
            as "held_out_labelers".
        by_file: the same rankings by the file they come from.

    Returns:
        accuracy and length baseline by part and by file, accuracy by labeler, margin
        and length difference, agreement of the labelers.
    """
    parts = dict(parts)
    if "test" in parts:
        known = {r.labeler for k, p in parts.items() if k != "test" for r in p[0]}
        labelers = {r.labeler for r in parts["test"][0]}
        held_out = None not in labelers and not labelers & known
        name = "held_out_labelers" if held_out else "test"
        parts[name] = parts.pop("test")
    pairs = {name: Pairs(part) for name, part in parts.items()}
    held = [pairs[name] for name in pairs if name != "train"]
    margin = np.concatenate([p.margin for p in held])
    longer = np.concatenate([p.longer for p in held])
    prompt = np.concatenate([p.prompt + 10**6 * n for n, p in enumerate(held)])
    labelers = np.array([str(x) for p in held for x in p.labeler])

    def agreement(name: str) -> Any:
        return _json(labeler_agreement(parts[name][0])) if name in parts else None

    return {
        "accuracy": {name: _json(p.accuracy()) for name, p in pairs.items()},
        "length_baseline": {n: _json(p.length_baseline()) for n, p in pairs.items()},
        "agreement": {
            "train_labelers": agreement("held_out_prompts"),
            "held_out_labelers": agreement("held_out_labelers"),
        },
        "by_labeler": {
            name: _json(_share(margin, prompt, labelers == name))
            for name in sorted(set(labelers) - {"None"})
        },
        "by_margin": _bins(np.abs(margin), margin, prompt),
        "by_length": _bins(longer, margin, prompt),
        "by_file": {
            name: {
                "accuracy": _json(p.accuracy()),
                "length_baseline": _json(p.length_baseline()),
                "num_rankings": len(part[0]),
            }
            for name, part in by_file.items()
            for p in [Pairs(part)]
        },
    }


def _bins(by: np.ndarray, margin: np.ndarray, prompt: np.ndarray) -> list[Any]:
    """Accuracy in five bins of equal size of `by`."""
    edges = np.unique(np.quantile(by, np.linspace(0, 1, 6)))
    rows = []
    for n, (low, high) in enumerate(itertools.pairwise(edges)):
        last = n == len(edges) - 2
        keep = (by >= low) & ((by <= high) if last else (by < high))
        accuracy = _share(margin, prompt, keep)
        if accuracy is not None:
            bounds = {"low": float(low), "high": float(high)}
            rows.append(bounds | {"accuracy": accuracy.to_json()})
    return rows


def _json(estimate: Estimate | None) -> Any:
    return None if estimate is None else estimate.to_json()
