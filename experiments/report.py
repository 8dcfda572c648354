"""Report of a run: RUN/report.md, RUN/report.json and RUN/figures.

python -m experiments.report --run RUN
"""

import dataclasses
from pathlib import Path

import tyro

from rlhf_jax.evaluation.report import write_report


@dataclasses.dataclass(frozen=True)
class Report:
    """Which run to report on."""

    run: Path = Path("runs/instructgpt")
    """Directory of the run."""


if __name__ == "__main__":
    print(write_report(tyro.cli(Report, description=__doc__).run))
