"""Sampling from models in batches of few compiled shapes, and measuring the samples."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import PromptBatch, pad_prompts
from rlhf_jax.data.sources import DataError
from rlhf_jax.data.widths import fitted_width, width_bounds, width_groups
from rlhf_jax.nn.sampling import Rollout, Sampling, generate
from rlhf_jax.stages.common import Context, Model
from rlhf_jax.stages.scoring import rollout_scores, sequence_kl
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


class Sampler:
    """Samples from models of one shape and measures the samples.

    Compiled once for each of few widths, see `width_bounds`.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        prompt_len: int,
        batch_size: int,
        ctx: Context,
        num_calls: int = 1,
    ):
        """Compiles nothing yet.

        Args:
            model: gives shape, tokenizer and format; parameters come with each call.
            sampling: contract.
            prompt_len: longest prompt in tokens.
            batch_size: prompts at a time, see `fill_shards`.
            ctx: the run.
            num_calls: how often the prompts of the first call will be sampled.
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
        self._num_calls, self._bounds = num_calls, None

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
            DataError: if there are none, or one is longer than prompt_len.
        """
        if not prompts:
            raise DataError(
                f"there is no prompt of at most {self._prompt_len} tokens to sample "
                "from; raise prompt_len or give others"
            )
        encoded = self._encode(prompts)
        lengths = [len(ids) for ids in encoded]
        temperature = jnp.float32(self.sampling.temperature)
        if self._bounds is None:  # programs that later calls find compiled
            counts = self._batch_size, self._num_calls
            self._bounds = width_bounds(lengths, self._prompt_len, *counts)
        groups = width_groups(lengths, self._bounds)
        responses: list[Response] = []
        values: dict[str, list[np.ndarray]] = {name: [] for name in measures}

        def keep(rollout: Rollout, measured: dict[str, Any], count: int) -> None:
            responses.extend(self._responses(rollout, count))
            for name, x in measured.items():
                values[name].append(x[:count])

        drawn = None
        for step, (batch, count) in enumerate(self._batches(encoded, groups)):
            batch = shard_whole_batch(self._ctx.mesh, batch)
            previous = jax.device_get(drawn)  # before the next, whose cache is as large
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
            if previous is not None:  # while the device is at the next
                keep(*previous)
            drawn = (rollout, measured, count)
        keep(*jax.device_get(drawn))
        back = np.argsort(np.concatenate(groups))
        in_order = {name: np.concatenate(x)[back] for name, x in values.items()}
        return [responses[i] for i in back], in_order

    def _responses(self, rollout: Rollout, count: int) -> Iterator[Response]:
        """The first rows of a rollout on the host, as text."""
        for row in range(count):
            ids = np.asarray(rollout.responses[row, : rollout.lengths[row]])
            # the byte 0 is no text, as other bytes that decode to U+FFFD
            text = self.model.tokenizer.decode(ids).replace("\0", "\ufffd")
            yield Response(text, ids, bool(rollout.ended[row]))

    def width(self, prompts: Sequence[str]) -> int:
        """Columns of the widest batch of these prompts, P; raises as `measured`."""
        return fitted_width(map(len, self._encode(prompts)), self._prompt_len)

    def _encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each prompt, none longer than prompt_len."""
        encoded = _encoded(prompts, self.model)
        num_long = sum(len(ids) > self._prompt_len for ids in encoded)
        if num_long:
            raise DataError(
                f"{num_long} of {len(prompts)} prompts are longer than "
                f"{self._prompt_len} tokens; raise prompt_len (with few-shot examples: "
                "raise few_shot_len or lower num_few_shot) or leave them out"
            )
        return encoded

    def _batches(
        self, encoded: Sequence[np.ndarray], groups: Sequence[np.ndarray]
    ) -> Iterator[tuple[PromptBatch, int]]:
        """Batches of one group after the other, and how many rows of each are real."""
        pad_id = self.model.tokenizer.pad_id
        for group in groups:
            P = fitted_width([len(encoded[i]) for i in group], self._prompt_len)
            for first in range(0, len(group), self._batch_size):
                rows = [encoded[i] for i in group[first : first + self._batch_size]]
                yield pad_prompts(rows, self._batch_size, P, pad_id), len(rows)


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


def prompt_lengths(prompts: Sequence[str], model: Model) -> list[int]:
    """Tokens of each prompt, [N], with what the model's format puts around it."""
    return [len(ids) for ids in _encoded(prompts, model)]


def _encoded(prompts: Sequence[str], model: Model) -> list[np.ndarray]:
    return [model.format.encode_prompt(model.tokenizer, prompt) for prompt in prompts]


def fitting(prompts: list[str], model: Model, prompt_len: int) -> list[str]:
    """The prompts of at most prompt_len tokens; how many have more is told."""
    lengths = prompt_lengths(prompts, model)
    kept = [p for p, n in zip(prompts, lengths, strict=True) if n <= prompt_len]
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} prompts over {prompt_len} tokens left out")
    return kept
