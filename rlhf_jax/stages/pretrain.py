"""Pre-training: next-token prediction on packed documents."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import Batches, TokenBatch, packed_batches
from rlhf_jax.data.inputs import cache_dir
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.schedule import evenly
from rlhf_jax.data.tokenizer import Tokenizer, train_tokenizer
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.devices import sum_over_devices
from rlhf_jax.nn.transformer import forward
from rlhf_jax.objectives.language_modeling import next_token_head, token_logprobs
from rlhf_jax.objectives.masking import masked_sum
from rlhf_jax.stages.common import Context, Model, init_model, save_model
from rlhf_jax.training.activations import on_accelerator, text_row
from rlhf_jax.training.loop import LoopConfig, run_loop
from rlhf_jax.training.mesh import (
    jit_measure,
    jit_step,
    num_local_shards,
    pad_rows,
    replicas,
    shard_batch,
    state_sharding,
)
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.room import require_room_to_train
from rlhf_jax.training.run_dir import file_hash
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """SentencePiece BPE with byte fallback, trained on the corpus unless given."""

    vocab_size: int = 50257
    """Tokens, special ones and 256 bytes included."""
    model: Path | None = None
    """A trained `.model` file to use instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-training of a GPT. Constants of GPT-3 (Brown et al. 2020, appendix B)."""

    model: TransformerConfig = TransformerConfig()
    """Shape of the model; its vocab_size is the tokenizer's."""
    num_steps: int = 10000
    """Updates."""
    batch_size: int = 512
    """Sequences per update."""
    seq_len: int = 1024
    """Tokens per sequence, T; documents are packed without gaps."""
    separate_documents: bool = False
    """Keep attention within each of the packed documents, in this stage and all later
    ones. GPT-3 did not; small models learn to read a prompt much sooner with it."""
    num_microbatches: int = 1
    """Sequential parts of each batch, to save memory; replicas cut no further than a
    row a device, with fsdp parts of fewer rows than devices cost time."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=6e-4, warmup_steps=700, weight_decay=0.1
    )
    """AdamW, cosine to 10 % (GPT-3 small: 6e-4, decay 0.1)."""
    eval_batches: int = 20
    """Held-out batches per evaluation."""
    loop: LoopConfig = LoopConfig()
    """How often to save and evaluate."""


def lm_loss(
    params: Any, batch: TokenBatch, key: Array, *, model: TransformerConfig
) -> tuple[Array, dict[str, Array]]:
    """Next-token loss of a batch: the loss of pre-training and of SFT.

    -sum_t w_t log p(y_t | x_<=t)

    Args:
        params: transformer.
        batch: tokens, targets and weights [B, T], the weights summing to 1 over the
            global batch.
        key: of dropout.
        model: shape; its `dropout` applies.

    Returns:
        Scalar in nats per token; no extras.
    """
    hidden = forward(params, batch.tokens, model, key, batch.documents)
    arrays = hidden, batch.targets, batch.weights

    def head(embedding, hidden, *of_tokens):
        return next_token_head(hidden, embedding, *of_tokens)

    if batch.loss_first is None:
        return head(params["embed"], *arrays), {}
    # each device stops where its rows have no more loss
    return sum_over_devices(head, params["embed"], *arrays, batch.loss_first), {}


def sum_logprobs(
    params: Any, batch: TokenBatch, *, model: TransformerConfig
) -> tuple[Array, Array]:
    """Summed log-probability of weighted targets [B, T] in nats, and their number."""
    hidden = forward(params, batch.tokens, model, documents=batch.documents)
    logprobs, _ = token_logprobs(hidden, params["embed"], batch.targets, lambda x: x)
    mask = (batch.weights > 0).astype(jnp.float32)
    return masked_sum(logprobs, mask), jnp.sum(mask)


def make_heldout_loss(
    model: TransformerConfig,
    batches: Batches,
    mesh: jax.sharding.Mesh,
    max_batches: int | None = None,
) -> Callable[[Any], float]:
    """Returns `params -> mean loss, nats per token` over held-out batches.

    Of more than `max_batches` those that are spread evenly over all.
    """
    sums = jit_measure(sum_logprobs, mesh, model=model)
    count = batches.steps_per_epoch
    steps = evenly(range(count), count if max_batches is None else max_batches)
    shards = num_local_shards(mesh)
    kept = [pad_rows(batches(step), shards) for step in steps]

    def heldout_loss(params: Any) -> float:
        totals = [sums(params, shard_batch(mesh, batch)) for batch in kept]
        table = np.asarray(jax.device_get(totals), np.float64)  # [batches, 2]
        logprob, tokens = table[:, 0].sum(), table[:, 1].sum()
        return float(-logprob / tokens)

    return heldout_loss


def get_tokenizer(cfg: TokenizerConfig, ctx: Context) -> Tokenizer:
    """The run's tokenizer: given, or trained once on the training corpus."""
    if cfg.model is not None:
        return Tokenizer.load(cfg.model)
    path = ctx.stage("pretrain").path / "tokenizer.model"
    if not path.exists():
        corpus = ctx.inputs.read("corpus", "train")
        train_tokenizer(corpus, cfg.vocab_size).save(path)
    return Tokenizer.load(path)


def heldout_rows() -> int:
    """Windows in a batch of held-out text: 8, or what the processes can share."""
    count = jax.process_count()
    return 8 if 8 % count == 0 else count


def corpus_batches(
    ctx: Context,
    tokenizer: Tokenizer,
    split: str,
    batch_size: int,
    seq_len: int,
    seed: int | None,
) -> Batches:
    """Packed windows of the corpus; `seed=None` reads them in order."""
    return packed_batches(
        ctx.inputs.read("corpus", split),  # type: ignore[arg-type]
        tokenizer,
        batch_size,
        seq_len,
        seed,
        shard=ctx.shard,
        cache_dir=cache_dir() / "tokens",
    )


def model_of_run(
    cfg: PretrainConfig, vocab_size: int, eos_id: int
) -> TransformerConfig:
    """The shape of the config with what it learns from the run's tokenizer."""
    document_end = eos_id if cfg.separate_documents else None
    return dataclasses.replace(
        cfg.model, vocab_size=vocab_size, document_end=document_end
    )


def run(cfg: PretrainConfig, tokenizer_cfg: TokenizerConfig, ctx: Context) -> None:
    """Pre-trains a model into RUN/pretrain, or goes on with it.

    Args:
        cfg: of this stage.
        tokenizer_cfg: how the run's tokenizer is made.
        ctx: the run.
    """
    stage = ctx.stage("pretrain")
    sources = ctx.inputs.fingerprint(("corpus", "train"), ("corpus", "valid"))
    vocab_size = tokenizer_cfg.vocab_size
    if tokenizer_cfg.model is not None:  # known by its content, wherever it lies
        vocab_size = Tokenizer.load(tokenizer_cfg.model).vocab_size
        sources["tokenizer"] = file_hash(tokenizer_cfg.model)
    described = dataclasses.replace(tokenizer_cfg, model=None, vocab_size=vocab_size)
    made_by = {"pretrain": cfg, "tokenizer": described, "seed": ctx.seed}
    stage.open("pretrain", made_by, sources, {})
    if stage.done:
        return
    planned = dataclasses.replace(cfg.model, vocab_size=vocab_size)
    row = text_row(cfg.seq_len, on_accelerator())
    batch, lengths = (cfg.batch_size, cfg.num_microbatches), ("pretrain.seq_len",)
    require_room_to_train("pretrain", planned, row, *batch, lengths, ctx.mesh)
    tokenizer = get_tokenizer(tokenizer_cfg, ctx)
    model = model_of_run(cfg, tokenizer.vocab_size, tokenizer.eos_id)
    batches = corpus_batches(
        ctx, tokenizer, "train", cfg.batch_size, cfg.seq_len, ctx.data_seed("pretrain")
    )
    heldout = corpus_batches(ctx, tokenizer, "valid", cfg.batch_size, cfg.seq_len, None)
    heldout_loss = make_heldout_loss(model, heldout, ctx.mesh, cfg.eval_batches)

    key = ctx.key("pretrain")
    make = lambda: init_state(  # noqa: E731
        init_model("language_model", jax.random.fold_in(key, 0), model),
        jax.random.fold_in(key, 1),
    )
    sharding = state_sharding(ctx.mesh, jax.eval_shape(make))
    state = jax.jit(make, out_shardings=sharding)()
    scalars = cfg.optimizer.scalars()
    step = make_train_step(
        functools.partial(lm_loss, model=model),
        cfg.optimizer,
        cfg.num_steps,
        cfg.num_microbatches,
        mesh=None if model.dropout else replicas(ctx.mesh),
    )
    compiled = jit_step(step, ctx.mesh, sharding)
    state = run_loop(
        name="pretrain",
        directory=stage.path,
        step_fn=compiled,
        rest=(scalars,),
        state=state,
        batches=batches,
        num_steps=cfg.num_steps,
        mesh=ctx.mesh,
        cfg=cfg.loop,
        evaluate=lambda state, _: {"heldout/loss": heldout_loss(state.params)},
        profile=ctx.profile,
    )
    final = heldout_loss(state.params)
    save_model(
        stage, Model("language_model", state.params, model, tokenizer, PromptFormat())
    )
    stage.finish(
        {
            "heldout_loss": final,
            "heldout_perplexity": float(np.exp(final)),
            "num_params": model.num_params,
        }
    )
