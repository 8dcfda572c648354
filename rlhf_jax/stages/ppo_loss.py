"""What PPO minimises: clipped policy and value losses, and the pre-training loss."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import forward
from rlhf_jax.objectives.language_modeling import next_token_head, token_loss
from rlhf_jax.objectives.masking import masked_sum
from rlhf_jax.objectives.ppo import clipped_value_loss, ppo_objective
from rlhf_jax.stages.experience import Experience, response_values
from rlhf_jax.stages.ppo_state import PPOConfig, PPOScalars
from rlhf_jax.stages.scoring import contract, response_hidden

Array = jax.Array


def ppo_loss(
    params: Any,
    batch: tuple[Experience, Array],
    key: Array,
    *,
    scalars: PPOScalars,
    cfg: PPOConfig,
    model: TransformerConfig,
    reward_model: TransformerConfig,
) -> tuple[Array, dict[str, Array]]:
    """Clipped policy loss plus the clipped value loss of a minibatch.

    -sum_t w_t L_t + value_coef sum_t w_t V_t,  w summing to 1 over response tokens

    Args:
        params: `{"policy", "value"}`.
        batch: experience, arrays [B, R], and its weights [B, R].
        key: unused: there is no dropout in PPO.
        scalars, cfg, model, reward_model: constants.

    Returns:
        The scalar loss; policy and value loss, log-probabilities, entropies and values
        [B, R] of this forward pass.
    """
    del key
    experience, weights = batch
    ids = (experience.prompts, experience.prompt_lengths, experience.responses)
    hidden = response_hidden(params["policy"], *ids, model)

    def clipped_loss(logprobs, _, mask, old_logprobs, advantages, weights):
        logprobs = jnp.where(mask, logprobs, 0.0)  # before exp: see masked_sum
        objective = ppo_objective(logprobs, old_logprobs, advantages, scalars.clip)
        return -masked_sum(objective, weights)

    policy_loss, (logprobs, entropy) = token_loss(
        hidden[:, :-1],
        params["policy"]["embed"],
        experience.responses,
        contract(scalars.temperature, cfg.sampling),
        clipped_loss,
        experience.mask,
        experience.old_logprobs,
        experience.advantages,
        weights,
    )
    values = response_values(params["value"], hidden, *ids, reward_model)[:, :-1]
    value_loss = masked_sum(
        clipped_value_loss(
            values, experience.old_values, experience.returns, scalars.value_clip
        ),
        weights,
    )
    extras = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": masked_sum(entropy, weights),
        "logprobs": jnp.where(experience.mask, logprobs, 0.0),
        "values": values,
    }
    return policy_loss + scalars.value_coef * value_loss, extras


def ptx_loss(
    params: Any, batch: tuple[Array, Array, Array], key: Array, *, model: Any
) -> tuple[Array, dict[str, Array]]:
    """Next-token loss of the policy on pre-training text, in nats per token.

    Args:
        params: `{"policy", "value"}`.
        batch: tokens, targets and weights, [B, T] each.
        key: unused: there is no dropout in PPO.
        model: shape of the policy.
    """
    del key
    tokens, targets, weights = batch
    hidden = forward(params["policy"], tokens, model)
    embedding = params["policy"]["embed"]
    return next_token_head(hidden, embedding, targets, weights), {}
