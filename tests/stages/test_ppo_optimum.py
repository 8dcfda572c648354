"""PPO with a KL penalty reaches the closed form: pi* = pi_ref exp(r / beta) / Z."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import ppo_case as case

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import lm_logits
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.nn.transformer import forward, init_params
from rlhf_jax.stages.ppo import ppo_update
from rlhf_jax.stages.ppo_state import Frozen, PPOConfig, PPOInputs, init_ppo_state
from rlhf_jax.training.optimizers import OptimizerConfig

# The bandit of reference values: four arms, one token, one prompt.
LOGITS = np.array([0.0, 0.5, 1.0, -0.5])
REWARDS = np.array([1.0, 0.0, -1.0, 2.0])
BETAS = (0.5, 2.0)
B, D, V = 128, 8, 4
MODEL = TransformerConfig(
    num_layers=1, model_dim=D, num_heads=1, max_len=4, vocab_size=V
)
OPTIMIZER = OptimizerConfig(
    learning_rate=0.05, schedule="linear", final_fraction=0.0, b2=0.99
)
CFG = PPOConfig(
    num_iterations=200,
    batch_size=B,
    num_minibatches=1,
    num_epochs=1,
    prompt_len=2,
    sampling=Sampling(response_len=1),
    policy_optimizer=OPTIMIZER,
    value_optimizer=OPTIMIZER,
)


def blank():
    """A transformer whose blocks write nothing: its states are normed embeddings."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    params["final_norm"]["scale"] = jnp.ones(D)
    return params


def reference():
    """The same state always, (1, 0, ..), and embeddings that begin with the logit."""
    params = blank()
    rng = np.random.default_rng(0)
    table = np.concatenate([LOGITS[:, None], rng.normal(size=(V, D - 1))], axis=1)
    params["embed"] = jnp.asarray(table, jnp.float32)
    params["final_norm"] = {"scale": jnp.zeros(D), "bias": jnp.eye(D)[0]}
    return params


def reward_model():
    """A head on normed embeddings that gives each last token its reward."""
    params = blank()
    table = np.random.default_rng(1).normal(size=(V, D))
    params["embed"] = jnp.asarray(table, jnp.float32)
    states = np.stack(
        [
            np.asarray(forward(params, jnp.full((1, 1), v), MODEL))[0, 0]
            for v in range(V)
        ]
    )
    w = np.linalg.lstsq(states, REWARDS, rcond=None)[0]
    head = {
        "w": jnp.asarray(w, jnp.float32),
        "b": jnp.zeros(()),
        "shift": jnp.zeros(()),
    }
    return {"transformer": params, "head": head}


def test_one_token_ppo_reaches_the_closed_form():
    """beta 0.5: E r = 1.722723, KL 1.482784; beta 2: the uniform policy."""
    policy, scorer = reference(), reward_model()
    frozen = Frozen(reference=policy, reward_model=scorer)
    empty = jnp.zeros((0, CFG.ptx_len), jnp.int32)
    inputs = PPOInputs(
        prompts=jnp.tile(jnp.asarray([[1, 2]], jnp.int32), (B, 1)),
        prompt_lengths=jnp.full((B,), 2, jnp.int32),
        ptx_tokens=empty,
        ptx_targets=empty,
        ptx_mask=empty > 0,
    )
    update = functools.partial(
        ppo_update, cfg=CFG, model=MODEL, reward_model=MODEL, eos_id=0, pad_id=0
    )

    @case.compiled
    @functools.partial(jax.vmap, in_axes=0)
    def train(kl_coef):
        value = jax.tree.map(jnp.copy, scorer)
        state = init_ppo_state(policy, value, 0.0, jax.random.key(0))
        state = state.replace(kl_coef=kl_coef)

        def iteration(state, _):
            state, metrics = update(state, inputs, frozen, CFG.scalars())
            return state, metrics["objective/score"]

        state, scores = jax.lax.scan(iteration, state, None, CFG.num_iterations)
        hidden = forward(state.params["policy"], inputs.prompts[:1], MODEL)[:, -1]
        return lm_logits(state.params["policy"], hidden)[0], scores

    logits, scores = train(jnp.asarray(BETAS, jnp.float32))
    prior = oracle.log_softmax(LOGITS)
    expected = {0.5: (1.722723, 1.482784), 2.0: (0.5, 0.151044)}
    np.testing.assert_allclose(
        scores[:, 0], np.exp(prior) @ REWARDS, atol=0.2
    )  # starts at the reference, up to sampling noise
    for beta, row in zip(BETAS, np.asarray(logits, np.float64), strict=True):
        best = oracle.softmax(prior + REWARDS / beta)
        found = oracle.log_softmax(row)
        score = np.exp(found) @ REWARDS
        kl = np.exp(found) @ (found - prior)
        assert np.exp(found) @ (found - np.log(best)) < 2e-3  # nats from the optimum
        np.testing.assert_allclose(score, expected[beta][0], atol=0.05)
        np.testing.assert_allclose(kl, expected[beta][1], atol=0.05)


def test_the_bandit_is_what_it_says():
    scorer = reward_model()
    assert dataclasses.asdict(CFG)["sampling"]["response_len"] == 1
    tokens = jnp.asarray([[1, 2, v] for v in range(V)], jnp.int32)
    hidden = forward(scorer["transformer"], tokens, MODEL)[:, -1]
    np.testing.assert_allclose(hidden @ scorer["head"]["w"], REWARDS, atol=1e-4)
    hidden = forward(reference(), tokens[:1, :2], MODEL)[0, -1]
    np.testing.assert_allclose(lm_logits(reference(), hidden), LOGITS, atol=1e-6)
