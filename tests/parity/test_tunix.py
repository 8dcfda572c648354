"""PPO beside tunix: the benchmark times the two only where they do the same work."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("tunix", reason="needs the extra [tunix]")

import jax  # noqa: E402

from experiments.benchmark import ppo_tunix  # noqa: E402
from experiments.benchmark.ppo import Workload, our_iteration  # noqa: E402
from rlhf_jax.objectives.advantages import response_advantages  # noqa: E402
from rlhf_jax.objectives.masking import masked_whiten  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of tunix and flax


@pytest.fixture(scope="module", autouse=True)
def without_strict_rules():
    """tunix adds integers to floats, in threads of its own too."""
    names = ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, ("standard", "allow"), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def work(tiny):
    """Small, and of a width at which the matrices are equal: 8 * 24 / 3 = 64."""
    return Workload(tiny(model_dim=24), 4, 8, 8, epochs=2, microbatch=2)


@pytest.fixture(scope="module")
def first(work):
    """What `check_same_work` reads after the first iteration of both."""
    start, ours = our_iteration(work)
    cluster, seen, theirs = ppo_tunix.tunix_iteration(start["prompts"], work)
    mine = jax.device_get(ours())
    theirs()
    return {"start": start, "mine": mine, "cluster": cluster, "seen": dict(seen)}


def test_both_sides_of_a_duel_do_the_same_work(work):
    steady, first = ppo_tunix.against_tunix("ppo/tiny", work, repeats=1)
    assert steady.ratio > 0 and steady.unit == "times as fast"
    assert first.ratio > 0 and first.unit == "of its time"


def test_equal_work_passes(work, first):
    ppo_tunix.check_same_work("ppo/tiny", work, **first)


@pytest.mark.parametrize("field", ["epochs", "minibatches", "episodes", "response_len"])
def test_other_work_is_not_timed(work, first, field):
    more = dataclasses.replace(work, **{field: 2 * getattr(work, field)})
    with pytest.raises(SystemExit, match="do not do the same work"):
        ppo_tunix.check_same_work("ppo/tiny", more, **first)


def test_other_prompts_are_not_timed(work, first):
    start = first["start"] | {"prompts": first["start"]["prompts"][::-1]}
    with pytest.raises(SystemExit, match="different prompts"):
        ppo_tunix.check_same_work("ppo/tiny", work, **first | {"start": start})


def test_a_response_that_ends_is_not_timed(work, first):
    short = [text.rsplit(" ", 1)[0] for text in first["seen"]["responses"]]
    seen = first["seen"] | {"responses": first["seen"]["responses"][:-1] + short[-1:]}
    with pytest.raises(SystemExit, match="tokens of a response"):
        ppo_tunix.check_same_work("ppo/tiny", work, **first | {"seen": seen})


@pytest.mark.parametrize("side", ["mine", "seen"])
def test_policies_that_differ_from_the_reference_are_not_timed(work, first, side):
    changed = {
        "mine": first["mine"] | {"objective/kl_per_token": 0.1},
        "seen": first["seen"]
        | {"metrics": {"rewards/reward_kl_penalty": ([0.1], None)}},
    }[side]
    with pytest.raises(SystemExit, match="KL of 0.1 from equal policies"):
        ppo_tunix.check_same_work("ppo/tiny", work, **first | {side: changed})


def test_other_matrices_are_not_timed(work, first):
    wide = dataclasses.replace(work.model, model_dim=32)
    start, _ = our_iteration(dataclasses.replace(work, model=wide))
    with pytest.raises(SystemExit, match="matrices"):
        ppo_tunix.check_same_work("ppo/tiny", work, **first | {"start": start})


def test_a_later_iteration_compiles_nothing_and_moves_the_policy(work):
    prompts = np.random.default_rng(0).integers(2, 11, (4, 8)).astype(np.int32)
    _, _, theirs = ppo_tunix.tunix_iteration(prompts, work)
    params, compiled = [], []
    for _ in range(2):
        events = []  # tunix drops the listeners when an iteration ends
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, events=events, **__: events.append(name)
        )
        params.append(jax.device_get(jax.tree.leaves(theirs())))
        compiled.append(any("compile" in name for name in events))
    assert compiled == [True, False]
    moved = [np.abs(a - b).max() for a, b in zip(*params, strict=True)]
    assert max(moved) > 0


def test_advantages_and_returns_are_those_of_tunix():
    """Whitened there by the unbiased variance, n / (n - 1) of ours."""
    from tunix.rl.algo_core import compute_gae_advantages

    rng = np.random.default_rng(0)
    rewards, values = np.float32(rng.normal(size=(2, 3, 7)))
    lengths = np.array([7, 7, 7])
    mask = np.arange(7) < lengths[:, None]
    theirs, their_returns = compute_gae_advantages(rewards, values, mask, 0.9, 0.8)
    ours, returns = response_advantages(
        rewards, values, lengths, np.float32(0.9), np.float32(0.8)
    )
    np.testing.assert_allclose(their_returns, returns, rtol=1e-5, atol=1e-6)
    n = mask.sum()
    ours = masked_whiten(ours, mask) * np.sqrt((n - 1) / n)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
