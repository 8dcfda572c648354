"""The reward model: a scalar fitted to rankings of K responses to one prompt."""

import dataclasses
import functools
import itertools
import json
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.data.packed_rankings import PackedRankings, packed_ranking_batches
from rlhf_jax.data.ranking_batches import (
    EncodedRankings,
    RankingBatch,
    ranking_batches,
)
from rlhf_jax.data.records import SPLITS
from rlhf_jax.data.schedule import Batches, evenly
from rlhf_jax.data.sources import DataError
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import init_scalar_head, scalar_head
from rlhf_jax.nn.responses import packed_last_states
from rlhf_jax.nn.transformer import check_length
from rlhf_jax.objectives.masking import masked_sum
from rlhf_jax.objectives.ranking import pair_mean, ranking_accuracy, ranking_loss
from rlhf_jax.stages.common import Context, load_model, save_model
from rlhf_jax.stages.rankings import (
    RankingScorer,
    accuracy,
    evaluate_rankings,
    fitting_demonstrations,
    has_rankings,
    ranking_hashes,
    read_rankings,
    score_demonstrations,
)
from rlhf_jax.stages.scoring import response_scores
from rlhf_jax.training.activations import Row, on_accelerator, response_row, text_row
from rlhf_jax.training.loop import LoopConfig, run_loop
from rlhf_jax.training.mesh import (
    jit_step,
    num_local_shards,
    pad_rows,
    replicas,
    state_sharding,
)
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.room import require_room_to_train
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
    prompt_len: int = 1024
    """Longest prompt in tokens, P (IG: 1024); longer ones are dropped with a count."""
    response_len: int = 1024
    """Longest response in tokens, R (IG: 1024); longer ones are dropped, counted."""
    num_microbatches: int = 1
    """Sequential parts of each batch's rows, to save memory; short rankings share rows,
    and parts beyond the rows cost time for nothing."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6)
    """AdamW, cosine to 10 % (IG: 9e-6, insensitive to 50 %)."""
    num_centering: int = 512
    """Demonstrations whose mean score is set to 0 (IG does so; how many is not
    published)."""
    loop: LoopConfig = LoopConfig(eval_every=50)
    """How often to save and evaluate."""


@struct.dataclass
class WeightedRankings:
    """Rankings and the weight of each in the loss."""

    rankings: RankingBatch | PackedRankings
    weights: Array  # float32 [B] or [N, G], summing to 1 over the global batch


def weighted(
    rankings: RankingBatch | PackedRankings, batch_size: int
) -> WeightedRankings:
    """Gives each of the B rankings of a global batch 1 / B, and absent ones [G] 0.

    Every ranking kept has an ordered pair.
    """
    present = np.any(rankings.ranks > 0, axis=-1)
    return WeightedRankings(rankings, np.float32(present / batch_size))  # type: ignore


def packed_scores(
    reward_model: Any, rankings: PackedRankings, model: TransformerConfig
) -> Array:
    """`response_scores` of packed rankings: float32 [N, G, K], reward units."""
    last = rankings.last.reshape(len(rankings.last), -1)
    states = packed_last_states(
        reward_model["transformer"],
        rankings.tokens,
        rankings.positions,
        rankings.documents,
        rankings.branches,
        last,
        model,
    )
    return scalar_head(reward_model["head"], states).reshape(rankings.last.shape)


def reward_loss(
    params: Any, batch: WeightedRankings, key: Array, *, model: TransformerConfig
) -> tuple[Array, dict[str, Array]]:
    """Ranking loss of a batch: mean over a prompt's pairs, then over prompts.

    Args:
        params: `{"transformer", "head"}`.
        batch: rankings of [B, K] or packed [N, G, K] responses, and their weights.
        key: unused: the reward model is trained without dropout.
        model: shape.

    Returns:
        Scalar in nats per comparison; accuracy and mean margin of the ordered pairs.
    """
    del key
    rankings = batch.rankings
    if isinstance(rankings, PackedRankings):
        scores = packed_scores(params, rankings, model)
    else:
        scores = response_scores(
            params,
            rankings.prompts,
            rankings.prompt_lengths,
            rankings.responses,
            rankings.response_lengths,
            model,
        )
    K = scores.shape[-1]
    scores, ranks = scores.reshape(-1, K), rankings.ranks.reshape(-1, K)
    weights = batch.weights.reshape(-1)
    extras = {
        "accuracy": masked_sum(ranking_accuracy(scores, ranks), weights),
        "margin": masked_sum(pair_mean(lambda m: m, scores, ranks), weights),
    }
    return masked_sum(ranking_loss(scores, ranks), weights), extras


def center(params: Any, scores: np.ndarray) -> Any:
    """Moves the head's shift so that the given scores [N] would have mean 0."""
    head = params["head"]
    shift = head["shift"] + jnp.float32(np.mean(scores, dtype=np.float64))
    return params | {"head": head | {"shift": shift}}


def training_batches(
    cfg: RewardModelConfig,
    ctx: Context,
    rankings: EncodedRankings,
    model: TransformerConfig,
) -> tuple[Batches[Any], Row, int]:
    """Batches of rankings, packed where that costs less.

    Raises:
        ValueError: prompt and response do not fit the model's positions.

    Returns:
        step -> `PackedRankings` or `RankingBatch` of this process; what is computed of
        each row; rows of a global batch.
    """
    rankings.check_any()
    check_length(max(ranking.num_positions for ranking in rankings.kept), model)
    how = (rankings, cfg.batch_size, ctx.data_seed("reward_model"))
    parts = num_local_shards(ctx.mesh) * jax.process_count() * cfg.num_microbatches
    packed = packed_ranking_batches(*how, cfg.num_epochs, parts, ctx.shard)
    if packed is None:
        batches = ranking_batches(*how, ctx.shard)
        first = batches(0)
        P, (_, K, R) = first.prompts.shape[1], first.responses.shape
        row = response_row(P, K, R, on_accelerator(), last_only=True)
        return batches, row, cfg.batch_size
    first = packed(0)
    num_rows, T = first.tokens.shape
    num_rows *= jax.process_count()
    row = text_row(T, on_accelerator())
    row = dataclasses.replace(row, logits=0, last=first.last[0].size)
    if jax.process_index() == 0:
        held = f"{cfg.batch_size} rankings in {num_rows} rows of {T} tokens"
        print(f"reward_model: {held}", file=sys.stderr)
    return packed, row, num_rows


def run(cfg: RewardModelConfig, ctx: Context) -> None:
    """Trains a reward model on the run's rankings into RUN/reward_model."""
    stage = ctx.stage("reward_model")
    parents = {cfg.init_from: ctx.stage(cfg.init_from)}
    if not has_rankings(ctx):
        parents["collect"] = ctx.stage("collect")
    sources = ranking_hashes(ctx)
    sources |= ctx.inputs.fingerprint(("demonstrations", "train"))  # get mean score 0
    made_by = {"reward_model": cfg, "seed": ctx.seed}
    stage.open("reward_model", made_by, sources, parents)
    if stage.done:
        return
    base = load_model(parents[cfg.init_from], ctx.mesh, "language_model")
    scorer = RankingScorer(cfg, base, ctx)
    encoded = {}
    for split in SPLITS:  # the test's too: what is wrong stops the run before training
        files = read_rankings(ctx, split).values()
        rankings = list(itertools.chain(*files))
        encoded[split] = scorer.encode(rankings)
    valid = encoded["valid"]
    demonstrations = ctx.inputs.read("demonstrations", "train")
    some = evenly(demonstrations, cfg.num_centering)
    centering = fitting_demonstrations(scorer, some)
    batches, row, num_rows = training_batches(cfg, ctx, encoded["train"], base.cfg)
    lengths = ("reward_model.prompt_len", "reward_model.response_len")
    batch = (num_rows, cfg.num_microbatches)
    require_room_to_train("reward_model", base.cfg, row, *batch, lengths, ctx.mesh)

    multiple = num_local_shards(ctx.mesh) * cfg.num_microbatches

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
        mesh=replicas(ctx.mesh),
    )
    compiled = jit_step(step_fn, ctx.mesh, sharding)
    if not valid.kept:
        raise DataError(
            f"rankings (valid): of {valid.num_read} none is left with an ordered pair "
            f"of responses: prompt_len is {cfg.prompt_len}, response_len "
            f"{cfg.response_len}; raise them or give other held-out rankings"
        )

    def evaluate(state: Any, step: int) -> dict[str, float]:
        del step
        scores, _ = scorer(state.params, valid)
        ranks = [record.ranks for record in valid.records]
        return {"heldout/accuracy": accuracy(scores, ranks)}

    state = run_loop(
        name="reward_model",
        directory=stage.path,
        step_fn=compiled,
        rest=(scalars,),
        state=state,
        batches=lambda step: pad_rows(
            weighted(batches(step), cfg.batch_size), multiple
        ),
        num_steps=num_steps,
        mesh=ctx.mesh,
        cfg=cfg.loop,
        evaluate=evaluate,
        show=("loss", "accuracy"),
        profile=ctx.profile,
    )
    scores = score_demonstrations(scorer, state.params, centering)
    params = center(state.params, scores)
    save_model(stage, dataclasses.replace(base, kind="reward_model", params=params))
    report = evaluate_rankings(scorer, params, ctx)
    write_text(stage.path / "evaluation.json", json.dumps(report, indent=2))
    stage.finish(
        {
            "num_steps": num_steps,
            "num_rankings": batches.num_examples,
            "num_dropped": encoded["train"].num_dropped,
            "num_tied": encoded["train"].num_tied,
            "num_dropped_responses": encoded["train"].num_dropped_responses,
            "accuracy": report["accuracy"],
        }
    )
