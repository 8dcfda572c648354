"""The figures of a report, one function each, without matplotlib's global state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rlhf_jax.evaluation.measurements import (
    EVALUATION,
    METADATA_LABELS,
    MODEL_LABELS,
    MORE_IS_BETTER,
    REWARD_MODEL_EVALUATION,
    MissingInput,
    RunData,
    estimates_by_model,
    model_estimate,
    optional_estimate,
)
from rlhf_jax.evaluation.plotting import (
    MODEL_COLORS,
    REFERENCE_LINE,
    draw_bars,
    draw_intervals,
    legend_below,
    make_panels,
)
from rlhf_jax.evaluation.statistics import Estimate
from rlhf_jax.evaluation.training_figures import (
    draw_frontier,
    draw_losses,
    draw_ppo,
    draw_rollouts,
)

_REWARD_COLOR = "#009e73"
_SPLITS = {
    "train": "training\nprompts",
    "held_out_prompts": "held-out\nprompts",
    "held_out_labelers": "held-out\nlabelers",
    "test": "test\nfiles",
}


def draw_reward_accuracy(run: RunData) -> Figure:
    """Accuracy of the reward model by split, score margin and length difference."""
    marks = [
        ("accuracy", "reward model", _REWARD_COLOR, "o"),
        ("length_baseline", "length alone", "#999933", "s"),
        ("agreement", "labelers among themselves", "#000000", "D"),
    ]
    found: dict[str, dict[str, Estimate]] = {}
    for kind, *_ in marks:
        for split in _SPLITS:
            agreement_of = {"held_out_prompts": "train_labelers"}.get(split, split)
            key = agreement_of if kind == "agreement" else split
            estimate = optional_estimate(
                run.reward_model, REWARD_MODEL_EVALUATION, kind, key
            )
            if estimate is not None:
                found.setdefault(split, {})[kind] = estimate
    if not found:
        raise MissingInput(f"not measured: {REWARD_MODEL_EVALUATION} has no accuracy")
    by_margin = run.reward_model.get("by_margin") or []
    by_length = run.reward_model.get("by_length") or []
    figure, axes = make_panels(1 + bool(by_margin) + bool(by_length), columns=3)
    splits = [split for split in _SPLITS if split in found]
    for offset, (kind, label, color, marker) in zip((-0.2, 0, 0.2), marks, strict=True):
        rows = [(n, found[s][kind]) for n, s in enumerate(splits) if kind in found[s]]
        if rows:
            places = [n + offset for n, _ in rows]
            estimates = [estimate for _, estimate in rows]
            draw_intervals(axes[0], places, estimates, color, marker, label)
    axes[0].set_xticks(range(len(splits)), [_SPLITS[split] for split in splits])
    axes[0].set_xlim(-0.6, len(splits) - 0.4)
    axes[0].set_title("By split")
    remaining = iter(axes[1:])
    for bins, title, xlabel in (
        (by_margin, "By margin", "difference in score (reward units)"),
        (by_length, "By length", "length, better minus worse (tokens)"),
    ):
        if bins:
            axis = next(remaining)
            _draw_bins(axis, bins)
            axis.set(title=title, xlabel=xlabel)
    limits = np.array([axis.get_ylim() for axis in axes])
    for axis in axes:
        axis.axhline(0.5, **REFERENCE_LINE)
        axis.set_ylim(min(limits[:, 0].min(), 0.45), max(limits[:, 1].max(), 0.8))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_ylabel("pairs ordered as the labeler did")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def draw_win_rates(run: RunData) -> Figure:
    """How often each model is preferred to SFT (the form of the paper's Figure 1)."""
    rates = estimates_by_model(run, "win_rate_vs_sft")
    rates.pop("sft", None)  # 50 % against itself
    figure, (axis,) = make_panels(1, columns=1)
    places = np.arange(len(rates))
    draw_bars(axis, places, rates, width=0.65)
    for place, estimate in zip(places, rates.values(), strict=True):
        top = estimate.high if np.isfinite(estimate.high) else estimate.mean
        axis.annotate(
            f"{100 * estimate.mean:.0f} %",
            (place, top),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axis.axhline(0.5, **REFERENCE_LINE)
    axis.set_xticks(places, [MODEL_LABELS[name] for name in rates])
    axis.set_ylim(0, 1.08)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set(
        ylabel="win rate against SFT",
        title=f"Preferred to SFT on held-out prompts\n"
        f"(judge: {run.evaluation.get('judge')}; ties count half)",
    )
    return figure


def draw_metadata(run: RunData) -> Figure:
    """Rates of the metadata labels by model (the form of the paper's Figure 4)."""
    found = {
        name: {
            label: estimate
            for label in METADATA_LABELS
            if (estimate := model_estimate(run, name, "metadata", label)) is not None
        }
        for name in MODEL_LABELS
    }
    names = [name for name in found if found[name]]
    if not names:
        raise MissingInput(
            f"{EVALUATION} has no metadata labels (real data has no labeler for them)"
        )
    figure, (axis,) = make_panels(1, columns=1)
    width = 0.84 / len(names)
    for index, name in enumerate(names):
        for group, label in enumerate(METADATA_LABELS):
            if label in found[name]:
                place = group + (index - (len(names) - 1) / 2) * width
                draw_bars(axis, [place], {name: found[name][label]}, width)
    ticks = [
        f"{text}\n({'higher' if label in MORE_IS_BETTER else 'lower'} is better)"
        for label, text in METADATA_LABELS.items()
    ]
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set(ylabel="share of responses", title="What the responses are like")
    legend_below(figure, axis)
    return figure


def draw_alignment_tax(run: RunData) -> Figure:
    """Held-out pre-training loss by model, and its paired differences."""
    losses = estimates_by_model(run, "pretrain_loss")
    losses.pop("gpt_few_shot", None)  # a prompt does not change the weights
    pairs = {
        "ppo-sft_rl": ("PPO\n− SFT (RL init)", MODEL_COLORS["ppo"]),
        "ppo_ptx-sft_rl": ("PPO-ptx\n− SFT (RL init)", MODEL_COLORS["ppo_ptx"]),
        "ppo-ppo_ptx": ("PPO\n− PPO-ptx", "black"),
    }
    differences = {
        pair: estimate
        for pair in pairs
        if (
            estimate := optional_estimate(
                run.evaluation, EVALUATION, "differences", "pretrain_loss", pair
            )
        )
        is not None
    }
    figure, axes = make_panels(1 + bool(differences), columns=2)
    for place, (name, estimate) in enumerate(losses.items()):
        draw_intervals(axes[0], [place], [estimate], MODEL_COLORS[name], "o", None)
    axes[0].set_xticks(
        range(len(losses)), [MODEL_LABELS[n].replace(" (", "\n(") for n in losses]
    )
    axes[0].set_xlim(-0.6, len(losses) - 0.4)
    axes[0].set(title="By model", ylabel="held-out pre-training loss (nats per token)")
    if differences:
        for place, (pair, estimate) in enumerate(differences.items()):
            draw_intervals(axes[1], [place], [estimate], pairs[pair][1], "o", None)
        axes[1].axhline(0.0, **REFERENCE_LINE)
        axes[1].set_xticks(
            range(len(differences)), [pairs[pair][0] for pair in differences]
        )
        axes[1].set_xlim(-0.6, len(differences) - 0.4)
        axes[1].set(
            title="Differences on the same batches",
            ylabel="difference in loss (nats per token)",
        )
    return figure


def draw_lengths(run: RunData) -> Figure:
    """Length of the responses and how many end by themselves, by model."""
    lengths = estimates_by_model(run, "response_length")
    ended = estimates_by_model(run, "eos_rate")
    figure, axes = make_panels(2, columns=2)
    for axis, estimates in zip(axes, (lengths, ended), strict=True):
        places = np.arange(len(estimates))
        draw_bars(axis, places, estimates, width=0.65)
        axis.set_xticks(
            places, [MODEL_LABELS[n].replace(" (", "\n(") for n in estimates]
        )
        axis.tick_params(axis="x", labelsize=9)
        axis.set_ylim(bottom=0)
    axes[0].set(title="Response length", ylabel="tokens")
    axes[1].set(title="Responses that end by themselves", ylabel="share of responses")
    axes[1].set_ylim(0, 1.04)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the report: the stem of its file, what it shows, how it is drawn."""

    name: str
    caption: str
    draw: Callable[[RunData], Figure]


FIGURES = (
    FigureSpec(
        "win_rates",
        "Preference over SFT by model, the form of the paper's Figure 1.",
        draw_win_rates,
    ),
    FigureSpec(
        "metadata",
        "Metadata labels of the responses, the form of the paper's Figure 4.",
        draw_metadata,
    ),
    FigureSpec(
        "alignment_tax",
        "Held-out pre-training loss, of batches spread over the held-out text. The "
        "differences on the right compare the same batches, so they are known far "
        "better than either loss; text by other authors may give others.",
        draw_alignment_tax,
    ),
    FigureSpec(
        "reward_accuracy",
        "How often the reward model orders two responses as the labeler did.",
        draw_reward_accuracy,
    ),
    FigureSpec(
        "ppo",
        "PPO: score, KL and entropy of each iteration's rollouts (lines) and of "
        "held-out prompts (points).",
        draw_ppo,
    ),
    FigureSpec(
        "frontier",
        "Score against √KL on held-out prompts: the path of the policy while it "
        "trains, and its moving average, which is evaluated and handed on. A path that "
        "turns down while KL grows would be over-optimisation, but only in a score PPO "
        "was not trained on.",
        draw_frontier,
    ),
    FigureSpec(
        "rollouts",
        "PPO: length and ends of the responses, and the pre-training loss.",
        draw_rollouts,
    ),
    FigureSpec("lengths", "Length and ends of held-out responses.", draw_lengths),
    FigureSpec("losses", "Loss of every supervised stage.", draw_losses),
)


def _draw_bins(axis: Axes, bins: Sequence[Mapping[str, Any]]) -> None:
    estimates = [Estimate.from_json(part["accuracy"]) for part in bins]
    draw_intervals(axis, range(len(bins)), estimates, _REWARD_COLOR, "o", None)
    highest = max(abs(part[end]) for part in bins for end in ("low", "high"))
    digits = 0 if highest >= 10 else 2
    ticks = [f"{part['low']:.{digits}f}\nto {part['high']:.{digits}f}" for part in bins]
    axis.set_xticks(range(len(bins)), ticks)
    axis.set_xlim(-0.6, len(bins) - 0.4)
    axis.tick_params(axis="x", labelsize=8.5)
