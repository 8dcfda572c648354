"""SFT is next-token learning on responses; dropout is for training only."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import ppo_case as case
import pytest
from letters import FORM, LETTERS
from meshes import one_update

from rlhf_jax.data.batches import TokenBatch, demonstration_batches
from rlhf_jax.data.records import Demonstration
from rlhf_jax.nn.transformer import forward
from rlhf_jax.stages.common import Context, Model
from rlhf_jax.stages.pretrain import lm_loss, sum_logprobs
from rlhf_jax.stages.sft import SFTConfig, mixed_batches, training_batches

DEMONSTRATIONS = [Demonstration("ab", "cd"), Demonstration("f", "g")]


SOME = [Demonstration("ab"[: i % 3], "cdefg"[: i % 2]) for i in range(6)]


def batches_of(demonstrations, loss_on="response", num_epochs=None):
    """All of them in one batch, 7 tokens a row."""
    size = len(demonstrations)
    how = {"loss_on": loss_on, "num_epochs": num_epochs}
    return demonstration_batches(demonstrations, LETTERS, FORM, size, 7, None, **how)


def batch_of(*args, **kwargs):
    return jax.tree.map(jnp.asarray, batches_of(*args, **kwargs)(0))


@functools.cache
def loss_fn():
    return case.compiled(functools.partial(lm_loss, model=case.MODEL))


def test_the_loss_is_the_mean_over_response_tokens_and_their_end():
    params, batch = case.transformer(0), batch_of(DEMONSTRATIONS)
    loss, extras = loss_fn()(params, batch, jax.random.key(0))
    assert extras == {}
    states = case.compiled(lambda tokens: forward(params, tokens, case.MODEL))
    nll = []
    for d in DEMONSTRATIONS:
        ids = np.array([*LETTERS.encode(f"{d.prompt}:{d.response}"), 0], np.int32)
        hidden = states(jnp.asarray(ids[None, :-1]))[0]
        logprobs = jax.nn.log_softmax(hidden @ params["embed"].T)
        first = len(d.prompt)  # the state after the suffix decides the first token
        nll += [-float(logprobs[t, ids[t + 1]]) for t in range(first, len(ids) - 1)]
    assert len(nll) == 3 + 2
    np.testing.assert_allclose(loss, np.mean(nll), rtol=1e-5)


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("document_end", [None, 0])
def test_sharing_rows_changes_neither_the_loss_nor_its_gradient(loss_on, document_end):
    model = dataclasses.replace(case.MODEL, document_end=document_end)
    loss = case.compiled(
        jax.value_and_grad(functools.partial(lm_loss, model=model), has_aux=True)
    )
    sums = case.compiled(functools.partial(sum_logprobs, model=model))
    params, key = case.transformer(0), jax.random.key(0)
    alone, shared = (batch_of(SOME, loss_on, epochs) for epochs in (None, 1))
    assert (len(alone.tokens), len(shared.tokens)) == (6, 3)
    (expected, _), expected_grad = loss(params, alone, key)
    (found, _), grad = loss(params, shared, key)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    case.assert_trees_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    for a, b in zip(sums(params, shared), sums(params, alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_targets_of_the_prompt_carry_no_loss():
    params, batch = case.transformer(0), batch_of(DEMONSTRATIONS)
    garbage = jnp.where(batch.weights > 0, batch.targets, 7)
    loss, _ = loss_fn()(params, batch, jax.random.key(0))
    other, _ = loss_fn()(params, batch.replace(targets=garbage), jax.random.key(0))
    assert float(loss) == float(other)
    everything, _ = loss_fn()(
        params, batch_of(DEMONSTRATIONS, "all"), jax.random.key(0)
    )
    assert float(everything) != float(loss)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    params, batch = case.transformer(0), batch_of(DEMONSTRATIONS)
    model = dataclasses.replace(case.MODEL, dropout=0.5)
    dropped = case.compiled(functools.partial(lm_loss, model=model))
    losses = [float(dropped(params, batch, jax.random.key(s))[0]) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    sums = case.compiled(functools.partial(sum_logprobs, model=model))
    total, count = sums(params, batch)
    plain, _ = loss_fn()(params, batch, jax.random.key(0))
    np.testing.assert_allclose(-total / count, plain, rtol=1e-5)
    assert float(count) == 5


# ----------------------------------------------------------- mixed-in pre-training


def text_batch(step, rows=3):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, case.V, (rows, 7)).astype(np.int32)
    weights = np.full((rows, 7), 1 / (7 * rows), np.float32)
    return TokenBatch(tokens, tokens[:, ::-1].copy(), weights)


def test_mixing_weighs_both_losses_by_the_fraction():
    demonstrations = jax.tree.map(np.asarray, batch_of(DEMONSTRATIONS))
    mixed = mixed_batches(lambda step: demonstrations, text_batch, 0.25)(5)
    assert mixed.tokens.shape == (5, 7)
    np.testing.assert_allclose(mixed.weights.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(mixed.weights[2:].sum(), 0.25, rtol=1e-6)
    params, key = case.transformer(0), jax.random.key(0)

    def loss(batch):
        return loss_fn()(params, jax.tree.map(jnp.asarray, batch), key)

    (both, _), (first, _), (second, _) = map(
        loss, (mixed, demonstrations, text_batch(5))
    )
    np.testing.assert_allclose(both, 0.75 * first + 0.25 * second, rtol=1e-5)


@pytest.mark.parametrize("document_end", [None, 3])
def test_text_beside_rows_that_are_shared_is_read_as_in_pre_training(document_end):
    model = dataclasses.replace(case.MODEL, document_end=document_end)
    loss = case.compiled(functools.partial(lm_loss, model=model))
    text = text_batch(5)
    assert (text.tokens[:, 1:-1] == 3).any()  # ends of documents, if they are any
    demonstrations = batches_of(SOME, num_epochs=1)(0)
    assert demonstrations.documents is not None
    mixed = mixed_batches(lambda step: demonstrations, text_batch, 0.25)
    params, key = case.transformer(0), jax.random.key(0)
    both, first, second = (
        loss(params, jax.tree.map(jnp.asarray, batch), key)[0]
        for batch in (mixed(5), demonstrations, text)
    )
    np.testing.assert_allclose(both, 0.75 * first + 0.25 * second, rtol=1e-5)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "others",
    [
        [{"num_microbatches": 2}, {"data": 4, "fsdp": 2}],
        pytest.param(
            [
                *({"data": 8}, {"fsdp": 8}, {"num_microbatches": 8}),
                {"data": 2, "fsdp": 2, "tensor": 2, "num_microbatches": 2},
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "more"],
)
def test_an_update_knows_neither_devices_nor_microbatches(others, share):
    """Rows of ragged responses beside rows of text."""
    ragged = [Demonstration("ab"[: 1 + i % 2], "cdefg"[: 1 + i]) for i in range(5)]
    some = SOME[3:] + ragged if share else ragged  # fill the rows, or have their own
    demonstrations = batches_of(some, num_epochs=1 if share else None)(0)
    assert len(demonstrations.tokens) == 5 and share == (
        demonstrations.documents is not None
    )
    batch = mixed_batches(lambda step: demonstrations, text_batch, 0.25)(5)
    loss = functools.partial(lm_loss, model=case.MODEL)
    expected = one_update(loss, case.transformer(0), batch)
    for other in others:
        case.assert_trees_close(
            one_update(loss, case.transformer(0), batch, **other),
            expected,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize(("fraction", "shape"), [(0.0, (1, 64)), (0.25, (3, 100))])
def test_the_stage_reads_shared_rows_as_wide_as_the_text_beside_them(
    tmp_path, monkeypatch, fraction, shape
):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    data = {"demonstrations": SOME, "corpus": ["abcd" * 40, "efg" * 50]}
    inputs = types.SimpleNamespace(read=lambda purpose, split: data[purpose])
    ctx = Context(tmp_path, inputs, None, 0)  # type: ignore[arg-type]
    base = Model("language_model", None, case.MODEL, LETTERS, FORM)  # type: ignore[arg-type]
    cfg = SFTConfig(num_epochs=2, batch_size=6, seq_len=100, pretrain_fraction=fraction)
    train, batches = training_batches(cfg, ctx, base, "sft")
    assert (train.num_examples, train.steps_per_epoch) == (6, 1)
    for step in range(2):
        batch = batches(step)
        assert batch.tokens.shape == shape
        assert [len(set(row)) for row in batch.documents] == [6, 1, 1][: shape[0]]
        np.testing.assert_allclose(batch.weights[1:].sum(), fraction, atol=1e-6)


def test_mixing_asks_both_for_the_same_step():
    asked = []

    def batches(name):
        return lambda step: asked.append((name, step)) or text_batch(step)

    mixed_batches(batches("a"), batches("b"), 0.1)(9)
    assert asked == [("a", 9), ("b", 9)]


@pytest.mark.parametrize(
    ("fraction", "rows"), [(0.0, 0), (0.1, 4), (0.5, 32), (0.001, 1)]
)
def test_pre_training_rows_are_the_fractions_share_of_the_batch(fraction, rows):
    cfg = SFTConfig(batch_size=32, pretrain_fraction=fraction)
    assert cfg.num_pretrain_rows == rows


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_outside_0_1_is_refused(fraction):
    with pytest.raises(ValueError, match="pretrain_fraction"):
        SFTConfig(pretrain_fraction=fraction)


def test_the_defaults_are_instructgpts():
    """Ouyang et al. 2022, appendix C.1."""
    cfg = SFTConfig()
    assert (cfg.num_epochs, cfg.batch_size, cfg.dropout) == (16, 32, 0.2)
    assert cfg.optimizer.learning_rate == 9.65e-6
    assert cfg.optimizer.warmup_steps == 0 and cfg.optimizer.final_fraction == 0.1
