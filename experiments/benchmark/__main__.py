"""Speed and memory of ours beside what one would use instead, in one run.

python -m experiments.benchmark                 # all groups

python -m experiments.benchmark train generate  # some

The other sides come with `pip install -e ".[bench]"`, tunix with `".[tunix]"`. Each row
is the ratio of two times measured in turn: median, smallest and largest of the
repetitions.
"""

import dataclasses
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmark import (
    accelerator,
    generation,
    ppo,
    ppo_tunix,
    reward_model,
    scaling,
    system,
    training,
)
from experiments.benchmark.timing import Row
from rlhf_jax.training.host import keep_freed_memory
from rlhf_jax.training.run_dir import write_text

Group = Literal[
    "train",
    "head",
    "generate",
    "reward_model",
    "ppo",
    "tunix",
    "sweep",
    "system",
    "scaling",
    "accelerator",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    groups: Annotated[tuple[Group, ...], tyro.conf.Positional] = ()
    """Groups of cases; none means all, "accelerator" on an accelerator only, "tunix"
    where it is installed."""
    out: Path = Path("runs/benchmark")
    """Directory of benchmark.json, benchmark.png and scaling.png."""
    repeats: int = 7
    """Repetitions of each duel, in turn."""

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


def cases(repeats: int, out: Path) -> dict[Group, list[Callable[[], list[Row]]]]:
    """Group -> its measurements, not yet made; goals are for two CPU cores."""
    return {
        "train": [
            lambda: training.train(8192, 1.3, repeats),
            lambda: training.train(50257, 1.7, repeats),
            lambda: training.demonstrations(repeats),
        ],
        "head": [lambda: training.head(repeats)],
        "generate": [
            lambda: generation.fixed(1, 3.3, repeats),
            lambda: generation.fixed(8, 3.5, repeats),
            lambda: generation.fixed(32, 4.7, repeats),
            lambda: generation.varying(5.5, repeats),
            lambda: generation.long_tail(repeats),
        ],
        "reward_model": [
            lambda: reward_model.against_pairs(4, 8.0, repeats),
            lambda: reward_model.against_pairs(9, 28.0, repeats // 2),
            lambda: reward_model.token_law(9, repeats),
            lambda: reward_model.varying(repeats),
        ],
        "ppo": [
            lambda: ppo.iteration(8192, 1.8, repeats),
            lambda: ppo.iteration(50257, 2.7, repeats),
        ],
        "tunix": [lambda: ppo_tunix.iteration(repeats)],
        "sweep": [lambda: system.sweep(repeats)],
        "system": [
            lambda: system.compile_depth(repeats),
            lambda: system.start_warm(repeats),
            lambda: system.devices(2, repeats),
            lambda: system.devices(8, repeats),
        ],
        "scaling": [lambda: scaling.scaling(out, repeats)],
        "accelerator": accelerator.measurements(repeats),
    }


def more_is_better(row: Row) -> bool:
    """Of a rate; not of a time or of bytes."""
    return row.unit in ("times as fast", "of the law", "of the limit")


def reached(row: Row) -> bool | None:
    """Whether the median meets the goal; None where there is no goal."""
    if row.goal is None:
        return None
    return row.ratio >= row.goal if more_is_better(row) else row.ratio <= row.goal


def draw(rows: list[Row], path: Path) -> None:
    """Ratios with their spread as bars, goals as ticks."""
    import matplotlib.pyplot as plt  # slow to import

    rows = [row for row in rows if row.unit == "times as fast"][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(rows) + 1.2))
    places = range(len(rows))
    ratios = [row.ratio for row in rows]
    spread = (
        [row.ratio - row.low for row in rows],
        [row.high - row.ratio for row in rows],
    )
    beyond = [ratio - 1.0 for ratio in ratios]  # a slower one reaches to the left
    axes.barh(places, beyond, 0.6, 1.0, xerr=spread, color="tab:blue", capsize=3)
    for place, row in zip(places, rows, strict=True):
        if row.goal is not None:
            axes.plot([row.goal] * 2, [place - 0.4, place + 0.4], color="black")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(list(places), [row.case for row in rows])
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], labels="0.5 1 2 5 10 20 50".split())
    axes.set_xlabel("times as fast as the other side (black: what must be reached)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    prog = "python -m experiments.benchmark"
    cfg = tyro.cli(Benchmark, prog=prog, description=__doc__)
    keep_freed_memory()  # for both sides: one process, one allocator
    on_cpu = jax.default_backend() == "cpu"
    console, rows = Console(), []
    console.print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)")
    for group, measurements in cases(cfg.repeats, cfg.out).items():
        if cfg.groups and group not in cfg.groups:
            continue
        if not cfg.groups and on_cpu and group == "accelerator":
            continue
        if not cfg.groups and group == "tunix" and find_spec("tunix") is None:
            continue
        for measure in measurements:
            for row in measure():
                if not on_cpu and group != "accelerator":
                    row = dataclasses.replace(row, goal=None)  # set for CPU cores
                rows.append(row)
                verdict = {None: "", True: "reached", False: "NOT reached"}
                console.print(
                    f"{row.case}: {row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}] "
                    f"{row.unit} {verdict[reached(row)]} ({row.note})"
                )
                jax.clear_caches()
                write_text(
                    cfg.out / "benchmark.json",
                    json.dumps([dataclasses.asdict(r) for r in rows], indent=2),
                )
    table = Table("case", "against", "median", "spread", "unit", "must", title="ratios")
    for row in rows:
        spread = f"{row.low:.2f} to {row.high:.2f}"
        bound = "at least" if more_is_better(row) else "at most"
        goal = "" if row.goal is None else f"{bound} {row.goal}"
        table.add_row(row.case, row.against, f"{row.ratio:.2f}", spread, row.unit, goal)
    console.print(table)
    draw(rows, cfg.out / "benchmark.png")
    console.print(f"{cfg.out / 'benchmark.json'}, {cfg.out / 'benchmark.png'}")


if __name__ == "__main__":
    main()
