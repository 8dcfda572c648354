"""What a step will hold on each device, from its shapes, before it is compiled.

What it is given (parameters, moments, frozen models) is exact where all devices that
hold a copy hold equal parts: `tensor` leaves some leaves whole. What it holds meanwhile
depends on what the compiler lets live at a time; the larger of two moments is taken:
the head at work on the last states, or one block's backward pass.

XLA on CPU (JAX 0.10.2) allocated within 10 % of this for all steps on text and rankings
tried, with fsdp too, and within 15 % for PPO, see tests/training/test_memory.py.
Accelerators have not been compared.
"""

import dataclasses

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.decoding import caches_apart, narrower, stretches, written_out
from rlhf_jax.nn.transformer import unrolled
from rlhf_jax.training.activations import (
    Row,
    activation_size,
    gathered_bytes,
    kept_bytes,
    least_bytes,
    logits_bytes,
    response_row,
    score_bytes,
    text_row,
    working_bytes,
)
from rlhf_jax.training.costs import (
    BYTES,
    block_params,
    cache_bytes,
    frozen_bytes,
    param_bytes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes each device holds at the fullest moment of a step.

    Attributes:
        parameters: trained, float32; in PPO also the moving average.
        optimizer: Adam's two moments.
        frozen: parameters of models that are only read.
        gradients: and what stands beside them: sums over microbatches, or the old
            parameters, which XLA copies where it may not overwrite them yet.
        activations: kept for the backward pass, and of one block at work.
        logits: held at once.
        cache: keys and values while sampling.
        least: what no compiler can do without: the arguments, and the largest of one
            set of gradients, `least_bytes` and half the cache.
    """

    parameters: float = 0.0
    optimizer: float = 0.0
    frozen: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0
    least: float = 0.0

    @property
    def arguments(self) -> float:
        """Of the step's inputs (its batch aside)."""
        return self.parameters + self.optimizer + self.frozen

    @property
    def temporaries(self) -> float:
        """Held only while the step runs."""
        return self.gradients + self.activations + self.logits + self.cache

    @property
    def total(self) -> float:
        """All of it."""
        return self.arguments + self.temporaries


def _backward(
    parts: list[tuple[TransformerConfig, Row]], rows: float, holders: int, sets: int
) -> Memory:
    """The fullest moment of one forward and backward pass.

    Args:
        parts: models trained together, and what they compute of each row.
        rows: [rows, T] at a time on one device, 1 at least.
        holders: devices that hold one copy of the parameters between them.
        sets: of arrays of the parameters' size that are held while the logits are;
            while gradients are formed, 2 at least.
    """
    one_set = sum(param_bytes(model, holders) for model, _ in parts)
    least = max(one_set, rows * sum(least_bytes(*part) for part in parts))
    rows = max(rows, 1.0)  # a device has a whole row, or none
    kept = rows * sum(kept_bytes(*part) for part in parts)
    if holders > 1:  # parameters gathered for their products
        kept += sum(gathered_bytes(model) for model, _ in parts)
    for model, _ in parts:  # weights in the dtype of the products, for both passes
        if model.dtype != "float32" and model.remat == "none":
            kept += block_params(model) * BYTES[model.dtype]
    working = rows * max(working_bytes(*part) for part in parts)
    logits = max(logits_bytes(model, rows, row) for model, row in parts)
    at_head = Memory(gradients=sets * one_set, activations=kept, logits=2 * logits)
    at_block = Memory(gradients=max(sets, 2) * one_set, activations=kept + working)
    fullest = max(at_head, at_block, key=lambda m: m.temporaries)
    return dataclasses.replace(fullest, least=least)


def train_step(
    model: TransformerConfig, row: Row, rows: float, parts: int = 1, holders: int = 1
) -> Memory:
    """A step of pre-training, SFT or the reward model.

    Args:
        model: shape.
        row: what is computed of each row.
        rows: [rows, T] of a batch on one device.
        parts: microbatches they are cut into.
        holders: devices that hold one copy of the parameters between them.
    """
    weights = param_bytes(model, holders)
    sets = 2 if parts > 1 and not unrolled(model) else 1
    step = _backward([(model, row)], rows / parts, holders, sets)
    given = Memory(parameters=weights, optimizer=2 * weights)
    return _with_arguments(given, [step])


def ppo_iteration(
    policy: TransformerConfig,
    reward: TransformerConfig,
    rows: float,
    prompt: int,
    length: int,
    minibatches: int,
    microbatches: int = 1,
    ptx: tuple[float, int] = (0, 0),
    slots: float | None = None,
    shared_value: bool = False,
    holders: int = 1,
    accelerator: bool = False,
    offload: bool = False,
) -> Memory:
    """The fullest phase of a PPO iteration: rollout, scores, update or ptx.

    Rollout: keys and values [L, B, N, P - 1 + R, H], while they are laid out those of
    the prompt twice (XLA may manage with the keys alone), then 2 arrays [B, V] (top-p
    sorts 2 more, not counted; with slots: keys and values of all prompts, and B slots),
    and weights in the dtype of their products. Scores: a forward pass of policy,
    reference, value and reward model holds 6 [T, D], 1 [T, F] and the scores of
    attention, those of the response twice; written out, all four advance together and
    are fullest in the last block, 1 [R + 1, F], the reward model in the one before it.
    Then 2 chunks of logits of policy and reference each. Ptx: beside the pass of PPO,
    on which it does not wait.

    Args:
        policy, reward: shapes; a value model of its own has the reward model's.
        rows: episodes [B, P + R] of an iteration on one device.
        prompt, length: P, R.
        minibatches, microbatches: parts of the episodes, parts of each part.
        ptx: rows on one device and T of an iteration's pre-training text [rows, T].
        slots: responses decoded at a time on one device; None means all.
        shared_value: whether the value model is a head on the policy.
        holders: devices that hold one copy of the parameters between them.
        accelerator: whether on a GPU or TPU.
        offload: whether frozen models are brought to the accelerator only to score.
    """
    spoken = response_row(prompt, 1, length, accelerator, logits=length)
    valued = response_row(prompt, 1, length, accelerator)
    own_value = [] if shared_value else [(reward, valued)]
    parts = minibatches * microbatches
    sets = 2 if microbatches == 1 else 3
    phases = [_backward([(policy, spoken), *own_value], rows / parts, holders, sets)]
    ptx_rows, ptx_len = ptx
    if ptx_rows:
        text = text_row(ptx_len, accelerator)
        step = _backward([(policy, text)], ptx_rows / parts, holders, 1)
        both = (getattr(phases[0], name) + getattr(step, name) for name in _PARTS)
        phases.append(Memory(**dict(zip(_PARTS, both, strict=True)), least=step.least))

    decoded = rows if slots is None else min(slots, rows)
    phases += _decoding(policy, rows, decoded, prompt, length, holders)

    seen = _seen(valued, prompt, length)
    last = seen.last if unrolled(policy) else seen.tokens
    models = [(policy, last)] * 2 + [(model, last) for model, _ in own_value]
    forwards = [_forward(m, seen, wide) for m, wide in [*models, (reward, seen.tokens)]]
    together = sum if unrolled(policy) else max
    frozen = sum(frozen_bytes(model, holders) for model in (policy, reward))
    brought = frozen if offload and accelerator else 0.0  # a CPU has but one memory
    phases.append(Memory(activations=rows * together(forwards) + brought))
    logits = 4 * logits_bytes(policy, rows, spoken)
    phases.append(Memory(logits=logits, activations=brought))

    of_policy, of_reward = (param_bytes(model, holders) for model in (policy, reward))
    trained = of_policy + (0.0 if shared_value else of_reward)
    given = Memory(
        parameters=trained + of_policy,
        optimizer=2 * trained,
        frozen=frozen - brought,
    )
    return _with_arguments(given, phases)


def _seen(row: Row, prompt: int, length: int) -> Row:
    """`response_row` with the scores of the response twice, as a forward pass has."""
    pairs = row.pairs + (length + 1) * (prompt + length)
    return dataclasses.replace(row, pairs=pairs)


def _forward(model: TransformerConfig, row: Row, wide: int) -> float:
    """Of one row: 6 [T, D], the MLP of `wide` positions and the scores of attention."""
    width = row.tokens * 6 * model.model_dim + wide * model.mlp_dim
    return activation_size(model, row) * width + score_bytes(model, row, 1)


def sampling(
    model: TransformerConfig,
    models: int,
    rows: float,
    prompt: int,
    length: int,
    holders: int = 1,
    accelerator: bool = False,
    measured: bool = False,
) -> Memory:
    """Samples [rows, R] after prompts [rows, P], as collection and evaluation draw.

    The fullest moment of decoding, or the last block but one of the prompts beside
    their keys and values so far: its attention, 5 [P - 1, D] and the scores, or its
    MLP, 2 [P - 1, D] and 1 [P - 1, F].

    Args:
        model: shape.
        models: of this shape that the stage keeps on the device.
        rows: prompts at a time on one device.
        prompt, length: P, R.
        holders: devices that hold one copy of the parameters between them.
        accelerator: whether on a GPU or TPU.
        measured: whether the KL to a reference is measured, two forward passes with
            logits, as of the scores in `ppo_iteration`.
    """
    row = text_row(prompt - 1, accelerator)
    array = activation_size(model, row) * row.tokens
    attention = 5 * array * model.model_dim + score_bytes(model, row, 1)
    block = max(attention, array * (2 * model.model_dim + model.mlp_dim))
    stem = rows * _looped(model) * cache_bytes(model, 1, row.tokens)
    phases = _decoding(model, rows, rows, prompt, length, holders)
    copied = phases[0].activations
    phases.append(Memory(cache=stem, activations=copied + rows * block))
    if measured:
        spoken = response_row(prompt, 1, length, accelerator, logits=length)
        wide = spoken.last if unrolled(model) else spoken.tokens
        passes = _forward(model, _seen(spoken, prompt, length), wide)
        passes *= 2 if unrolled(model) else 1
        phases.append(Memory(activations=rows * passes))
        phases.append(Memory(logits=4 * logits_bytes(model, rows, spoken)))
    given = Memory(frozen=models * param_bytes(model, holders))
    return _with_arguments(given, phases)


def _looped(model: TransformerConfig) -> float:
    """Share of the layers that the loop of `prefill` stacks: all but the last."""
    return 1 - 1 / model.num_layers


def _decoding(
    model: TransformerConfig,
    rows: float,
    decoded: float,
    prompt: int,
    length: int,
    holders: int,
) -> list[Memory]:
    """Responses [decoded, R] at a time after prompts [rows, P], see `ppo_iteration`:
    while the cache is laid out, is widened layer by layer or taken of fewer rows, and
    tokens are drawn."""
    stem = rows * cache_bytes(model, 1, prompt - 1)
    cache = decoded * cache_bytes(model, 1, prompt - 1 + length)
    least = (stem + cache) / 2
    copied = 0.0  # of the weights, see `cast_once` and `layers_apart`
    if model.dtype != "float32":
        weights = block_params(model) + model.vocab_size * model.model_dim
        copied = BYTES[model.dtype] * weights / holders
    if written_out(model):
        copied += BYTES[model.dtype] * block_params(model) / holders
    both = Memory(cache=cache, activations=copied, least=least)
    logits = 4 * 2 * decoded * model.vocab_size
    kept = 0.0 if decoded == rows else stem
    parts = model.num_layers if caches_apart(model) else 1
    fewer = max(narrower(int(decoded), length), default=0) / decoded
    beside = [_looped(model) * stem]
    beside.append(cache * fewer / parts / 2)  # keys of fewer rows, then values
    if decoded == rows and caches_apart(model):
        before = prompt - 1 + [0, *stretches(length)][-2]
        beside.append(decoded * cache_bytes(model, 1, before) / parts)
    return [
        dataclasses.replace(both, cache=cache + max(beside)),
        dataclasses.replace(both, cache=cache + kept, logits=logits),
    ]


_PARTS = ("gradients", "activations", "logits")


def _with_arguments(given: Memory, phases: list[Memory]) -> Memory:
    """The fullest phase, with what all of them are given."""
    return dataclasses.replace(
        max(phases, key=lambda phase: phase.temporaries),
        parameters=given.parameters,
        optimizer=given.optimizer,
        frozen=given.frozen,
        least=given.arguments + max(phase.least for phase in phases),
    )
