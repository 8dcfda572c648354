"""Log-probabilities, KL and scores of responses to prompts, arrays in and out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import scalar_head
from rlhf_jax.nn.responses import forward_responses, last_response_states
from rlhf_jax.nn.sampling import Rollout, Sampling, contract_logits
from rlhf_jax.objectives.language_modeling import token_logprobs
from rlhf_jax.objectives.masking import response_mask

Array = jax.Array


def contract(temperature: Array, sampling: Sampling) -> Callable[[Array], Array]:
    """The sampling contract as a function of logits [..., V] alone."""
    return functools.partial(contract_logits, temperature=temperature, cfg=sampling)


def response_hidden(
    policy: Any,
    prompts: Array,
    prompt_lengths: Array,
    responses: Array,
    model: TransformerConfig,
) -> Array:
    """Hidden states of one response [B, R] to each prompt [B, P]: [B, R + 1, D]."""
    return forward_responses(
        policy, prompts, prompt_lengths, responses[:, None], model
    )[:, 0]


def policy_logprobs(
    policy: Any,
    prompts: Array,
    prompt_lengths: Array,
    responses: Array,
    temperature: Array,
    sampling: Sampling,
    model: TransformerConfig,
) -> tuple[Array, Array, Array]:
    """Log-probabilities of responses under the sampling contract.

    Args:
        policy: transformer parameters.
        prompts, prompt_lengths, responses: [B, P], [B], [B, R].
        temperature: of the contract, traced.
        sampling: reads `top_k`, `top_p`.
        model: shape of the policy.

    Returns:
        log-probabilities and entropies [B, R] in nats, hidden states [B, R + 1, D].
    """
    hidden = response_hidden(policy, prompts, prompt_lengths, responses, model)
    logprobs, entropy = token_logprobs(
        hidden[:, :-1], policy["embed"], responses, contract(temperature, sampling)
    )
    return logprobs, entropy, hidden


def response_scores(
    reward_model: Any,
    prompts: Array,
    prompt_lengths: Array,
    responses: Array,
    lengths: Array,
    model: TransformerConfig,
) -> Array:
    """Scores of K responses to each prompt, read at their last real token.

    Args:
        reward_model: `{"transformer", "head"}`.
        prompts, prompt_lengths: int32, [B, P] and [B].
        responses, lengths: int32, [B, K, R] and [B, K].
        model: shape of the reward model.

    Returns:
        float32, [B, K], reward units.

    Source: Ouyang et al. 2022, section 3.5; the position is the family's convention
        (Stiennon et al. 2020), InstructGPT did not publish it.
    """
    transformer = reward_model["transformer"]
    last = last_response_states(
        transformer, prompts, prompt_lengths, responses, lengths, model
    )
    return scalar_head(reward_model["head"], last)


def rollout_scores(
    reward_model: Any,
    prompts: Array,
    prompt_lengths: Array,
    rollout: Rollout,
    model: TransformerConfig,
) -> Array:
    """Score of each sampled response: float32 [B], see `response_scores`."""
    responses, lengths = rollout.responses[:, None], rollout.lengths[:, None]
    return response_scores(
        reward_model, prompts, prompt_lengths, responses, lengths, model
    )[:, 0]


def sequence_kl(
    policy: Any,
    reference: Any,
    prompts: Array,
    prompt_lengths: Array,
    rollout: Rollout,
    temperature: Array,
    sampling: Sampling,
    model: TransformerConfig,
) -> Array:
    """Sum over each response of log pi - log pi_ref (k1): [B], nats per response."""
    ids = (prompts, prompt_lengths, rollout.responses)
    contract = (temperature, sampling, model)
    logprobs, _, _ = policy_logprobs(policy, *ids, *contract)
    ref_logprobs, _, _ = policy_logprobs(reference, *ids, *contract)
    mask = response_mask(rollout.lengths, rollout.responses.shape[-1])
    return jnp.sum(jnp.where(mask, logprobs - ref_logprobs, 0.0), axis=1)
