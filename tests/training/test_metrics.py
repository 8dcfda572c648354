"""Metrics reach the disk one step late, whole, finite, and without a lost past."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.training.metrics import MetricsWriter, NonFiniteError, read_metrics
from rlhf_jax.training.run_dir import RunDirError

GRADS = {"embed": 0, "blocks": {"b": 0, "w": 0}}  # leaves: blocks.b, blocks.w, embed


def metrics(loss, nonfinite=(False, False, False)):
    return {"loss": jnp.float32(loss), "nonfinite": jnp.asarray(nonfinite)}


@pytest.fixture
def writer(tmp_path):
    made = []

    def make(first_step=0):
        made.append(MetricsWriter(tmp_path, first_step, GRADS))
        return made[-1]

    yield make
    for each in made:
        each.close()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_written_when_the_next_one_arrives(writer, tmp_path):
    path = tmp_path / "metrics.jsonl"
    out = writer()
    assert out.push(1, metrics(3.0)) is None
    assert lines(path) == []
    values = out.push(2, metrics(2.0))
    assert values is not None and values["loss"] == 3.0
    assert [(x["step"], x["loss"]) for x in lines(path)] == [(1, 3.0)]
    values = out.flush()
    assert values is not None and values["loss"] == 2.0
    assert [(x["step"], x["loss"]) for x in lines(path)] == [(1, 3.0), (2, 2.0)]
    assert out.flush() is None


def test_every_line_says_how_long_its_step_took(writer, tmp_path):
    out = writer()
    out.push(1, metrics(1.0))
    out.flush()
    assert lines(tmp_path / "metrics.jsonl")[0]["seconds"] >= 0.0


def test_the_flags_are_not_written_as_a_metric(writer, tmp_path):
    out = writer()
    out.push(1, metrics(1.0))
    out.flush()
    assert set(lines(tmp_path / "metrics.jsonl")[0]) == {"step", "loss", "seconds"}


def test_lines_of_lost_updates_are_dropped_on_resume(writer, tmp_path):
    out = writer()
    for step in range(1, 6):
        out.push(step, metrics(step))
    out.flush()
    out.write(4, {"heldout/loss": 1.0})
    out.close()
    again = writer(first_step=4)
    path = tmp_path / "metrics.jsonl"
    assert [x["step"] for x in lines(path)] == [1, 2, 3, 4, 4]
    again.push(5, metrics(50.0))
    again.flush()
    assert lines(path)[-1]["loss"] == 50.0
    assert [x["step"] for x in lines(path)] == [1, 2, 3, 4, 4, 5]


def test_a_run_from_the_start_drops_everything(writer, tmp_path):
    out = writer()
    out.write(1, {"loss": 1.0})
    out.close()
    writer()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_a_line_that_a_kill_cut_short_does_not_stop_the_resume(writer, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    writer(first_step=2)
    assert lines(path) == [{"step": 1, "loss": 2.0}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl:2: not JSON.*remove"):
        read_metrics(path)


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_nonfinite_gradient_names_its_leaf_and_is_not_written(writer, tmp_path):
    out = writer()
    out.push(7, metrics(1.0, (False, True, True)))
    with pytest.raises(
        NonFiniteError,
        match=r"update 7: the gradient of \['blocks'\]\['w'\] .*\(2 of 3",
    ):
        out.flush()
    assert lines(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_metric_is_named(writer, value):
    out = writer()
    out.push(3, metrics(value))
    with pytest.raises(NonFiniteError, match="update 3: metric loss is not finite"):
        out.flush()


def test_tensorboard_gets_the_same_numbers(writer, tmp_path):
    out = writer()
    out.push(1, metrics(1.25))
    out.flush()
    out.close()
    events = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    content = events[0].read_bytes()
    assert b"loss" in content and np.float32(1.25).tobytes() in content


def test_what_precedes_a_checkpoint_is_on_the_disk_when_a_kill_comes(writer, tmp_path):
    out = writer()
    out.push(1, metrics(1.25))
    out.flush()  # as before every checkpoint
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert np.float32(1.25).tobytes() in events.read_bytes()


def test_a_held_out_metric_that_is_not_finite_stops(writer):
    with pytest.raises(NonFiniteError, match="update 3: metric heldout/loss is not"):
        writer().write(3, {"heldout/loss": float("nan")})


def test_lost_lines_of_updates_that_were_done_are_told(writer, tmp_path, capsys):
    writer(first_step=2)
    assert "metrics.jsonl: lacks steps up to 2" in capsys.readouterr().err


def test_a_full_disk_stops_the_step_that_could_not_be_written(writer, tmp_path):
    """A thread that wrote for TensorBoard died instead, and the run waited forever."""
    out = writer()
    board = out._board._py_recordio_writer
    board._writer.close()
    board._writer = open("/dev/full", "wb", buffering=0)
    with pytest.raises(OSError, match="No space left"):
        out.write(1, {"loss": 1.0})
    board._writer.close()
    board._writer = (tmp_path / "other").open("wb")  # for the fixture to close
