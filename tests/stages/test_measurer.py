"""What the evaluation measures of each sample, against the oracle."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import oracle
import ppo_case as case
from letters import FORM, LETTERS
from meshes import some_devices

from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.stages import evaluate
from rlhf_jax.stages.common import Model
from rlhf_jax.stages.sampler import Response
from rlhf_jax.stages.scoring import response_scores
from rlhf_jax.training.mesh import jit_measure

FORM = dataclasses.replace(FORM, separator=":")


def measurer() -> Any:
    """Two prompts at a time, on one device."""
    found: Any = object.__new__(evaluate.Measurer)
    mesh, shape = some_devices(1, 1), (case.MODEL, LETTERS, FORM)
    found._reward = Model("reward_model", case.scalar_model(1), *shape)
    found._reference = Model("language_model", case.transformer(0), *shape)
    found._prompts = ["a", "bc", "d", "ef", "g"]
    found._shown = [f"ab{p}" for p in found._prompts]
    sampling = Sampling(response_len=4)
    found._cfg = SimpleNamespace(
        prompt_len=4, batch_size=2, num_samples=2, sampling=sampling
    )
    found._ctx = SimpleNamespace(mesh=mesh, key=lambda name: jax.random.key(0))
    found._scores = jit_measure(response_scores, mesh, model=case.MODEL)
    found._kl = found._pretrain_losses = lambda *_: None
    return found


def test_the_reward_is_of_the_text_and_its_end_under_its_own_prompt():
    asked = measurer()
    reward = asked._reward
    texts = [("ab", True), ("ab", False), ("cdef", False), ("", True), ("cdef", True)]
    responses = [Response(t, np.zeros(0, np.int32), e) for t, e in texts]
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), reward.params["head"])
    expected = []
    for prompt, (text, ended) in zip(asked._prompts, texts, strict=True):
        answer = [*LETTERS.encode(text), *[0] * ended][:4]  # the rest is cut
        ids = np.array([*LETTERS.encode(prompt + ":"), *answer])
        last = oracle.hidden_states(reward.params["transformer"], ids, "pre")[-1]
        expected.append(last @ head["w"] + head["b"] - head["shift"])
    np.testing.assert_allclose(asked._rewards(responses), expected, rtol=1e-4)


def test_samples_have_keys_of_their_own_and_few_shot_ones_end_at_the_next_example():
    asked, seen = measurer(), []

    def measured(params, prompts, key, measures):
        seen.append((list(prompts), jax.random.key_data(key).tolist(), set(measures)))
        drawn = [Response("ab:cd", np.arange(5), False) for _ in prompts]
        return drawn, {name: np.zeros(5) for name in measures}

    asked._plain = asked._few_shot = SimpleNamespace(measured=measured)
    found = asked("gpt_few_shot", asked._reference)
    assert found["texts"] == [["ab"] * 5] * 2 and found["ended"] == [[True] * 5] * 2
    assert found["lengths"] == [[3] * 5] * 2 and found["kl"] == [None, None]
    plain = asked("sft", asked._reference)
    assert plain["texts"] == [["ab:cd"] * 5] * 2 and plain["kl"] == [[0.0] * 5] * 2
    assert [s[0] for s in seen] == [asked._shown] * 2 + [asked._prompts] * 2
    assert seen[0][1] != seen[1][1] and seen[0][1] == seen[2][1]
