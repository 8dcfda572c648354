"""From a rollout to advantages: every number equals a slow one; padding is nothing."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import ppo_case as case
import pytest

from rlhf_jax.nn.sampling import Rollout, Sampling
from rlhf_jax.stages import experience
from rlhf_jax.stages.experience import make_experience, response_values

B, P, R = case.B, case.P, case.R
CFG = case.CONFIG
PLAIN = dataclasses.replace(CFG, whiten_advantages=False)
SCALARS = CFG.scalars()


def rows(inputs, rollout):
    """Prompt and response of each row as plain lists, without padding."""
    lengths = np.asarray(inputs.prompt_lengths), np.asarray(rollout.lengths)
    for b in range(B):
        prompt = np.asarray(inputs.prompts)[b, : lengths[0][b]]
        response = np.asarray(rollout.responses)[b, : lengths[1][b]]
        yield b, prompt.tolist(), response.tolist()


def slow(state, frozen, inputs, rollout, cfg):
    """Log-probabilities, entropies, values and scores by the oracle, row by row."""
    out = {k: np.zeros((B, R)) for k in ("logprobs", "ref", "entropy", "values")}
    out |= {"scores": np.zeros(B), "last_values": np.zeros(B)}

    def scalar(model, sequence, position):
        hidden = oracle.hidden_states(model["transformer"], sequence, "pre")[position]
        head = jax.tree.map(lambda x: np.asarray(x, np.float64), model["head"])
        return hidden @ head["w"] + head["b"] - head["shift"]

    for b, prompt, response in rows(inputs, rollout):
        sequence = np.array(prompt + response)
        last = len(sequence) - 1
        for name, params in (
            ("logprobs", state.params["policy"]),
            ("ref", frozen.reference),
        ):
            hidden = oracle.hidden_states(params, sequence, "pre")
            for t, token in enumerate(response):
                logits = (
                    np.asarray(params["embed"], np.float64)
                    @ hidden[len(prompt) - 1 + t]
                )
                probs = oracle.contract_probs(
                    logits,
                    cfg.sampling.temperature,
                    cfg.sampling.top_k,
                    cfg.sampling.top_p,
                )
                out[name][b, t] = np.log(probs[token])
                if name == "logprobs":
                    kept = probs[probs > 0]
                    out["entropy"][b, t] = -np.sum(kept * np.log(kept))
        for t in range(len(response)):
            position = len(prompt) - 1 + t
            out["values"][b, t] = scalar(state.params["value"], sequence, position)
        out["last_values"][b] = scalar(state.params["value"], sequence, last)
        out["scores"][b] = scalar(frozen.reward_model, sequence, last)
    return out


@pytest.fixture(scope="module")
def made():
    """A later state, a stored rollout, and both what we and what the oracle make."""
    state, frozen = case.later_state(PLAIN), case.frozen()
    inputs, rollout = case.make_inputs(), case.stored_rollout()
    experience, metrics = case.experience_fn(PLAIN)(
        state, frozen, inputs, rollout, SCALARS
    )
    expected = slow(state, frozen, inputs, rollout, PLAIN)
    mask = np.arange(R)[None] < np.asarray(rollout.lengths)[:, None]
    kl_coef = float(state.kl_coef)
    rewards, advantages = np.zeros((B, R)), np.zeros((B, R))
    for b, length in enumerate(np.asarray(rollout.lengths)):
        rewards[b] = oracle.kl_penalized_rewards(
            expected["scores"][b],
            expected["logprobs"][b],
            expected["ref"][b],
            length,
            kl_coef,
        )
        advantages[b, :length] = oracle.gae(
            list(rewards[b, :length]), list(expected["values"][b, :length]), 1.0, 0.95
        )
    expected |= {"rewards": rewards, "advantages": advantages, "mask": mask}
    expected["returns"] = np.where(mask, advantages + expected["values"], 0.0)
    return experience, metrics, expected, (state, frozen, inputs, rollout)


def test_every_array_equals_the_oracle(made):
    experience, _, expected, _ = made
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(experience.mask, expected["mask"])
    close(experience.old_logprobs, expected["logprobs"])
    close(experience.old_values, expected["values"])
    close(experience.advantages, expected["advantages"])
    close(experience.returns, expected["returns"])


def test_every_metric_equals_the_oracle(made):
    _, metrics, expected, (state, _, _, rollout) = made
    mask, scores = expected["mask"], expected["scores"]
    lengths = np.asarray(rollout.lengths, np.float64)
    kl = expected["logprobs"] - expected["ref"]
    per_response = np.where(mask, kl, 0).sum(1)
    token = lambda x: oracle.mean(oracle.masked_values(x, mask))  # noqa: E731
    mismatch = np.abs(expected["logprobs"] - np.asarray(rollout.logprobs))
    returns, values = expected["returns"], expected["values"]
    variance = oracle.variance(oracle.masked_values(returns, mask))
    residual = oracle.variance(oracle.masked_values(returns - values, mask))
    numbers = {
        "objective/score": scores.mean(),
        "objective/score_std": scores.std(),
        "objective/kl": per_response.mean(),
        "objective/kl_per_token": token(kl),
        "objective/kl_k2_per_token": token(kl**2 / 2),
        "objective/kl_k3_per_token": token(np.exp(-kl) - 1 + kl),
        "objective/non_score_reward": -0.3 * per_response.mean(),
        "objective/rlhf_reward": (scores - 0.3 * per_response).mean(),
        "objective/kl_coef": 0.3,
        "policy/entropy": token(expected["entropy"]),
        "policy/entropy_min": expected["entropy"][mask].min(),
        "policy/entropy_max": expected["entropy"][mask].max(),
        "rollout/length": lengths.mean(),
        "rollout/length_min": lengths.min(),
        "rollout/length_max": lengths.max(),
        "rollout/eos_rate": np.asarray(rollout.ended).mean(),
        "rollout/pad_fraction": 1 - mask.mean(),
        "rollout/logprob_mismatch_mean": token(mismatch),
        "rollout/logprob_mismatch_max": mismatch[mask].max(),
        "rollout/score_length_correlation": np.corrcoef(scores, lengths)[0, 1],
        "value/last_minus_score": np.abs(expected["last_values"] - scores).max(),
        "value/explained_variance": 1 - residual / variance,
    }
    for name, x in (
        ("value", values),
        ("returns", returns),
        ("advantages", expected["advantages"]),
        ("rewards", expected["rewards"]),
    ):
        numbers |= {
            f"{name}/mean": x[mask].mean(),
            f"{name}/std": x[mask].std(),
            f"{name}/min": x[mask].min(),
            f"{name}/max": x[mask].max(),
        }
    assert set(metrics) == set(numbers)
    for name, number in numbers.items():
        np.testing.assert_allclose(
            metrics[name], number, rtol=2e-3, atol=2e-4, err_msg=name
        )
    assert float(state.kl_coef) == np.float32(0.3)


def test_advantages_are_whitened_over_response_tokens(made):
    _, _, expected, arguments = made
    experience, metrics = case.experience_fn(CFG)(*arguments, SCALARS)
    white = oracle.whiten(expected["advantages"], expected["mask"], shift_mean=True)
    np.testing.assert_allclose(experience.advantages, white, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(experience.returns, expected["returns"], atol=1e-4)
    assert abs(float(metrics["advantages/whitened_mean"])) < 1e-5
    assert abs(float(metrics["advantages/whitened_variance"]) - 1) < 1e-4


def rewards_of(cfg, arguments, **changes):
    """The rewards themselves: with lam = 0 and values 0, advantages are rewards."""
    state, *rest = arguments
    value = {"transformer": case.transformer(1), "head": case.zero_head()}
    state = state.replace(params=state.params | {"value": value}, **changes)
    scalars = SCALARS.replace(lam=jnp.float32(0.0), gamma=jnp.float32(0.0))
    experience, _ = case.experience_fn(cfg)(state, *rest, scalars)
    return np.asarray(experience.advantages)


def test_the_score_lands_on_the_last_real_token_with_or_without_its_end(made):
    _, _, expected, arguments = made
    rewards = rewards_of(PLAIN, arguments, kl_coef=jnp.float32(0.0))
    lengths = np.asarray(arguments[3].lengths)
    by_hand = np.zeros((B, R))
    for b in range(B):
        by_hand[b, lengths[b] - 1] = expected["scores"][b]
    assert sorted(set(lengths)) == [1, 2, 3, 4, 5, 6]
    assert case.PAD == case.EOS and not all(arguments[3].ended)
    np.testing.assert_allclose(rewards, by_hand, rtol=1e-3, atol=1e-4)


def test_a_score_that_is_missing_its_end_is_replaced(made):
    _, _, expected, arguments = made
    cfg = dataclasses.replace(PLAIN, missing_eos_score=-7.0)
    rewards = rewards_of(cfg, arguments, kl_coef=jnp.float32(0.0))
    scores = np.where(np.asarray(arguments[3].ended), expected["scores"], -7.0)
    assert -7.0 in scores
    np.testing.assert_allclose(rewards.sum(1), scores, rtol=1e-3, atol=1e-4)
    _, metrics = case.experience_fn(cfg)(*arguments, SCALARS)
    np.testing.assert_allclose(metrics["objective/score"], scores.mean(), rtol=1e-3)
    np.testing.assert_allclose(  # speaks of the models, not of the rule
        metrics["value/last_minus_score"],
        np.abs(expected["last_values"] - expected["scores"]).max(),
        rtol=1e-3,
    )
    lengths = np.asarray(arguments[3].lengths)
    np.testing.assert_allclose(
        metrics["rollout/score_length_correlation"],
        np.corrcoef(expected["scores"], lengths)[0, 1],
        atol=1e-4,
    )


def test_equal_scores_of_equal_lengths_do_not_correlate():
    """Their rounded means leave the same rest everywhere: a correlation of 1."""
    rng = np.random.default_rng(0)
    scores, lengths = rng.normal(size=(2, 20, 1)).astype(np.float32)
    equal = [jnp.broadcast_to(x, (20, 7)) for x in (scores, lengths)]
    found = jax.jit(jax.vmap(experience._correlation))(*equal)
    np.testing.assert_array_equal(found, 0.0)


def test_whitened_rewards_keep_their_mean(made):
    _, _, expected, arguments = made
    cfg = dataclasses.replace(PLAIN, whiten_rewards=True)
    white = oracle.whiten(expected["rewards"], expected["mask"], shift_mean=False)
    np.testing.assert_allclose(rewards_of(cfg, arguments), white, rtol=1e-3, atol=1e-3)


def test_the_first_iteration_has_kl_0_and_the_value_repeats_the_score(made):
    *_, (_, frozen, inputs, rollout) = made
    _, metrics = case.experience_fn(PLAIN)(
        case.fresh_state(), frozen, inputs, rollout, SCALARS
    )
    for name in ("kl", "kl_per_token", "kl_k2_per_token", "kl_k3_per_token"):
        assert abs(float(metrics[f"objective/{name}"])) < 1e-6
    assert float(metrics["value/last_minus_score"]) < 1e-5
    for name in ("rlhf_reward", "score"):
        np.testing.assert_allclose(
            metrics[f"objective/{name}"], metrics["objective/score"], rtol=1e-5
        )


def garbage_behind(inputs, rollout, seed):
    """Other tokens wherever nothing real stands."""
    rng = np.random.default_rng(seed)

    def fill(tokens, lengths):
        behind = np.arange(tokens.shape[1])[None] >= np.asarray(lengths)[:, None]
        other = rng.integers(0, case.V, tokens.shape)
        return jnp.asarray(np.where(behind, other, tokens), jnp.int32)

    return (
        inputs.replace(prompts=fill(inputs.prompts, inputs.prompt_lengths)),
        rollout.replace(responses=fill(rollout.responses, rollout.lengths)),
    )


def real_part(experience):
    """What is not tokens: nothing of it may depend on padding."""
    return {
        name: getattr(experience, name)
        for name in ("mask", "old_logprobs", "old_values", "advantages", "returns")
    }


def test_garbage_in_padding_changes_nothing(made):
    _, _, _, (state, frozen, inputs, rollout) = made
    run = case.experience_fn(CFG)
    experience, metrics = run(state, frozen, inputs, rollout, SCALARS)
    for seed in range(2):
        changed = garbage_behind(inputs, rollout, seed)
        other, other_metrics = run(state, frozen, *changed, SCALARS)
        case.assert_trees_close(real_part(other), real_part(experience))
        case.assert_trees_close(other_metrics, metrics)


def test_more_prompt_padding_changes_nothing(made):
    _, _, _, (state, frozen, inputs, rollout) = made
    run = case.experience_fn(CFG)
    experience, metrics = run(state, frozen, inputs, rollout, SCALARS)
    wider = inputs.replace(prompts=jnp.pad(inputs.prompts, ((0, 0), (0, 3))))
    other, other_metrics = run(state, frozen, wider, rollout, SCALARS)
    case.assert_trees_close(real_part(other), real_part(experience), 1e-4, 1e-5)
    case.assert_trees_close(other_metrics, metrics, 1e-4, 1e-5)


def test_the_order_of_rows_is_only_an_order(made):
    _, _, _, (state, frozen, inputs, rollout) = made
    run = case.experience_fn(CFG)
    experience, metrics = run(state, frozen, inputs, rollout, SCALARS)
    order = np.random.default_rng(0).permutation(B)
    take = functools.partial(jax.tree.map, lambda x: x[order])
    shuffled = inputs.replace(
        prompts=inputs.prompts[order], prompt_lengths=inputs.prompt_lengths[order]
    )
    other, other_metrics = run(state, frozen, shuffled, take(rollout), SCALARS)
    case.assert_trees_close(real_part(other), real_part(take(experience)))
    case.assert_trees_close(other_metrics, metrics)


def test_no_gradient_flows_through_experience(made):
    _, _, _, (state, *rest) = made

    def total(params):
        experience, _ = make_experience(
            state.replace(params=params), *rest, SCALARS, cfg=CFG, **case.SHAPES
        )
        return sum(
            jnp.sum(x) for x in real_part(experience).values() if x.dtype != bool
        )

    grads = case.compiled(jax.grad(total))(state.params)
    assert all(not np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("truncation", [{"top_k": 4}, {"top_p": 0.9}])
def test_truncated_sampling_is_refused(truncation):
    with pytest.raises(ValueError, match="infinite KL"):
        dataclasses.replace(PLAIN, sampling=Sampling(response_len=R, **truncation))


def test_slots_change_nothing_of_a_rollout():
    slots = dataclasses.replace(CFG, num_slots=3)
    state = dataclasses.replace(case.fresh_state(), step=jnp.int32(2))
    args = (state, case.make_inputs(), SCALARS)
    expected, actual = case.rollout_fn(CFG)(*args), case.rollout_fn(slots)(*args)
    chex.assert_trees_all_close(actual, expected, atol=2e-5)
    assert len(set(map(int, expected.lengths))) > 1  # a slot did become free early


def test_rollouts_are_a_function_of_key_and_step():
    run, inputs = case.rollout_fn(CFG), case.make_inputs()
    state = case.fresh_state()

    def responses(state) -> Rollout:
        return np.asarray(run(state, inputs, SCALARS).responses)

    first = responses(state)
    np.testing.assert_array_equal(
        first,
        responses(
            case.later_state().replace(
                params=state.params, step=state.step, key=state.key
            )
        ),
    )
    assert np.any(first != responses(state.replace(step=jnp.int32(1))))
    assert np.any(first != responses(case.fresh_state(seed=1)))


def test_a_head_on_the_policys_trunk_reads_the_policys_states(made):
    _, _, _, (_, _, inputs, rollout) = made
    hidden = jnp.asarray(
        np.random.default_rng(0).normal(size=(B, R + 1, case.MODEL.model_dim)),
        jnp.float32,
    )
    head = case.some_head(2)
    values = response_values(
        {"head": head},
        hidden,
        inputs.prompts,
        inputs.prompt_lengths,
        rollout.responses,
        case.MODEL,
    )
    by_hand = np.asarray(hidden) @ np.asarray(head["w"]) + 0.2 + 0.4
    np.testing.assert_allclose(values, by_hand, rtol=1e-4, atol=1e-5)
