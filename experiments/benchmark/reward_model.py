"""Reward-model steps: K responses beside one prompt, against pairs and K rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.peers import hf_gpt2, import_torch
from experiments.benchmark.timing import Row, check_close, duel
from experiments.benchmark.training import model_config
from rlhf_jax.data.packed_rankings import packed_ranking_batches
from rlhf_jax.data.ranking_batches import (
    EncodedRanking,
    EncodedRankings,
    RankingBatch,
    ranking_batches,
)
from rlhf_jax.data.records import Ranking
from rlhf_jax.nn.heads import init_scalar_head, scalar_head
from rlhf_jax.nn.transformer import forward, init_params
from rlhf_jax.objectives.ranking import ranking_loss
from rlhf_jax.stages.reward_model import WeightedRankings, reward_loss, weighted

B, P, R, V = 2, 192, 64, 8192


def make_model():
    """Shape and parameters."""
    cfg = model_config(V)
    key = jax.random.key(0)
    params = {
        "transformer": init_params(key, cfg),
        "head": init_scalar_head(key, cfg.model_dim),
    }
    return cfg, params


def compiled_grad(cfg):
    """Loss and gradient, `(params, batch, key) -> ((loss, extras), gradient)`."""
    return jax.jit(
        jax.value_and_grad(functools.partial(reward_loss, model=cfg), has_aux=True)
    )


def make_case(K: int) -> tuple[RankingBatch, WeightedRankings]:
    """Rankings of K full-length responses to each of B prompts; and their weights."""
    rng = np.random.default_rng(0)
    rankings = RankingBatch(
        prompts=rng.integers(0, V, (B, P)).astype(np.int32),
        prompt_lengths=np.full((B,), P, np.int32),
        responses=rng.integers(0, V, (B, K, R)).astype(np.int32),
        response_lengths=np.full((B, K), R, np.int32),
        ranks=np.tile(np.arange(1, K + 1, dtype=np.int32), (B, 1)),
    )
    weights = np.full((B,), 1 / B, np.float32)
    return rankings, WeightedRankings(rankings, weights)  # type: ignore[arg-type]


def against_pairs(K: int, goal: float, repeats: int) -> list[Row]:
    """Loss and gradient, against all K (K - 1) / 2 pairs in transformers."""
    torch, _ = import_torch()
    cfg, params = make_model()
    rankings, batch = make_case(K)
    grad, key = compiled_grad(cfg), jax.random.key(0)
    model = hf_gpt2(params["transformer"], cfg).train().transformer
    w = torch.tensor(np.asarray(params["head"]["w"]), device=model.device)
    w.requires_grad_()
    prompts = np.repeat(np.asarray(rankings.prompts)[:, None], K, axis=1)
    rows = np.concatenate([prompts, rankings.responses], axis=2)  # [B, K, P + R]
    rows = torch.tensor(rows, dtype=torch.long, device=model.device)
    better, worse = np.triu_indices(K, 1)

    def ours():
        return grad(params, batch, key)

    def theirs():
        both = torch.cat([rows[:, better], rows[:, worse]]).reshape(-1, P + R)
        hidden = model(both, use_cache=False).last_hidden_state[:, -1]
        scores = (hidden @ w).reshape(2, -1)
        loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1]).mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        w.grad = None
        return float(loss.detach())

    case = f"reward_model/K{K}"
    check_close(case, float(ours()[0][0]), theirs())
    return [
        duel(case, ours, "transformers GPT-2 on pairs", theirs, max(2, repeats), goal)
    ]


def token_law(K: int, repeats: int) -> list[Row]:
    """The gain over K sequences of our own, as a share of K (P + R) / (P + K R)."""
    cfg, params = make_model()
    rankings, batch = make_case(K)

    def separate(params, batch, key):
        prompts = jnp.repeat(rankings.prompts[:, None], K, axis=1)
        rows = jnp.concatenate([prompts, rankings.responses], axis=2)
        hidden = forward(params["transformer"], rows.reshape(-1, P + R), cfg)[:, -1]
        scores = scalar_head(params["head"], hidden).reshape(B, K)
        return jnp.sum(ranking_loss(scores, rankings.ranks) * batch.weights), {}

    key = jax.random.key(0)
    sides = compiled_grad(cfg), jax.jit(jax.value_and_grad(separate, has_aux=True))
    ours, theirs = (functools.partial(f, params, batch, key) for f in sides)
    check_close("reward_model/token_law", float(ours()[0][0]), float(theirs()[0][0]))
    row = duel("reward_model/token_law", ours, "K sequences of ours", theirs, repeats)
    law = K * (P + R) / (P + K * R)
    return [
        Row(
            row.case,
            f"the law K (P + R) / (P + K R) = {law:.2f}, K = {K}",
            row.ratio / law,
            row.low / law,
            row.high / law,
            "of the law",
            0.95,
            row.note,
        )
    ]


def varying(repeats: int) -> list[Row]:
    """Sixteen rankings of 4 to 9 responses whose lengths vary, packed and padded."""
    cfg, params = make_model()
    rng, size = np.random.default_rng(0), 16

    def ranking() -> EncodedRanking:
        K = int(rng.integers(4, 10))
        lengths = np.minimum(1 + rng.geometric([3 / P] + [3 / R] * K), [P] + [R] * K)
        prompt, *responses = (rng.integers(0, V, n).astype(np.int32) for n in lengths)
        record = Ranking("", ("",) * K, (*range(1, K + 1),), (True,) * K)
        return EncodedRanking(record, prompt, responses)

    limits = P, R
    kept = [ranking() for _ in range(size)]
    rankings = EncodedRankings(kept, size, 0, 0, limits, limits, pad_id=0)
    padded = ranking_batches(rankings, size, seed=0)(0)
    batches = packed_ranking_batches(rankings, size, seed=0, num_epochs=1)
    assert batches is not None, "packing these saves two thirds"
    packed = batches(0)
    grad, key = compiled_grad(cfg), jax.random.key(0)

    def side(batch):
        return functools.partial(grad, params, weighted(batch, size), key)

    case, (ours, theirs) = "reward_model/varying", map(side, (packed, padded))
    check_close(case, float(ours()[0][0]), float(theirs()[0][0]))
    width = padded.prompts.shape[1] - 1
    width += padded.ranks.shape[1] * (padded.responses.shape[2] + 1)
    rows, T = packed.tokens.shape
    note = f"{rows} rows of {T} tokens against {size} of {width}"
    return [duel(case, ours, "ours, padded", theirs, repeats, note=note)]
