"""How well scores predict rankings, beside length alone and the labelers themselves."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.sources import Ranking
from rlhf_jax.evaluation.statistics import (
    Estimate,
    rate_difference,
    rate_estimate,
)

Scored = tuple[Sequence[Ranking], Sequence[np.ndarray], np.ndarray]
"""Rankings, the scores of each [K], and all response lengths flattened, in tokens."""


class Pairs:
    """Every strictly ordered pair of some rankings, as flat arrays [num_pairs]."""

    def __init__(self, scored: Scored):
        rankings, scores, lengths = scored
        rows: list[tuple[str, float, float, str | None]] = []
        offset = 0
        for ranking, values in zip(rankings, scores, strict=True):
            ranks = ranking.ranks
            for i, j in itertools.permutations(range(len(ranks)), 2):
                if ranks[i] < ranks[j]:
                    margin = float(values[i] - values[j])
                    longer = float(lengths[offset + i] - lengths[offset + j])
                    rows.append((ranking.prompt, margin, longer, ranking.labeler))
            offset += len(ranks)
        self.prompts = [r[0] for r in rows]
        self.prompt = _numbers(self.prompts)
        self.margin = np.array([r[1] for r in rows])
        self.longer = np.array([r[2] for r in rows])
        self.labeler = [r[3] for r in rows]

    def accuracy(self) -> Estimate | None:
        """Share of pairs whose better response scores higher; equal counts half."""
        return _share(self.margin, self.prompt)

    def length_baseline(self) -> Estimate | None:
        """The same for "the longer one is better"; equal lengths count half."""
        return _share(self.longer, self.prompt)

    def minus_length_baseline(self) -> Estimate | None:
        """Accuracy minus the length baseline, pair by pair."""
        if self.margin.size == 0:
            return None
        right, longer = _right(self.margin), _right(self.longer)
        return rate_difference(right, longer, clusters=self.prompt)


def _numbers(items: Iterable[Hashable]) -> np.ndarray:
    """Clusters: a number for each item, the same for equal ones."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(item, len(seen)) for item in items], int)


def _share(
    margin: np.ndarray, prompt: np.ndarray, keep: np.ndarray | None = None
) -> Estimate | None:
    if keep is not None:
        margin, prompt = margin[keep], prompt[keep]
    if margin.size == 0:
        return None
    return rate_estimate(_right(margin), clusters=prompt)


def _right(margin: np.ndarray) -> np.ndarray:
    """1 where the better response has more, 1/2 where both have the same."""
    return np.where(margin > 0, 1.0, np.where(margin == 0, 0.5, 0.0))


def labeler_agreement(
    rankings: Sequence[Ranking], scores: Sequence[np.ndarray]
) -> tuple[Estimate, Estimate] | None:
    """How often two labelers order a pair alike, and how the scores compare with them.

    The scores are held against both labelers on the pairs that neither of them ties,
    those on which they are held against each other.

    Args:
        rankings: of the same prompts and responses, in any order, by several labelers;
            a pair of equal responses is nobody's preference.
        scores: of each ranking's responses, [K].

    Returns:
        The rate of agreement, and the share of orders that the scores predict minus
        it, both clustered by prompt; None where no two labelers ranked the same.
    """
    groups: dict[Any, list[tuple[str, Any, Any]]] = defaultdict(list)
    for ranking, values in zip(rankings, scores, strict=True):
        if ranking.labeler is None:
            continue
        # in one order, whichever each labeler was shown or a comparison puts first
        rows = zip(ranking.responses, ranking.ended, ranking.ranks, values, strict=True)
        texts, ended, ranks, own = zip(*sorted(rows), strict=True)
        groups[ranking.prompt, texts, ended].append((ranking.labeler, ranks, own))
    agree: list[float] = []
    right: list[float] = []
    prompts: list[str] = []
    for (prompt, *given), group in groups.items():
        responses = list(zip(*given, strict=True))
        for (one, a, values), (other, b, _) in itertools.combinations(group, 2):
            if one == other:
                continue
            for i, j in itertools.combinations(range(len(a)), 2):
                first = np.sign(a[j] - a[i])  # 1: i is better
                second = np.sign(b[j] - b[i])
                if first and second and responses[i] != responses[j]:
                    margins = np.array([first, second]) * (values[i] - values[j])
                    agree.append(float(first == second))
                    right.append(float(_right(margins).mean()))
                    prompts.append(prompt)
    if not agree:
        return None
    clusters = _numbers(prompts)
    gap = rate_difference(right, agree, clusters=clusters)
    return rate_estimate(agree, clusters=clusters), gap


def ranking_report(
    parts: Mapping[str, Scored],
    by_file: Mapping[str, Scored],
    known_labelers: Collection[str | None],
) -> dict[str, Any]:
    """Everything the report says of a reward model, as JSON.

    Args:
        parts: "train", "held_out_prompts" and "test", as far as they exist. Where the
            test rankings come from labelers that ranked nothing else they are reported
            as "held_out_labelers".
        by_file: the same rankings by the file they come from.
        known_labelers: of all rankings but the test's, also of those that are in no
            part; None is somebody who was not named, and may be anybody.

    Returns:
        accuracy and length baseline by part and by file, accuracy by labeler, margin
        and length difference, agreement of the labelers; and the accuracy minus the
        length baseline and minus the agreement, over the same pairs each.
    """
    parts = dict(parts)
    if "test" in parts:
        labelers = {r.labeler for r in parts["test"][0]}
        named = None not in labelers.union(known_labelers)
        held_out = named and labelers.isdisjoint(known_labelers)
        name = "held_out_labelers" if held_out else "test"
        parts[name] = parts.pop("test")
    pairs = {name: Pairs(part) for name, part in parts.items()}
    held = [pairs[name] for name in pairs if name != "train"]
    margin = np.concatenate([p.margin for p in held])
    longer = np.concatenate([p.longer for p in held])
    # pairs of one prompt belong together, whoever ranked it
    prompt = _numbers(itertools.chain.from_iterable(p.prompts for p in held))
    labelers = np.array([str(x) for p in held for x in p.labeler])

    asked = {
        "train_labelers": "held_out_prompts",
        "held_out_labelers": "held_out_labelers",
        "test": "test",
    }
    agreement, minus_agreement = {}, {}
    for name, part in asked.items():
        both = labeler_agreement(*parts[part][:2]) if part in parts else None
        agreement[name], minus_agreement[name] = map(_json, both or (None, None))

    return {
        "accuracy": {name: _json(p.accuracy()) for name, p in pairs.items()},
        "length_baseline": {n: _json(p.length_baseline()) for n, p in pairs.items()},
        "agreement": agreement,
        "minus_agreement": minus_agreement,
        "minus_length_baseline": {
            name: _json(p.minus_length_baseline()) for name, p in pairs.items()
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
