"""A run is a function of its config: stopped anywhere, it goes on to the same state."""

import functools
import gzip
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import some_devices

from rlhf_jax.training.loop import (
    PROFILED,
    SKIPPED_BY_TRACE,
    LoopConfig,
    Stopped,
    run_loop,
    tracked,
)
from rlhf_jax.training.mesh import MeshConfig, jit_step, state_sharding
from rlhf_jax.training.metrics import NonFiniteError
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

CFG = OptimizerConfig(learning_rate=0.1, warmup_steps=3)
N = 10


class Crash(Exception):
    """Stands for a kill: nothing after it runs."""


def loss(params, batch, key):
    """Linear regression under dropout of its inputs; `poison` makes a NaN slope."""
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    x = jnp.where(keep, 2.0 * batch["x"], 0.0)
    errors = x @ params["embed"] - batch["y"]
    broken = jnp.sum(batch["poison"] * params["b"])
    return jnp.sum(batch["weights"] * jnp.square(errors)) + broken, {}


def make_batch(step, poison=False):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(8, 4)).astype(np.float32),
        "y": rng.normal(size=(8,)).astype(np.float32),
        "weights": np.full(8, 1 / 8, np.float32),
        "poison": np.full(8, np.nan if poison else 0.0, np.float32),
    }


@pytest.fixture(scope="module")
def loop():
    """`loop(directory, **changes)` runs N steps, as a new process would."""
    everywhere = MeshConfig().make()

    def make():
        params = {"b": jnp.zeros(8), "embed": jnp.ones(4)}
        return init_state(params, jax.random.key(0))

    @functools.cache
    def compiled(mesh):
        sharding = state_sharding(mesh, jax.eval_shape(make))
        return sharding, jit_step(make_train_step(loss, CFG, N), mesh, sharding)

    def run(directory, mesh=everywhere, **changes):
        sharding, step = compiled(mesh)
        state = jax.device_put(make(), sharding)
        arguments = {
            "name": "toy",
            "directory": directory,
            "step_fn": step,
            "rest": (CFG.scalars(),),
            "state": state,
            "batches": make_batch,
            "num_steps": N,
            "mesh": mesh,
            "cfg": LoopConfig(checkpoint_every=4, eval_every=3),
        }
        return run_loop(**(arguments | changes))

    return run


@pytest.fixture(scope="module")
def uninterrupted(loop, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return loop(directory), metrics(directory)


def metrics(directory, *names):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    for line in parsed:
        line.pop("seconds", None)
    return parsed


def assert_same(state, other):
    def host(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)

    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(host(a), host(b)), *(state, other)
    )


def test_a_trace_changes_nothing_and_can_be_opened(
    loop, uninterrupted, tmp_path, capsys
):
    state = loop(tmp_path, profile=True)
    assert capsys.readouterr().err.count("toy: compiled: ") == 1
    assert_same(state, uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]
    (trace,) = tmp_path.glob("profile/**/perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    named = [e for e in events if e.get("name") == "toy" and "dur" in e]
    assert len(named) == PROFILED


def test_a_run_that_fails_while_it_is_traced_can_be_traced_again(loop, tmp_path):
    with pytest.raises(Crash):
        loop(tmp_path, profile=True, batches=crash_at(SKIPPED_BY_TRACE + 1))
    loop(tmp_path, profile=True)


def crash_at(bad_step):
    def batches(step):
        if step == bad_step:
            raise Crash
        return make_batch(step)

    return batches


@pytest.mark.parametrize("bad_step", [0, 2, 4, 6, 9])
def test_a_killed_run_ends_in_the_same_state_and_metrics(
    bad_step, loop, uninterrupted, tmp_path
):
    with pytest.raises(Crash):
        loop(tmp_path, batches=crash_at(bad_step))
    asked = []

    def batches(step):
        asked.append(step)
        return make_batch(step)

    state = loop(tmp_path, batches=batches)
    assert asked == list(range(bad_step // 4 * 4, N))
    assert_same(state, uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_run_goes_on_with_another_number_of_devices(
    devices, loop, uninterrupted, tmp_path
):
    """The same batches in the same order; equal up to the order of sums."""
    fewer = some_devices(1, devices)
    with pytest.raises(Crash):
        loop(tmp_path, batches=crash_at(6))
    asked = []
    state = loop(
        tmp_path,
        mesh=fewer,
        batches=lambda step: asked.append(step) or make_batch(step),
    )
    assert asked == list(range(4, N))
    for name, leaf in uninterrupted[0].params.items():
        np.testing.assert_allclose(state.params[name], leaf, rtol=1e-5, atol=1e-6)
    for row, expected in zip(metrics(tmp_path), uninterrupted[1], strict=True):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)


def test_a_clock_that_goes_back_changes_nothing_but_times(
    loop, uninterrupted, tmp_path, monkeypatch
):
    now = [1e9]

    def back():
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(time, "monotonic", back)
    with pytest.raises(Crash):
        loop(tmp_path, batches=crash_at(6))
    assert_same(loop(tmp_path), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


def test_metrics_that_cannot_be_written_are_named(loop, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="metrics.jsonl"):
        loop(tmp_path)


def test_every_update_has_one_line_with_its_own_loss(uninterrupted):
    steps = [line["step"] for line in uninterrupted[1]]
    assert steps == list(range(1, N + 1))
    assert len({line["loss"] for line in uninterrupted[1]}) == N


def test_a_finished_run_does_nothing_more(loop, uninterrupted, tmp_path):
    loop(tmp_path)

    def none(step):
        raise AssertionError(f"asked for step {step}")

    assert_same(loop(tmp_path, batches=none), uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", [5, N - 1])
def test_a_signal_saves_stops_and_the_next_command_goes_on(
    number, when, loop, uninterrupted, tmp_path
):
    before = signal.getsignal(number)

    def batches(step):
        if step == when:
            os.kill(os.getpid(), number)
        return make_batch(step)

    with pytest.raises(Stopped, match=f"{number.name} after step {when + 1}, .* go on"):
        loop(tmp_path, batches=batches)
    assert signal.getsignal(number) is before
    asked = []
    state = loop(tmp_path, batches=lambda step: asked.append(step) or make_batch(step))
    assert asked == list(range(when + 1, N))
    assert_same(state, uninterrupted[0])
    assert metrics(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("bad_step", [3, 5, 7, 9])
def test_a_nonfinite_gradient_stops_with_the_last_good_state_kept(
    bad_step, loop, tmp_path, capfd
):
    with pytest.raises(NonFiniteError, match=rf"update {bad_step + 1}: .*\['b'\]"):
        loop(tmp_path, batches=lambda step: make_batch(step, step == bad_step))
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, bad_step + 1))
    good = bad_step // 4 * 4  # the save at the end of a bad step must not happen
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"step_{step}" for step in (4, 8) if step <= good
    ]
    capfd.readouterr()
    asked = []
    loop(tmp_path, batches=lambda step: asked.append(step) or make_batch(step))
    assert asked[0] == good
    if good:
        assert f"toy: going on from step {good}" in capfd.readouterr().err


def test_evaluations_are_at_the_start_on_time_and_at_the_end(loop, tmp_path):
    seen = []

    def evaluate(state, step):
        seen.append((step, int(state.step)))
        return {"heldout/loss": float(step)}

    loop(tmp_path, evaluate=evaluate)
    assert seen == [(s, s) for s in (0, 3, 6, 9, 10)]
    written = [x["step"] for x in metrics(tmp_path) if "heldout/loss" in x]
    assert written == [0, 3, 6, 9, 10]


def test_evaluations_survive_a_kill_once_each(loop, tmp_path):
    evaluate = lambda state, step: {"heldout/loss": float(step)}  # noqa: E731
    with pytest.raises(Crash):
        loop(tmp_path, batches=crash_at(7), evaluate=evaluate)
    loop(tmp_path, evaluate=evaluate)
    written = [x["step"] for x in metrics(tmp_path) if "heldout/loss" in x]
    assert written == [0, 3, 6, 9, 10]


def test_a_check_sees_every_update_and_stops_before_it_is_saved(loop, tmp_path):
    class Violated(Exception):
        pass

    seen = []

    def check(step, values):
        seen.append(step)
        assert np.isfinite(values["loss"])
        if step == 8:
            raise Violated

    with pytest.raises(Violated):
        loop(tmp_path, check=check)
    assert seen == list(range(1, 9))
    folders = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert folders == ["step_4"]


def test_metrics_are_read_one_step_late(loop, tmp_path):
    """Update t must be dispatched before the metrics of update t - 1 are waited for."""
    events = []

    def batches(step):
        events.append(("dispatch", step + 1))
        return make_batch(step)

    def check(step, values):
        events.append(("read", step))

    loop(
        tmp_path,
        batches=batches,
        check=check,
        cfg=LoopConfig(checkpoint_every=100, eval_every=100),
    )
    for step in range(1, N):
        assert events.index(("dispatch", step + 1)) < events.index(("read", step))


def test_tensorboard_files_exist(loop, tmp_path):
    loop(tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_where_stderr_is_no_terminal_progress_is_told_as_lines(loop, tmp_path, capfd):
    loop(tmp_path)
    told = capfd.readouterr().err
    assert "toy 10/10" in told and "s left" in told and "loss" in told


def test_the_time_left_is_told_without_that_of_compilation(capfd, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for item in tracked("items", range(100)):
        now += 60.0 if item == 0 else 1.0
    told = capfd.readouterr().err.splitlines()
    assert told[0].rstrip() == "items 1/100  60 s"
    assert told[1].rstrip() == "items 11/100  70 s, 89 s left"
    assert told[-1].rstrip() == "items 100/100  159 s, 0 s left"


def test_tracked_items_come_in_order_and_their_number_is_told(capfd):
    assert list(tracked("letters", "abc")) == ["a", "b", "c"]
    assert "letters 3/3  0 s, 0 s left" in capfd.readouterr().err
