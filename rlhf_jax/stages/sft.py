"""Supervised fine-tuning on demonstrations: pre-training's loss on other batches."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax.data.batches import (
    Batches,
    TokenBatch,
    demonstration_batches,
    put_loss_first,
)
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.objectives.language_modeling import loss_chunks
from rlhf_jax.stages.common import (
    Context,
    Model,
    check_compatible,
    load_model,
    save_model,
)
from rlhf_jax.stages.pretrain import corpus_batches, lm_loss, make_heldout_loss
from rlhf_jax.stages.sampler import Sampler, fitting, reward_measure
from rlhf_jax.training.activations import on_accelerator, text_row
from rlhf_jax.training.checkpoint import load_params, save_params
from rlhf_jax.training.loop import LoopConfig, run_loop, tracked
from rlhf_jax.training.mesh import (
    jit_step,
    num_local_shards,
    pad_rows,
    replicas,
    state_sharding,
)
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.room import require_room_to_train
from rlhf_jax.training.run_dir import RunDirError
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning. "IG" marks what InstructGPT published (appendix C)."""

    num_epochs: int = 16
    """Passes over the demonstrations (IG: 16; 2 for the initialisation of PPO), each of
    as many whole batches as hold them all."""
    batch_size: int = 32
    """Demonstrations per update, however many share a row (IG: 32; 8 for 175B)."""
    seq_len: int = 2048
    """Longest prompt + response in tokens (IG: 2048); longer ones are dropped."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens the loss is on (not published by IG)."""
    dropout: float = 0.2
    """Residual dropout (IG: 0.2)."""
    pretrain_fraction: float = 0.0
    """Weight of the loss on pre-training text; a row of it counts as a demonstration,
    so 0.1 adds 4 rows to 32 (IG: 0.1 for the initialisation of PPO; by rows or by
    tokens is not published)."""
    num_microbatches: int = 1
    """Sequential parts of each batch's rows, to save memory; short demonstrations share
    rows, and parts beyond the rows cost time for nothing."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9.65e-6)
    """AdamW, cosine to 10 %, no warm-up (IG: 9.65e-6 for 1.3B and 6B)."""
    checkpoint_every: int = 200
    """Updates between checkpoints; held-out loss is measured after every epoch."""

    def __post_init__(self):
        if self.checkpoint_every < 1:
            raise ValueError(
                f"checkpoint_every must be at least 1, got {self.checkpoint_every}"
            )
        if not 0.0 <= self.pretrain_fraction < 1.0:
            raise ValueError(
                f"pretrain_fraction must be in [0, 1), got {self.pretrain_fraction}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def num_pretrain_rows(self) -> int:
        """Pre-training rows added to each batch."""
        f = self.pretrain_fraction
        return 0 if f == 0.0 else max(1, round(self.batch_size * f / (1.0 - f)))


def mixed_batches(
    demonstrations: Callable[[int], TokenBatch],
    pretraining: Callable[[int], TokenBatch],
    fraction: float,
) -> Callable[[int], TokenBatch]:
    """Batches whose loss is (1 - fraction) L_demonstrations + fraction L_pretraining.

    Args:
        demonstrations, pretraining: step -> rows [B, T], [B', T], weights summing to 1.
        fraction: weight of the pre-training loss.

    Returns:
        step -> rows [B + B', T], weights summing to 1.
    """

    def batch(step: int) -> TokenBatch:
        parts = [demonstrations(step), pretraining(step)]
        if parts[0].documents is not None:
            whole = np.zeros_like(parts[1].tokens)  # rows of text are not shared
            parts[1] = parts[1].replace(documents=whole)  # type: ignore
        scaled = [
            part.replace(weights=np.float32(w) * part.weights)  # type: ignore
            for part, w in zip(parts, (1.0 - fraction, fraction), strict=True)
        ]
        return jax.tree.map(lambda *xs: np.concatenate(xs), *scaled)

    return batch


def _demonstrations(
    cfg: SFTConfig,
    ctx: Context,
    base: Model,
    split: Literal["train", "valid"],
    seed: int | None,
    num_epochs: int,
    width: int | None = None,
) -> Batches[TokenBatch]:
    return demonstration_batches(
        ctx.inputs.read("demonstrations", split),
        base.tokenizer,
        base.format,
        cfg.batch_size,
        cfg.seq_len,
        seed,
        loss_on=cfg.loss_on,
        shard=ctx.shard,
        num_epochs=num_epochs,
        width=width,
    )


def training_batches(
    cfg: SFTConfig, ctx: Context, base: Model, name: str
) -> tuple[Batches[TokenBatch], Callable[[int], TokenBatch]]:
    """Demonstrations, and batches of them with what text is mixed in.

    Args:
        cfg: of the stage.
        ctx: the run.
        base: the pre-trained model.
        name: of the stage.

    Returns:
        step -> rows [B, T] of demonstrations; step -> these and rows of text, weights
        summing to 1.
    """
    mixed = cfg.num_pretrain_rows > 0
    width = cfg.seq_len if mixed else None  # of the text beside them
    seed = ctx.data_seed(name)
    train = _demonstrations(cfg, ctx, base, "train", seed, cfg.num_epochs, width)
    if not mixed:
        return train, train
    text = corpus_batches(
        ctx,
        base.tokenizer,
        "train",
        cfg.num_pretrain_rows,
        cfg.seq_len,
        ctx.data_seed(f"{name}/pretrain"),
    )
    return train, mixed_batches(train, text, cfg.pretrain_fraction)


def run(cfg: SFTConfig, ctx: Context, name: str = "sft") -> None:
    """Fine-tunes RUN/pretrain on the demonstrations into RUN/`name`.

    The parameters of every epoch are kept in RUN/`name`/epochs; `params` is the last
    epoch until `select` chooses another by reward.
    """
    stage, parent = ctx.stage(name), ctx.stage("pretrain")
    purposes = [("demonstrations", "train"), ("demonstrations", "valid")]
    if cfg.num_pretrain_rows:
        purposes.append(("corpus", "train"))
    sources = ctx.inputs.fingerprint(*purposes)  # type: ignore[arg-type]
    made_by = {name: cfg, "seed": ctx.seed}
    stage.open(name, made_by, sources, {"pretrain": parent})
    if stage.done:
        return
    base = load_model(parent, ctx.mesh, "language_model")
    model = dataclasses.replace(base.cfg, dropout=cfg.dropout)

    train, batches = training_batches(cfg, ctx, base, name)
    valid = _demonstrations(cfg, ctx, base, "valid", None, 1)
    shards, parts = num_local_shards(ctx.mesh), cfg.num_microbatches

    # devices along tensor share the head's vocabulary: they meet for every chunk of it
    ordered = cfg.loss_on == "response" and ctx.mesh.shape["tensor"] == 1

    def read(step: int) -> TokenBatch:
        batch = pad_rows(batches(step), shards * parts)
        return put_loss_first(batch, shards, parts) if ordered else batch

    first = read(0)
    rows, length = first.tokens.shape
    rows *= jax.process_count()
    if first.documents is not None and jax.process_index() == 0:
        text = cfg.num_pretrain_rows
        beside = f" and {text} rows of text" if text else ""
        held = f"{cfg.batch_size} demonstrations{beside} in {rows} rows"
        print(f"{name}: {held} of {length} tokens", file=sys.stderr)
    batch = (rows, cfg.num_microbatches)
    row, lengths = text_row(length, on_accelerator()), (f"{name}.seq_len",)
    if first.loss_first is not None:
        chunks = loss_chunks(first.loss_first.shape[1])
        row = dataclasses.replace(row, logits=-(-length // chunks))
    require_room_to_train(name, model, row, *batch, lengths, ctx.mesh)
    heldout_loss = make_heldout_loss(base.cfg, valid, ctx.mesh)
    num_steps = cfg.num_epochs * train.steps_per_epoch

    key = ctx.key(name)
    sharding = state_sharding(
        ctx.mesh, jax.eval_shape(lambda: init_state(base.params, key))
    )
    state = jax.jit(init_state, out_shardings=sharding)(base.params, key)
    scalars = cfg.optimizer.scalars()
    step = make_train_step(
        functools.partial(lm_loss, model=model),
        cfg.optimizer,
        num_steps,
        cfg.num_microbatches,
        mesh=None if model.dropout else replicas(ctx.mesh),
    )
    compiled = jit_step(step, ctx.mesh, sharding)

    def evaluate(state: Any, step: int) -> dict[str, float]:
        epoch, rest = divmod(step, train.steps_per_epoch)
        if epoch and not rest:
            save_params(stage.path / "epochs" / f"{epoch:02d}", state.params)
        return {"heldout/loss": heldout_loss(state.params)}

    state = run_loop(
        name=name,
        directory=stage.path,
        step_fn=compiled,
        rest=(scalars,),
        state=state,
        batches=read,
        num_steps=num_steps,
        mesh=ctx.mesh,
        cfg=LoopConfig(
            checkpoint_every=cfg.checkpoint_every, eval_every=train.steps_per_epoch
        ),
        evaluate=evaluate,
        profile=ctx.profile,
    )
    save_model(stage, dataclasses.replace(base, params=state.params))
    stage.finish(
        {
            "heldout_loss": heldout_loss(state.params),
            "num_steps": num_steps,
            "num_demonstrations": train.num_examples,
            "num_dropped": train.num_dropped,
            "num_dropped_heldout": valid.num_dropped,
        }
    )


def select(cfg: SFTConfig, ctx: Context, sampling: Sampling) -> None:
    """Chooses the epoch of RUN/sft by the reward of its samples, as InstructGPT did.

    Samples a response to each validation prompt from the parameters of every epoch,
    scores them by RUN/reward_model, and writes the best epoch to RUN/sft_selected.

    Args:
        cfg: of the SFT stage.
        ctx: the run.
        sampling: contract of the samples.

    Source: Ouyang et al. 2022, section 3.5 and appendix C.1.
    """
    stage = ctx.stage("sft_selected")
    parents = {"sft": ctx.stage("sft"), "reward_model": ctx.stage("reward_model")}
    sources = ctx.inputs.fingerprint(("demonstrations", "valid"))
    made_by = {"evaluate.sampling": sampling, "seed": ctx.seed}
    stage.open("sft_selected", made_by, sources, parents)
    if stage.done:
        return
    model = load_model(parents["sft"], ctx.mesh, "language_model")
    reward = load_model(parents["reward_model"], ctx.mesh, "reward_model")
    check_compatible("sft", model, "reward_model", reward)
    records = ctx.inputs.read("demonstrations", "valid")
    prompt_len = min(model.cfg.max_len, cfg.seq_len) - sampling.response_len
    prompts = fitting([record.prompt for record in records], model, prompt_len)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        model.params,
    )
    sampler = Sampler(model, sampling, prompt_len, 64, ctx)
    measure = reward_measure(reward, ctx.mesh)
    rewards = {}
    best: tuple[float, Any] | None = None
    epochs = sorted((parents["sft"].path / "epochs").iterdir())
    for path in tracked("sft_selected", epochs):
        params = load_params(path, like)
        _, values = sampler.measured(
            params, prompts, ctx.key("sft_selected"), {"reward": measure}
        )
        rewards[path.name] = float(values["reward"].mean())
        if best is None or rewards[path.name] > best[0]:
            best = (rewards[path.name], params)
    if best is None:
        raise RunDirError(f"{parents['sft'].path}/epochs is empty; run sft again")
    save_model(stage, dataclasses.replace(model, params=best[1]))
    stage.finish({"reward_by_epoch": rewards, "reward": best[0]})
