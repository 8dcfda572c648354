"""The report of a run: `report.md`, `report.json` and `figures/*.png`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.evaluation.claims import judge_claims
from rlhf_jax.evaluation.figures import FIGURES
from rlhf_jax.evaluation.measurements import (
    EVALUATION,
    REWARD_MODEL_EVALUATION,
    Curve,
    Document,
    MissingInput,
    RunData,
)
from rlhf_jax.evaluation.report_text import Report, render_report
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.run_dir import read_json, write_text

STAGES = (
    "pretrain",
    "sft",
    "sft_rl",
    "collect",
    "reward_model",
    "ppo",
    "ppo_ptx",
    "evaluate",
)
SAMPLES = "evaluate/samples.jsonl"
NUM_SAMPLES = 6


def write_report(run_dir: Path) -> Path:
    """Writes the report of a run from what its stages left, as far as they came.

    What is missing is named in the report and never made up: a claim without its
    input is inconclusive, a figure without its data is not drawn. Each file is
    replaced as a whole, `report.md` last.

    Args:
        run_dir: the RUN directory, with stages as its subdirectories.

    Returns:
        The path of `report.md`.

    Raises:
        FileNotFoundError: no stage has left anything in `run_dir`.
        ValueError: a file that a stage wrote is malformed; the message names it.
        RunDirError: a JSON file of a stage does not parse.
    """
    run = load_run(run_dir)
    if not (run.evaluation or run.reward_model or run.curves):
        raise FileNotFoundError(
            f"{run_dir} holds no metrics.jsonl and no evaluation.json of a stage; run "
            "`python -m experiments.instructgpt --run` with this directory first"
        )
    figures, not_drawn = _write_figures(run, run_dir)
    report = Report(
        run=run,
        configs={
            stage: read_json(run_dir / stage / "config.json")
            for stage in STAGES
            if (run_dir / stage / "config.json").exists()
        },
        finished=[s for s in STAGES if (run_dir / s / "done.json").exists()],
        claims=judge_claims(run.evaluation, run.reward_model),
        samples=choose_samples(read_samples(run_dir / SAMPLES), NUM_SAMPLES),
        figures=figures,
        not_drawn=not_drawn,
    )
    text = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    write_text(run_dir / "report.json", text)
    write_text(run_dir / "report.md", render_report(report))
    return run_dir / "report.md"


def load_run(run_dir: Path) -> RunData:
    """The evaluations and metrics of a run; empty where a stage has not come so far."""
    return RunData(
        evaluation=_read_optional(run_dir / EVALUATION),
        reward_model=_read_optional(run_dir / REWARD_MODEL_EVALUATION),
        curves={
            stage: curves
            for stage in STAGES
            if (curves := _curves(run_dir / stage / "metrics.jsonl"))
        },
    )


def read_samples(path: Path) -> list[Document]:
    """The prompts of `samples.jsonl` with their responses; [] where there is no file.

    Raises:
        ValueError: a line is no JSON object with a prompt and responses.
    """
    if not path.exists():
        return []
    samples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                sample = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({error.msg}); delete the folder "
                    f"{path.parent.name} and evaluate again"
                ) from error
            for field in ("prompt", "responses"):
                if not isinstance(sample, dict) or field not in sample:
                    raise ValueError(
                        f"{path}:{number}: no field '{field}'; delete the folder "
                        f"{path.parent.name} and evaluate again"
                    )
            samples.append(sample)
    return samples


def choose_samples(samples: Sequence[Document], count: int) -> list[Document]:
    """The first sample of each use case, then the first of the rest, up to `count`.

    The choice knows nothing of the responses, so it cannot flatter a model.
    """
    first: dict[Any, int] = {}
    for index, sample in enumerate(samples):
        first.setdefault(sample.get("use_case"), index)
    leading = list(first.values())
    rest = [index for index in range(len(samples)) if index not in leading]
    return [samples[index] for index in sorted((leading + rest)[:count])]


def _curves(path: Path) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = {}
    for record in read_metrics(path):
        for name, value in record.items():
            if name != "step":
                points.setdefault(name, {})[int(record["step"])] = value
    return {
        name: (
            np.array(sorted(by_step)),
            np.array([by_step[s] for s in sorted(by_step)]),
        )
        for name, by_step in points.items()
    }


def _write_figures(
    run: RunData, run_dir: Path
) -> tuple[dict[str, str], dict[str, str]]:
    (run_dir / "figures").mkdir(exist_ok=True)
    drawn, not_drawn = {}, {}
    for spec in FIGURES:
        relative = f"figures/{spec.name}.png"
        path = run_dir / relative
        try:
            figure = spec.draw(run)
        except MissingInput as missing:
            path.unlink(missing_ok=True)  # of an earlier report: no longer true
            not_drawn[spec.name] = str(missing)
            continue
        partial = path.with_name(path.name + ".tmp")
        figure.savefig(partial, format="png")
        os.replace(partial, path)
        drawn[spec.name] = relative
    return drawn, not_drawn


def _read_optional(path: Path) -> Document:
    return read_json(path) if path.exists() else {}
