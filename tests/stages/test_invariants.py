"""Each contradiction in PPO's numbers stops the run and names its likely causes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import ppo_case as case
import pytest

from rlhf_jax.nn import responses
from rlhf_jax.stages import experience, ppo
from rlhf_jax.stages.invariants import InvariantError, check_invariants, warn_of_trouble

CFG = case.CONFIG
SEVERAL = dataclasses.replace(CFG, num_minibatches=2)
LARGE = dataclasses.replace(CFG, batch_size=64)


@pytest.fixture(scope="module")
def first():
    """Metrics of a real first iteration."""
    arguments = (case.make_inputs(), case.stored_rollout(), CFG.scalars())
    return observed(case.fresh_state(), case.frozen(), *arguments)


def observed(state, frozen, inputs, rollout, scalars, **faults):
    """Metrics on the host of an iteration, with faults in what `optimize` is given."""
    cfg = CFG
    made, metrics = case.experience_fn(cfg)(state, frozen, inputs, rollout, scalars)
    # The stored rollout was not drawn from the policy: agree on its log-probabilities.
    rollout = rollout.replace(logprobs=made.old_logprobs)
    _, metrics = case.experience_fn(cfg)(state, frozen, inputs, rollout, scalars)
    made = made.replace(**faults.get("experience", {}))
    optimize = faults.get("optimize", case.optimize_fn(cfg))
    _, more = optimize(state, made, inputs, faults.get("update_scalars", scalars))
    host = {k: np.asarray(v) for k, v in (metrics | more).items() if k != "nonfinite"}
    return {name: float(x) for name, x in host.items()}


def test_a_real_first_iteration_passes(first):
    check_invariants(1, first, CFG, case.V)
    check_invariants(1, first | {"policy/last_ratio_error": 0.1}, SEVERAL, case.V)
    collapsed = {"policy/last_ratio_error": 0.0, "policy/entropy": 1e-6}
    check_invariants(1, first | collapsed, SEVERAL, case.V)  # a warning, no fault


VIOLATIONS = [
    ({"policy/first_ratio_error": 0.5}, "policy/first_ratio_error", "dropout"),
    ({"policy/last_ratio_error": 0.0}, "policy/last_ratio_error", "after each step"),
    ({"rollout/logprob_mismatch_mean": 0.1}, "logprob_mismatch_mean", "temperature"),
    ({"policy/entropy_max": 9.0}, "policy/entropy_max", "not normalised"),
    ({"policy/entropy_min": -1.0}, "policy/entropy_min", "not normalised"),
    ({"policy/entropy_min": -0.5}, "policy/entropy", "unmasked mean"),
    ({"advantages/whitened_mean": 0.3}, "whitened_mean", "padding"),
    ({"advantages/whitened_variance": 0.5}, "whitened_variance", "padding"),
    ({"objective/kl_per_token": 0.1}, "objective/kl_per_token", "another reference"),
    ({"value/last_minus_score": 0.5}, "value/last_minus_score", "one position off"),
    ({"policy/first_ratio_error": float("nan")}, "first_ratio_error", "dropout"),
]


@pytest.mark.parametrize(("change", "name", "cause"), VIOLATIONS)
def test_a_violation_names_update_metric_value_and_causes(change, name, cause, first):
    with pytest.raises(InvariantError) as caught:
        moved = {"policy/last_ratio_error": 0.1}
        check_invariants(1, first | moved | change, SEVERAL, case.V)
    text = str(caught.value)
    assert "PPO update 1" in text and name in text and cause in text


def test_a_large_batch_in_which_nothing_ends_is_a_violation(first):
    silent = first | {"rollout/eos_rate": 0.0}
    with pytest.raises(InvariantError, match="eos_rate.*response_len"):
        check_invariants(1, silent, LARGE, case.V)
    check_invariants(1, silent, CFG, case.V)  # eight responses may not end by chance


def test_kl_value_and_end_are_checked_at_the_first_update_only(first):
    later = first | {
        "objective/kl_per_token": 0.1,
        "value/last_minus_score": 3.0,
        "rollout/eos_rate": 0.0,
    }
    check_invariants(2, later, LARGE, case.V)
    with pytest.raises(InvariantError, match="update 2"):
        check_invariants(2, later | {"policy/first_ratio_error": 1.0}, LARGE, case.V)


def test_a_shared_trunk_need_not_repeat_the_score(first):
    shared = dataclasses.replace(CFG, value="shared")
    check_invariants(1, first | {"value/last_minus_score": 3.0}, shared, case.V)


def test_constant_advantages_cannot_be_whitened_and_pass(first):
    flat = first | {"advantages/std": 0.0, "advantages/whitened_variance": 0.0}
    check_invariants(1, flat, CFG, case.V)


# ------------------------------------------- faults in real arithmetic are noticed


def fails(values, match):
    with pytest.raises(InvariantError, match=match):
        check_invariants(1, values, CFG, case.V)


def test_another_temperature_in_the_update_is_noticed():
    arguments = (case.make_inputs(), case.stored_rollout(), CFG.scalars())
    scalars = CFG.scalars().replace(temperature=jnp.float32(1.0))
    faulty = observed(
        case.fresh_state(), case.frozen(), *arguments, update_scalars=scalars
    )
    fails(faulty, "first_ratio_error")


def test_a_shifted_mask_is_noticed():
    arguments = (case.make_inputs(), case.stored_rollout(), CFG.scalars())
    mask = np.arange(case.R)[None] < np.asarray(arguments[1].lengths)[:, None] + 1
    faulty = observed(
        case.fresh_state(),
        case.frozen(),
        *arguments,
        experience={"mask": jnp.asarray(mask)},
    )
    fails(faulty, "first_ratio_error")


def test_dropout_left_on_in_the_update_is_noticed(monkeypatch):
    forward = responses.transformer

    def with_dropout(params, tokens, positions, attend, cfg, last):
        leaky, key = dataclasses.replace(cfg, dropout=0.1), jax.random.key(1)
        return forward(params, tokens, positions, attend, leaky, key, last)

    arguments = (case.make_inputs(), case.stored_rollout(), CFG.scalars())
    state = case.fresh_state()
    made, _ = case.experience_fn(CFG)(state, case.frozen(), *arguments)
    leaky = case.compiled(functools.partial(ppo.optimize, cfg=CFG, **case.SHAPES))
    monkeypatch.setattr(responses, "transformer", with_dropout)
    leaky(state, made, arguments[0], arguments[2])  # traced with dropout
    monkeypatch.undo()
    faulty = observed(state, case.frozen(), *arguments, optimize=leaky)
    fails(faulty, "first_ratio_error")


def test_whitening_over_padding_is_noticed(monkeypatch):
    """Mean and variance of all positions: of the response tokens they are others."""

    def unmasked(x, mask, shift_mean=True):
        return (x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + 1e-8)

    arguments = (case.make_inputs(), case.stored_rollout(), CFG.scalars())
    fails(observed_with(monkeypatch, arguments, masked_whiten=unmasked), "whitened")


def observed_with(monkeypatch, arguments, **replaced):
    """Metrics of a first iteration whose `make_experience` calls other functions."""
    models = (case.fresh_state(), case.frozen())
    sound, _ = case.experience_fn(CFG)(*models, *arguments)
    inputs, rollout, scalars = arguments
    rollout = rollout.replace(logprobs=sound.old_logprobs)
    wrong = case.compiled(
        functools.partial(experience.make_experience, cfg=CFG, **case.SHAPES)
    )
    with monkeypatch.context() as patch:
        for name, function in replaced.items():
            patch.setattr(experience, name, function)
        made, metrics = wrong(*models, inputs, rollout, scalars)
    _, more = case.optimize_fn(CFG)(models[0], made, inputs, scalars)
    host = {k: np.asarray(v) for k, v in (metrics | more).items() if k != "nonfinite"}
    return {name: float(x) for name, x in host.items()}


def test_another_reference_is_noticed():
    arguments = (case.make_inputs(), case.stored_rollout(), CFG.scalars())
    other = case.frozen().replace(reference=case.moved(case.transformer(0), 0.1))
    fails(observed(case.fresh_state(), other, *arguments), "objective/kl_per_token")


def test_a_score_read_one_position_off_is_noticed(monkeypatch):
    """The reward model reads the token before the last, the value model the last."""
    scores = experience.rollout_scores

    def one_off(reward, prompts, prompt_lengths, rollout, model):
        before = rollout.replace(lengths=jnp.maximum(rollout.lengths - 1, 0))
        return scores(reward, prompts, prompt_lengths, before, model)

    arguments = (case.make_inputs(), case.stored_rollout(), CFG.scalars())
    faulty = observed_with(monkeypatch, arguments, rollout_scores=one_off)
    fails(faulty, "value/last_minus_score")


def test_a_real_update_of_several_steps_leaves_ratio_1_and_passes(first):
    several = dataclasses.replace(CFG, num_minibatches=2, num_epochs=2)
    arguments = (case.make_inputs(), case.stored_rollout(), several.scalars())
    state = case.fresh_state()
    made, _ = case.experience_fn(CFG)(state, case.frozen(), *arguments)
    _, sound = case.optimize_fn(several)(state, made, arguments[0], arguments[2])
    moved = {"policy/last_ratio_error": float(sound["policy/last_ratio_error"])}
    check_invariants(1, first | moved, several, case.V)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective/kl": -2.0}, "clearly negative"),
        ({"policy/entropy": 0.001}, "entropy is nearly 0"),
        ({"rollout/eos_rate": 0.01}, "hardly any response ends"),
        ({"rollout/score_length_correlation": -0.95}, "follows length"),
    ],
)
def test_trouble_is_told_and_does_not_stop(change, said, first, capsys):
    fine = first | {
        "objective/kl": 1.0,
        "rollout/eos_rate": 0.9,
        "rollout/score_length_correlation": 0.1,
    }
    warn_of_trouble(7, fine)
    assert capsys.readouterr().err == ""
    warn_of_trouble(7, fine | change)
    told = capsys.readouterr().err
    assert "PPO update 7" in told and said in told
