"""A stage's directory belongs to one command, and says so."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.training.run_dir import (
    RunDirError,
    StageDir,
    lock_run,
    model_from_json,
    read_json,
    to_json,
    write_text,
)


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    names: tuple[str, ...] = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    path: Path = Path("x/y")
    inner: Inner = Inner()
    extra: int | None = None


DATA = {"corpus/train": "abc"}


def opened(path, config=None, data=DATA, parents=None):
    """A stage that has written something."""
    stage = StageDir(path)
    stage.open("sft", Config() if config is None else config, data, parents or {})
    write_text(path / "metrics.jsonl", "")
    return stage


def test_the_same_command_opens_a_directory_again(tmp_path):
    opened(tmp_path / "sft")
    before = (tmp_path / "sft" / "config.json").read_bytes()
    opened(tmp_path / "sft")
    assert (tmp_path / "sft" / "config.json").read_bytes() == before


def test_another_config_lists_every_field_that_differs(tmp_path):
    opened(tmp_path / "sft")
    other = Config(steps=4, inner=Inner(rate=0.2))
    with pytest.raises(RunDirError) as caught:
        opened(tmp_path / "sft", other)
    text = str(caught.value)
    assert str(tmp_path / "sft") in text
    assert "  steps: 3 there, 4 now" in text
    assert "  inner.rate: 0.1 there, 0.2 now" in text
    assert "path:" not in text and "names" not in text
    assert "--run" in text and "delete" in text


def test_options_are_named_as_on_the_command_line(tmp_path):
    opened(tmp_path / "sft", {"sft": Config(), "seed": 0})
    with pytest.raises(RunDirError) as caught:
        opened(tmp_path / "sft", {"sft": Config(steps=4), "seed": 1})
    lines = str(caught.value).splitlines()[1:]
    assert lines == ["  seed: 0 there, 1 now", "  sft.steps: 3 there, 4 now"]


def test_an_option_that_is_new_or_gone_is_a_difference(tmp_path):
    stage = opened(tmp_path / "sft")
    made_from = read_json(stage.path / "config.json")
    del made_from["config"]["steps"]
    made_from["config"]["old"] = 1
    write_text(stage.path / "config.json", json.dumps(made_from))
    with pytest.raises(RunDirError) as caught:
        opened(tmp_path / "sft")
    assert "  steps: 'absent' there, 3 now" in str(caught.value)
    assert "  old: 1 there, 'absent' now" in str(caught.value)


def test_a_stage_that_was_refused_before_it_wrote_anything_is_made_anew(tmp_path):
    stage = StageDir(tmp_path / "sft")
    stage.open("sft", Config(), DATA, {})
    refused = stage.fingerprint()
    stage.open("sft", Config(steps=4), DATA, {})
    assert stage.fingerprint() != refused
    assert stage.fingerprint() == opened(tmp_path / "b", Config(steps=4)).fingerprint()
    opened(tmp_path / "sft", Config(steps=4))
    with pytest.raises(RunDirError, match="steps: 4 there, 3 now"):
        opened(tmp_path / "sft")


def test_processes_of_one_run_with_other_options_are_refused(tmp_path, monkeypatch):
    StageDir(tmp_path / "sft").open("sft", Config(), DATA, {})  # by the first of them
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RunDirError, match="steps: 3 there, 4 now"):
        StageDir(tmp_path / "sft").open("sft", Config(steps=4), DATA, {})
    StageDir(tmp_path / "sft").open("sft", Config(), DATA, {})


def test_other_data_is_a_difference(tmp_path):
    opened(tmp_path / "sft")
    with pytest.raises(RunDirError, match="data.corpus/train: 'abc' there, 'xyz' now"):
        opened(tmp_path / "sft", data={"corpus/train": "xyz"})


def test_an_unfinished_parent_names_the_command_to_run(tmp_path):
    parent = StageDir(tmp_path / "pretrain")
    with pytest.raises(
        RunDirError, match=r"python -m experiments\.pretrain --run"
    ) as e:
        opened(tmp_path / "sft", parents={"pretrain": parent})
    assert str(tmp_path) in str(e.value)
    assert not (tmp_path / "sft").exists()


def test_a_parent_made_again_differently_is_a_difference(tmp_path):
    def parent(steps):
        stage = StageDir(tmp_path / f"pretrain{steps}")
        stage.open("pretrain", Config(steps=steps), DATA, {})
        stage.finish({})
        return stage

    opened(tmp_path / "sft", parents={"pretrain": parent(1)})
    opened(tmp_path / "sft", parents={"pretrain": parent(1)})
    with pytest.raises(RunDirError, match="parents.pretrain"):
        opened(tmp_path / "sft", parents={"pretrain": parent(2)})


def test_a_fingerprint_covers_config_data_and_parents(tmp_path):
    def made(name, **kwargs):
        return opened(tmp_path / name, **kwargs).fingerprint()

    same = made("a")
    assert same == made("b")
    assert len({same, made("c", config=Config(steps=9)), made("d", data={})}) == 3


def test_a_stage_is_done_when_its_summary_is_written(tmp_path, capsys):
    stage = opened(tmp_path / "sft")
    assert not stage.done
    stage.finish({"loss": 1.5, "by_epoch": {"a": 1}})
    assert stage.done and stage.summary() == {"loss": 1.5, "by_epoch": {"a": 1}}
    told = capsys.readouterr()
    assert told.out == "" and told.err.endswith("sft: finished, loss 1.5\n")
    opened(tmp_path / "sft")  # nothing is left to do, and that is said
    assert capsys.readouterr().out == f"sft: finished before, see {tmp_path / 'sft'}\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "done.json"
    write_text(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_damaged_json_names_file_line_and_way_out(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n"a": 1,\n')
    with pytest.raises(RunDirError, match=r"config\.json:3: not JSON .*delete"):
        read_json(path)


def test_configs_become_plain_json():
    assert to_json((Config(), {"a": Path("b")})) == [
        {
            "steps": 3,
            "path": "x/y",
            "inner": {"rate": 0.1, "names": ["a", "b"]},
            "extra": None,
        },
        {"a": "b"},
    ]


def test_a_model_comes_back_as_it_was_written(tmp_path):
    cfg = TransformerConfig(num_layers=3, dropout=0.1, dtype="bfloat16")
    path = tmp_path / "model.json"
    write_text(path, json.dumps({"kind": "reward_model", **to_json(cfg)}))
    assert model_from_json(path) == cfg
    write_text(path, json.dumps({"kind": "reward_model", "num_layers": 3}))
    with pytest.raises(RunDirError, match="another version"):
        model_from_json(path)
    write_text(path, json.dumps({**to_json(cfg), "remat": False}))
    with pytest.raises(RunDirError, match="model.json: remat must be"):
        model_from_json(path)


def test_a_run_belongs_to_one_process_until_that_is_killed(tmp_path):
    code = (
        "import sys, time, pathlib; from rlhf_jax.training.run_dir import lock_run; "
        f"lock = lock_run(pathlib.Path({str(tmp_path)!r})); print('mine', flush=True); "
        "time.sleep(100)"
    )
    args = [sys.executable, "-c", code]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "mine\n"
        with pytest.raises(RunDirError, match=f"process {owner.pid} .* another --run"):
            lock_run(tmp_path)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        lock_run(tmp_path).close()
        lock_run(tmp_path).close()  # and it was given free


def test_a_run_that_is_a_file_is_refused_with_the_option_to_mend(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(RunDirError, match="notes.txt is a file.*--run"):
        lock_run(path)
    assert path.read_text() == "mine"


def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path):
    """What it saves there it cannot read again."""
    with pytest.raises(RunDirError, match=r"has a '\['"):
        lock_run(tmp_path / "lr[1e-3]")
