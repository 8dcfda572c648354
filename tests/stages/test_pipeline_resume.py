"""The whole command, killed at random moments, ends where an undisturbed one does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.stages.common import load_model
from rlhf_jax.training.mesh import MeshConfig
from rlhf_jax.training.run_dir import StageDir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KINDS = {
    "pretrain": "language_model",
    "sft": "language_model",
    "sft_rl": "language_model",
    "reward_model": "reward_model",
    "sft_selected": "language_model",
    "ppo": "language_model",
    "ppo_ptx": "language_model",
}
# What else PPO carries from step to step: adaptive coefficient, whitened rewards.
EVERYTHING = (
    *("--ppo.kl-target", "1.0", "--ppo.kl-horizon", "100"),
    *("--ppo.whiten-rewards", "--ppo.num-iterations", "4"),
    *("--ppo.missing-eos-score", "-1.0"),
    *("--reward-model.batch-size", "2"),  # eight steps, four checkpoints
)
FILES = (
    "collect/rankings_train.jsonl",
    "collect/rankings_valid.jsonl",
    "collect/rankings_test.jsonl",
    "reward_model/evaluation.json",
    "evaluate/evaluation.json",
    "evaluate/samples.jsonl",
    "report.json",
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Starts `python -m experiments.instructgpt smoke ...` with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "RLHF_JAX_CACHE": str(cache)}

    def start(
        run: Path, *options: str, log_compiles=False, largest_file=None
    ) -> subprocess.Popen:
        limit = ()
        if largest_file is not None:  # by the shell: Python would fork to set it
            limit = ("bash", "-c", f'ulimit -f {largest_file // 1024}; exec "$@"', "_")
        return subprocess.Popen(
            [
                *limit,
                *(sys.executable, "-m", "experiments.instructgpt"),
                *("smoke", "--run", str(run), *EVERYTHING, *options),
            ],
            cwd=ROOT,
            env=environment | {"JAX_LOG_COMPILES": str(int(log_compiles))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


@pytest.fixture(scope="module")
def told(command, tmp_path_factory):
    """An undisturbed run, and what it said with every compilation logged."""
    run = tmp_path_factory.mktemp("whole") / "run"
    code, output = finish(command(run, log_compiles=True))
    assert code == 0, output
    return run, output


@pytest.fixture(scope="module")
def whole(told):
    return told[0]


def test_each_program_of_a_run_is_compiled_once(told):
    """Four supervised stages, PPO and PPO-ptx: six updates, however many steps."""
    compiled = re.findall(r"Compiling jit\((\w+)\) with global shapes", told[1])
    counts = Counter(compiled)
    print(counts)
    assert counts["train_step"] == 4 and counts["ppo_update"] == 2
    # samplers: SFT's choice of an epoch, collect and evaluate with and without
    # examples, and held-out looks of PPO; the loop has no say in their number
    assert counts["generate"] <= 6


def same_run(run: Path, other: Path) -> None:
    mesh = MeshConfig().make()
    for name, kind in KINDS.items():
        params = [
            load_model(StageDir(r / name), mesh, kind).params for r in (run, other)
        ]
        jax.tree.map(np.testing.assert_array_equal, *params)
        lines = []
        for r in (run, other):
            assert StageDir(r / name).summary() == StageDir(other / name).summary()
            path = r / name / "metrics.jsonl"
            rows = path.read_text().splitlines() if path.exists() else []
            lines.append([without_time(json.loads(row)) for row in rows])
        assert lines[0] == lines[1]
    for file in FILES:
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


def without_time(line: dict) -> dict:
    line.pop("seconds", None)
    return line


def progress(run: Path) -> int:
    """Counts what a run has written so far."""
    lines = sum(p.read_text().count("\n") for p in run.glob("*/metrics.jsonl"))
    patterns = ("*/done.json", "collect/*.jsonl", "evaluate/models/*.json")
    return lines + sum(len(list(run.glob(p))) for p in patterns)


def test_a_run_killed_at_random_moments_ends_in_the_same_parameters(
    command, whole, tmp_path
):
    seed = int.from_bytes(os.urandom(4))
    print(f"seed of the moments: {seed}")  # shown if the test fails
    rng = np.random.default_rng(seed)
    run, kills = tmp_path / "run", 0
    for _ in range(5):
        goal = progress(run) + rng.integers(1, progress(whole) // 5)
        process = command(run)
        while process.poll() is None and progress(run) < goal:
            time.sleep(0.02)
        try:
            process.communicate(timeout=rng.uniform(0.0, 2.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills >= 3
    code, output = finish(command(run))
    assert code == 0, output
    same_run(run, whole)


def test_a_run_killed_while_it_writes_checkpoints_ends_the_same(
    command, whole, tmp_path
):
    """Killed beside a finished checkpoint, in one stage after another."""
    run, outputs = tmp_path / "run", []
    stages = ("pretrain", "reward_model", "ppo")
    for stage in stages:
        process = command(run)
        folder = run / stage / "checkpoints"
        stop_while_writing(process, folder)
        os.killpg(process.pid, signal.SIGKILL)
        outputs.append(process.communicate()[0])
    code, output = finish(command(run))
    assert code == 0, output
    for stage, said in zip(stages, (*outputs[1:], output), strict=True):
        assert f"{stage}: going on from step" in said
    same_run(run, whole)


def stop_while_writing(process: subprocess.Popen, folder: Path) -> None:
    """Halts the process where it has one checkpoint and is writing the next."""

    def unfinished():
        names = [path.name for path in folder.glob("step_*")]
        writing = [name for name in names if "tmp" in name]
        return writing and len(writing) < len(names)

    deadline = time.monotonic() + 200
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        if unfinished():
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(0.05)  # until all its threads stand still
            if unfinished():
                return
            os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.001)


def test_a_terminated_run_says_so_and_goes_on(command, whole, tmp_path):
    run = tmp_path / "run"
    process = command(run)
    metrics = run / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0 and "Traceback" not in output
    assert "stopped by SIGTERM" in output and "run the same command" in output
    code, output = finish(command(run))
    assert code == 0 and "going on from step" in output
    same_run(run, whole)


def test_a_full_disk_is_told_and_costs_nothing_that_was_done(command, whole, tmp_path):
    """A limit on the size of a file stands for the disk: no checkpoint fits in it."""
    run = tmp_path / "run"
    for done in ("data", "pretrain"):
        shutil.copytree(whole / done, run / done)
    code, output = finish(command(run, largest_file=50_000))
    assert code != 0
    told = re.search(
        "^error: .*sft.* cannot be written .* free some space", output, re.M
    )
    assert told, output  # beside what Orbax logs of its own
    assert not (run / "sft" / "done.json").exists()
    code, output = finish(command(run))
    assert code == 0, output
    same_run(run, whole)


def test_a_finished_run_is_left_alone(command, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.glob("*/params/**/*")}
    code, _ = finish(command(whole))
    assert code == 0
    assert before == {p: p.stat().st_mtime_ns for p in whole.glob("*/params/**/*")}


# -------------------------------------------------------------------- bad input


def refused(process: subprocess.Popen, *said: str) -> None:
    code, output = finish(process)
    flat = " ".join(output.replace("│", " ").split())
    assert code != 0
    assert f'File "{ROOT}' not in output, output  # Orbax's threads may still complain
    for words in said:
        assert words in flat, output


@pytest.fixture
def data(whole, tmp_path):
    """The written campaign as files of a user: `--data` cannot know it is simulated."""
    path = tmp_path / "data"
    shutil.copytree(whole / "data", path)
    (path / "simulation.json").unlink()
    return path


def test_unknown_presets_and_options_name_the_valid_ones(command, tmp_path):
    run = tmp_path / "run"
    refused(command(run, "--no-such-option", "1"), "--no-such-option")
    refused(command(run, "--ppo.num-minibatches", "3"), "num_minibatches 3")
    refused(command(run, "--sft.loss-on", "prompt"), "response", "all")


def test_a_malformed_line_is_named(command, data, tmp_path):
    file = data / "corpus" / "simulation_train.txt"
    file.write_bytes(b"fine\n\xff\xfe broken\n")
    refused(command(tmp_path / "a", "--data", str(data)), f"{file}", "UTF-8")


def test_a_malformed_demonstration_stops_before_training(command, data, tmp_path):
    file = data / "demonstrations" / "simulation_train.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = '{"prompt": "x", "resp'
    file.write_text("\n".join(lines))
    run = tmp_path / "run"
    refused(command(run, "--data", str(data)), f"{file}:3", "JSON")
    assert not (run / "pretrain" / "params").exists()


def test_an_empty_split_and_a_missing_directory_are_named(command, data, tmp_path):
    (data / "corpus" / "simulation_valid.txt").unlink()
    refused(command(tmp_path / "a", "--data", str(data)), "corpus", "valid", str(data))
    nowhere = str(tmp_path / "nowhere")
    refused(command(tmp_path / "b", "--data", nowhere), nowhere, "no such directory")


def test_a_run_of_another_config_lists_what_differs(command, whole):
    refused(
        command(whole, "--pretrain.num-steps", "13"),
        str(whole / "pretrain"),
        "num_steps: 12 there, 13 now",
        "--run",
    )


def test_truncated_parameters_name_folder_and_way_out(command, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("ppo_ptx", "evaluate"):
        shutil.rmtree(run / name)
    for file in (run / "sft_rl" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(command(run), str(run / "sft_rl" / "params"), "delete the stage's folder")
