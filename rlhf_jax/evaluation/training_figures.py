"""Figures of the stages while they train: losses, and the course of PPO."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator

from rlhf_jax.evaluation.measurements import (
    EVALUATION,
    MODEL_LABELS,
    MissingInput,
    RunData,
    model_estimate,
)
from rlhf_jax.evaluation.plotting import (
    MODEL_COLORS,
    REFERENCE_LINE,
    error_bars,
    legend_below,
    make_panels,
    plot_curve,
    plot_points,
)

POLICIES = ("ppo", "ppo_ptx")
TRAIN_COLOR, HELD_OUT_COLOR = "#444444", "#009e73"


def draw_losses(run: RunData) -> Figure:
    """Training and held-out loss of every stage over its updates."""
    panels = [
        ("pretrain", "loss", "Pre-training", "nats per token"),
        ("sft", "loss", "SFT", "nats per token"),
        ("sft_rl", "loss", "SFT (RL init)", "nats per token"),
        ("reward_model", "loss", "Reward model", "nats per comparison"),
    ]
    drawn = [panel for panel in panels if "loss" in run.curves.get(panel[0], {})]
    if not drawn:
        raise MissingInput("no stage wrote loss to its metrics.jsonl")
    figure, axes = make_panels(len(drawn), columns=2)
    for axis, (stage, name, title, unit) in zip(axes, drawn, strict=True):
        curves = run.curves[stage]
        plot_curve(axis, curves[name], TRAIN_COLOR, "training batches")
        if f"heldout/{name}" in curves:
            plot_points(axis, curves[f"heldout/{name}"], HELD_OUT_COLOR, "held out")
        if stage == "reward_model":
            axis.axhline(np.log(2), label="chance (log 2)", **REFERENCE_LINE)
        axis.set(title=title, xlabel="update", ylabel=f"loss ({unit})")
    legend_below(figure, *axes)
    return figure


def draw_ppo(run: RunData) -> Figure:
    """Score, KL to the reference and entropy of the policy over PPO iterations."""
    panels = [
        ("objective/score", "heldout/score", "Score", "reward units"),
        ("objective/kl", "heldout/kl", "KL to the reference", "nats per response"),
        ("policy/entropy", None, "Entropy of the policy", "nats per token"),
    ]
    return _draw_policy_curves(run, panels)


def draw_frontier(run: RunData) -> Figure:
    """Score against the square root of the KL it costs, on held-out prompts.

    The path is of the policy while it trains. A KL estimated below 0, which is noise
    around 0, is drawn at 0.
    """
    figure, (axis,) = make_panels(1, columns=1)
    for name in POLICIES:
        curves = run.curves.get(name, {})
        if "heldout/score" in curves and "heldout/kl" in curves:
            axis.plot(
                np.sqrt(np.maximum(curves["heldout/kl"][1], 0.0)),
                curves["heldout/score"][1],
                color=MODEL_COLORS[name],
                marker=".",
                label=f"{MODEL_LABELS[name]} while it trains",
            )
        score, kl = (
            model_estimate(run, name, key) for key in ("reward", "kl_to_reference")
        )
        if score is not None and kl is not None:
            axis.errorbar(
                np.sqrt(max(kl.mean, 0.0)),
                score.mean,
                yerr=error_bars([score]),
                fmt="o",
                markersize=8,
                markeredgecolor="black",
                ecolor="black",
                capsize=4,
                color=MODEL_COLORS[name],
                zorder=4,
                label=f"{MODEL_LABELS[name]} as evaluated (averaged)",
            )
    if not axis.has_data():
        raise MissingInput(
            "neither ppo nor ppo_ptx wrote heldout/score and heldout/kl, and "
            f"{EVALUATION} has no KL of them"
        )
    axis.xaxis.set_major_locator(AutoLocator())
    axis.set(
        xlabel=r"$\sqrt{\mathrm{KL}}$ to the reference (square root of nats per "
        "response)",
        ylabel="reward-model score (reward units)",
        title="What the reward costs in KL",
    )
    axis.set_xlim(left=0)
    legend_below(figure, axis)
    return figure


def draw_rollouts(run: RunData) -> Figure:
    """Length, ends and pre-training loss of the policy over PPO iterations."""
    panels = [
        ("rollout/length", "heldout/length", "Response length", "tokens"),
        ("rollout/eos_rate", "heldout/eos_rate", "Ended by themselves", "share"),
        (None, "heldout/pretrain_loss", "Alignment tax", "nats per token, held out"),
    ]
    return _draw_policy_curves(run, panels)


def _draw_policy_curves(
    run: RunData, panels: Sequence[tuple[str | None, str | None, str, str]]
) -> Figure:
    drawn = []
    for panel in panels:
        present = [
            name
            for name in POLICIES
            if any(metric in run.curves.get(name, {}) for metric in panel[:2])
        ]
        if present:
            drawn.append((panel, present))
    if not drawn:
        wanted = ", ".join(str(panel[0] or panel[1]) for panel in panels)
        raise MissingInput(f"neither ppo nor ppo_ptx wrote {wanted}")
    figure, axes = make_panels(len(drawn), columns=3)
    for axis, ((rollout, held_out, title, unit), names) in zip(
        axes, drawn, strict=True
    ):
        for name in names:
            color, curves = MODEL_COLORS[name], run.curves[name]
            if rollout in curves:
                plot_curve(axis, curves[rollout], color, MODEL_LABELS[name])
            if held_out in curves:
                label = f"{MODEL_LABELS[name]}, held out"
                plot_points(axis, curves[held_out], color, label)
        axis.set(title=title, xlabel="PPO iteration", ylabel=unit)
    legend_below(figure, *axes)
    return figure
