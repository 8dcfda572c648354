"""SFT computes the head where the loss is; nothing else changes."""

import functools
import types

import jax
import numpy as np
import ppo_case as case
import pytest
from meshes import one_update, some_devices

from rlhf_jax.data.batches import TokenBatch, put_loss_first
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.records import Demonstration
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.objectives import language_modeling
from rlhf_jax.stages import sft
from rlhf_jax.stages.common import Context, Model, load_model, save_model
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.stages.sft import SFTConfig
from rlhf_jax.training.optimizers import OptimizerConfig

ROWS, T = 16, 7


def ragged() -> TokenBatch:
    """As of demonstrations: a stretch of each row has a loss, of some rows none."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, case.V, (ROWS, T + 1)).astype(np.int32)
    start, length = rng.integers(0, 4, (ROWS, 1)), rng.integers(0, 5, (ROWS, 1))
    mask = (np.arange(T) >= start) & (np.arange(T) < start + length)
    weights = (mask / mask.sum()).astype(np.float32)
    return TokenBatch(ids[:, :-1], ids[:, 1:], weights)


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_each_part_is_of_a_device_and_a_microbatch_with_its_losses_first(shards, parts):
    plain = ragged()
    made = put_loss_first(plain, shards, parts)
    jax.tree.map(np.testing.assert_array_equal, made.replace(loss_first=None), plain)  # type: ignore
    assert made.loss_first.shape == (shards * parts, ROWS * T // (shards * parts))
    for part, order in enumerate(made.loss_first):
        device, microbatch = divmod(part, parts)
        rows = np.arange(ROWS).reshape(shards, -1)[device, microbatch::parts]
        found = [(rows[place // T], place % T) for place in order]
        everywhere = [(r, t) for r in rows for t in range(T)]
        with_loss = [at for at in everywhere if plain.weights[at]]
        assert found[: len(with_loss)] == with_loss
        assert sorted(found) == everywhere


@pytest.fixture
def in_chunks(monkeypatch):
    """Chunks of the head as short as there are."""
    monkeypatch.setattr(language_modeling, "MIN_CHUNK", 1)


LOSS = functools.partial(lm_loss, model=case.MODEL)


@functools.cache
def expected_update():
    return one_update(LOSS, case.transformer(0), ragged())


@pytest.mark.parametrize(
    "how",
    [
        {"num_microbatches": 2},
        {"data": 4, "fsdp": 2},
        {"data": 2, "num_microbatches": 2},
        {"data": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8, "num_microbatches": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda how: " ".join(f"{name}{n}" for name, n in how.items()) or "alone",
)
def test_an_update_is_that_of_the_loss_at_all_positions(in_chunks, how):
    shards = how.get("data", 1) * how.get("fsdp", 1)
    batch = put_loss_first(ragged(), shards, how.get("num_microbatches", 1))
    found = one_update(LOSS, case.transformer(0), batch, **how)
    case.assert_trees_close(found, expected_update(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, random_params):
    """Runs the stage from one pre-trained model: `(M, devices) -> parameters`."""
    tokenizer = train_tokenizer(["the fox sees the hen " * 9], 290)
    cfg = tiny(vocab_size=tokenizer.vocab_size)
    shown = [
        Demonstration("the fox sees" * (i % 2), "hen " * (i % 3)) for i in range(8)
    ]
    inputs = types.SimpleNamespace(
        read=lambda purpose, split: shown, fingerprint=lambda *purposes: {}
    )

    def run(num_microbatches: int, devices: int):
        ctx = Context(
            tmp_path_factory.mktemp("run"),
            inputs,  # type: ignore[arg-type]
            some_devices(devices, 1),
            seed=0,
        )
        parent = ctx.stage("pretrain")
        parent.open("pretrain", {}, {}, {})
        base = Model(
            "language_model", random_params(cfg), cfg, tokenizer, PromptFormat()
        )
        save_model(parent, base)
        parent.finish({})
        stage = SFTConfig(
            num_epochs=1,
            batch_size=8,
            seq_len=24,
            dropout=0.0,
            num_microbatches=num_microbatches,
            optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3),
        )
        sft.run(stage, ctx)
        return load_model(ctx.stage("sft"), ctx.mesh, "language_model").params

    return run


def test_the_stage_cuts_its_batches_by_devices_and_microbatches(
    in_chunks, trained, monkeypatch
):
    parts = set()

    def seen(*args):
        batch = put_loss_first(*args)
        parts.add(batch.loss_first.shape[0])
        return batch

    alone = trained(1, 1)
    monkeypatch.setattr(sft, "put_loss_first", seen)
    cut = trained(2, 2)
    assert parts == {4}
    case.assert_trees_close(
        jax.device_get(cut), jax.device_get(alone), rtol=1e-4, atol=1e-5
    )


def test_any_order_gives_the_loss(in_chunks):
    batch = ragged()
    read = put_loss_first(batch).replace(loss_first=np.arange(ROWS * T)[None])  # type: ignore
    case.assert_trees_close(
        one_update(LOSS, case.transformer(0), read),
        expected_update(),
        rtol=1e-4,
        atol=1e-5,
    )
