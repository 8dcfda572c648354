"""What PPO's held-out looks log equals the oracle, sequence by sequence."""

import dataclasses
import types

import jax
import numpy as np
import oracle
import ppo_case as case
import pytest
from letters import FORM, LETTERS

from rlhf_jax.data.records import Prompt
from rlhf_jax.stages.common import Context, Model
from rlhf_jax.stages.ppo_run import make_evaluate
from rlhf_jax.stages.sampler import Sampler
from rlhf_jax.training.mesh import MeshConfig

PROMPTS = ["a", "bc", "dca", "ef", "hig", "i", "ab", "cd", "e", "gh"]
# Eight windows of seven tokens are a batch: here are two, the second not full.
TEXT = ["abca", "fghi", "iiba", "dd", "ebcahg", "bdfhi" * 3, "c", "gg" * 8, "hb" * 5]
CFG = dataclasses.replace(case.CONFIG, eval_prompts=6)  # on eight devices


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """The metrics of a look at a policy that has moved, and the sequences behind it."""
    records = {
        ("eval_prompts", "test"): [Prompt(p) for p in PROMPTS],
        ("corpus", "valid"): TEXT,
    }
    inputs = types.SimpleNamespace(read=lambda *asked: records[asked])
    ctx = Context(
        run=tmp_path_factory.mktemp("run"),
        inputs=inputs,  # type: ignore[arg-type]
        mesh=MeshConfig().make(),
        seed=0,
    )
    ctx.stage("ppo").path.mkdir()
    shape = (case.MODEL, LETTERS, FORM)
    reference = Model("language_model", case.transformer(9), *shape)
    reward = Model("reward_model", case.scalar_model(1), *shape)
    policy = case.moved(reference.params, 0.05)
    state = types.SimpleNamespace(params={"policy": policy})
    with pytest.MonkeyPatch.context() as patch:  # tokens of the text are kept there
        patch.setenv("RLHF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        evaluate = make_evaluate(CFG, reference, reward, ctx, "ppo")
    metrics = evaluate(state, 3)  # type: ignore[arg-type]
    sampler = Sampler(reference, CFG.sampling, CFG.prompt_len, CFG.eval_prompts, ctx)
    count = min(len(PROMPTS), CFG.eval_prompts)  # all of them fit
    kept = [PROMPTS[n * len(PROMPTS) // count] for n in range(count)]
    responses = sampler(policy, kept, ctx.key("ppo/heldout"))
    prompts = [FORM.encode_prompt(LETTERS, p).tolist() for p in kept]
    pairs = [(p, r.ids.tolist()) for p, r in zip(prompts, responses, strict=True)]
    return metrics, pairs, policy, reference.params, reward.params


def logprob(params, prompt, response, temperature):
    """log p(response | prompt) at a temperature, token by token."""
    hidden = oracle.hidden_states(params, np.array(prompt + response), "pre")
    logits = hidden @ np.asarray(params["embed"], np.float64).T
    rows = [oracle.log_softmax(row / temperature) for row in logits]
    return sum(rows[len(prompt) - 1 + t][token] for t, token in enumerate(response))


def test_score_kl_length_and_ends_equal_the_oracle(look):
    metrics, pairs, policy, reference, reward = look
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), reward["head"])
    scores, kls = [], []
    for prompt, response in pairs:
        ids = np.array(prompt + response)
        last = oracle.hidden_states(reward["transformer"], ids, "pre")[-1]
        scores.append(last @ head["w"] + head["b"] - head["shift"])
        args = (prompt, response, CFG.sampling.temperature)
        kls.append(logprob(policy, *args) - logprob(reference, *args))
    lengths = [len(response) for _, response in pairs]
    ended = [response[-1] == LETTERS.eos_id for _, response in pairs]
    assert 0 < sum(ended) < len(ended)  # both kinds are there
    expected = {
        "heldout/score": np.mean(scores),
        "heldout/kl": np.mean(kls),
        "heldout/length": np.mean(lengths),
        "heldout/eos_rate": np.mean(ended),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_the_pre_training_loss_counts_every_held_out_token_once(look):
    metrics, _, policy, _, _ = look
    ids = [i for text in TEXT for i in (*LETTERS.encode(text), LETTERS.eos_id)]
    losses = []
    for start in range(0, len(ids) - 1, CFG.ptx_len):
        row = ids[start : start + CFG.ptx_len + 1]
        losses += [
            -logprob(policy, row[: t + 1], [row[t + 1]], 1.0)
            for t in range(len(row) - 1)
        ]
    assert len(losses) == len(ids) - 1 > 8 * CFG.ptx_len
    np.testing.assert_allclose(
        metrics["heldout/pretrain_loss"], np.mean(losses), rtol=1e-5
    )
