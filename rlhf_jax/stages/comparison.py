"""The models of a run side by side: judged samples, estimates, lines to read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import simulation
from rlhf_jax.evaluation.statistics import (
    mean_estimate,
    rate_difference,
    rate_estimate,
)
from rlhf_jax.stages.common import Context

DIFFERENCES = {
    "gold_score": (
        ("gpt_few_shot", "gpt"),
        ("sft", "gpt_few_shot"),
        ("ppo", "sft"),
        ("ppo_ptx", "sft"),
    ),
    "pretrain_loss": (("ppo", "sft_rl"), ("ppo_ptx", "sft_rl"), ("ppo", "ppo_ptx")),
    "metadata": (("ppo", "gpt_few_shot"), ("ppo", "sft")),
}
METADATA = {  # in the report -> of the labelers, and whether it is their contrary
    "follows_instruction": ("fails_instruction", True),
    "meets_constraints": ("violates_constraint", True),
    "invents_facts": ("hallucination", False),
    "inappropriate": ("inappropriate", False),
}


def judge_results(
    results: dict[str, Any], prompts: Sequence[str], ctx: Context
) -> None:
    """Adds gold scores, metadata labels and preferences over SFT to every model.

    Each prompt's preference is the mean over the simulated labelers who are held out,
    who rank the model's response against SFT's; where there are none, the reward model
    judges. A tie counts half.
    """
    judge, labelers = _judges(ctx)
    sft = results["sft"]
    for model in results.values():
        num_samples = len(model["texts"])
        model["gold"], model["labels"], model["preferences"] = [], [], []
        for s in range(num_samples):
            rows = list(zip(prompts, model["texts"][s], model["ended"][s], strict=True))
            if judge is not None:
                model["gold"].append([judge.gold_score(*row) for row in rows])
                model["labels"].append([judge.metadata_labels(*row) for row in rows])
            if labelers:
                rng = np.random.default_rng(ctx.data_seed(f"evaluate/judge/{s}"))
                preferences = []
                for n, (prompt, text, ended) in enumerate(rows):
                    pair = ([text, sft["texts"][s][n]], [ended, sft["ended"][s][n]])
                    ranks = [x.rank(prompt, *pair, rng) for x in labelers]
                    preferences.append([float(np.sign(b - a)) for a, b in ranks])
            else:
                margins = np.subtract(model["rewards"][s], sft["rewards"][s])
                preferences = np.sign(margins)[:, None].tolist()
            model["preferences"].append(preferences)


def summarize(
    results: dict[str, Any],
    num_prompts: int,
    num_samples: int,
    temperature: float,
    ctx: Context,
) -> dict[str, Any]:
    """Estimates with intervals, clustered by prompt, as the report reads them."""

    def estimate(values: Any) -> Any:
        """Of [samples][prompts] values, any of them in one unit."""
        return mean_estimate(np.mean(values, axis=0)).to_json()

    def rate(values: np.ndarray) -> Any:
        """Of [samples, prompts] values in [0, 1]; a prompt may have none, NaN."""
        means = values.mean(axis=0)
        given = ~np.isnan(means)
        return rate_estimate(means[given]).to_json() if given.any() else None

    models = {}
    for name, model in results.items():
        preferences = np.asarray(model["preferences"])  # [samples, prompts, judges]
        models[name] = {
            "gold_score": estimate(model["gold"]) if model["gold"] else None,
            "reward": estimate(model["rewards"]),
            "win_rate_vs_sft": rate((preferences.mean(axis=2) + 1.0) / 2.0),
            "wins": float(np.mean(preferences > 0)),
            "ties": float(np.mean(preferences == 0)),
            "losses": float(np.mean(preferences < 0)),
            "kl_to_reference": None
            if model["kl"][0] is None
            else estimate(model["kl"]),
            "response_length": estimate(model["lengths"]),
            "eos_rate": rate(np.asarray(model["ended"], float)),
            "pretrain_loss": mean_estimate(model["pretrain_losses"]).to_json(),
            "metadata": None
            if not model["labels"]
            else {x: rate(_labels(model, x)) for x in METADATA},
        }

    def difference(key: str, a: str, b: str) -> Any:
        x, y = np.asarray(results[a][key]), np.asarray(results[b][key])
        if x.ndim == 2:
            x, y = x.mean(0), y.mean(0)
        return mean_estimate(x - y).to_json()

    pairs = DIFFERENCES["gold_score"]
    differences = {
        "pretrain_loss": {
            f"{a}-{b}": difference("pretrain_losses", a, b)
            for a, b in DIFFERENCES["pretrain_loss"]
        },
        "reward": {f"{a}-{b}": difference("rewards", a, b) for a, b in pairs},
    }
    if results["sft"]["gold"]:
        differences["gold_score"] = {
            f"{a}-{b}": difference("gold", a, b) for a, b in pairs
        }
        differences["metadata"] = {
            name: {
                f"{a}-{b}": _label_difference(results[a], results[b], name)
                for a, b in DIFFERENCES["metadata"]
            }
            for name in METADATA
        }
    return {
        "judge": "simulated labelers" if _judges(ctx)[1] else "reward model",
        "num_prompts": num_prompts,
        "num_samples": num_samples,
        "temperature": temperature,
        "seed": ctx.seed,
        "models": models,
        "differences": differences,
    }


def _judges(ctx: Context) -> tuple[simulation.Judge | None, list[simulation.Labeler]]:
    """Who knows the utility of a response, and the labelers PPO never met, if any."""
    if not ctx.inputs.simulated:
        return None, []
    _, _, judge, people = simulation.load_campaign(ctx.inputs.root)
    return judge, [labeler for labeler in people if labeler.held_out]


def _labels(model: dict[str, Any], name: str) -> np.ndarray:
    """[samples, prompts]: 1 where the label holds, 0 where not, NaN without one."""
    given, contrary = METADATA[name]
    rows = [[sample[given] for sample in samples] for samples in model["labels"]]
    table = np.array(rows, float)  # None is NaN
    return 1.0 - table if contrary else table


def _label_difference(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> Any:
    """Rate of a label minus another model's, prompt by prompt; None if without."""
    a, b = (_labels(model, name).mean(axis=0) for model in (ours, theirs))
    both = ~np.isnan(a - b)  # a prompt without a constraint has no label at all
    return rate_difference(a[both], b[both]).to_json() if both.any() else None


def sample_lines(
    results: dict[str, Any], prompts: Sequence[str], ctx: Context
) -> list[dict[str, Any]]:
    """The first sample of every model side by side, a line per prompt."""
    judge, _ = _judges(ctx)
    lines = []
    for n, prompt in enumerate(prompts):
        first = {name: model["texts"][0][n] for name, model in results.items()}
        lines.append(
            {
                "prompt": prompt,
                "use_case": None
                if judge is None
                else simulation.parse_prompt(prompt).use_case,
                "responses": first,
                "ended": {name: m["ended"][0][n] for name, m in results.items()},
                "rewards": {name: m["rewards"][0][n] for name, m in results.items()},
                "gold_scores": None
                if judge is None
                else {name: m["gold"][0][n] for name, m in results.items()},
            }
        )
    return lines
