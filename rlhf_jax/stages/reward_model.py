"""The reward model: a scalar fitted to rankings of K responses to one prompt."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.data.batches import RankingBatch, ranking_batches
from rlhf_jax.data.inputs import cache_dir
from rlhf_jax.data.sources import Demonstration, Ranking, find_files, load
from rlhf_jax.evaluation.rankings import ranking_report
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import init_scalar_head
from rlhf_jax.objectives.masking import masked_sum
from rlhf_jax.objectives.ranking import (
    preferred_pairs,
    ranking_accuracy,
    ranking_loss,
)
from rlhf_jax.stages.common import Context, Model, load_model, save_model
from rlhf_jax.stages.scoring import response_scores
from rlhf_jax.training.loop import LoopConfig, run_loop
from rlhf_jax.training.mesh import jit_step, replicated, shard_batch, state_sharding
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.run_dir import write_text
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Reward modelling. "IG" marks what InstructGPT published (appendix C.2)."""

    init_from: Literal["pretrain", "sft", "sft_rl"] = "sft_rl"
    """Stage whose transformer it starts from (IG: a 6B GPT-3 fine-tuned on public NLP
    sets; "results similar" from GPT-3 or SFT)."""
    num_epochs: int = 1
    """Passes over the rankings (IG: 1; more overfit)."""
    batch_size: int = 64
    """Prompts per update, each with all its responses and pairs (IG: 64)."""
    num_responses: int = 9
    """Most responses to a prompt, K (IG: 4 to 9)."""
    prompt_len: int = 1024
    """Longest prompt in tokens, P (IG: 1024); longer ones are dropped with a count."""
    response_len: int = 1024
    """Longest response in tokens, R (IG: 1024); longer ones are dropped, counted."""
    num_microbatches: int = 1
    """Sequential parts of each batch, to save memory."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6)
    """AdamW, cosine to 10 % (IG: 9e-6, insensitive to 50 %)."""
    num_centering: int = 512
    """Demonstrations whose mean score is set to 0 (IG does so; how many is not
    published)."""
    loop: LoopConfig = LoopConfig(eval_every=50)
    """How often to save and evaluate."""


@struct.dataclass
class WeightedRankings:
    """Rankings and the weight of each prompt in the loss."""

    rankings: RankingBatch
    weights: Array  # float32 [B], summing to 1 over the global batch


def reward_loss(
    params: Any, batch: WeightedRankings, key: Array, *, model: TransformerConfig
) -> tuple[Array, dict[str, Array]]:
    """Ranking loss of a batch: mean over a prompt's pairs, then over prompts.

    Args:
        params: `{"transformer", "head"}`.
        batch: rankings of [B, K] responses and weights [B].
        key: unused: the reward model is trained without dropout.
        model: shape.

    Returns:
        Scalar in nats per comparison; accuracy and mean margin of the ordered pairs.
    """
    del key
    rankings = batch.rankings
    scores = response_scores(
        params,
        rankings.prompts,
        rankings.prompt_lengths,
        rankings.responses,
        rankings.response_lengths,
        model,
    )
    pairs = preferred_pairs(rankings.ranks)
    margins = jnp.where(pairs, scores[:, :, None] - scores[:, None, :], 0.0)
    num_pairs = jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 1)
    extras = {
        "accuracy": masked_sum(ranking_accuracy(scores, rankings.ranks), batch.weights),
        "margin": masked_sum(jnp.sum(margins, axis=(1, 2)) / num_pairs, batch.weights),
    }
    return masked_sum(ranking_loss(scores, rankings.ranks), batch.weights), extras


class RankingScorer:
    """Scores of whole rankings as text, in batches of one compiled shape."""

    def __init__(self, cfg: RewardModelConfig, model: Model, ctx: Context):
        self._cfg, self._model, self._ctx = cfg, model, ctx
        devices = len(ctx.mesh.devices.flat)
        self._rows = -(-min(cfg.batch_size, 32) // devices) * devices
        self._score = jax.jit(
            functools.partial(response_scores, model=model.cfg),
            out_shardings=replicated(ctx.mesh),
        )

    def __call__(
        self, params: Any, rankings: Sequence[Ranking]
    ) -> tuple[list[Ranking], list[np.ndarray], np.ndarray]:
        """Scores every ranking that fits the model, in order.

        Args:
            params: `{"transformer", "head"}`.
            rankings: may hold responses that are too long; they are left out.

        Returns:
            The rankings as scored (over-long responses removed, rankings without an
            ordered pair left out), the scores of each, float32 [K], and the lengths of
            all their responses in tokens, flattened in the same order.
        """
        cfg, model = self._cfg, self._model
        kept = fitting_rankings(rankings, model, cfg.prompt_len, cfg.response_len)
        batches = ranking_batches(
            kept,
            model.tokenizer,
            model.format,
            self._rows,
            cfg.prompt_len,
            cfg.response_len,
            cfg.num_responses,
            None,
        )
        scores: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for step in range(batches.steps_per_epoch):
            host = batches(step)
            batch = shard_batch(self._ctx.mesh, host)
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
        return kept, scores, np.concatenate(lengths)


def fitting_rankings(
    rankings: Sequence[Ranking], model: Model, prompt_len: int, response_len: int
) -> list[Ranking]:
    """Rankings without what is too long for a batch, where an ordered pair remains."""
    kept = []
    for ranking in rankings:
        prompt = model.format.encode_prompt(model.tokenizer, ranking.prompt)
        fits = [
            len(model.format.encode_response(model.tokenizer, text, ended))
            <= response_len
            for text, ended in zip(ranking.responses, ranking.ended, strict=True)
        ]
        ranks = [rank for rank, fit in zip(ranking.ranks, fits, strict=True) if fit]
        if len(prompt) > prompt_len or len(set(ranks)) < 2:
            continue
        kept.append(
            dataclasses.replace(
                ranking,
                responses=tuple(itertools.compress(ranking.responses, fits)),
                ranks=tuple(ranks),
                ended=tuple(itertools.compress(ranking.ended, fits)),
            )
        )
    return kept


def read_rankings(ctx: Context, split: str) -> list[Ranking]:
    """The run's rankings: collected, or of the data with its comparisons (K = 2)."""
    records: list[Ranking] = []
    for path in ranking_files(ctx, split):
        records += read_ranking_file(path, split)
    return records


def ranking_files(ctx: Context, split: str) -> list[Path]:
    """Files that `read_rankings` reads."""
    files: list[Path] = []
    for purpose in ("rankings", "comparisons"):
        if ctx.inputs.has(purpose, split):  # type: ignore[arg-type]
            patterns = getattr(ctx.inputs.files, purpose)
            files += find_files(ctx.inputs.root, patterns, split)  # type: ignore
    collected = ctx.run / "collect" / f"rankings_{split}.jsonl"
    return [collected] if collected.exists() else files


def read_ranking_file(path: Path, split: str) -> list[Ranking]:
    """Rankings of one file; a file in a folder `comparisons` holds pairs."""
    kind = "comparisons" if path.parent.name == "comparisons" else "rankings"
    records = load(kind, path.parent, (path.name,), split, cache_dir() / "data")  # type: ignore
    return [records[i] for i in range(len(records))]


def center(params: Any, scores: np.ndarray) -> Any:
    """Moves the head's shift so that the given scores [N] would have mean 0."""
    head = params["head"]
    shift = head["shift"] + jnp.float32(np.mean(scores, dtype=np.float64))
    return params | {"head": head | {"shift": shift}}


def run(cfg: RewardModelConfig, ctx: Context) -> None:
    """Trains a reward model on the run's rankings into RUN/reward_model."""
    stage = ctx.stage("reward_model")
    parents = {cfg.init_from: ctx.stage(cfg.init_from)}
    if ctx.stage("collect").done:
        parents["collect"] = ctx.stage("collect")
        sources = {}
    else:
        purposes = [
            (purpose, split)
            for purpose in ("rankings", "comparisons")
            for split in ("train", "valid", "test")
            if ctx.inputs.has(purpose, split)  # type: ignore[arg-type]
        ]
        sources = ctx.inputs.fingerprint(*purposes)  # type: ignore[arg-type]
    stage.open("reward_model", (cfg, ctx.seed), sources, parents)
    if stage.done:
        return
    base = load_model(parents[cfg.init_from], ctx.mesh, "language_model")
    train, valid = read_rankings(ctx, "train"), read_rankings(ctx, "valid")
    batches = ranking_batches(
        train,
        base.tokenizer,
        base.format,
        cfg.batch_size,
        cfg.prompt_len,
        cfg.response_len,
        cfg.num_responses,
        ctx.data_seed("reward_model"),
        shard=ctx.shard,
    )

    def weighted(step: int) -> WeightedRankings:
        rankings = batches(step)  # every ranking kept has an ordered pair
        rows = len(rankings.prompts)
        return WeightedRankings(
            rankings=rankings,
            weights=np.full((rows,), 1.0 / cfg.batch_size, np.float32),  # type: ignore
        )

    num_steps = cfg.num_epochs * batches.steps_per_epoch
    key = ctx.key("reward_model")
    make = lambda transformer: init_state(  # noqa: E731
        {
            "transformer": transformer,
            "head": init_scalar_head(key, base.cfg.model_dim),
        },
        key,
    )
    sharding = state_sharding(ctx.mesh, jax.eval_shape(make, base.params))
    state = jax.jit(make, out_shardings=sharding)(base.params)
    scalars = cfg.optimizer.scalars()
    step_fn = make_train_step(
        functools.partial(reward_loss, model=base.cfg),
        cfg.optimizer,
        num_steps,
        cfg.num_microbatches,
    )
    compiled = jit_step(step_fn, ctx.mesh, sharding)
    scorer = RankingScorer(cfg, base, ctx)

    def evaluate(state: Any, _: int) -> dict[str, float]:
        rankings, scores, _ = scorer(state.params, valid)
        ranks = [r.ranks for r in rankings]
        return {"heldout/accuracy": accuracy(scores, ranks)}

    state = run_loop(
        name="reward_model",
        directory=stage.path,
        step_fn=lambda state, batch: compiled(state, batch, scalars),
        state=state,
        batches=weighted,
        num_steps=num_steps,
        mesh=ctx.mesh,
        grads_like=state.params,
        cfg=cfg.loop,
        evaluate=evaluate,
        show=("loss", "accuracy"),
    )
    params = state.params
    demonstrations = ctx.inputs.read("demonstrations", "train")
    some = [
        demonstrations[i] for i in range(min(cfg.num_centering, len(demonstrations)))
    ]
    params = center(params, score_demonstrations(scorer, params, some))
    save_model(stage, dataclasses.replace(base, kind="reward_model", params=params))
    report = evaluate_rankings(scorer, params, ctx)
    write_text(stage.path / "evaluation.json", json.dumps(report, indent=2))
    stage.finish(
        {
            "num_steps": num_steps,
            "num_rankings": batches.num_examples,
            "num_dropped": batches.num_dropped,
            "accuracy": report["accuracy"],
        }
    )


def accuracy(scores: Sequence[np.ndarray], ranks: Sequence[Sequence[int]]) -> float:
    """Mean over rankings of the share of ordered pairs that the scores order so."""
    shares = [
        float(
            ranking_accuracy(jnp.asarray(s)[None], jnp.asarray(r, jnp.int32)[None])[0]
        )
        for s, r in zip(scores, ranks, strict=True)
    ]
    return float(np.mean(shares))


def score_demonstrations(
    scorer: RankingScorer, params: Any, demonstrations: Sequence[Demonstration]
) -> np.ndarray:
    """Scores of demonstrations that fit the model: float32 [N]."""
    pairs = [  # two copies under distinct ranks: the reader of rankings wants a pair
        Ranking(d.prompt, (d.response, d.response), (1, 2), (True, True), None)
        for d in demonstrations
    ]
    _, scores, _ = scorer(params, pairs)
    return np.asarray([s[0] for s in scores])


def evaluate_rankings(
    scorer: RankingScorer, params: Any, ctx: Context
) -> dict[str, Any]:
    """Accuracy on every split and file beside the length baseline and the labelers."""
    splits = {"train": "train", "held_out_prompts": "valid", "test": "test"}
    parts: dict[str, Any] = {}
    by_file: dict[str, Any] = {}
    for name, split in splits.items():
        for path in ranking_files(ctx, split):
            records = read_ranking_file(path, split)
            records = records[:512] if split == "train" else records
            kept, scores, lengths = scorer(params, records)
            part = parts.setdefault(name, ([], [], []))
            part[0].extend(kept)
            part[1].extend(scores)
            part[2].append(lengths)
            by_file[path.name] = (kept, scores, lengths)
    parts = {k: (a, b, np.concatenate(c)) for k, (a, b, c) in parts.items()}
    return ranking_report(parts, by_file)
