"""The text of a report, in Markdown."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.evaluation.claims import ClaimResult
from rlhf_jax.evaluation.figures import FIGURES
from rlhf_jax.evaluation.markdown import code, table, visible
from rlhf_jax.evaluation.measurements import (
    EVALUATION,
    METADATA_LABELS,
    MODEL_LABELS,
    Curve,
    Document,
    RunData,
    model_estimate,
)
from rlhf_jax.evaluation.reward_model_section import (
    NOT_MEASURED,
    cell,
    reward_model_section,
)
from rlhf_jax.evaluation.statistics import Unit, format_estimate

_VERDICT_MARKS = {"holds": "✅", "does not hold": "❌", "inconclusive": "❔"}
MODEL_COLUMNS: tuple[tuple[str, str, Unit], ...] = (
    ("gold_score", "gold score", ""),
    ("reward", "reward", ""),
    ("win_rate_vs_sft", "win rate against SFT", "%"),
    ("kl_to_reference", "KL to reference (nats per response)", ""),
    ("response_length", "response length (tokens)", ""),
    ("eos_rate", "ends by itself", "%"),
    ("pretrain_loss", "pre-training loss (nats per token)", ""),
)
_NOTES = """\
- **Intervals.** Every `x [low, high]` is a mean with its 95 % interval over held-out
  prompts (over batches of text for the pre-training loss). They measure how well these
  prompts, and these documents, stand for more of their kind; they do not include the
  spread between training seeds. With a hundred prompts and more a verdict is wrong by
  chance in at most about one run of forty, with few more often; the {claims} claims
  share data and contain each other, so do not count them as independent tests.
- **Verdicts** are computed: a claim *holds* where the whole interval lies above its
  threshold, *does not hold* where none of it does, and is *inconclusive* otherwise,
  where its input is missing, or where the judge is no judge of it.
- **Held out** are the prompts, the documents of the pre-training loss and, where named
  so, the labelers. Nothing was trained on them.
- **KL** is that of the policy to the model RL started from, `SFT (RL init)`, summed
  over a response; `SFT` is fine-tuned apart from it.
- **Published numbers** are of far larger models (175B policies, a 6B reward model),
  other prompts and human labelers: they show what to expect in kind, not in size."""
_EVALUATED = {
    "judge": "judge: {}",
    "num_prompts": "{} held-out prompts",
    "num_samples": "{} sample(s) each",
    "temperature": "temperature {}",
    "seed": "seed {}",
}
_JUDGE_NOTES = {
    "reward model": "- **Judge.** The win rates of this run come from the reward model "
    "that PPO was trained on. It is trainer and judge at once: a high win rate of PPO "
    "shows that the proxy was optimised, not that the responses are better. Read the "
    "samples.",
    "simulated labelers": "- **Judge.** The win rates come from simulated labelers, "
    "and the gold score is the utility that their tastes scatter around; PPO never saw "
    "either, only a reward model fitted to rankings.",
}


@dataclass(frozen=True)
class Report:
    """Everything that a report says, before it is rendered.

    Attributes:
        run: the measurements.
        configs: stage -> its `config.json`, for the stages that have one.
        finished: the stages that have finished.
        claims: every claim with its verdict.
        samples: the prompts to show, with the responses of every model.
        figures: name -> path relative to the run, of the figures that were drawn.
        not_drawn: name -> why that figure was not drawn.
    """

    run: RunData
    configs: Mapping[str, Document]
    finished: Sequence[str]
    claims: Sequence[ClaimResult]
    samples: Sequence[Document]
    figures: Mapping[str, str]
    not_drawn: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """What `report.json` holds."""
        return {
            "stages_finished": list(self.finished),
            **{name: self.run.evaluation.get(name) for name in _EVALUATED},
            "claims": [result.to_json() for result in self.claims],
            "models": self.run.evaluation.get("models"),
            "differences": self.run.evaluation.get("differences"),
            "reward_model": self.run.reward_model or None,
            "figures": dict(self.figures),
            "figures_not_drawn": dict(self.not_drawn),
        }


def render_report(report: Report) -> str:
    """The whole `report.md`."""
    run = report.run
    sections = [
        "# Report\n\n" + _summary(report),
        "## Claims\n\n" + _claims(report.claims),
        "## Models\n\n" + _models(run),
        "## Figures\n\n" + _figures(report.figures, report.not_drawn),
        "## Reward model\n\n" + reward_model_section(run.reward_model),
        "## Samples\n\n" + _samples(report.samples),
        "## How to read this\n\n" + _notes(report),
        "## What was run\n\n" + _stages(run.curves, report.finished, report.configs),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(report: Report) -> str:
    counts = Counter(result.verdict for result in report.claims)
    verdicts = ", ".join(
        f"**{counts[verdict]}** {one if counts[verdict] == 1 else several}"
        for verdict, one, several in (
            ("holds", "holds", "hold"),
            ("does not hold", "does not hold", "do not hold"),
            ("inconclusive", "is inconclusive", "are inconclusive"),
        )
    )
    lines = [f"Of {len(report.claims)} claims of the InstructGPT recipe {verdicts}."]
    evaluation = report.run.evaluation
    if evaluation:
        known = [
            text.format(evaluation[name])
            for name, text in _EVALUATED.items()
            if name in evaluation
        ]
        lines.append(f"Evaluation: {', '.join(known)}.")
    else:
        lines.append(f"The models were not evaluated: there is no `{EVALUATION}`.")
    return "\n\n".join(lines)


def _claims(results: Sequence[ClaimResult]) -> str:
    rows = []
    for result in results:
        claim = result.claim
        if result.estimate is None:
            measured = NOT_MEASURED
        else:
            measured = format_estimate(result.estimate, claim.unit)
        scale = 100 if claim.unit else 1
        threshold = f"> {scale * claim.threshold:g} {claim.unit}".rstrip()
        rows.append(
            (
                f"{_VERDICT_MARKS[result.verdict]} {result.verdict}",
                claim.statement,
                f"{measured}<br>must be {threshold}",
                f"{claim.quantity[0].upper()}{claim.quantity[1:]}. {result.detail}",
                claim.published or NOT_MEASURED,
            )
        )
    header = ("verdict", "claim", "estimate", "what it is", "published")
    return table(header, rows)


def _models(run: RunData) -> str:
    names = list(run.evaluation.get("models") or {})
    ordered = [name for name in MODEL_LABELS if name in names]
    if not ordered:
        return f"Not evaluated: `{EVALUATION}` has no models."
    rows = []
    for name in ordered:
        row = [f"**{MODEL_LABELS[name]}**"]
        for quantity, _, unit in MODEL_COLUMNS:
            text = cell(run.evaluation, EVALUATION, unit, "models", name, quantity)
            if quantity == "win_rate_vs_sft" and text != NOT_MEASURED:
                outcomes = _outcomes(run.evaluation["models"][name])
                text = "50 % (itself)" if name == "sft" else text + outcomes
            row.append(text)
        rows.append(row)
    header = ["model", *(title for _, title, _ in MODEL_COLUMNS)]
    text = "Mean [95 % interval] on held-out data.\n\n" + table(header, rows)
    labelled = [
        [f"**{MODEL_LABELS[name]}**"]
        + [
            cell(run.evaluation, EVALUATION, "%", "models", name, "metadata", label)
            for label in METADATA_LABELS
        ]
        for name in ordered
        if any(
            model_estimate(run, name, "metadata", label) for label in METADATA_LABELS
        )
    ]
    if not labelled:
        return text + "\n\nThere are no metadata labels: nobody labelled the responses."
    constraints = (
        model_estimate(run, name, "metadata", "meets_constraints") for name in ordered
    )
    with_one = max((estimate.n for estimate in constraints if estimate), default=0)
    note = (
        "Shares of the responses to all prompts; of those that meet explicit "
        f"constraints, to the {with_one} prompts that have one. Invented facts "
        "are counted in all use cases; the paper counts closed-domain ones."
    )
    header = ["model", *METADATA_LABELS.values()]
    return "\n\n".join([text, table(header, labelled), note])


def _outcomes(model: Mapping[str, Any]) -> str:
    outcomes = ("wins", "ties", "losses")
    if any(model.get(outcome) is None for outcome in outcomes):
        return ""
    shares = " / ".join(f"{100 * model[outcome]:.0f}" for outcome in outcomes)
    return f"<br>{shares} % won, tied, lost"


def _figures(drawn: Mapping[str, str], not_drawn: Mapping[str, str]) -> str:
    parts = [
        f"![{spec.name}]({drawn[spec.name]})\n\n*{spec.caption}*"
        for spec in FIGURES
        if spec.name in drawn
    ]
    if not_drawn:
        reasons = "\n".join(f"- `{name}`: {why}" for name, why in not_drawn.items())
        parts.append(f"Not drawn, for lack of data:\n\n{reasons}")
    return "\n\n".join(parts)


def _samples(samples: Sequence[Document]) -> str:
    if not samples:
        return "There are no samples."
    parts = [
        "Chosen by position alone: the first prompt of each use case, then the next."
    ]
    for sample in samples:
        use_case = sample.get("use_case")
        title = "" if use_case is None else f" ({code(use_case)})"
        names = [name for name in MODEL_LABELS if name in sample["responses"]]
        rows = "\n".join(_sample_row(sample, name) for name in names)
        parts.append(
            f"**Prompt**{title}\n\n<blockquote>{visible(sample['prompt'])}"
            f"</blockquote>\n\n<table>\n<tr><th>model</th><th>response</th>"
            f"<th>reward</th><th>gold score</th></tr>\n{rows}\n</table>"
        )
    return "\n\n".join(parts)


def _sample_row(sample: Document, name: str) -> str:
    def score(field: str) -> str:
        value = (sample.get(field) or {}).get(name)
        return NOT_MEASURED if value is None else f"{value:.2f}"

    text = visible(sample["responses"][name])
    if not (sample.get("ended") or {}).get(name, True):
        text += " <i>[did not end]</i>"
    return (
        f"<tr><td><b>{MODEL_LABELS[name]}</b></td><td>{text}</td>"
        f"<td>{score('rewards')}</td><td>{score('gold_scores')}</td></tr>"
    )


def _notes(report: Report) -> str:
    judge_note = _JUDGE_NOTES.get(str(report.run.evaluation.get("judge")))
    notes = _NOTES.format(claims=len(report.claims))
    return notes if judge_note is None else f"{judge_note}\n{notes}"


def _stages(
    curves: Mapping[str, Mapping[str, Curve]],
    finished: Sequence[str],
    configs: Mapping[str, Document],
) -> str:
    rows = []
    for stage, metrics in curves.items():
        last = max(int(steps[-1]) for steps, _ in metrics.values())
        rows.append(
            (
                f"`{stage}`",
                "yes" if stage in finished else "no",
                str(last),
                _first_to_last(metrics.get("loss"), share=0.1),
                _first_to_last(metrics.get("heldout/loss")),
                _first_to_last(metrics.get("heldout/score")),
            )
        )
    header = (
        "stage",
        "finished",
        "updates",
        "training loss, first and last tenth",
        "held-out loss",
        "held-out reward",
    )
    parts = [table(header, rows)] if rows else ["No stage left metrics."]
    parts += [
        f"<details><summary>config of <code>{stage}</code></summary>\n\n"
        f"```json\n{json.dumps(config, indent=2)}\n```\n\n</details>"
        for stage, config in configs.items()
    ]
    return "\n\n".join(parts)


def _first_to_last(curve: Curve | None, share: float = 0.0) -> str:
    """Means of a share of the values at each end, at least of one."""
    if curve is None:
        return NOT_MEASURED
    count = max(1, int(share * len(curve[1])))
    return f"{curve[1][:count].mean():.3f} → {curve[1][-count:].mean():.3f}"
