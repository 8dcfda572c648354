"""How every figure of a report looks: panels, curves, bars and intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from rlhf_jax.evaluation.measurements import MODEL_LABELS, Curve
from rlhf_jax.evaluation.statistics import Estimate

# Okabe and Ito's palette, which colour-blind readers can tell apart; one colour per
# model in every figure.
MODEL_COLORS = {
    "gpt": "#7f7f7f",
    "gpt_few_shot": "#56b4e9",
    "sft": "#e69f00",
    "sft_rl": "#cc79a7",
    "ppo": "#d55e00",
    "ppo_ptx": "#0072b2",
}
REFERENCE_LINE = {"color": "#444444", "linestyle": "--", "linewidth": 1, "zorder": 1}


def make_panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure 1300 pixels wide with `count` axes, at most `columns` side by side."""
    columns = min(columns, count)
    rows = -(-count // columns)
    height = 5.6 if columns == 1 else 3.9 * rows + 0.4
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(10, height), dpi=130, layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def plot_curve(axis: Axes, curve: Curve, color: str, label: str) -> None:
    """A noisy curve in a light shade, and its running mean."""
    axis.plot(*curve, color=color, alpha=0.2, linewidth=1)
    marker = "o" if len(curve[0]) < 10 else None
    smoothed = smooth(curve, windows=25)
    axis.plot(*smoothed, color=color, linewidth=2, marker=marker, label=label)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def plot_points(axis: Axes, curve: Curve, color: str, label: str) -> None:
    """The few points of a held-out measurement."""
    axis.plot(
        *curve,
        color=color,
        linestyle=":",
        marker="o",
        markersize=6,
        markeredgecolor="white",
        zorder=3,
        label=label,
    )
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def smooth(curve: Curve, windows: int) -> Curve:
    """Running means over 1 / `windows` of a curve, at the middle of each window."""
    steps, values = curve
    window = max(1, len(values) // windows)
    kernel = np.full(window, 1 / window)
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def draw_bars(
    axis: Axes, places: Any, estimates: Mapping[str, Estimate], width: float
) -> None:
    for place, (name, estimate) in zip(places, estimates.items(), strict=True):
        axis.bar(
            place,
            estimate.mean,
            width,
            yerr=error_bars([estimate]),
            color=MODEL_COLORS[name],
            error_kw={"ecolor": "black", "capsize": 3, "linewidth": 1.2},
            label=MODEL_LABELS[name],
        )


def draw_intervals(
    axis: Axes,
    places: Sequence[float],
    estimates: Sequence[Estimate],
    color: str,
    marker: str,
    label: str | None,
) -> None:
    axis.errorbar(
        places,
        [estimate.mean for estimate in estimates],
        yerr=error_bars(estimates),
        fmt=marker,
        markersize=7,
        color=color,
        capsize=4,
        label=label,
    )


def error_bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """Lengths [2, n] of the error bars; none where a sample bounds nothing."""
    ends = np.array([(e.mean - e.low, e.high - e.mean) for e in estimates]).T
    return np.where(np.isfinite(ends), ends, 0.0)


def legend_below(figure: Figure, *axes: Axes) -> None:
    """One legend for all axes, below them, each label once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(len(entries), 4 if len(axes) > 1 or len(entries) > 4 else 2),
    )
