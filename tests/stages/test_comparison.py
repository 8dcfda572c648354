"""Models side by side: labels and their differences against a loop over prompts."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data import simulation
from rlhf_jax.data.records import Ranking
from rlhf_jax.stages import evaluate
from rlhf_jax.stages import rankings as stage_rankings
from rlhf_jax.stages.comparison import METADATA, judge_results, summarize
from rlhf_jax.stages.evaluate import MODELS

PROMPTS, SAMPLES = 40, 2
CONTEXT: Any = SimpleNamespace(inputs=SimpleNamespace(simulated=False), seed=0)


@pytest.fixture
def results() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    constrained = rng.random(PROMPTS) < 0.4

    def table(draw) -> list[list[Any]]:
        return [[draw(n) for n in range(PROMPTS)] for _ in range(SAMPLES)]

    def label(n: int, rate: float) -> dict[str, Any]:
        labels = {given: bool(rng.random() < rate) for given, _ in METADATA.values()}
        return labels if constrained[n] else labels | {"violates_constraint": None}

    number = lambda n: float(rng.normal())  # noqa: E731
    return {
        name: {
            "gold": table(number),
            "rewards": table(number),
            "kl": table(number),
            "lengths": table(number),
            "ended": table(lambda n: True),
            "preferences": table(lambda n: [1.0]),
            "labels": table(lambda n, rate=0.1 + 0.1 * i: label(n, rate)),
            "pretrain_losses": [2.0, 2.1],
        }
        for i, name in enumerate(MODELS)
    }


@pytest.mark.parametrize("name", METADATA)
def test_labels_and_their_differences_are_means_over_prompts_that_have_them(
    results, name
):
    report = summarize(results, PROMPTS, SAMPLES, 1.0, CONTEXT)
    given, contrary = METADATA[name]

    def rates(model: str) -> list[float]:
        found = []
        for n in range(PROMPTS):
            values = [sample[n][given] for sample in results[model]["labels"]]
            if None not in values:
                found.append(np.mean([x != contrary for x in values]))
        return found

    for model in MODELS:
        estimate = report["models"][model]["metadata"][name]
        assert estimate["mean"] == pytest.approx(np.mean(rates(model)))
    for other in ("gpt_few_shot", "sft"):
        estimate = report["differences"]["metadata"][name][f"ppo-{other}"]
        pairs = np.subtract(rates("ppo"), rates(other))
        assert estimate["mean"] == pytest.approx(pairs.mean())
        assert estimate["n"] == len(pairs) < PROMPTS + (name != "meets_constraints")
        normal = 1.96 * pairs.std() / len(pairs) ** 0.5
        assert estimate["high"] - estimate["low"] == pytest.approx(2 * normal, rel=0.3)


@pytest.mark.parametrize("held_out", [0, 2])
def test_the_judge_that_is_named_is_the_one_that_judged(tmp_path, held_out):
    """Without held-out labelers PPO's own reward model compares, and says so."""
    cfg = simulation.SimulationConfig(
        num_documents=1, num_valid_documents=1, num_held_out_labelers=held_out
    )
    simulation.write_campaign(cfg, tmp_path)
    inputs = SimpleNamespace(simulated=True, root=tmp_path)
    ctx: Any = SimpleNamespace(inputs=inputs, seed=0, data_seed=lambda name: 0)
    (file,) = (tmp_path / "prompts").glob("*eval*")
    prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()[:2]]
    results: dict[str, Any] = {
        name: {
            "texts": [["Apple.", "Apple."]],
            "ended": [[True, True]],
            "rewards": [[float(i), -float(i)]],
            "kl": [None],
            "lengths": [[2, 2]],
            "pretrain_losses": [2.0, 2.0],
        }
        for i, name in enumerate(MODELS)
    }
    judge_results(results, prompts, ctx)
    report = summarize(results, 2, 1, 1.0, ctx)
    judge = "simulated labelers" if held_out else "reward model"
    assert report["judge"] == judge
    of_ppo = np.array(results["ppo"]["preferences"])
    assert of_ppo.shape == (1, 2, held_out or 1)
    if not held_out:  # the reward model's own order
        np.testing.assert_array_equal(of_ppo[0, :, 0], [1.0, -1.0])


@pytest.mark.parametrize(
    ("examples", "steps"),
    [(8, [0]), (5, [0]), (17, [0, 1]), (25, [0, 1, 2]), (73, [0, 3, 6])],
)
def test_text_is_measured_by_whole_batches_of_all_of_it(monkeypatch, examples, steps):
    """The last one's few tokens would weigh as much as all of another's, and the first
    ones would be those of the first document."""
    read = []
    text: Any = lambda step: read.append(step)  # noqa: E731
    measurer = object.__new__(evaluate.Measurer)
    measurer._cfg = SimpleNamespace(text_batches=3)  # type: ignore[assignment]
    measurer._ctx = SimpleNamespace(mesh=None)  # type: ignore[assignment]
    measurer._text = text
    measurer._sums = lambda params, batch: (-4.0, 2.0)
    text.num_examples = examples
    for name in ("pad_rows", "shard_batch", "num_local_shards"):
        monkeypatch.setattr(evaluate, name, lambda *_: None)
    assert measurer._pretrain_losses(None) == [2.0] * len(steps)
    assert read == steps


def test_a_label_that_no_prompt_has_is_no_estimate(results):
    for model in results.values():
        for sample in model["labels"]:
            for labels in sample:
                labels["violates_constraint"] = None
    report = summarize(results, PROMPTS, SAMPLES, 1.0, CONTEXT)
    assert report["models"]["ppo"]["metadata"]["meets_constraints"] is None
    assert report["differences"]["metadata"]["meets_constraints"]["ppo-sft"] is None


def test_a_reward_that_is_not_a_number_is_no_missing_one(results):
    results["ppo"]["rewards"][0][3] = float("nan")
    with pytest.raises(ValueError, match="value 3 of 40 is nan"):
        summarize(results, PROMPTS, SAMPLES, 1.0, CONTEXT)


def test_a_labeler_of_training_is_known_however_late_he_comes(monkeypatch):
    """Training rankings are cut for the report, those who made them are not."""

    def ranking(n: int, labeler: str) -> Ranking:
        return Ranking(f"p{n}", ("x", "y"), (1, 2), (True, True), labeler)

    files = {
        "train": [ranking(n, "anna") for n in range(128)] + [ranking(999, "carl")],
        "valid": [ranking(1000, "anna")],
        "test": [ranking(1001, "carl")],
    }
    monkeypatch.setattr(
        stage_rankings, "read_rankings", lambda ctx, split: {split: files[split]}
    )
    counted = []

    class Scorer:
        def encode(self, records):
            counted.append(len(records))
            return SimpleNamespace(kept=records, records=list(records))

        def __call__(self, params, encoded):
            scores = [np.array([1.0, 0.0]) for _ in encoded.kept]
            return scores, np.arange(2 * len(scores))

    report = stage_rankings.evaluate_rankings(Scorer(), None, CONTEXT)  # type: ignore
    assert counted == [128, 1, 1]
    train = report["by_file"]["train"]
    assert (train["num_rankings"], train["num_rankings_read"]) == (128, 129)
    assert (
        "test" in report["accuracy"] and "held_out_labelers" not in report["accuracy"]
    )


def test_differences_have_the_sign_of_their_name(results):
    results["ppo"]["pretrain_losses"] = [3.0, 3.2]
    report = summarize(results, PROMPTS, SAMPLES, 1.0, CONTEXT)
    for name, key in (
        ("gold_score", "gold"),
        ("reward", "rewards"),
        ("pretrain_loss", "pretrain_losses"),
    ):
        for pair, found in report["differences"][name].items():
            a, b = pair.split("-")
            expected = np.mean(results[a][key]) - np.mean(results[b][key])
            assert found["mean"] == pytest.approx(expected), pair
    assert report["differences"]["pretrain_loss"]["ppo-sft_rl"]["mean"] > 0.9


def test_a_tie_is_half_a_win(results):
    rng = np.random.default_rng(1)
    table = rng.choice([-1.0, 0.0, 1.0], (SAMPLES, PROMPTS, 3), p=[0.5, 0.2, 0.3])
    results["ppo"]["preferences"] = table.tolist()
    found = summarize(results, PROMPTS, SAMPLES, 1.0, CONTEXT)["models"]["ppo"]
    shares = [(table == x).mean() for x in (1.0, 0.0, -1.0)]
    assert [found[x] for x in ("wins", "ties", "losses")] == pytest.approx(shares)
    assert found["win_rate_vs_sft"]["mean"] == pytest.approx(shares[0] + shares[1] / 2)


def test_held_out_labelers_prefer_the_better_response(tmp_path):
    cfg = simulation.SimulationConfig(num_documents=1, num_valid_documents=1)
    simulation.write_campaign(cfg, tmp_path)
    _, _, judge, people = simulation.load_campaign(tmp_path)
    inputs = SimpleNamespace(simulated=True, root=tmp_path)
    ctx: Any = SimpleNamespace(inputs=inputs, seed=0, data_seed=lambda name: 0)
    (file,) = (tmp_path / "prompts").glob("*eval*")
    prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()[:9]]
    rng = np.random.default_rng(0)
    good = [people[0].demonstrate(prompt, rng) for prompt in prompts]
    results: dict[str, Any] = {
        name: {
            "texts": [good if name == "ppo" else ["Shut up, fool."] * 9],
            "ended": [[name != "gpt"] * 9],
            "rewards": [[0.0] * 9],
        }
        for name in MODELS
    }
    judge_results(results, prompts, ctx)
    of = {name: np.array(results[name]["preferences"]).mean() for name in MODELS}
    assert of["ppo"] > 0.8 and of["sft"] == 0.0 > of["gpt"]
    for name, ended in (("gpt", False), ("sft", True)):
        expected = [judge.gold_score(p, "Shut up, fool.", ended) for p in prompts]
        assert results[name]["gold"] == [expected]
