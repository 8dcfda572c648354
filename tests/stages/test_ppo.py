"""One PPO step (`optimize`) is the gradient of the objective; nothing else moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import ppo_case as case
import pytest
from meshes import by_sizes, some_devices

from rlhf_jax.nn.transformer import forward
from rlhf_jax.stages.common import Model
from rlhf_jax.stages.ppo_run import make_state
from rlhf_jax.stages.ppo_state import PPOConfig
from rlhf_jax.training.mesh import replicas, replicated, shard_batch
from rlhf_jax.training.optimizers import learning_rate

B, R = case.B, case.R
CFG = case.CONFIG
PTX = dataclasses.replace(CFG, ptx_coef=2.5)
EPOCHS = dataclasses.replace(CFG, num_minibatches=2, num_epochs=2)
MICRO = dataclasses.replace(CFG, num_microbatches=2)
SHARED = dataclasses.replace(CFG, value="shared")


@functools.cache
def experience_of(cfg: PPOConfig, later: bool = True):
    state = case.later_state(cfg) if later else case.fresh_state(cfg)
    inputs, rollout = case.make_inputs(cfg), case.stored_rollout()
    experience, _ = case.experience_fn(dataclasses.replace(cfg, num_epochs=1))(
        state, case.frozen(), inputs, rollout, cfg.scalars()
    )
    return state, experience, inputs


@functools.cache
def optimized(cfg: PPOConfig, later: bool = True):
    state, experience, inputs = experience_of(cfg, later)
    return case.optimize_fn(cfg)(state, experience, inputs, cfg.scalars())


def off_policy(experience):
    """Experience of an older policy: ratios fall on both sides of the clip."""
    rng = np.random.default_rng(1)
    shift = jnp.asarray(rng.normal(size=(B, R), scale=0.4), jnp.float32)
    shift = jnp.where(experience.mask, shift, 0.0)
    return experience.replace(
        old_logprobs=experience.old_logprobs + shift,
        old_values=experience.old_values - shift,
    )


# --------------------------------------------------------------- the gradient


def written_out_loss(params, experience, value_coef):
    """The objective again: joined sequences, a list of tokens, no weights, no mask."""
    experience = jax.tree.map(np.asarray, experience)
    joined = np.zeros((B, case.P + R), np.int32)
    rows, positions, taken = [], [], []
    for b, n in enumerate(experience.prompt_lengths):
        length = int(experience.mask[b].sum())
        joined[b, :n] = experience.prompts[b, :n]
        joined[b, n : n + length] = experience.responses[b, :length]
        rows += [b] * length
        positions += range(n - 1, n - 1 + length)
        taken += experience.responses[b, :length].tolist()
    at = (np.array(rows), np.array(positions))
    hidden = forward(params["policy"], jnp.asarray(joined), case.MODEL)[at]
    logits = jnp.einsum("nd,vd->nv", hidden, params["policy"]["embed"]) / 0.7
    logprobs = jax.nn.log_softmax(logits)[np.arange(len(rows)), np.array(taken)]
    old, advantages, before, targets = (
        jnp.asarray(x[experience.mask])
        for x in (
            experience.old_logprobs,
            experience.advantages,
            experience.old_values,
            experience.returns,
        )
    )
    ratio = jnp.exp(logprobs - old)
    objective = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
    value = params["value"]
    hidden = forward(value["transformer"], jnp.asarray(joined), case.MODEL)[at]
    values = hidden @ value["head"]["w"] + value["head"]["b"] + 0.4
    near = jnp.clip(values, before - 0.2, before + 0.2)
    worse = jnp.maximum((values - targets) ** 2, (near - targets) ** 2)
    return jnp.mean(-objective + value_coef * 0.5 * worse)


def written_out_ptx(policy, inputs):
    hidden = forward(policy, inputs.ptx_tokens, case.MODEL)
    logits = jnp.einsum("btd,vd->btv", hidden, policy["embed"])
    nll = -jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(nll, inputs.ptx_targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(inputs.ptx_mask, taken, 0.0)) / jnp.sum(
        inputs.ptx_mask, dtype=jnp.float32
    )


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


def first_adam_step(params, grads, rate):
    """Adam from zero moments: g / (|g| + eps), g clipped to norm 1."""
    scale = min(1.0, 1.0 / norm(grads))
    return jax.tree.map(
        lambda p, g: p - rate * scale * g / (np.abs(scale * g) + 1e-3), params, grads
    )


@pytest.fixture(scope="module")
def gradients():
    state, experience, inputs = experience_of(PTX)
    experience = off_policy(experience)
    ppo = case.compiled(
        jax.grad(
            functools.partial(written_out_loss, experience=experience, value_coef=0.1)
        )
    )(state.params)
    ptx = case.compiled(jax.grad(functools.partial(written_out_ptx, inputs=inputs)))(
        state.params["policy"]
    )
    return (state, experience, inputs), *jax.device_get((ppo, ptx))


@pytest.mark.parametrize("ptx_coef", [2.5, 0.5])
def test_one_step_follows_the_summed_gradient(gradients, ptx_coef):
    (state, experience, inputs), ppo, ptx = gradients
    scalars = PTX.scalars().replace(ptx_coef=jnp.float32(ptx_coef))
    new, metrics = case.optimize_fn(PTX)(state, experience, inputs, scalars)
    summed = jax.tree.map(lambda a, b: a + ptx_coef * b, ppo["policy"], ptx)
    expected = {
        "policy": first_adam_step(state.params["policy"], summed, 1e-2),
        "value": first_adam_step(state.params["value"], ppo["value"], 2e-2),
    }
    case.assert_trees_close(new.params, expected, rtol=1e-3, atol=1e-4)

    scaled = jax.tree.map(lambda x: ptx_coef * x, ptx)
    dot = sum(
        np.sum(a * b)
        for a, b in zip(
            jax.tree.leaves(ppo["policy"]), jax.tree.leaves(scaled), strict=True
        )
    )
    numbers = {
        "policy/ppo_grad_norm": norm(ppo["policy"]),
        "ptx/grad_norm": norm(scaled),
        "ptx/grad_cosine": dot / (norm(ppo["policy"]) * norm(scaled)),
        "policy/grad_norm": norm(summed),
        "value/grad_norm": norm(ppo["value"]),
        "ptx/loss": written_out_ptx(state.params["policy"], inputs),
        "policy/learning_rate": 1e-2,
        "value/learning_rate": 2e-2,
        "policy/param_norm": norm(state.params["policy"]),
        "value/param_norm": norm(state.params["value"]),
    }
    for name, number in numbers.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-3, err_msg=name)
    change = jax.tree.map(lambda a, b: a - b, new.params, state.params)
    for name in ("policy", "value"):
        np.testing.assert_allclose(
            metrics[f"{name}/update_norm"], norm(change[name]), rtol=1e-3
        )


def test_diagnostics_equal_the_oracle(gradients):
    (state, experience, inputs), _, _ = gradients
    _, metrics = case.optimize_fn(PTX)(state, experience, inputs, PTX.scalars())
    on_policy = np.asarray(experience_of(PTX)[1].old_logprobs)
    mask = np.asarray(experience.mask)
    old, advantages = (
        np.asarray(x) for x in (experience.old_logprobs, experience.advantages)
    )
    _, rollout_metrics = case.experience_fn(PTX)(
        state, case.frozen(), inputs, case.stored_rollout(), PTX.scalars()
    )
    np.testing.assert_allclose(  # before the step the entropy is the rollout's
        metrics["policy/update_entropy"], rollout_metrics["policy/entropy"], rtol=1e-4
    )
    numbers = oracle.ppo_diagnostics(on_policy, old, advantages, mask, 0.2)
    for name, number in numbers.items():
        np.testing.assert_allclose(
            metrics[f"policy/{name}"], number, rtol=1e-3, atol=1e-5, err_msg=name
        )
    objective, value_loss, far = [], [], []
    for index in zip(*np.nonzero(mask), strict=True):
        objective.append(
            oracle.ppo_objective(on_policy[index], old[index], advantages[index], 0.2)
        )
        value = float(experience_of(PTX)[1].old_values[index])
        before = float(experience.old_values[index])
        value_loss.append(
            oracle.clipped_value_loss(
                value, before, float(experience.returns[index]), 0.2
            )
        )
        far.append(abs(value - before) > 0.2)
    np.testing.assert_allclose(metrics["policy/loss"], -np.mean(objective), rtol=1e-3)
    np.testing.assert_allclose(metrics["value/loss"], np.mean(value_loss), rtol=1e-3)
    np.testing.assert_allclose(metrics["value/clip_fraction"], np.mean(far), rtol=1e-3)
    error = np.abs(np.exp(on_policy - old) - 1)[mask].max()
    np.testing.assert_allclose(metrics["policy/first_ratio_error"], error, rtol=1e-3)


def test_ptx_with_coefficient_0_is_ppo_bit_for_bit():
    state, experience, inputs = experience_of(PTX)
    scalars = PTX.scalars().replace(ptx_coef=jnp.float32(0.0))
    with_rows, _ = case.optimize_fn(PTX)(state, experience, inputs, scalars)
    without, metrics = case.optimize_fn(CFG)(
        state, experience, case.make_inputs(CFG), CFG.scalars()
    )
    case.assert_trees_equal(with_rows.params, without.params)
    assert not any(name.startswith("ptx/") for name in metrics)


# ------------------------------------------------------------------- invariants


def test_the_first_step_table():
    _, metrics = optimized(CFG, later=False)
    exact = {
        "policy/ratio_mean": 1.0,
        "policy/ratio_max": 1.0,
        "policy/ratio_min": 1.0,
        "policy/ratio_var": 0.0,
        "policy/approx_kl": 0.0,
        "policy/clip_fraction": 0.0,
        "policy/first_ratio_error": 0.0,
        "policy/last_ratio_error": 0.0,
        "policy/loss": 0.0,  # minus the mean of whitened advantages
        "value/clip_fraction": 0.0,
    }
    for name, number in exact.items():
        np.testing.assert_allclose(metrics[name], number, atol=1e-5, err_msg=name)
    assert float(metrics["policy/grad_norm"]) > 1e-3
    assert not np.any(metrics["nonfinite"])


def test_old_log_probabilities_are_frozen_over_epochs():
    _, metrics = optimized(EPOCHS)
    assert float(metrics["policy/first_ratio_error"]) < 1e-5
    assert float(metrics["policy/last_ratio_error"]) > 1e-2
    assert float(metrics["policy/approx_kl"]) > 1e-6


def test_microbatches_change_nothing():
    whole, metrics = optimized(CFG)
    cut, cut_metrics = optimized(MICRO)
    case.assert_trees_close(cut.params, whole.params, rtol=1e-4, atol=1e-5)
    case.assert_trees_close(cut_metrics, metrics, rtol=1e-4, atol=1e-5)


def test_the_average_moves_by_its_formula():
    state, _, _ = experience_of(CFG)
    new, _ = optimized(CFG)
    expected = jax.tree.map(
        lambda a, p: 0.9 * a + (1 - 0.9) * p, state.ema, new.params["policy"]
    )
    case.assert_trees_close(new.ema, expected, rtol=1e-5, atol=1e-6)


def test_garbage_in_padding_changes_no_parameter():
    state, experience, inputs = experience_of(CFG)
    rng = np.random.default_rng(3)
    noise = lambda x: jnp.where(  # noqa: E731
        experience.mask, x, jnp.asarray(rng.normal(size=(B, R)) * 50, jnp.float32)
    )
    tokens = jnp.asarray(rng.integers(0, case.V, (B, R)), jnp.int32)
    changed = experience.replace(
        responses=jnp.where(experience.mask, experience.responses, tokens),
        returns=noise(experience.returns),
    )
    new, metrics = case.optimize_fn(CFG)(state, changed, inputs, CFG.scalars())
    case.assert_trees_close(new.params, optimized(CFG)[0].params)
    case.assert_trees_close(metrics, optimized(CFG)[1])


def test_the_order_of_rows_is_only_an_order():
    state, experience, inputs = experience_of(CFG)
    order = np.random.default_rng(0).permutation(B)
    shuffled = jax.tree.map(lambda x: x[order], experience)
    new, metrics = case.optimize_fn(CFG)(state, shuffled, inputs, CFG.scalars())
    case.assert_trees_close(new.params, optimized(CFG)[0].params, 1e-4, 1e-5)
    case.assert_trees_close(metrics, optimized(CFG)[1], 1e-4, 1e-5)


def test_every_epoch_visits_every_episode_once():
    """One poisoned episode of eight must reach both epochs: one of two minibatches."""
    state, experience, inputs = experience_of(EPOCHS)
    still = EPOCHS.scalars()
    still = still.replace(
        policy_optimizer=still.policy_optimizer.replace(learning_rate=jnp.float32(0)),
        value_optimizer=still.value_optimizer.replace(learning_rate=jnp.float32(0)),
    )
    counts = []
    for row in range(B):
        far = experience.old_values.at[row].add(100.0)
        run = case.optimize_fn(EPOCHS)
        _, metrics = run(state, experience.replace(old_values=far), inputs, still)
        # With parameters that stand still, the mean over the 4 steps of the share of
        # far values: each of the 2 epochs counts the row in exactly one minibatch.
        counts.append(float(metrics["value/clip_fraction"]))
    assert min(counts) > 0
    lengths = np.asarray(jnp.sum(experience.mask, axis=1))
    for row, share in enumerate(counts):
        smallest = sum(sorted(np.delete(lengths, row))[:3]) + lengths[row]
        largest = sum(sorted(np.delete(lengths, row))[-3:]) + lengths[row]
        low, high = lengths[row] / largest / 2, lengths[row] / smallest / 2
        assert low - 1e-6 <= share <= high + 1e-6
    # Rows that share their minibatch in both epochs have one share per token: two
    # values in all, if the epochs cut the episodes alike.
    assert (
        len({round(float(c / n), 6) for c, n in zip(counts, lengths, strict=True)}) > 2
    )


# --------------------------------------------------------------- shared trunk


def test_a_shared_trunk_learns_values():
    state, experience, inputs = experience_of(SHARED)
    silent = experience.replace(advantages=jnp.zeros((B, R)))  # values only
    scalars = SHARED.scalars().replace(
        value_coef=jnp.float32(1.0), value_clip=jnp.float32(100.0)
    )
    run = case.optimize_fn(SHARED)
    losses = []
    new = state
    for _ in range(15):
        new, metrics = run(new, silent, inputs, scalars)
        losses.append(float(metrics["value/loss"]))
    assert losses[-1] < 0.5 * losses[0]
    change = jax.tree.map(
        lambda a, b: a - b, new.params["policy"], state.params["policy"]
    )
    assert norm(change["blocks"]) > 1e-3  # the trunk has learned it too
    assert set(new.params["value"]) == {"head"}


def test_a_separate_value_model_leaves_the_policy_alone():
    state, experience, inputs = experience_of(CFG)
    silent = experience.replace(advantages=jnp.zeros((B, R)))
    new, _ = case.optimize_fn(CFG)(state, silent, inputs, CFG.scalars())
    case.assert_trees_equal(new.params["policy"], state.params["policy"])
    change = jax.tree.map(
        lambda a, b: a - b, new.params["value"], state.params["value"]
    )
    assert norm(change) > 1e-3


def test_the_shift_of_the_value_head_is_never_trained():
    state, _, _ = experience_of(EPOCHS)
    new, _ = optimized(EPOCHS)
    before, after = (s.params["value"]["head"] for s in (state, new))
    assert float(before["shift"]) == float(after["shift"]) != 0.0
    assert float(before["b"]) != float(after["b"])


# ------------------------------------------------------------ whole iterations


WHOLE = dataclasses.replace(
    CFG, num_minibatches=2, kl_target=4.0, kl_horizon=100.0, ptx_coef=1.5
)


@pytest.fixture(scope="module")
def whole():
    """Three iterations on one device, compiled once for all scalars."""
    traces = []

    def counted(state, inputs, frozen, scalars):
        traces.append(None)
        return case.update(WHOLE)(state, inputs, frozen, scalars)

    step = case.compiled(counted)

    def run(seed=0, kl_coef=0.3, rate=1e-2, iterations=3):
        state = case.fresh_state(WHOLE, seed).replace(kl_coef=jnp.float32(kl_coef))
        scalars = rated(rate)
        history = []
        for i in range(iterations):
            state, metrics = step(
                state, case.make_inputs(WHOLE, i), case.frozen(), scalars
            )
            history.append(metrics)
        return state, history

    return run, traces


def rated(rate):
    scalars = WHOLE.scalars()
    return scalars.replace(
        policy_optimizer=scalars.policy_optimizer.replace(
            learning_rate=jnp.float32(rate)
        )
    )


def test_one_program_serves_all_iterations_and_all_scalars(whole):
    run, traces = whole
    run()
    run(seed=1, kl_coef=0.1, rate=1e-3)
    assert len(traces) == 1


def test_the_kl_coefficient_moves_after_each_iteration_by_its_formula(whole):
    run, _ = whole
    state, history = run()
    coef = 0.3
    for metrics in history:
        np.testing.assert_allclose(metrics["objective/kl_coef"], coef, rtol=1e-6)
        error = float(metrics["objective/kl"]) / 4.0 - 1.0
        coef *= 1.0 + min(max(error, -0.2), 0.2) * B / 100.0
    np.testing.assert_allclose(state.kl_coef, coef, rtol=1e-5)
    assert int(state.step) == 3


def test_the_first_iteration_of_a_whole_update_obeys_the_table(whole):
    run, _ = whole
    _, history = run(iterations=1)
    for name, number in (
        ("objective/kl", 0.0),
        ("value/last_minus_score", 0.0),
        ("policy/first_ratio_error", 0.0),
        ("rollout/logprob_mismatch_max", 0.0),
        ("advantages/whitened_mean", 0.0),
        ("advantages/whitened_variance", 1.0),
    ):
        np.testing.assert_allclose(history[0][name], number, atol=1e-4, err_msg=name)


def test_a_sweep_at_once_equals_separate_runs(whole):
    run, _ = whole
    sweep = [(0, 0.3, 1e-2), (1, 0.05, 1e-3)]
    stack = lambda *trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)  # noqa: E731
    states = stack(
        *(
            case.fresh_state(WHOLE, seed).replace(kl_coef=jnp.float32(kl_coef))
            for seed, kl_coef, _ in sweep
        )
    )
    scalars = stack(*(rated(rate) for _, _, rate in sweep))
    step = case.compiled(jax.vmap(case.update(WHOLE), in_axes=(0, None, None, 0)))
    for i in range(2):
        states, metrics = step(
            states, case.make_inputs(WHOLE, i), case.frozen(), scalars
        )
    for n, (seed, kl_coef, rate) in enumerate(sweep):
        state, history = run(seed, kl_coef, rate, iterations=2)
        one = jax.tree.map(lambda x, n=n: x[n], states.params)
        case.assert_trees_close(one, state.params, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(states.kl_coef[n], state.kl_coef, rtol=1e-4)
        case.assert_trees_close(
            {k: v[n] for k, v in metrics.items()}, history[-1], rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in [(4, 2), (1, 1, 2), (2, 1, 2), (1, 2, 2)]
        ),
    ],
    ids=by_sizes,
)
def test_many_devices_do_what_one_does_and_frozen_models_stay(shape, whole):
    run, _ = whole
    expected, history = run(iterations=2)
    mesh = some_devices(*shape)
    model = lambda kind, params: Model(kind, params, case.MODEL, None, None)  # type: ignore # noqa: E731
    reference = model("language_model", case.transformer(0))
    reward = model("reward_model", case.scalar_model(1))
    state, sharding = make_state(WHOLE, reference, reward, jax.random.key(0), mesh)
    frozen = case.frozen()
    before = jax.device_get(frozen)
    step = case.compiled(
        case.update(WHOLE),
        donate_argnums=0,
        out_shardings=(sharding, replicated(mesh)),
    )
    for i in range(2):
        inputs = shard_batch(mesh, case.make_inputs(WHOLE, i))
        state, metrics = step(state, inputs, frozen, WHOLE.scalars())
    case.assert_trees_close(
        jax.device_get(state.params), jax.device_get(expected.params), 1e-3, 1e-4
    )
    case.assert_trees_close(
        jax.device_get(metrics), jax.device_get(history[-1]), 1e-2, 1e-3
    )
    case.assert_trees_equal(jax.device_get(frozen), before)
    case.assert_trees_equal(jax.device_get(reference.params), before.reference)


@pytest.mark.slow
def test_replicas_add_up_what_one_device_does(whole):
    """Two devices with all parameters each, in microbatches; rows come back in order:
    the diagnostics of each token and `first_ratio_error` are made of them."""
    run, _ = whole
    cfg = dataclasses.replace(WHOLE, num_microbatches=2)
    expected, history = run(iterations=2)
    mesh = some_devices(2, 1)
    update = functools.partial(case.update(cfg), mesh=replicas(mesh))
    step = case.compiled(update)
    state = case.fresh_state(cfg, 0)
    for i in range(2):
        inputs = shard_batch(mesh, case.make_inputs(cfg, i))
        state, metrics = step(state, inputs, case.frozen(), cfg.scalars())
    assert float(metrics["policy/first_ratio_error"]) < 1e-3
    case.assert_trees_close(
        jax.device_get(state.params), jax.device_get(expected.params), 1e-3, 1e-4
    )
    case.assert_trees_close(
        jax.device_get(metrics), jax.device_get(history[-1]), 1e-2, 1e-3
    )


# ------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_minibatches": 3}, "batch_size 8 .* num_minibatches 3"),
        ({"num_minibatches": 0}, "num_minibatches .* got 0"),
        ({"num_minibatches": 2, "num_microbatches": 3}, "4 episodes .* 3"),
        ({"num_microbatches": 0}, "num_microbatches 0"),
        ({"kl_coef": -0.1}, "kl_coef .* -0.1"),
        ({"kl_coef": float("nan")}, "kl_coef"),
        ({"value": "seperate"}, "'separate' or 'shared'"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"lam": 95.0}, "lam"),
        ({"gamma": -0.1}, "gamma"),
        ({"ptx_coef": -1.0}, "ptx_coef"),
        ({"value_coef": -0.1}, "value_coef"),
        ({"clip": 0.0}, "clip"),
        ({"kl_target": 1.0, "kl_horizon": float("nan")}, "kl_horizon"),
        ({"missing_eos_score": float("-inf")}, "missing_eos_score"),
        ({"kl_target": 0.0}, "kl_target must be above 0 or None, got 0"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef is 0, which kl_target multipli"),
        ({"kl_target": 1.0, "kl_horizon": 1.6}, "kl_horizon .* batch_size = 1.6"),
    ],
)
def test_impossible_numbers_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(CFG, **change)


@pytest.mark.parametrize("coef", [0.0, 1.0])
def test_rows_of_text_that_the_config_does_not_speak_of_are_refused(coef):
    """A sweep over `scalars.ptx_coef` would otherwise change nothing."""
    given = dataclasses.replace(CFG, ptx_coef=1.0 - coef)
    cfg = dataclasses.replace(CFG, ptx_coef=coef)
    state, inputs = case.fresh_state(cfg, 0), case.make_inputs(given, 0)
    with pytest.raises(ValueError, match="pre-training rows, and by ptx_coef"):
        case.update(cfg)(state, inputs, case.frozen(), cfg.scalars())


def test_there_are_pre_training_rows_only_with_ptx():
    assert CFG.num_ptx_rows == 0
    assert PTX.num_ptx_rows == 16


def test_the_defaults_are_instructgpts():
    """Ouyang et al. 2022, appendix C.4."""
    cfg = PPOConfig()
    assert (cfg.batch_size, cfg.num_minibatches, cfg.num_epochs) == (512, 8, 1)
    assert (cfg.kl_coef, cfg.clip, cfg.gamma, cfg.ema_decay) == (0.02, 0.2, 1.0, 0.992)
    assert cfg.num_iterations * cfg.batch_size == 256_000
    assert (cfg.sampling.temperature, cfg.ptx_per_episode) == (1.0, 8)
    assert cfg.value_optimizer.learning_rate == 9e-6
    assert cfg.policy_optimizer.warmup_steps == 10
    assert cfg.policy_optimizer.warmup_fraction == 0.1
    assert cfg.kl_target is None and cfg.value == "separate"


def changed(cfg, step=0, **changes):
    state = dataclasses.replace(case.fresh_state(cfg), step=jnp.int32(step))
    args = case.frozen(), case.make_inputs(cfg), case.stored_rollout(), cfg.scalars()
    experience, _ = case.experience_fn(cfg)(state, *args)
    experience = experience.replace(**changes)
    return case.optimize_fn(cfg)(state, experience, args[1], cfg.scalars())[1]


def test_each_model_has_a_schedule_of_its_own():
    other = dataclasses.replace(case.OPTIMIZER, schedule="linear", learning_rate=0.02)
    cfg = dataclasses.replace(CFG, value_optimizer=other)
    metrics = changed(cfg, step=5)
    for name, opt in (("policy", case.OPTIMIZER), ("value", other)):
        expected = learning_rate(jnp.int32(5), opt, opt.scalars(), cfg.num_iterations)
        np.testing.assert_allclose(metrics[f"{name}/learning_rate"], expected)


def test_values_clip_by_their_own_width():
    cfg = dataclasses.replace(CFG, clip=1e3, value_clip=1e-3)
    far = jnp.full((case.B, case.R), 7.0)
    found = changed(cfg, old_values=far)["value/clip_fraction"]
    np.testing.assert_allclose(found, 1.0, rtol=1e-5)
