"""Presets are consistent before anything runs, and hold the constants they name."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import instructgpt
from experiments.presets import PRESETS
from experiments.run import parse
from rlhf_jax.data.inputs import FilesConfig, Inputs
from rlhf_jax.data.simulation import SimulationConfig, write_campaign
from rlhf_jax.data.sources import DataError
from rlhf_jax.stages.common import Context
from rlhf_jax.training.mesh import MeshConfig


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_its_model_and_one_device(name: str) -> None:
    dataclasses.replace(PRESETS[name][1], data=Path("data")).check(num_devices=1)


def option(cfg: Any, path: str, value: Any) -> Any:
    """The config with the field at a dotted path replaced."""
    name, _, rest = path.partition(".")
    inner = option(getattr(cfg, name), rest, value) if rest else value
    return dataclasses.replace(cfg, **{name: inner})


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("ppo.ptx_len", 129, "ppo.ptx_len is 129 tokens"),
        ("evaluate.text_len", 129, "evaluate.text_len"),
        ("evaluate.prompt_len", 120, "evaluate.prompt_len + evaluate.sampling"),
        ("seed", -1, "seed must be from 0 to 2**32 - 1, got -1"),
        ("seed", 2**32, "seed must be from 0 to 2**32 - 1"),
        ("sft.dropout", 1.0, "dropout must be in [0, 1), got 1.0"),
        ("collect.labelers_per_heldout_prompt", 0, "heldout_prompt must be at least 1"),
        ("sft.seq_len", 24, "sft.seq_len 24 leaves no room"),
        ("evaluate.num_few_shot", 6, "evaluate.num_few_shot is 6"),
        ("pretrain.model.vocab_size", 300, "vocab_size has no effect; the tokenizer"),
        ("pretrain.model.document_end", 7, "document_end has no effect; --pretrain.s"),
        ("collect.ranked", Path("nowhere.jsonl"), "collect.ranked: nowhere.jsonl"),
        ("ppo.eval_prompts", 0, "ppo.eval_prompts must be at least 1"),
        ("ppo_ptx.loop.eval_every", -1, "eval_every must be at least 1"),
        ("pretrain.num_microbatches", 0, "pretrain.num_microbatches"),
        ("tokenizer.vocab_size", 0, "tokenizer.vocab_size must be at least 1"),
        ("pretrain.batch_size", 12, "pretrain: batches of 12 rows"),
        ("ppo_ptx.ptx_per_episode", 0, "ptx_per_episode must be at least 1"),
        ("ppo.num_slots", 0, "ppo.num_slots must be at least 1"),
        ("ppo_ptx.num_slots", 4, "ppo_ptx.num_slots takes prompts in turn on one"),
        ("mesh.tensor", 3, "mesh: tensor = 3 does not divide the 8 devices"),
        ("mesh.fsdp", 16, "mesh: fsdp = 16 does not divide the 8 devices"),
        ("ppo.clip", -1.0, "clip must be in (0, inf], got -1.0"),
    ],
)
def test_what_would_fail_late_is_refused_before_anything_runs(
    path: str, value: Any, named: str
) -> None:
    with pytest.raises((DataError, ValueError), match=re.escape(named)):
        option(PRESETS["default"][1], path, value).check(num_devices=8)


def test_a_simulation_may_hold_no_labeler_out() -> None:
    preset = PRESETS["default"][1]
    option(preset, "simulation.num_held_out_labelers", 0).check(num_devices=1)


@pytest.mark.parametrize("path", ["sft.batch_size", "reward_model.batch_size"])
def test_batches_that_processes_cannot_share_are_refused(path: str) -> None:
    preset = PRESETS["smoke"][1]
    preset.check(num_devices=2, num_processes=2)
    with pytest.raises(DataError, match="15 cannot be dealt over 2 processes"):
        option(preset, path, 15).check(num_devices=2, num_processes=2)


def test_rows_are_dealt_over_data_and_fsdp_not_over_tensor() -> None:
    preset = option(PRESETS["default"][1], "ppo.num_slots", 4)
    option(preset, "mesh.tensor", 8).check(num_devices=8)
    preset = option(PRESETS["default"][1], "pretrain.batch_size", 12)
    option(preset, "mesh.tensor", 2).check(num_devices=8)


@pytest.mark.parametrize("name", ["default", "smoke", "cpu", "gpu"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_presets_fit_several_devices(name: str, devices: int) -> None:
    dataclasses.replace(PRESETS[name][1], data=Path("data")).check(devices)


def test_the_readmes_commands_for_several_hosts_are_accepted() -> None:
    """Two nodes of eight GPUs with fsdp; a TPU slice of four hosts with four chips."""
    text = (Path(__file__).parents[1] / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"experiments\.instructgpt (gpu .*--run /shared/\S+\w)", text)
    for command, processes in zip(commands, (2, 4), strict=True):
        cfg = parse("experiments.instructgpt", "", command.split())
        cfg.check(num_devices=16, num_processes=processes)


def test_ziegler_makes_the_published_number_of_gradient_steps() -> None:
    ppo = PRESETS["ziegler"][1].ppo
    assert ppo.num_iterations == math.ceil(1_000_000 / ppo.batch_size) == 1954
    steps = ppo.num_iterations * ppo.num_epochs * ppo.num_minibatches
    assert steps == 7816  # the released code
    assert (ppo.kl_coef, ppo.kl_target, ppo.sampling.temperature) == (0.15, 6.0, 0.7)
    assert ppo.value_optimizer == ppo.policy_optimizer  # one for trunk and heads
    assert ppo.value == "shared" and ppo.missing_eos_score == -1.0


def test_stiennon_has_a_value_model_and_a_fixed_coefficient() -> None:
    ppo = PRESETS["stiennon"][1].ppo
    assert (ppo.kl_coef, ppo.kl_target, ppo.value) == (0.05, None, "separate")
    assert ppo.policy_optimizer.learning_rate == 1.5e-5
    assert ppo.policy_optimizer.final_fraction == 0.0


@pytest.mark.parametrize("name", ["gpu", "gpt3-175b"])
def test_ppo_defaults_are_instructgpts(name: str) -> None:
    cfg = PRESETS[name][1]
    for ppo in (cfg.ppo, cfg.ppo_ptx):
        assert ppo.num_iterations * ppo.batch_size == 256_000
        assert (ppo.num_epochs, ppo.num_minibatches, ppo.clip) == (1, 8, 0.2)
        assert (ppo.kl_coef, ppo.ema_decay, ppo.sampling.temperature) == (
            0.02,
            0.992,
            1.0,
        )
    assert (cfg.ppo.ptx_coef, cfg.ppo_ptx.ptx_coef) == (0.0, 27.8)
    assert cfg.ppo_ptx.ptx_per_episode == 8


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_the_grammar_has_prompts_enough_for_the_default_campaign(
    seed: int, tmp_path: Path
) -> None:
    cfg = dataclasses.replace(
        PRESETS["default"][1].simulation,
        seed=seed,
        num_documents=1,
        num_valid_documents=1,
    )
    write_campaign(cfg, tmp_path)  # raises where a use case is used up
    ranked = tmp_path / "prompts" / "simulation_rank_train.jsonl"
    assert len(ranked.read_text().splitlines()) == cfg.num_ranking_prompts


def test_a_preset_after_the_options_is_told_where_it_belongs() -> None:
    with pytest.raises(SystemExit, match="the preset comes first: .*ppo smoke"):
        parse("experiments.ppo", "", ["--seed", "1", "smoke"])
    with pytest.raises(SystemExit, match="the preset comes first"):
        parse("experiments.ppo", "", ["cpu", "--seed=1", "smoke"])
    cfg = parse("experiments.ppo", "", ["smoke", "--run", "cpu"])
    assert cfg.run == Path("cpu")  # a value, though a preset has that name


def test_an_error_begins_and_ends_a_line_whatever_other_threads_write(
    tmp_path: Path,
) -> None:
    """Where a disk is full Orbax's threads still print: they may be within a line."""
    program = (
        "import sys\n"
        "from experiments.run import main\n"
        "from rlhf_jax.data.sources import DataError\n"
        "def stages(cfg, context):\n"
        "    sys.stderr.write('half a line')\n"
        "    raise DataError('lost')\n"
        "main('program', '', stages)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "smoke", "--run", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("half a line\nerror: lost\n"), done.stderr


@pytest.mark.parametrize("missing", ["demonstrations/x_valid.jsonl", None])
def test_the_whole_run_takes_rankings_and_comparisons_split_by_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    """Rankings to train on beside held-out comparisons are all it needs."""
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    told = {"prompt": "p", "response": "a"}
    lines = {
        "rankings/x.jsonl": {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]},
        "comparisons/x_valid.jsonl": pair,
        "demonstrations/x.jsonl": told,
        "demonstrations/x_valid.jsonl": told,
        "prompts/ppo.jsonl": {"prompt": "p"},
        "prompts/eval_test.jsonl": {"prompt": "p"},
    }
    for name, line in lines.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(line) + "\n")
    (tmp_path / "corpus").mkdir()
    for name in ("x.txt", "x_valid.txt"):
        (tmp_path / "corpus" / name).write_text("some text\n")
    if missing is not None:
        (tmp_path / missing).unlink()

    class Checked(Exception):
        pass

    def pretrain(*_: Any) -> None:
        raise Checked

    monkeypatch.setattr(instructgpt.pretrain, "run", pretrain)
    run = tmp_path / "run"
    inputs = Inputs(tmp_path, FilesConfig(), SimulationConfig(), run)
    ctx = Context(run, inputs, MeshConfig().make(), 0)
    cfg = dataclasses.replace(PRESETS["smoke"][1], data=tmp_path)
    refused = pytest.raises(DataError, match="split 'valid' matches demonstrations")
    with pytest.raises(Checked) if missing is None else refused:
        instructgpt.stages(cfg, ctx)
