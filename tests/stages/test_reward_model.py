"""The reward model learns K-way rankings; its scores know nothing but their text."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import ppo_case as case
import pytest
from letters import FORM, LETTERS
from meshes import one_update

from rlhf_jax.data.packed_rankings import PackedRankings, packed_ranking_batches
from rlhf_jax.data.ranking_batches import RankingBatch, encode_rankings, ranking_batches
from rlhf_jax.data.records import DataError, Demonstration, Ranking
from rlhf_jax.stages.common import Context, Model
from rlhf_jax.stages.rankings import (
    RankingScorer,
    accuracy,
    fitting_demonstrations,
    score_demonstrations,
)
from rlhf_jax.stages.reward_model import (
    RewardModelConfig,
    WeightedRankings,
    center,
    reward_loss,
    training_batches,
    weighted,
)
from rlhf_jax.stages.scoring import response_scores
from rlhf_jax.training.mesh import MeshConfig
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

MODEL = dataclasses.replace(case.MODEL, max_len=24)
CFG = RewardModelConfig(batch_size=4, prompt_len=5, response_len=6, num_centering=8)


def ranking(prompt, responses, ranks, ended=None):
    ended = (True,) * len(responses) if ended is None else ended
    return Ranking(prompt, tuple(responses), tuple(ranks), tuple(ended))


RANKINGS = [
    ranking("ab", ["a", "bcd", "i"], [2, 1, 3]),
    ranking("c", ["fe", "a", "d", "dd"], [1, 2, 2, 3]),
    ranking("abcd", ["gg", "hhhhh"], [2, 1], (True, False)),
    ranking("i", ["e", "ee", "eee"], [3, 1, 1]),
]


@pytest.fixture(scope="module")
def params():
    value = case.scalar_model(1)
    rng = np.random.default_rng(0)
    table = jnp.asarray(0.3 * rng.normal(size=(MODEL.max_len, MODEL.model_dim)))
    table = table.astype(jnp.float32)
    return value | {"transformer": value["transformer"] | {"pos_embed": table}}


def padded(rankings, rows=4):
    encoded = encode_rankings(rankings, LETTERS, FORM, 5, 6)
    batch = ranking_batches(encoded, rows, None)(0)
    return WeightedRankings(
        rankings=jax.tree.map(jnp.asarray, batch), weights=jnp.full((rows,), 1 / rows)
    )


def packed(rankings, rows=4, multiple=1):
    """The same in rows that they share."""
    encoded = encode_rankings(rankings, LETTERS, FORM, 5, 6)
    batches = packed_ranking_batches(encoded, rows, 0, 1, multiple)
    assert batches is not None
    return weighted(batches(0), rows)


def slow_scores(params, ranking):
    """Each response alone, unpadded, in float64."""
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["head"])
    scores = []
    for text, ended in zip(ranking.responses, ranking.ended, strict=True):
        ids = [*LETTERS.encode(ranking.prompt + ":"), *LETTERS.encode(text)]
        ids = np.array(ids + [0] * ended)
        hidden = oracle.hidden_states(params["transformer"], ids, "pre")[-1]
        scores.append(hidden @ head["w"] + head["b"] - head["shift"])
    return np.array(scores)


@pytest.mark.parametrize("layout", [padded, packed])
def test_the_loss_of_text_equals_the_oracle(params, layout):
    loss, extras = case.compiled(functools.partial(reward_loss, model=MODEL))(
        params, layout(RANKINGS), jax.random.key(0)
    )
    scores = [slow_scores(params, r) for r in RANKINGS]
    ranks = [np.array(r.ranks) for r in RANKINGS]
    pairs = list(zip(scores, ranks, strict=True))
    np.testing.assert_allclose(
        loss, np.mean([oracle.ranking_loss(s, r) for s, r in pairs]), rtol=1e-4
    )
    np.testing.assert_allclose(
        extras["accuracy"], np.mean([oracle.ranking_accuracy(s, r) for s, r in pairs])
    )
    margins = [
        np.mean([s[i] - s[j] for i, j in oracle.ordered_pairs(r)]) for s, r in pairs
    ]
    np.testing.assert_allclose(extras["margin"], np.mean(margins), rtol=1e-3)


def test_a_zero_head_starts_at_log_2(params):
    blank = params | {"head": case.zero_head()}
    loss, _ = case.compiled(functools.partial(reward_loss, model=MODEL))(
        blank, padded(RANKINGS), jax.random.key(0)
    )
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_scores_know_neither_batch_mates_nor_padding(params):
    whole = padded(RANKINGS).rankings
    rng = np.random.default_rng(0)

    def garbage(tokens, lengths):
        behind = np.arange(tokens.shape[-1]) >= np.asarray(lengths)[..., None]
        return jnp.where(behind, rng.integers(0, case.V, tokens.shape), tokens)

    @case.compiled
    def scores(batch):
        return response_scores(
            params,
            batch.prompts,
            batch.prompt_lengths,
            batch.responses,
            batch.response_lengths,
            MODEL,
        )

    expected = scores(whole)
    dirty = whole.replace(
        prompts=garbage(whole.prompts, whole.prompt_lengths).astype(jnp.int32),
        responses=garbage(whole.responses, whole.response_lengths).astype(jnp.int32),
    )
    present = np.asarray(whole.ranks) > 0
    np.testing.assert_allclose(
        np.asarray(scores(dirty))[present], np.asarray(expected)[present], atol=1e-5
    )
    alone = jax.tree.map(lambda x: x[1:2], whole)
    np.testing.assert_allclose(scores(alone)[0], expected[1], atol=1e-5)
    turned = whole.replace(
        responses=whole.responses[:, ::-1],
        response_lengths=whole.response_lengths[:, ::-1],
    )
    np.testing.assert_allclose(
        np.asarray(scores(turned))[:, ::-1][present],
        np.asarray(expected)[present],
        atol=1e-5,
    )


def test_a_small_set_of_rankings_is_learned_perfectly(params):
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    step = case.compiled(
        make_train_step(functools.partial(reward_loss, model=MODEL), optimizer, 60)
    )
    state, batch = init_state(params, jax.random.key(0)), padded(RANKINGS)
    for _ in range(60):
        state, metrics = step(state, batch, optimizer.scalars())
    assert float(metrics["accuracy"]) == 1.0
    assert float(metrics["loss"]) < 0.1
    assert float(state.params["head"]["shift"]) == float(params["head"]["shift"])


MESHES = [
    {"num_microbatches": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 4, "fsdp": 2},
    {"data": 2, "num_microbatches": 2},
    {"tensor": 2},
    {"data": 2, "tensor": 2, "num_microbatches": 2},
    {"fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize(
    "others",
    [
        [("padded", MESHES[0]), ("packed", MESHES[1])],
        pytest.param(
            [("padded", mesh) for mesh in MESHES[1:]]
            + [("packed", mesh) for mesh in MESHES],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "more"],
)
def test_an_update_knows_neither_devices_nor_microbatches_nor_the_layout(
    params, others
):
    batch = jax.tree.map(
        lambda x: np.concatenate([x, x]), jax.device_get(padded(RANKINGS))
    )
    layouts = {
        "padded": batch.replace(weights=batch.weights / 2),
        "packed": packed(RANKINGS * 8, 32, multiple=8),  # with rows of padding
    }
    loss = functools.partial(reward_loss, model=MODEL)
    expected = one_update(loss, params, layouts["padded"])
    for layout, mesh in others:
        case.assert_trees_close(
            one_update(loss, params, layouts[layout], **mesh),
            expected,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.slow
def test_known_utilities_come_back_from_bradley_terry_choices(params):
    """P(i over j) = sigmoid(u_i - u_j), six responses: the scores are u + constant."""
    utilities = np.array([-1.5, -0.5, 0.0, 0.4, 1.0, 2.0])
    rng = np.random.default_rng(0)
    num_steps, B = 300, 256

    def batch():
        pairs = np.stack([rng.choice(6, 2, replace=False) for _ in range(B)])
        margin = utilities[pairs[:, 0]] - utilities[pairs[:, 1]]
        first_wins = rng.random(B) < 1 / (1 + np.exp(-margin))
        ones = np.ones((B, 2), np.int32)
        rankings = RankingBatch(
            prompts=np.ones((B, 1), np.int32),
            prompt_lengths=np.ones(B, np.int32),
            responses=pairs[:, :, None].astype(np.int32) + 2,
            response_lengths=ones,
            ranks=np.where(first_wins[:, None], [1, 2], [2, 1]).astype(np.int32),
        )
        return WeightedRankings(rankings, np.full(B, 1 / B, np.float32))

    optimizer = OptimizerConfig(learning_rate=1e-2)
    step = case.compiled(
        make_train_step(
            functools.partial(reward_loss, model=MODEL), optimizer, num_steps
        )
    )
    state = init_state(params, jax.random.key(0))
    for _ in range(num_steps):
        state, _ = step(state, batch(), optimizer.scalars())
    found = response_scores(
        state.params,
        jnp.ones((1, 1), jnp.int32),
        jnp.ones((1,), jnp.int32),
        jnp.arange(2, 8, dtype=jnp.int32)[None, :, None],
        jnp.ones((1, 6), jnp.int32),
        MODEL,
    )[0]
    found = np.asarray(found) - np.mean(found)
    np.testing.assert_allclose(found, utilities - utilities.mean(), atol=0.2)


# ------------------------------------------------------------- scoring whole sets


@pytest.fixture(scope="module")
def scorer():
    model = Model("reward_model", None, MODEL, LETTERS, FORM)  # type: ignore[arg-type]
    ctx = Context(Path("."), None, MeshConfig().make(), 0)  # type: ignore[arg-type]
    return RankingScorer(CFG, model, ctx)


def test_scores_of_many_rankings_come_back_in_order(params, scorer):
    many = [RANKINGS[i % 4] for i in range(11)]  # more than a batch of 8 devices
    encoded = scorer.encode(many)
    scores, lengths = scorer(params, encoded)
    assert encoded.records == many
    for ranking, found in zip(many, scores, strict=True):
        np.testing.assert_allclose(found, slow_scores(params, ranking), atol=1e-4)
    expected = [
        len(text) + ended
        for r in many
        for text, ended in zip(r.responses, r.ended, strict=True)
    ]
    np.testing.assert_array_equal(lengths, expected)


def test_what_does_not_fit_is_left_out_and_the_rest_stays_aligned(params, scorer):
    long = "a" * 6  # seven tokens with its end
    rankings = [
        ranking("ab", ["a", long, "i"], [2, 1, 3]),
        ranking("ab", ["a", long], [2, 1]),  # one response left
        ranking("abcde", ["a", "b"], [1, 2]),  # prompt of six tokens
        ranking("ab", ["a", "b", long], [1, 1, 2]),  # only a tie left
        RANKINGS[1],
    ]
    encoded = scorer.encode(rankings)
    scores, _ = scorer(params, encoded)
    assert encoded.records == [ranking("ab", ["a", "i"], [2, 3]), RANKINGS[1]]
    assert [len(s) for s in scores] == [2, 4]


def test_where_no_demonstration_fits_nothing_can_be_centred(scorer):
    long = [Demonstration("abcde", "a")]
    with pytest.raises(DataError, match="none of 1 fits"):
        fitting_demonstrations(scorer, long)


def test_centering_gives_demonstrations_mean_0(params, scorer):
    some = [Demonstration(p, r) for p, r in (("a", "bc"), ("b", "a"))] * 3
    long = Demonstration("a", "abcdefg")
    demonstrations = fitting_demonstrations(scorer, [long, *some])
    before = score_demonstrations(scorer, params, demonstrations)
    assert len(before) == 6 and abs(before.mean()) > 1e-3
    moved = center(params, before)
    after = score_demonstrations(scorer, moved, demonstrations)
    np.testing.assert_allclose(after.mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(after - before, after[0] - before[0], atol=1e-5)
    case.assert_trees_equal(moved["transformer"], params["transformer"])


@pytest.mark.parametrize("count", [2, 32])
def test_the_stage_packs_where_that_costs_less(count):
    """On eight devices 2 rankings leave most rows empty; weights sum to 1 both ways."""
    cfg = dataclasses.replace(CFG, batch_size=8 * count)
    ctx = Context(Path("."), None, MeshConfig().make(), 0)  # type: ignore[arg-type]
    encoded = encode_rankings(RANKINGS, LETTERS, FORM, 5, 6)
    batches, row, num_rows = training_batches(cfg, ctx, encoded, MODEL)
    batch = batches(0)
    assert isinstance(batch, PackedRankings) == (count == 32)
    weights = weighted(batch, cfg.batch_size).weights
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    assert len(weights) == num_rows and num_rows % 8 == 0
    if count == 32:
        assert (row.tokens, row.last) == (batch.tokens.shape[1], batch.last[0].size)
    short = dataclasses.replace(MODEL, max_len=8)  # "abcd:" and "hhhhh" are 10
    with pytest.raises(ValueError, match="10 tokens do not fit .*max_len 8"):
        training_batches(cfg, ctx, encoded, short)


def test_accuracy_counts_ordered_pairs_per_ranking():
    scores = [np.array([2.0, 1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)]
    assert accuracy(scores, [(1, 2, 3), (1, 2)]) == 0.5
    assert accuracy(scores[:1], [(1, 3, 2)]) == pytest.approx(2 / 3)


def test_the_defaults_are_instructgpts():
    """Ouyang et al. 2022, appendix C.2."""
    cfg = RewardModelConfig()
    assert (cfg.batch_size, cfg.num_epochs) == (64, 1)
    assert cfg.optimizer.learning_rate == 9e-6
    assert cfg.optimizer.schedule == "cosine" and cfg.optimizer.final_fraction == 0.1
