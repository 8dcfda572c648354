"""A train step as width, depth, batch and context grow: FLOP/s, one axis at a time."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.timing import Row, matmul_flops, row_of, seconds
from experiments.benchmark.training import model_config
from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.training import costs
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

BASE = {"batch": 8, "context": 256, "width": 256, "depth": 4}
AXES = {
    "batch": (1, 2, 4, 8, 16, 32),
    "context": (64, 128, 256, 512, 1024),
    "width": (64, 128, 256, 512),
    "depth": (1, 2, 4, 8, 16),
}


def flops_per_second(
    batch: int, context: int, width: int, depth: int, repeats: int
) -> np.ndarray:
    """Of a train step's products, in each of [repeats] updates; V = 8192."""
    shape = {"model_dim": width, "num_layers": depth, "max_len": context}
    cfg = dataclasses.replace(model_config(8192), **shape)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, context + 1))
    weights = jnp.full((batch, context), 1 / (batch * context), jnp.float32)
    rows = jnp.asarray(ids, jnp.int32)
    data = TokenBatch(rows[:, :-1], rows[:, 1:], weights)
    opt = OptimizerConfig(schedule="constant")
    step = make_train_step(functools.partial(lm_loss, model=cfg), opt, 1000)
    compiled, scalars = jax.jit(step, donate_argnums=0), opt.scalars()
    state = init_state(init_params(jax.random.key(0), cfg), jax.random.key(1))

    def update():
        nonlocal state
        state, metrics = compiled(state, data, scalars)
        return metrics["loss"]

    seconds(update)
    tokens = batch * context
    work = 3 * costs.forward(cfg, tokens, costs.causal_keys(context), tokens)
    return work.flops / np.array([seconds(update) for _ in range(max(2, repeats))])


def scaling(out: Path, repeats: int) -> list[Row]:
    """One row an axis: FLOP/s at its largest value over those of the base.

    Draws `scaling.png`: FLOP/s of every value as a share of a matrix product's.
    """
    limit = matmul_flops()
    base = flops_per_second(**BASE, repeats=repeats) / limit
    shares = {
        axis: [
            base
            if value == BASE[axis]
            else flops_per_second(**(BASE | {axis: value}), repeats=repeats) / limit
            for value in values
        ]
        for axis, values in AXES.items()
    }
    best = {axis: [float(max(x)) for x in found] for axis, found in shares.items()}
    draw(best, out / "scaling.png")
    rows = []
    for axis, values in AXES.items():
        against = f"{axis} {BASE[axis]}, to {values[-1]}"
        each = zip(values, best[axis], strict=True)
        note = ", ".join(f"{value}: {share:.2f}" for value, share in each)
        note = f"share of {limit / 1e9:.0f} GFLOP/s at {note}"
        ratios = shares[axis][-1] / np.median(base)
        rows.append(
            row_of(f"scaling/{axis}", against, ratios, "of its FLOP/s", note=note)
        )
    return rows


def draw(shares: dict[str, list[float]], path: Path) -> None:
    """Four panels, shares of the matrix product's rate."""
    import matplotlib.pyplot as plt  # slow to import

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(1, 4, figsize=(11, 3), sharey=True)
    for panel, (axis, values) in zip(panels, AXES.items(), strict=True):
        panel.plot(values, shares[axis], marker="o", color="tab:blue")
        panel.axvline(BASE[axis], color="grey", linewidth=0.8, linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, labels=map(str, values))
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylim(0, 1.1 * max(map(max, shares.values())))  # of all panels
    panels[0].set_ylabel("FLOP/s of a train step,\nshare of a matrix product's")
    figure.suptitle("One axis grows, the others stay at the dotted values")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
