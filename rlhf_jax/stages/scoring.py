"""Sampling from a model and scoring with another, in batches of one compiled shape."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import PromptBatch, prompt_batches
from rlhf_jax.data.sources import DataError, Prompt
from rlhf_jax.data.widths import width_groups
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import scalar_head
from rlhf_jax.nn.responses import forward_responses, last_response_states
from rlhf_jax.nn.sampling import Rollout, Sampling, contract_logits, generate
from rlhf_jax.objectives.language_modeling import token_logprobs
from rlhf_jax.objectives.masking import response_mask
from rlhf_jax.stages.common import Context, Model
from rlhf_jax.training.mesh import fill_shards, jit_measure, shard_whole_batch

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Response:
    """One sampled response."""

    text: str
    """Decoded, without end-of-text."""
    ids: np.ndarray
    """int32, [number of tokens], end-of-text included."""
    ended: bool
    """Whether it ended by itself."""


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


class Sampler:
    """Samples from models of one shape and measures the samples.

    Compiled once, or once for each width where `width_groups` makes several.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        prompt_len: int,
        batch_size: int,
        ctx: Context,
    ):
        """Compiles nothing yet.

        Args:
            model: gives shape, tokenizer and format; parameters come with each call.
            sampling: contract.
            prompt_len: longest prompt in tokens.
            batch_size: prompts at a time, see `fill_shards`.
            ctx: the run.
        """
        self.model, self.sampling = model, sampling
        self._prompt_len, self._ctx = prompt_len, ctx
        self._batch_size = fill_shards(batch_size, ctx.mesh)
        tokenizer = model.tokenizer
        self._generate = jit_measure(
            generate,
            ctx.mesh,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            model=model.cfg,
            sampling=sampling,
        )
        self._measures: dict[Callable, Callable] = {}

    def __call__(
        self, params: Any, prompts: Sequence[str], key: Array
    ) -> list[Response]:
        """One response to each prompt, in order; the key decides all randomness."""
        return self.measured(params, prompts, key, {})[0]

    def measured(
        self,
        params: Any,
        prompts: Sequence[str],
        key: Array,
        measures: dict[str, Callable],
    ) -> tuple[list[Response], dict[str, np.ndarray]]:
        """Samples and measures of each sample.

        Args:
            params: of the policy.
            prompts: texts, none longer than prompt_len tokens.
            key: typed PRNG key; batch i uses `fold_in(key, i)`.
            measures: name -> compiled `(prompts, prompt_lengths, rollout) -> [B]`.

        Returns:
            Responses, and each measure as an array, in the order of the prompts.

        Raises:
            DataError: if a prompt is longer than prompt_len.
        """
        encode = self.model.format.encode_prompt
        ids = [encode(self.model.tokenizer, prompt) for prompt in prompts]
        num_long = sum(len(x) > self._prompt_len for x in ids)
        if num_long:
            raise DataError(
                f"{num_long} of {len(prompts)} prompts are longer than "
                f"{self._prompt_len} tokens; raise prompt_len (with few-shot examples: "
                "raise few_shot_len or lower num_few_shot) or leave them out"
            )
        temperature = jnp.float32(self.sampling.temperature)
        lengths = [len(x) for x in ids]
        groups = width_groups(lengths, self._prompt_len, self._batch_size)
        responses: list[Response] = []
        values: dict[str, list[np.ndarray]] = {name: [] for name in measures}
        for step, (batch, count) in enumerate(self._batches(prompts, groups)):
            batch = shard_whole_batch(self._ctx.mesh, batch)
            rollout = self._generate(
                params,
                batch.prompts,
                batch.prompt_lengths,
                jax.random.fold_in(key, step),
                temperature,
            )
            measured = {
                name: measure(batch.prompts, batch.prompt_lengths, rollout)
                for name, measure in measures.items()
            }
            rollout, measured = jax.device_get((rollout, measured))
            for row in range(count):
                ids = rollout.responses[row, : rollout.lengths[row]]
                responses.append(
                    Response(
                        # the byte 0 is no text, as other bytes that decode to U+FFFD
                        text=self.model.tokenizer.decode(ids).replace("\0", "\ufffd"),
                        ids=ids,
                        ended=bool(rollout.ended[row]),
                    )
                )
            for name, x in measured.items():
                values[name].append(x[:count])
        back = np.argsort(np.concatenate(groups))
        in_order = {name: np.concatenate(x)[back] for name, x in values.items()}
        return [responses[i] for i in back], in_order

    def _batches(
        self, prompts: Sequence[str], groups: Sequence[np.ndarray]
    ) -> Iterator[tuple[PromptBatch, int]]:
        """Batches of one group after the other, and how many rows of each are real."""
        for group in groups:
            batches = prompt_batches(
                [Prompt(prompts[int(i)]) for i in group],
                self.model.tokenizer,
                self.model.format,
                self._batch_size,
                self._prompt_len,
                None,
            )
            for step in range(batches.steps_per_epoch):
                yield batches(step), batches.real_rows(step)


def reward_measure(reward: Model, mesh: jax.sharding.Mesh) -> Callable:
    """A measure for `Sampler.measured`: the reward model's score of each sample."""
    return functools.partial(
        jit_measure(rollout_scores, mesh, model=reward.cfg), reward.params
    )


def make_kl(
    reference: Model, sampling: Sampling, mesh: jax.sharding.Mesh
) -> Callable[[Any, Array, Array, Rollout], Array]:
    """Returns `(policy, prompts, prompt_lengths, rollout) -> KL to the reference, [B]`.

    Nats per response, see `sequence_kl`; compiled once.
    """
    compiled = jit_measure(sequence_kl, mesh, sampling=sampling, model=reference.cfg)
    temperature = jnp.float32(sampling.temperature)

    def kl(policy, prompts, prompt_lengths, rollout):
        return compiled(
            policy, reference.params, prompts, prompt_lengths, rollout, temperature
        )

    return kl


def fitting(prompts: list[str], model: Model, prompt_len: int) -> list[str]:
    """The prompts that fit; how many did not is told."""
    ids = (model.format.encode_prompt(model.tokenizer, p) for p in prompts)
    kept = [p for p, x in zip(prompts, ids, strict=True) if len(x) <= prompt_len]
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} prompts over {prompt_len} tokens left out")
    return kept
