"""Rankings of a run: reading them, scoring them, and how well scores predict them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.inputs import cache_dir
from rlhf_jax.data.ranking_batches import (
    EncodedRankings,
    encode_rankings,
    ranking_batches,
)
from rlhf_jax.data.records import SPLITS
from rlhf_jax.data.schedule import evenly
from rlhf_jax.data.sources import DataError, Demonstration, Ranking, Split, load
from rlhf_jax.evaluation.rankings import ranking_report
from rlhf_jax.objectives.ranking import ranking_accuracy
from rlhf_jax.stages.common import Context, Model
from rlhf_jax.stages.scoring import response_scores
from rlhf_jax.training.mesh import fill_shards, jit_measure, shard_whole_batch
from rlhf_jax.training.run_dir import file_hash


class RankingLimits(Protocol):
    """The part of `RewardModelConfig` that bounds a batch of rankings."""

    @property
    def batch_size(self) -> int: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def response_len(self) -> int: ...


class RankingScorer:
    """Scores of whole rankings, in batches of one shape a call."""

    def __init__(self, cfg: RankingLimits, model: Model, ctx: Context):
        self._cfg, self._model, self._ctx = cfg, model, ctx
        self._rows = fill_shards(min(cfg.batch_size, 32), ctx.mesh)
        self._score = jit_measure(response_scores, ctx.mesh, model=model.cfg)

    def encode(self, rankings: Sequence[Ranking]) -> EncodedRankings:
        """Ids of the rankings that fit the model, see `encode_rankings`."""
        model, limits = self._model, (self._cfg.prompt_len, self._cfg.response_len)
        return encode_rankings(rankings, model.tokenizer, model.format, *limits)

    def __call__(
        self, params: Any, rankings: EncodedRankings
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Scores every ranking, in order.

        Args:
            params: `{"transformer", "head"}`.
            rankings: of `encode`, at least one.

        Returns:
            The scores of each, float32 [K], and the lengths of all their responses in
            tokens, flattened in the same order.
        """
        batches = ranking_batches(rankings, self._rows, None)
        scores: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for step in range(batches.steps_per_epoch):
            host = batches(step)
            batch = shard_whole_batch(self._ctx.mesh, host)
            values = jax.device_get(
                self._score(
                    params,
                    batch.prompts,
                    batch.prompt_lengths,
                    batch.responses,
                    batch.response_lengths,
                )
            )
            for row in range(len(values)):
                present = np.asarray(host.ranks[row]) > 0
                if present.any():
                    scores.append(values[row][present])
                    lengths.append(np.asarray(host.response_lengths[row])[present])
        return scores, np.concatenate(lengths)


def has_rankings(ctx: Context) -> bool:
    """Whether the data has rankings to train on, and none are collected.

    Raises:
        DataError: some would be ignored: it has, and the run has collected some too,
            or it has held-out ones alone, beside those that are collected.
    """
    given = bool(_purposes(ctx, "train"))
    collected = _collected(ctx, "train")
    if given and collected.exists():
        raise DataError(
            f"{ctx.inputs.root}: has rankings, and so has {collected}, which were "
            "collected before. Take one away: the folder of the collected ones (and "
            "those of later stages), or the rankings and comparisons of the data"
        )
    if not given and _purposes(ctx, "valid"):
        raise DataError(
            f"{ctx.inputs.root}: has held-out rankings (_valid) and none to train on; "
            "they would be ignored, since of those that are collected some are held "
            "out. Let their names end in _test, or take them away"
        )
    return given


def _purposes(ctx: Context, split: Split) -> list[str]:
    return [x for x in ("rankings", "comparisons") if ctx.inputs.has(x, split)]


def _collected(ctx: Context, split: Split) -> Path:
    return ctx.run / "collect" / f"rankings_{split}.jsonl"


def ranking_hashes(ctx: Context) -> dict[str, str]:
    """Hashes of all that `read_rankings` reads."""
    hashes = {}
    for split in SPLITS:
        collected = _collected(ctx, split)
        if collected.exists():
            hashes[collected.name] = file_hash(collected)
        else:
            for purpose in _purposes(ctx, split):
                hashes |= ctx.inputs.fingerprint((purpose, split))
    return hashes


def read_rankings(ctx: Context, split: Split) -> dict[str, list[Ranking]]:
    """The run's rankings by source: collected, or of the data with its comparisons.

    Returns:
        File name (or purpose, for a TFDS data set) -> rankings; comparisons have K = 2.
    """
    collected = _collected(ctx, split)
    if collected.exists():
        folder, cache = collected.parent, cache_dir() / "data"
        records = load("rankings", folder, (collected.name,), split, cache)
        return {collected.name: list(records)}
    sources = {}
    for purpose in _purposes(ctx, split):
        for name, records in ctx.inputs.read_by_file(purpose, split).items():
            sources[name] = list(records)
    return sources


def accuracy(scores: Sequence[np.ndarray], ranks: Sequence[Sequence[int]]) -> float:
    """Mean over rankings of the share of ordered pairs that the scores order so."""
    shape = (len(scores), max(map(len, scores)))
    padded, places = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for i, (s, r) in enumerate(zip(scores, ranks, strict=True)):
        padded[i, : len(s)], places[i, : len(r)] = s, r  # rank 0: no response
    return float(jnp.mean(ranking_accuracy(jnp.asarray(padded), jnp.asarray(places))))


def fitting_demonstrations(
    scorer: RankingScorer, demonstrations: Sequence[Demonstration]
) -> EncodedRankings:
    """Those that fit the model, as rankings of two copies, which the scorer can read.

    Raises:
        DataError: none fits.
    """
    pairs = [
        Ranking(d.prompt, (d.response, d.response), (1, 2), (True, True), None)
        for d in demonstrations
    ]
    encoded = scorer.encode(pairs)
    if not encoded.kept:
        raise DataError(
            f"demonstrations: none of {len(pairs)} fits the reward model's prompt_len "
            "and response_len, and its scores cannot be centred; raise them"
        )
    return encoded


def score_demonstrations(
    scorer: RankingScorer, params: Any, fitting: EncodedRankings
) -> np.ndarray:
    """Scores of `fitting_demonstrations`: float32 [N], reward units."""
    return np.asarray([scores[0] for scores in scorer(params, fitting)[0]])


def evaluate_rankings(
    scorer: RankingScorer, params: Any, ctx: Context
) -> dict[str, Any]:
    """Accuracy on every split and file beside the length baseline and the labelers."""
    splits: dict[str, Split] = {
        "train": "train",
        "held_out_prompts": "valid",
        "test": "test",
    }
    parts: dict[str, Any] = {}
    by_file: dict[str, Any] = {}
    num_read: dict[str, dict[str, int]] = {}
    known: set[str | None] = set()
    for name, split in splits.items():
        for file, records in read_rankings(ctx, split).items():
            if split != "test":
                known |= {ranking.labeler for ranking in records}
            some = evenly(records, 128) if split == "train" else records
            encoded = scorer.encode(some)
            if not encoded.kept:
                print(f"{file}: no ranking fits the reward model; left out")
                continue
            kept = encoded.records
            scores, lengths = scorer(params, encoded)
            part = parts.setdefault(name, ([], [], []))
            part[0].extend(kept)
            part[1].extend(scores)
            part[2].append(lengths)
            num_read[file] = {
                "num_rankings_read": len(records),
                "num_responses": sum(len(r.responses) for r in kept),
                "num_responses_read": sum(len(r.responses) for r in records),
            }
            by_file[file] = (kept, scores, lengths)
    parts = {k: (a, b, np.concatenate(c)) for k, (a, b, c) in parts.items()}
    report = ranking_report(parts, by_file, known)
    for file, read in num_read.items():  # what was left out is told, not hidden
        report["by_file"][file] |= read
    return report
