"""Held-out loss is the mean over every held-out token; a run has one tokenizer."""

import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import ppo_case as case
from letters import LETTERS

from rlhf_jax.data.batches import packed_batches
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.stages.common import Context, Model, check_compatible, init_model
from rlhf_jax.stages.pretrain import (
    PretrainConfig,
    TokenizerConfig,
    get_tokenizer,
    lm_loss,
    make_heldout_loss,
)
from rlhf_jax.training.mesh import MeshConfig

T = 6

DOCUMENTS = ["abc", "dddddd", "ihgfedcba", "", "bc" * 20]


def test_held_out_loss_is_the_mean_over_every_token():
    batches = packed_batches(DOCUMENTS, LETTERS, 8, T, None)
    ids = np.concatenate([[*LETTERS.encode(d), 0] for d in DOCUMENTS]).astype(int)
    assert (len(ids) - 1) % T and batches.steps_per_epoch == 2  # ragged at both ends
    params = case.transformer(0)
    nll = []
    for start in range(0, len(ids) - 1, T):
        window = ids[start : start + T + 1]
        hidden = oracle.hidden_states(params, window[:-1], "pre")
        for state, target in zip(hidden, window[1:], strict=True):
            logits = np.asarray(params["embed"], np.float64) @ state
            nll.append(-oracle.logprob_and_entropy(logits, target)[0])
    assert len(nll) == len(ids) - 1
    loss = make_heldout_loss(case.MODEL, batches, MeshConfig().make())
    np.testing.assert_allclose(loss(params), np.mean(nll), rtol=1e-5)
    first = make_heldout_loss(case.MODEL, batches, MeshConfig().make(), 1)
    np.testing.assert_allclose(first(params), np.mean(nll[: 8 * T]), rtol=1e-5)


def test_a_fresh_model_knows_nothing():
    """Its loss is log V."""
    make = case.compiled(functools.partial(init_params, cfg=case.MODEL))
    params = make(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, packed_batches(DOCUMENTS, LETTERS, 8, T, 0)(0))
    loss, _ = case.compiled(functools.partial(lm_loss, model=case.MODEL))(
        params, batch, jax.random.key(0)
    )
    np.testing.assert_allclose(loss, np.log(case.V), atol=0.02)


def test_the_tokenizer_is_trained_once_and_then_read(tmp_path):
    words = ["the cat sat on a mat", "a dog ran to the cat"] * 20
    reads = []

    def read(purpose, split):
        reads.append((purpose, split))
        return words

    inputs = types.SimpleNamespace(read=read)
    ctx = Context(tmp_path, inputs, None, 0)  # type: ignore[arg-type]
    (tmp_path / "pretrain").mkdir()  # as `StageDir.open` does
    first = get_tokenizer(TokenizerConfig(vocab_size=280), ctx)
    again = get_tokenizer(TokenizerConfig(vocab_size=280), ctx)
    assert reads == [("corpus", "train")]
    assert first.fingerprint == again.fingerprint
    path = tmp_path / "pretrain" / "tokenizer.model"
    other = Context(tmp_path / "other", inputs, None, 0)  # type: ignore[arg-type]
    given = get_tokenizer(TokenizerConfig(model=path), other)
    assert given.fingerprint == first.fingerprint and len(reads) == 1
    model = Model("language_model", None, case.MODEL, first, None)  # type: ignore[arg-type]
    check_compatible("a", model, "b", model)


def test_keys_and_seeds_are_of_the_stage_and_the_run():
    def context(seed):
        return Context(Path("x"), None, None, seed)  # type: ignore[arg-type]

    names = ("pretrain", "sft", "ppo")
    keys = {
        tuple(jax.random.key_data(context(seed).key(name)).tolist())
        for seed in (0, 1)
        for name in names
    }
    seeds = {context(seed).data_seed(name) for seed in (0, 1) for name in names}
    assert len(keys) == len(seeds) == 6
    assert context(0).data_seed("sft") == context(0).data_seed("sft")


def test_a_reward_model_is_a_transformer_and_a_head():
    shapes = jax.eval_shape(
        lambda key: init_model("reward_model", key, case.MODEL), jax.random.key(0)
    )
    assert set(shapes) == {"transformer", "head"}
    alone = jax.eval_shape(
        lambda key: init_model("language_model", key, case.MODEL), jax.random.key(0)
    )
    assert jax.tree.structure(shapes["transformer"]) == jax.tree.structure(alone)


def test_the_defaults_are_gpt3s():
    """Brown et al. 2020, appendix B."""
    cfg = PretrainConfig().optimizer
    assert (cfg.learning_rate, cfg.weight_decay, cfg.max_grad_norm) == (6e-4, 0.1, 1.0)
    assert (cfg.b1, cfg.b2, cfg.eps) == (0.9, 0.95, 1e-8)
    assert cfg.schedule == "cosine" and cfg.final_fraction == 0.1
