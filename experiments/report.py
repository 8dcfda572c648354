"""Report of a run: RUN/report.md, RUN/report.json and RUN/figures.

python -m experiments.report --run RUN
"""

import dataclasses
from pathlib import Path

import tyro

from rlhf_jax.evaluation.report import write_report
from rlhf_jax.training.run_dir import RunDirError


@dataclasses.dataclass(frozen=True)
class Report:
    """Which run to report on."""

    run: Path = Path("runs/instructgpt")
    """Directory of the run."""


if __name__ == "__main__":
    try:
        prog = "python -m experiments.report"
        print(write_report(tyro.cli(Report, prog=prog, description=__doc__).run))
    except (OSError, RunDirError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
