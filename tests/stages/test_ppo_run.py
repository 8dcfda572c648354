"""What the stage hands to PPO's updates, and keeps of them."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import ppo_case as case
from letters import FORM, LETTERS
from meshes import some_devices

from rlhf_jax.stages.common import Context, Model
from rlhf_jax.stages.ppo_run import keep_samples, make_inputs, make_state

CFG = case.CONFIG


def model(kind, params):
    return Model(kind, params, case.MODEL, LETTERS, FORM)  # type: ignore[arg-type]


def test_a_head_on_the_policy_starts_at_zero():
    cfg = dataclasses.replace(CFG, value="shared")
    models = (
        model("language_model", case.transformer(0)),
        model("reward_model", case.scalar_model(1)),
    )
    state, _ = make_state(cfg, *models, jax.random.key(0), some_devices(1, 1))
    assert not np.any(state.params["value"]["head"]["w"])


def test_samples_of_a_step_are_kept_once(tmp_path):
    for step in (0, 3, 3):
        keep_samples(tmp_path / "x.jsonl", step, [{"step": step, "n": step}])
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 3]


def test_ptx_rows_are_shifted_text_of_training_and_prompts_follow_the_seed(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    data = {
        ("ppo_prompts", "train"): [SimpleNamespace(prompt=c) for c in "abcdefgh" * 4],
        ("corpus", "train"): ["abab" * 30],
        ("corpus", "valid"): ["cdcd" * 30],
    }
    inputs = SimpleNamespace(read=lambda *asked: data[asked])
    cfg = dataclasses.replace(CFG, ptx_coef=1.0)

    def first(seed):
        ctx = Context(tmp_path, inputs, None, seed)  # type: ignore[arg-type]
        return make_inputs(cfg, model("language_model", None), ctx, "ppo_ptx")[0](0)

    batch = first(0)
    np.testing.assert_array_equal(batch.ptx_tokens[:, 1:], batch.ptx_targets[:, :-1])
    assert set(np.unique(batch.ptx_tokens)) <= {0, *LETTERS.encode("ab")}
    assert np.any(first(1).prompts != batch.prompts)
