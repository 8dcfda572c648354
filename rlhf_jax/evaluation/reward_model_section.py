"""The part of a report that speaks of the reward model."""

from rlhf_jax.evaluation.markdown import code, table
from rlhf_jax.evaluation.measurements import (
    REWARD_MODEL_EVALUATION,
    Document,
    optional_estimate,
)
from rlhf_jax.evaluation.statistics import Unit, format_estimate

NOT_MEASURED = "–"


def cell(document: Document, file: str, unit: Unit, *path: str) -> str:
    """One estimate of a parsed evaluation as text."""
    estimate = optional_estimate(document, file, *path)
    return NOT_MEASURED if estimate is None else format_estimate(estimate, unit)


def reward_model_section(document: Document) -> str:
    """Accuracies beside length alone and the labelers, as Markdown tables."""
    if not document:
        return f"Not evaluated: there is no `{REWARD_MODEL_EVALUATION}`."

    def percent(*path: str) -> str:
        return cell(document, REWARD_MODEL_EVALUATION, "%", *path)

    splits = {
        "train": ("training prompts", ""),
        "held_out_prompts": ("held-out prompts", "train_labelers"),
        "held_out_labelers": ("held-out labelers", "held_out_labelers"),
        "test": ("test files", "test"),
    }
    measured = document.get("accuracy") or {}
    rows = [
        (
            title,
            percent("accuracy", split),
            percent("length_baseline", split),
            percent("agreement", labelers),
        )
        for split, (title, labelers) in splits.items()
        if measured.get(split) is not None
    ]
    header = ("pairs", "accuracy", "length alone", "labelers agree")
    parts = [table(header, rows)]
    labelers = document.get("by_labeler") or {}
    if labelers:
        by_labeler = [(code(name), percent("by_labeler", name)) for name in labelers]
        parts.append(table(("labeler (held-out rankings)", "accuracy"), by_labeler))
    files = document.get("by_file") or {}
    if files:
        by_file = [
            (
                code(name),
                percent("by_file", name, "accuracy"),
                percent("by_file", name, "length_baseline"),
                _kept(file, "num_rankings"),
                _kept(file, "num_responses"),
            )
            for name, file in files.items()
        ]
        header = ("file", "accuracy", "length alone", "rankings used", "responses used")
        parts.append(table(header, by_file))
    return "\n\n".join(parts)


def _kept(file: Document, count: str) -> str:
    if count not in file or f"{count}_read" not in file:
        return NOT_MEASURED
    return f"{file[count]} of {file[f'{count}_read']}"
