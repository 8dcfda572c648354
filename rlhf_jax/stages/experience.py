"""From prompts to advantages: rollout, scores, KL-penalised rewards, GAE."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import scalar_head
from rlhf_jax.nn.refill import generate_refilled
from rlhf_jax.nn.sampling import Rollout, generate
from rlhf_jax.objectives.advantages import kl_penalized_rewards, response_advantages
from rlhf_jax.objectives.masking import (
    masked_mean,
    masked_variance,
    masked_whiten,
    response_mask,
)
from rlhf_jax.objectives.ppo import explained_variance, kl_estimates
from rlhf_jax.stages.ppo_state import (
    Frozen,
    PPOConfig,
    PPOInputs,
    PPOScalars,
    PPOState,
    on_device,
)
from rlhf_jax.stages.scoring import policy_logprobs, response_hidden, rollout_scores

Array = jax.Array
Metrics = dict[str, Array]


@struct.dataclass
class Experience:
    """A rollout with all that the update needs; the axis of [B, R] is the response."""

    prompts: Array  # int32 [B, P]
    prompt_lengths: Array  # int32 [B]
    responses: Array  # int32 [B, R]
    mask: Array  # bool [B, R], real response tokens
    old_logprobs: Array  # [B, R], nats, under the contract
    old_values: Array  # [B, R], reward units
    advantages: Array  # [B, R]
    returns: Array  # [B, R]


def response_values(
    value: Any,
    policy_hidden: Array,
    prompts: Array,
    prompt_lengths: Array,
    responses: Array,
    model: TransformerConfig,
) -> Array:
    """Values before each response token and after the last: [B, R + 1], reward units.

    Index t has read the prompt and t response tokens. A value model without a
    transformer of its own reads the policy's hidden states [B, R + 1, D].
    """
    hidden = policy_hidden
    if "transformer" in value:
        ids = prompts, prompt_lengths, responses
        hidden = response_hidden(value["transformer"], *ids, model)
    return scalar_head(value["head"], hidden)


def collect_rollout(
    state: PPOState,
    inputs: PPOInputs,
    scalars: PPOScalars,
    *,
    cfg: PPOConfig,
    model: TransformerConfig,
    eos_id: int,
    pad_id: int,
) -> Rollout:
    """Samples a response to each of the [B, P] prompts from the policy."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
    sample = generate
    if cfg.num_slots is not None:
        sample = functools.partial(generate_refilled, num_slots=cfg.num_slots)
    return sample(
        state.params["policy"],
        inputs.prompts,
        inputs.prompt_lengths,
        key,
        scalars.temperature,
        eos_id=eos_id,
        pad_id=pad_id,
        model=model,
        sampling=cfg.sampling,
    )


def make_experience(
    state: PPOState,
    frozen: Frozen,
    inputs: PPOInputs,
    rollout: Rollout,
    scalars: PPOScalars,
    *,
    cfg: PPOConfig,
    model: TransformerConfig,
    reward_model: TransformerConfig,
) -> tuple[Experience, Metrics]:
    """Scores a rollout and turns scores into advantages.

    Args:
        state: reads the policy, the value model and the KL coefficient.
        frozen: of `freeze`.
        inputs: prompts, [B, P].
        rollout: responses, [B, R].
        scalars: temperature, gamma, lam.
        cfg, model, reward_model: static.

    Returns:
        The experience, arrays [B, R], and what to watch of it.
    """
    if cfg.offload_frozen:
        frozen = on_device(frozen)
    ids = (inputs.prompts, inputs.prompt_lengths, rollout.responses)
    mask = response_mask(rollout.lengths, cfg.sampling.response_len)
    contract = (scalars.temperature, cfg.sampling, model)
    policy = state.params["policy"]
    logprobs, entropy, hidden = policy_logprobs(policy, *ids, *contract)
    ref_logprobs, _, _ = policy_logprobs(frozen.reference, *ids, *contract)
    all_values = response_values(state.params["value"], hidden, *ids, reward_model)
    values = all_values[:, :-1]
    raw_scores = rollout_scores(
        frozen.reward_model,
        inputs.prompts,
        inputs.prompt_lengths,
        rollout,
        reward_model,
    )
    scores = raw_scores
    if cfg.missing_eos_score is not None:
        scores = jnp.where(rollout.ended, raw_scores, cfg.missing_eos_score)

    rewards = kl_penalized_rewards(
        scores, logprobs, ref_logprobs, rollout.lengths, state.kl_coef
    )
    if cfg.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = response_advantages(
        rewards, values, rollout.lengths, scalars.gamma, scalars.lam
    )
    kl = kl_estimates(
        jnp.where(mask, logprobs, 0.0), jnp.where(mask, ref_logprobs, 0.0)
    )
    kl_per_episode = jnp.mean(jnp.sum(kl["k1"], axis=1))
    last_values = jnp.take_along_axis(all_values, rollout.lengths[:, None], axis=1)
    mismatch = jnp.where(mask, jnp.abs(logprobs - rollout.logprobs), 0.0)
    metrics = {
        "objective/score": jnp.mean(scores),
        "objective/score_std": jnp.std(scores),
        "objective/kl": kl_per_episode,
        "objective/kl_per_token": masked_mean(kl["k1"], mask),
        "objective/kl_k2_per_token": masked_mean(kl["k2"], mask),
        "objective/kl_k3_per_token": masked_mean(kl["k3"], mask),
        "objective/non_score_reward": -state.kl_coef * kl_per_episode,
        "objective/rlhf_reward": jnp.mean(scores) - state.kl_coef * kl_per_episode,
        "objective/kl_coef": state.kl_coef,
        "policy/entropy": masked_mean(entropy, mask),
        "policy/entropy_min": jnp.min(jnp.where(mask, entropy, jnp.inf)),
        "policy/entropy_max": jnp.max(jnp.where(mask, entropy, 0.0)),
        "rollout/length": jnp.mean(rollout.lengths.astype(jnp.float32)),
        "rollout/length_min": jnp.min(rollout.lengths).astype(jnp.float32),
        "rollout/length_max": jnp.max(rollout.lengths).astype(jnp.float32),
        "rollout/eos_rate": jnp.mean(rollout.ended.astype(jnp.float32)),
        "rollout/pad_fraction": jnp.mean((~mask).astype(jnp.float32)),
        "rollout/logprob_mismatch_mean": masked_mean(mismatch, mask),
        "rollout/logprob_mismatch_max": jnp.max(mismatch),
        "rollout/score_length_correlation": _correlation(
            raw_scores, rollout.lengths.astype(jnp.float32)
        ),
        "value/last_minus_score": jnp.max(jnp.abs(last_values[:, 0] - raw_scores)),
        "value/explained_variance": explained_variance(values, returns, mask),
        **_moments("value", values, mask),
        **_moments("returns", returns, mask),
        **_moments("advantages", advantages, mask),
        **_moments("rewards", rewards, mask),
    }
    if cfg.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
        metrics |= {
            "advantages/whitened_mean": masked_mean(advantages, mask),
            "advantages/whitened_variance": masked_variance(advantages, mask),
        }
    experience = Experience(
        *ids,
        mask=mask,
        old_logprobs=jnp.where(mask, logprobs, 0.0),
        old_values=jnp.where(mask, values, 0.0),
        advantages=advantages,
        returns=returns,
    )
    return jax.lax.stop_gradient(experience), metrics


def _moments(name: str, x: Array, mask: Array) -> Metrics:
    return {
        f"{name}/mean": masked_mean(x, mask),
        f"{name}/std": jnp.sqrt(masked_variance(x, mask)),
        f"{name}/min": jnp.min(jnp.where(mask, x, jnp.inf)),
        f"{name}/max": jnp.max(jnp.where(mask, x, -jnp.inf)),
    }


def _correlation(x: Array, y: Array) -> Array:
    dx, dy = x - jnp.mean(x), y - jnp.mean(y)
    varies = (jnp.var(x) > 1e-12 * jnp.mean(x * x)) & (
        jnp.var(y) > 1e-12 * jnp.mean(y * y)
    )  # not rounding
    scale = jnp.sqrt(jnp.sum(dx * dx) * jnp.sum(dy * dy))
    return jnp.where(varies, jnp.sum(dx * dy) / jnp.where(varies, scale, 1.0), 0.0)
