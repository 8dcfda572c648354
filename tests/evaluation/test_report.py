import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib._pylab_helpers
import matplotlib.image
import numpy as np
import pytest

import rlhf_jax.evaluation.report
from rlhf_jax.evaluation.claims import CLAIMS
from rlhf_jax.evaluation.figures import (
    FIGURES,
    draw_reward_accuracy,
    draw_win_rates,
)
from rlhf_jax.evaluation.measurements import RunData
from rlhf_jax.evaluation.plotting import smooth
from rlhf_jax.evaluation.report import (
    choose_samples,
    load_run,
    read_samples,
    write_report,
)
from rlhf_jax.evaluation.report_text import _first_to_last, _outcomes
from rlhf_jax.evaluation.reward_model_section import reward_model_section
from rlhf_jax.evaluation.training_figures import draw_frontier

METADATA = (
    "follows_instruction",
    "meets_constraints",
    "invents_facts",
    "inappropriate",
)
MODELS = {
    # gold score, reward, win rate, KL, length, EOS rate, pre-training loss, metadata
    "gpt": (-1.6, -1.9, 0.08, None, 46.0, 0.12, 2.31, (0.11, 0.08, 0.42, 0.13)),
    "gpt_few_shot": (-0.7, -0.8, 0.24, None, 33.0, 0.61, 2.31, (0.47, 0.31, 0.4, 0.11)),
    "sft": (0.31, 0.1, 0.5, 3.1, 24.0, 0.97, 2.52, (0.8, 0.58, 0.27, 0.06)),
    "sft_rl": (0.22, 0.0, 0.47, 0.0, 25.0, 0.96, 2.36, (0.78, 0.55, 0.28, 0.07)),
    "ppo": (0.95, 1.4, 0.71, 7.9, 29.0, 0.99, 2.55, (0.92, 0.79, 0.14, 0.02)),
    "ppo_ptx": (0.9, 1.3, 0.69, 7.1, 28.0, 0.99, 2.39, (0.91, 0.77, 0.15, 0.02)),
}


def est(mean: float, half: float, n: int = 300) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def rate(mean: float, n: int = 300) -> dict[str, Any]:
    half = 1.96 * np.sqrt(mean * (1 - mean) / n) + 0.004
    low, high = max(mean - half, 0.0), min(mean + half, 1.0)
    return {"mean": mean, "low": low, "high": high, "n": n}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluation_of_models() -> dict[str, Any]:
    models = {}
    for name, (gold, reward, win, kl, length, eos, loss, labels) in MODELS.items():
        models[name] = {
            "gold_score": est(gold, 0.12),
            "reward": est(reward, 0.15),
            "win_rate_vs_sft": rate(win),
            "wins": win - 0.05,
            "ties": 0.1,
            "losses": 0.95 - win,
            "kl_to_reference": None if kl is None else est(kl, 0.1 + 0.05 * kl),
            "response_length": est(length, 1.4),
            "eos_rate": rate(eos),
            "pretrain_loss": est(loss, 0.06, n=80),
            "metadata": {k: rate(x) for k, x in zip(METADATA, labels, strict=True)},
        }
    gains = {
        "gpt_few_shot-gpt": est(0.9, 0.14),
        "sft-gpt_few_shot": est(1.01, 0.13),
        "ppo-sft": est(0.64, 0.1),
        "ppo_ptx-sft": est(0.59, 0.1),
    }
    return {
        "judge": "simulated labelers",
        "num_prompts": 300,
        "num_samples": 1,
        "temperature": 1.0,
        "seed": 0,
        "models": models,
        "differences": {
            "pretrain_loss": {
                "ppo-sft_rl": est(0.19, 0.012, n=80),
                "ppo_ptx-sft_rl": est(0.03, 0.006, n=80),
                "ppo-ppo_ptx": est(0.16, 0.011, n=80),
            },
            "gold_score": gains,
            "reward": gains,
            "metadata": {
                label: {
                    f"ppo-{x}": est(MODELS["ppo"][7][n] - MODELS[x][7][n], 0.04)
                    for x in ("gpt_few_shot", "sft")
                }
                for n, label in enumerate(METADATA)
            },
        },
    }


def evaluation_of_rewards() -> dict[str, Any]:
    edges = [0.0, 0.21, 0.55, 1.04, 1.8, 5.2]
    lengths = [-41.0, -9.0, -2.0, 3.0, 11.0, 44.0]
    bins = list(zip(edges[:-1], edges[1:], (0.55, 0.63, 0.71, 0.8, 0.88), strict=True))
    by_length = list(
        zip(lengths[:-1], lengths[1:], (0.6, 0.68, 0.75, 0.77, 0.8), strict=True)
    )

    def part(values: list[tuple[float, float, float]]) -> list[dict[str, Any]]:
        return [{"low": a, "high": b, "accuracy": rate(x, 200)} for a, b, x in values]

    return {
        "accuracy": {
            "train": rate(0.755, 3000),
            "held_out_prompts": rate(0.731, 900),
            "held_out_labelers": rate(0.722, 700),
        },
        "length_baseline": {
            "train": rate(0.56, 3000),
            "held_out_prompts": rate(0.55, 900),
            "held_out_labelers": rate(0.57, 700),
        },
        "agreement": {
            "train_labelers": rate(0.735, 500),
            "held_out_labelers": rate(0.741, 400),
        },
        "by_labeler": {"amber": rate(0.74), "basil": rate(0.72)},
        "by_margin": part(bins),
        "by_length": part(by_length),
        "by_file": {
            "rankings_valid.jsonl": {
                "accuracy": rate(0.73),
                "length_baseline": rate(0.55),
            }
        },
    }


def loss_lines(
    rng: np.random.Generator, steps: int, first: float, last: float, held_out: float
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        mean = last + (first - last) * np.exp(-5 * step / steps)
        lines.append({"step": step, "loss": mean + 0.03 * rng.normal()})
        if step % (steps // 8) == 0 or step == 1:
            lines.append({"step": step, "heldout/loss": mean + held_out})
    return lines


def policy_lines(
    rng: np.random.Generator, steps: int, gain: float, tax: float
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = 1 - np.exp(-3 * step / steps)
        line = {
            "step": step,
            "objective/score": gain * done + 0.1 * rng.normal(),
            "objective/kl": 8 * done**1.6 + 0.2 * rng.normal(),
            "policy/entropy": 1.4 - 0.6 * done + 0.02 * rng.normal(),
            "rollout/length": 25 + 4 * done + 0.6 * rng.normal(),
            "rollout/eos_rate": min(1.0, 0.95 + 0.05 * done + 0.01 * rng.normal()),
        }
        if step % (steps // 6) == 0 or step == 1:
            line |= {
                "heldout/score": gain * done - 0.05,
                "heldout/kl": 8 * done**1.6,
                "heldout/length": 25 + 4 * done,
                "heldout/eos_rate": 0.95 + 0.05 * done,
                "heldout/pretrain_loss": 2.36 + tax * done,
            }
        lines.append(line)
    return lines


def write_run(run: Path) -> Path:
    """A run as its stages leave it, with the numbers of a plausible outcome."""
    rng = np.random.default_rng(0)
    for stage, steps, first, last, held_out in (
        ("pretrain", 400, 7.6, 2.2, 0.08),
        ("sft", 160, 2.6, 0.6, 0.3),
        ("sft_rl", 60, 2.6, 1.0, 0.1),
    ):
        lines = loss_lines(rng, steps, first, last, held_out)
        write_lines(run / stage / "metrics.jsonl", lines)
    lines = loss_lines(rng, 90, 0.72, 0.52, 0.0)
    lines = [{**x, "accuracy": 0.7} for x in lines if "loss" in x]
    lines[-1]["heldout/accuracy"] = 0.73
    write_lines(run / "reward_model" / "metrics.jsonl", lines)
    for stage, gain, tax in (("ppo", 1.45, 0.19), ("ppo_ptx", 1.35, 0.03)):
        lines = policy_lines(rng, 120, gain, tax)
        write_lines(run / stage / "metrics.jsonl", lines)
        config = {"stage": stage, "config": {"kl_coef": 0.02}, "parents": {}}
        write_json(run / stage / "config.json", config)
        write_json(run / stage / "done.json", {})
    write_json(run / "evaluate/evaluation.json", evaluation_of_models())
    write_json(run / "reward_model/evaluation.json", evaluation_of_rewards())
    cases = ("open_qa", "open_qa", "summarization", "chat", "rewrite")
    write_lines(
        run / "evaluate/samples.jsonl", [sample(c, i) for i, c in enumerate(cases)]
    )
    return run


def sample(use_case: str, index: int) -> dict[str, Any]:
    return {
        "prompt": f"Prompt {index}: what is <b>the capital</b> of Zoria?\nBe brief.",
        "use_case": use_case,
        "responses": {name: f"{name} | says *this*\n\nat {index}" for name in MODELS},
        "ended": {name: name != "gpt" for name in MODELS},
        "rewards": {name: MODELS[name][1] for name in MODELS},
        "gold_scores": {name: MODELS[name][0] for name in MODELS},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("run"))
    write_report(run)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run, without its report."""
    copy = tmp_path / "run"
    shutil.copytree(made, copy, ignore=shutil.ignore_patterns("report.*", "figures"))
    return copy


@pytest.fixture
def text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the seconds that the figures take where a test reads only the text."""
    monkeypatch.setattr(rlhf_jax.evaluation.report, "FIGURES", ())


def test_every_figure_is_a_readable_image_that_shows_something(made: Path):
    for spec in FIGURES:
        image = matplotlib.image.imread(made / "figures" / f"{spec.name}.png")
        assert image.shape[1] >= 1000
        assert image.std() > 0.05
    assert not matplotlib._pylab_helpers.Gcf.figs


def test_markdown_names_every_claim_and_embeds_every_figure(made: Path):
    text = (made / "report.md").read_text()
    assert all(claim.statement in text for claim in CLAIMS)
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert links == [f"figures/{spec.name}.png" for spec in FIGURES]
    assert all((made / link).is_file() for link in links)


def test_json_round_trips_and_agrees_with_the_inputs(made: Path):
    report = json.loads((made / "report.json").read_text())
    assert [c["name"] for c in report["claims"]] == [c.name for c in CLAIMS]
    assert report["models"] == evaluation_of_models()["models"]
    assert report["reward_model"] == evaluation_of_rewards()
    for name in ("judge", "num_prompts", "num_samples", "temperature", "seed"):
        assert report[name] == evaluation_of_models()[name]
    assert report["figures_not_drawn"] == {}
    assert report["stages_finished"] == ["ppo", "ppo_ptx"]


def test_models_table_shows_mean_and_interval_and_marks_what_is_missing(made: Path):
    lines = (made / "report.md").read_text().splitlines()
    row = next(x for x in lines if x.startswith("| **GPT** |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "-1.600 [-1.720, -1.480]"
    assert cells[4] == "–"


def test_tables_have_as_many_cells_in_every_row(made: Path):
    for block in (made / "report.md").read_text().split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


@pytest.mark.usefixtures("text_only")
def test_text_of_models_stays_text(run: Path):
    hostile = sample("chat", 0)
    hostile["responses"]["ppo"] = "<script>x</script>\n\n| a | b |\x07"
    hostile["responses"]["sft"] = ""
    write_lines(run / "evaluate/samples.jsonl", [hostile])
    text = write_report(run).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;x&lt;/script&gt;<br><br>| a | b |\\x07" in text
    assert "[empty]" in text


def test_writing_again_gives_the_same_and_leaves_no_partial_files(made: Path):
    files = [made / "report.md", made / "report.json", *made.glob("figures/*")]
    before = [file.read_bytes() for file in files]
    write_report(made)
    assert [file.read_bytes() for file in files] == before
    assert not list(made.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("lost", "not_drawn"),
    [
        (
            ("reward_model/evaluation.json", "pretrain/metrics.jsonl"),
            {"reward_accuracy"},
        ),
        (
            ("evaluate/evaluation.json", "evaluate/samples.jsonl", "ppo/metrics.jsonl"),
            {"win_rates", "metadata", "alignment_tax", "lengths"},
        ),
    ],
)
def test_a_run_that_came_only_so_far_is_reported_so_far(run: Path, lost, not_drawn):
    (run / "figures").mkdir()
    for name in not_drawn:  # left by an earlier report, whose data is gone
        (run / "figures" / f"{name}.png").touch()
    for path in lost:
        (run / path).unlink()
    text = write_report(run).read_text()
    report = json.loads((run / "report.json").read_text())
    assert set(report["figures_not_drawn"]) == not_drawn
    for name in not_drawn:
        assert not (run / "figures" / f"{name}.png").exists()
        assert report["figures_not_drawn"][name] in text


def test_real_data_has_no_gold_labeler_and_says_so(run: Path):
    document = evaluation_of_models()
    document["judge"] = "reward model"
    document["differences"]["gold_score"] = None
    for model in document["models"].values():
        model["gold_score"] = model["metadata"] = None
    write_json(run / "evaluate/evaluation.json", document)
    rewards = evaluation_of_rewards()
    rewards["agreement"] = rewards["by_margin"] = rewards["by_labeler"] = None
    rewards["accuracy"]["held_out_labelers"] = None
    write_json(run / "reward_model/evaluation.json", rewards)
    text = write_report(run).read_text()
    report = json.loads((run / "report.json").read_text())
    assert set(report["figures_not_drawn"]) == {"metadata"}
    assert "trainer and judge at once" in text
    verdicts = {c["name"]: c["verdict"] for c in report["claims"]}
    assert verdicts["ppo_beats_sft"] == "inconclusive"
    assert verdicts["ppo_raises_reward"] == "holds"


@pytest.mark.usefixtures("text_only")
def test_models_that_were_not_trained_are_not_invented(run: Path):
    document = evaluation_of_models()
    for name in ("gpt_few_shot", "ppo_ptx"):
        del document["models"][name]
    write_json(run / "evaluate/evaluation.json", document)
    text = write_report(run).read_text()
    models = text.split("## Models")[1].split("## Figures")[0]
    assert "PPO-ptx" not in models
    assert "**PPO**" in models


def test_one_value_alone_is_drawn_and_told_without_an_interval(run: Path):
    document = evaluation_of_models()
    alone = {"mean": 1.4, "low": None, "high": None, "n": 1}
    document["models"]["ppo"]["reward"] = alone
    document["models"]["ppo"]["win_rate_vs_sft"] = {**alone, "mean": 0.7}
    write_json(run / "evaluate/evaluation.json", document)
    assert "1.400 [no interval, n = 1]" in write_report(run).read_text()


def test_metrics_of_a_killed_and_resumed_run_make_one_curve(run: Path):
    path = run / "pretrain/metrics.jsonl"
    lines = [{"step": s, "loss": float(s)} for s in (1, 2, 3, 2, 3, 4)]
    write_lines(path, lines)
    path.write_text(path.read_text() + '{"step": 5, "tra')
    steps, values = load_run(run).curves["pretrain"]["loss"]
    assert steps.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_an_empty_run_is_refused_with_the_way_out(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="experiments.instructgpt"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "samples.jsonl:2: not JSON"),
        ('{"prompt": "x"}', ":2: no field 'responses'"),
    ],
)
def test_a_bad_sample_names_file_line_and_field(tmp_path: Path, line, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(sample("chat", 0)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_samples(path)


def test_samples_are_the_first_of_each_use_case_then_the_first_of_the_rest():
    cases = ["a", "a", "b", "a", "c"]
    samples = [sample(case, index) for index, case in enumerate(cases)]
    chosen = [samples.index(s) for s in map(dict, choose_samples(samples, 4))]
    assert chosen == [0, 1, 2, 4]
    assert choose_samples(samples, 2) == [samples[0], samples[2]]
    assert choose_samples(samples, 9) == samples


def test_numbers_of_the_report_are_what_their_columns_say():
    told = _outcomes({"wins": 0.5, "ties": 0.2, "losses": 0.3})
    assert told == "<br>50 / 20 / 30 % won, tied, lost"
    assert _first_to_last((np.arange(20), np.arange(20.0)), 0.1) == "0.500 → 18.500"
    steps, values = smooth((np.arange(4), 2.0 * np.arange(4)), 2)
    assert steps.tolist() == [0.5, 1.5, 2.5] and values.tolist() == [1.0, 3.0, 5.0]
    curve = lambda *ys: (np.arange(len(ys)), np.array(ys, float))  # noqa: E731
    curves = {"heldout/kl": curve(0, 4, 9), "heldout/score": curve(0, 1, 2)}
    figure = draw_frontier(RunData({}, {}, {"ppo": curves}))
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [0.0, 2.0, 3.0]


def test_reward_model_table_and_figures_show_each_number_where_it_belongs():
    reward = {
        "accuracy": {"held_out_prompts": rate(0.71), "held_out_labelers": rate(0.72)},
        "length_baseline": {"held_out_prompts": rate(0.53)},
        "agreement": {"train_labelers": rate(0.74), "held_out_labelers": rate(0.75)},
    }
    rows = reward_model_section(reward).splitlines()
    row = next(x for x in rows if x.startswith("| held-out prompts"))
    for share, cell in zip(("71.0", "53.0", "74.0"), row.split("|")[2:5], strict=True):
        assert f"{share} %" in cell
    axis = draw_reward_accuracy(RunData({}, reward, {})).axes[0]
    drawn = {c.get_label(): c.lines[0].get_ydata().tolist() for c in axis.containers}
    assert drawn["labelers among themselves"] == [0.74, 0.75]
    models = {x: {"win_rate_vs_sft": rate(y)} for x, y in (("sft", 0.5), ("ppo", 0.8))}
    axis = draw_win_rates(RunData({"models": models}, {}, {})).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0.8]
