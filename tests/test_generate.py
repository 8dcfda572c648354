"""What `experiments.generate` prints, and what it refuses."""

import dataclasses
import io
import sys

import jax
import pytest

from experiments import generate
from experiments.generate import Generate, main
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.records import DataError
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.stages.common import Model, init_model, save_model
from rlhf_jax.training.run_dir import RunDirError, StageDir


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny):
    """A stage's directory with an untrained model: 32 positions, six of a response."""
    tokenizer = train_tokenizer(["the fox sees the hen " * 9], 290)
    cfg = tiny(vocab_size=tokenizer.vocab_size)
    params = init_model("language_model", jax.random.key(0), cfg)
    path = tmp_path_factory.mktemp("run") / "ppo"
    path.mkdir()
    save_model(
        StageDir(path), Model("language_model", params, cfg, tokenizer, PromptFormat())
    )
    return path


@pytest.fixture
def asked(stage):
    return Generate(
        source=stage, prompt="the fox", num_samples=2, sampling=Sampling(response_len=6)
    )


def printed(cfg, capsys):
    main(cfg)
    return capsys.readouterr().out


def test_samples_are_those_of_the_seed(asked, capsys):
    first = printed(asked, capsys)
    assert first.count("\n") >= 2
    assert printed(asked, capsys) == first
    assert printed(dataclasses.replace(asked, seed=1), capsys) != first


def test_prompts_from_the_terminal_are_answered_until_they_end(
    asked, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n\n  \nthe hen\n"))
    chat = printed(dataclasses.replace(asked, prompt=None), capsys)
    assert chat.startswith(printed(asked, capsys))  # the first turn, then one more
    assert len(chat) > len(printed(asked, capsys))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**32}, "seed must be from 0"),
        ({"prompt": "q" * 40}, "room for 26 before the response"),
        ({"prompt": "caf\udce9"}, "the prompt: field 'prompt'"),
        ({"sampling": Sampling(response_len=32)}, "leaves no room for a prompt"),
    ],
)
def test_what_cannot_be_sampled_is_refused(asked, change, told):
    with pytest.raises(DataError, match=told):
        main(dataclasses.replace(asked, **change))


def test_a_prompt_that_is_too_long_does_not_end_the_conversation(
    asked, capsys, monkeypatch
):
    long = "q" * 40
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long}\nthe fox\n"))
    main(dataclasses.replace(asked, prompt=None))
    told = capsys.readouterr()
    assert told.err.startswith("error: the prompt has")
    assert told.out.count("\n") >= 2


def test_no_samples_are_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(ValueError, match="num_samples must be"):
        Generate(source=tmp_path, num_samples=0)


def test_a_directory_without_a_model_is_named(asked, tmp_path):
    with pytest.raises(RunDirError, match="no model here"):
        main(dataclasses.replace(asked, source=tmp_path))


def test_turns_differ_and_what_did_not_end_is_marked(asked, capsys, monkeypatch):
    seen = []
    original = generate.jit_measure

    def watched(*args, **kwargs):
        sample = original(*args, **kwargs)

        def kept(*inputs):
            seen.append(sample(*inputs))
            return seen[-1]

        return kept

    monkeypatch.setattr(generate, "jit_measure", watched)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n" * 3))
    cfg = dataclasses.replace(asked, prompt=None, num_samples=8)
    out = printed(cfg, capsys)
    texts = {str(rollout.responses.tolist()) for rollout in seen}
    assert len(texts) == 3
    ended = sum(int(rollout.ended.sum()) for rollout in seen)
    assert out.count(" ...\n") == 24 - ended > 0
