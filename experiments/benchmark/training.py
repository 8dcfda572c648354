"""Train steps: ours against transformers, and the head against full logits."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.peers import (
    hf_gpt2,
    hf_update,
    import_torch,
    torch_matmul_flops,
)
from experiments.benchmark.timing import (
    Row,
    check_close,
    duel,
    matmul_flops,
    seconds,
)
from rlhf_jax.data.batches import TokenBatch, demonstration_batches, put_loss_first
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.records import Demonstration
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.objectives import language_modeling
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

B, T, D, L = 8, 256, 256, 4


def model_config(vocab_size: int) -> TransformerConfig:
    """The model of most cases: 4 layers of 256, 4 heads."""
    return TransformerConfig(
        num_layers=L, model_dim=D, num_heads=4, max_len=512, vocab_size=vocab_size
    )


def train_flops(cfg: TransformerConfig, tokens: int, length: int) -> float:
    """Forward and backward: 6 (N + V d) + 6 L d T FLOPs a token, T halved (causal)."""
    n = 12 * cfg.num_layers * cfg.model_dim**2
    head = cfg.vocab_size * cfg.model_dim
    return tokens * (6 * (n + head) + 6 * cfg.num_layers * cfg.model_dim * length)


def make_batch(cfg: TransformerConfig) -> TokenBatch:
    """Random tokens, every position learned."""
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T + 1))
    ids = jnp.asarray(ids, jnp.int32)
    weights = jnp.full((B, T), 1.0 / (B * T), jnp.float32)
    return TokenBatch(ids[:, :-1], ids[:, 1:], weights)


def train(vocab_size: int, goal: float, repeats: int) -> list[Row]:
    """A whole update: forward, backward, clipping, AdamW."""
    torch, _ = import_torch()
    cfg, rate = model_config(vocab_size), 1e-4
    params = init_params(jax.random.key(0), cfg)
    batch = make_batch(cfg)
    model = hf_gpt2(params, cfg).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    ids = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    ids = torch.tensor(ids, dtype=torch.long, device=model.device)

    opt = OptimizerConfig(learning_rate=rate, schedule="constant")
    loss_fn = functools.partial(lm_loss, model=cfg)
    step = jax.jit(make_train_step(loss_fn, opt, 1000), donate_argnums=0)
    scalars = opt.scalars()
    state = init_state(params, jax.random.key(1))

    def ours():
        nonlocal state
        state, metrics = step(state, batch, scalars)
        return metrics["loss"]

    def theirs():
        return hf_update(model, optimizer, ids)

    case = f"train/V{vocab_size}"
    check_close(case, float(ours()), theirs())
    check_close(case, float(ours()), theirs(), rtol=1e-3)  # after one update
    rate = matmul_flops()
    best = min(seconds(ours) for _ in range(3))
    share = train_flops(cfg, B * T, T) / best / rate
    theirs_at_best = torch_matmul_flops(model.device) / 1e9
    note = f"{100 * share:.0f} % of {rate / 1e9:.0f} GFLOP/s of a matrix product"
    note += f" (PyTorch's: {theirs_at_best:.0f})"
    against = "transformers GPT-2, sdpa, fused AdamW"
    return [duel(case, ours, against, theirs, repeats, goal, note)]


class _Bytes:
    """Ids of a text: its UTF-8 bytes."""

    pad_id = eos_id = 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]


def demonstrations(repeats: int, vocab_size: int = 8192) -> list[Row]:
    """Four updates on 32 demonstrations each, most of them short.

    Lengths as of instructions and answers: lognormal of median 64, at most 511 tokens,
    a third of them the prompt. Ours in rows that demonstrations share, the head where
    the loss is, against batches in the same order that are each padded to their
    longest, and against ours with one a row, and with the head at all positions.
    """
    torch, _ = import_torch()
    size, limit, steps = 32, 512, 4
    longest = limit - 1  # a line break stands after the prompt
    cfg, rate = model_config(vocab_size), 1e-4
    params = init_params(jax.random.key(0), cfg)
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(64), 0.8, size * steps)).astype(int)
    lengths = lengths.clip(8, longest)
    lengths[0] = longest
    letters = rng.integers(97, 123, (size * steps, longest), np.uint8)
    texts = [
        row[:n].tobytes().decode() for row, n in zip(letters, lengths, strict=True)
    ]
    records = [
        Demonstration(text[: len(text) // 3], text[len(text) // 3 :]) for text in texts
    ]

    tokenizer: Any = _Bytes()

    def batches(num_epochs: int | None, ordered: bool = True) -> list[TokenBatch]:
        made = demonstration_batches(
            records,
            tokenizer,
            PromptFormat(),
            size,
            limit,
            seed=None,
            num_epochs=num_epochs,
        )
        order = put_loss_first if ordered else lambda batch: batch
        return [jax.tree.map(jnp.asarray, order(made(step))) for step in range(steps)]

    opt = OptimizerConfig(learning_rate=rate, schedule="constant")
    loss_fn = functools.partial(lm_loss, model=cfg)
    step = jax.jit(make_train_step(loss_fn, opt, 1000))
    scalars, initial = opt.scalars(), init_state(params, jax.random.key(1))

    def ours(batches: list[TokenBatch]) -> jax.Array:
        state, losses = initial, []
        for batch in batches:
            state, metrics = step(state, batch, scalars)
            losses.append(metrics["loss"])
        return jnp.stack(losses)

    model = hf_gpt2(params, cfg).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    alone, shared, everywhere = batches(None), batches(1), batches(1, ordered=False)

    def padded(batch: TokenBatch) -> tuple:
        """To the longest of the batch, with -100 where there is no loss."""
        targets = np.where(batch.weights > 0, batch.targets, -100)
        width = np.flatnonzero((targets != -100).any(axis=0))[-1] + 1
        ids = np.pad(np.asarray(batch.tokens)[:, :width], ((0, 0), (0, 1)))
        made = (torch.tensor(x, dtype=torch.long) for x in (ids, targets[:, :width]))
        return tuple(x.to(model.device) for x in made)

    their_batches = [padded(batch) for batch in alone]

    def theirs() -> list[float]:
        return [
            hf_update(model, optimizer, ids, targets=targets)
            for ids, targets in their_batches
        ]

    case = "train/demonstrations"
    first = theirs()
    variants = {"": shared, ", one a row": alone, ", head at all": everywhere}
    for name, made in variants.items():
        for mine, other in zip(ours(made), first, strict=True):
            check_close(case + name, float(mine), other, rtol=1e-3)
    rows, width = shared[0].tokens.shape
    widths = [ids.shape[1] - 1 for ids, _ in their_batches]
    note = f"32 in {rows} rows of {width} tokens, theirs {min(widths)} to {max(widths)}"
    mine = lambda: ours(shared)  # noqa: E731
    against = "transformers GPT-2, batches padded to their longest"
    table = [duel(case, mine, against, theirs, repeats, note=note)]
    for case, against, other in (
        ("train/shared_rows", "ours, one a row", alone),
        ("train/loss_first", "ours, the head at all positions", everywhere),
    ):
        slower = functools.partial(ours, other)
        table.append(duel(case, mine, against, slower, repeats))
    return table


def head(repeats: int, vocab_size: int = 50257) -> list[Row]:
    """Loss and gradient of the head: in chunks against all logits at once, which is
    what it does with so few on accelerators: there is nothing to compare there."""
    if jax.default_backend() != "cpu":
        return []
    key = jax.random.key(0)
    hidden = jax.random.normal(key, (B, T, D))
    embedding = 0.02 * jax.random.normal(key, (vocab_size, D))
    batch = make_batch(model_config(vocab_size))

    def loss(hidden, embedding):
        return language_modeling.next_token_head(
            hidden, embedding, batch.targets, batch.weights
        )

    def compiled(max_logits: int):
        with mock.patch.object(language_modeling, "MAX_LOGITS", max_logits):
            grad = jax.value_and_grad(lambda *args: loss(*args), argnums=(0, 1))
            return jax.jit(grad).lower(hidden, embedding).compile()

    cut, full = compiled(language_modeling.MAX_LOGITS), compiled(2**62)
    ours, theirs = lambda: cut(hidden, embedding), lambda: full(hidden, embedding)
    check_close("head", float(ours()[0]), float(theirs()[0]))
    analyses = [f.memory_analysis() for f in (cut, full)]
    sizes = [x.temp_size_in_bytes / 2**20 for x in analyses if x is not None]
    ratio = sizes[0] / sizes[1]
    note = f"{sizes[0]:.0f} MiB against {sizes[1]:.0f} MiB"
    memory = Row(
        "head/memory", "all logits", ratio, ratio, ratio, "of its bytes", 0.55, note
    )
    return [memory, duel("head/speed", ours, "all logits", theirs, repeats, 0.97)]
