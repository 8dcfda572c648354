"""Two processes do what one does; when one dies the other stops, and both go on."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from meshes import with_devices

from rlhf_jax.training.run_dir import lock_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# With several processes text mixed into SFT stands elsewhere in the batch, where it
# draws other dropout masks; without dropout nothing may differ.
NO_DROPOUT = ("--sft-rl.dropout", "0.0")
STAGES = ("pretrain", "sft", "sft_rl", "reward_model", "ppo", "ppo_ptx")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the smoke preset in one or two processes with one CPU device each."""
    cache = tmp_path_factory.mktemp("cache")

    def processes(
        run: Path, count: int, module: str = "experiments.instructgpt"
    ) -> list[subprocess.Popen]:
        environment = with_devices(1) | {"RLHF_JAX_CACHE": str(cache)}
        if count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
            }
        found = []
        for index in range(count):
            log = tmp_path_factory.mktemp("log") / "output.txt"
            with log.open("w") as file:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", module),
                        *("smoke", "--run", str(run), *NO_DROPOUT),
                    ],
                    cwd=ROOT,
                    env=environment | {"JAX_PROCESS_ID": str(index)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            process.log = log  # type: ignore[attr-defined]
            found.append(process)
        return found

    return processes


def finish(processes, timeout=900) -> list[tuple[int, str]]:
    """Exit codes and all that was said; files, so that no full pipe holds one up."""
    for process in processes:
        process.wait(timeout)
    return [(p.returncode, p.log.read_text()) for p in processes]


def lines(run: Path, stage: str) -> list[dict]:
    rows = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def wait_for(processes, condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    ((code, output),) = finish(start(run, 1))
    assert code == 0, output
    return run


@pytest.fixture(scope="module")
def together(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("together") / "run"
    for code, output in finish(start(run, 2)):
        assert code == 0, output
    return run


def same_losses(ours: list[dict], theirs: list[dict]) -> None:
    """Equal at the first update; later, rounding has been through Adam's roots."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in {"loss", "heldout/loss"} & row.keys():
            rtol = 1e-5 if row["step"] <= 1 else 2e-3
            np.testing.assert_allclose(row[name], expected[name], rtol=rtol)


def test_two_processes_have_the_losses_of_one(alone, together):
    for stage in ("pretrain", "sft", "sft_rl"):
        same_losses(lines(together, stage), lines(alone, stage))
    assert (together / "report.md").exists()


def test_from_the_same_models_two_processes_learn_and_sample_as_one(
    start, alone, tmp_path
):
    run = tmp_path / "run"
    left_out = ("reward_model", "sft_selected", "ppo*", "evaluate", "report*")
    shutil.copytree(alone, run, ignore=shutil.ignore_patterns(*left_out))
    for code, output in finish(start(run, 2)):
        assert code == 0, output
    same_losses(lines(run, "reward_model"), lines(alone, "reward_model"))
    for stage in ("ppo", "ppo_ptx"):
        first = [
            next(row for row in lines(r, stage) if "objective/score" in row)
            for r in (run, alone)
        ]
        for name in ("rollout/length", "rollout/eos_rate", "policy/entropy"):
            np.testing.assert_allclose(first[0][name], first[1][name], rtol=1e-5)
        for name in ("objective/score", "policy/loss", "value/loss", "returns/std"):
            np.testing.assert_allclose(
                first[0][name], first[1][name], rtol=5e-3, atol=1e-3
            )


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_stops_and_both_go_on(
    victim, start, together, tmp_path
):
    """Process 0 coordinates: without it the other stops too."""
    run = tmp_path / "run"
    pair = start(run, 2, "experiments.pretrain")
    metrics = run / "pretrain" / "metrics.jsonl"
    wait_for(pair, lambda: metrics.exists() and metrics.read_text().count("\n") >= 5)
    os.killpg(pair[victim].pid, signal.SIGKILL)
    pair[victim].wait()
    code, output = finish([pair[1 - victim]], timeout=200)[0]
    assert code != 0
    # our own words, or those of JAX's service, which may end the process before us
    said = ("nother process", "heartbeat", "unavailable", "Service/PollForError")
    assert any(words in output for words in said), output[-3000:]
    for code, output in finish(start(run, 2, "experiments.pretrain")):
        assert code == 0, output
    same_lines(run, together, "pretrain")


def test_a_terminated_pair_saves_the_same_step_and_goes_on(start, together, tmp_path):
    run = tmp_path / "run"
    pair = start(run, 2)
    metrics = run / "pretrain" / "metrics.jsonl"
    wait_for(pair, lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    pair[1].send_signal(signal.SIGTERM)  # to one of them: the other learns of it
    steps = set()
    for code, output in finish(pair, timeout=300):
        assert code != 0
        steps.add(re.search(r"stopped by SIGTERM after step (\d+)", output)[1])
    (step,) = steps
    assert (run / "pretrain" / "checkpoints" / f"step_{step}").exists()
    for code, output in finish(start(run, 2)):
        assert code == 0 and f"going on from step {step}" in output, output
    same_lines(run, together, *STAGES)


def test_a_process_that_fails_alone_ends_and_so_does_the_other(start, tmp_path):
    run = tmp_path / "run"
    (run / "pretrain" / "metrics.jsonl").mkdir(parents=True)  # process 0 writes it
    pair = start(run, 2)
    (code, output), (other, _) = finish(pair, timeout=300)
    assert code != 0 and other != 0
    assert "metrics.jsonl" in output and "run the same command" in output


def test_a_run_that_is_locked_is_refused_to_both(start, tmp_path):
    run = tmp_path / "run"
    with lock_run(run):
        for code, output in finish(start(run, 2), timeout=300):
            assert code != 0 and "error:" in output
    assert [p.name for p in run.iterdir()] == [".lock"]


def same_lines(run: Path, other: Path, *stages: str) -> None:
    for stage in stages:
        ours, theirs = lines(run, stage), lines(other, stage)
        assert [without_time(x) for x in ours] == [without_time(x) for x in theirs]


def without_time(line: dict) -> dict:
    line.pop("seconds", None)
    return line
