"""What a stage will hold on each device, from its shapes, before it is compiled.

What a step is given (parameters, moments, frozen models) is exact. What it holds
meanwhile is counted from the code: what autodiff keeps of each block, the logits of one
chunk, the gradients. The compiler decides what is alive at a time; the larger of two
moments is taken: the head at work on the last states, or one block's backward pass.

XLA on CPU gave temporaries within 10 % of this for the shapes of
tests/training/test_memory.py (PPO: 15 %); accelerators have not been compared.
"""

import dataclasses

import jax

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import unrolled
from rlhf_jax.objectives.language_modeling import logit_chunks
from rlhf_jax.training.costs import BYTES, block_params, cache_bytes, frozen_bytes


@dataclasses.dataclass(frozen=True)
class Row:
    """What is computed of one row of a batch, and where.

    Attributes:
        tokens: positions, T.
        pairs: of a query and a key, T S, for each head.
        logits: positions with next-token logits.
        last_only: whether the last block is computed for the read positions only.
        accelerator: whether on a GPU or TPU.
    """

    tokens: int
    pairs: int
    logits: int
    last_only: bool
    accelerator: bool


def on_accelerator() -> bool:
    """Whether this process computes on a GPU or TPU."""
    return jax.default_backend() != "cpu"


def text_row(length: int, accelerator: bool) -> Row:
    """A row of text [T] with the next-token loss on it."""
    return Row(length, length**2, length, False, accelerator)


def response_row(
    prompt: int,
    responses: int,
    length: int,
    accelerator: bool,
    logits: int = 0,
    last_only: bool = False,
) -> Row:
    """K responses [K, R] to one prompt [P], see `forward_responses`.

    P - 1 + K (R + 1) tokens, (P - 1)^2 + K (R + 1) (P + R) pairs
    """
    stem, own = prompt - 1, responses * (length + 1)
    pairs = stem**2 + own * (prompt + length)
    return Row(stem + own, pairs, logits, last_only, accelerator)


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
        least: what no compiler can do without, see `least_bytes`.
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


def _scores(model: TransformerConfig, row: Row, arrays: float) -> float:
    """Arrays [N, T, S], half in float32; cuDNN attends to bfloat16 without any."""
    fused = row.accelerator and model.dtype == "bfloat16" and model.head_dim <= 128
    size = 0 if fused else (4 + BYTES[model.dtype]) / 2
    return arrays * size * model.num_heads * row.pairs


def _one_block(model: TransformerConfig, row: Row, looped: bool) -> float:
    """What one block of a row keeps without remat, see `kept_bytes`."""
    D, F = model.model_dim, model.mlp_dim
    mlp, scores = (6, 2) if looped else (3, 3)
    per_token = 6 * 4 * D + BYTES[model.dtype] * (6 * D + mlp * F)
    if model.dropout:
        per_token += 2 * D if looped else 4 * 4 * D
    return row.tokens * per_token + _scores(model, row, scores)


def kept_bytes(model: TransformerConfig, row: Row) -> float:
    """What the blocks of one row [T, D] keep until its backward pass.

    A loop over layers stacks all that autodiff asks for, [L, ...]. Of each block, per
    token: 3 arrays [D] of both norms in float32; in `dtype` 6 [D] (q, k, v, attention's
    output, the inputs of two products) and 6 [F] (factors of gelu's derivative and the
    MLP's hidden units); per pair of positions and head, exponentials and weights.
    Of layers written out (`unrolled`) XLA keeps 3 [F] and 3 of pairs, and computes the
    rest again where it is read. Dropout keeps two masks [D]; written out, also their
    random bits. With remat: one residual stream [D] a layer, unless layers are written
    out on CPU, where XLA merges what was to be computed again.
    """
    looped = not unrolled(model)
    if model.remat and (looped or row.accelerator):
        stream = row.tokens * model.model_dim * BYTES[model.dtype]
        return model.num_layers * stream
    layers = model.num_layers - (row.last_only and not looped)
    return layers * _one_block(model, row, looped)


def working_bytes(model: TransformerConfig, row: Row) -> float:
    """Of one block of a row in the backward pass, beside what is kept.

    In a loop, whose stacked arrays stay, gradients of 4 [T, D], 2 [T, F] and 2 of
    pairs, and with remat 1 [T, F] more. Layers written out free what they kept as its
    gradients come: 1 [T, F].
    """
    D, F = model.model_dim, model.mlp_dim
    size = row.tokens * BYTES[model.dtype]
    if unrolled(model):
        return size * F
    return size * (4 * D + (2 + model.remat) * F) + _scores(model, row, 2)


def logits_bytes(model: TransformerConfig, rows: float, row: Row) -> float:
    """One float32 buffer of the head's chunk, [rows, width, V]."""
    if not row.logits:
        return 0.0
    shape = (max(1, round(rows)), row.logits)
    _, width = logit_chunks(shape, model.vocab_size, row.accelerator)
    return 4.0 * shape[0] * width * model.vocab_size


def least_bytes(model: TransformerConfig, row: Row) -> float:
    """What any compiler keeps of one row: the factors of each block's products.

    10 [T, D] in `dtype`: input, q, k, v, attention's output, the MLP's input, its
    hidden units [F]; with remat 1. Scores [T, S] need not exist.
    """
    layers, arrays = model.num_layers - row.last_only, 1 if model.remat else 10
    return layers * arrays * row.tokens * model.model_dim * BYTES[model.dtype]


def _backward(
    parts: list[tuple[TransformerConfig, Row]], rows: float, fsdp: int, sets: int
) -> Memory:
    """The fullest moment of one forward and backward pass.

    Args:
        parts: models trained together, and what they compute of each row.
        rows: [rows, T] at a time on one device.
        fsdp: devices that share the parameters.
        sets: of arrays of the parameters' size that are held while the logits are;
            while gradients are formed, 2 at least.
    """
    one_set = sum(frozen_bytes(model, fsdp) for model, _ in parts)
    kept = rows * sum(kept_bytes(*part) for part in parts)
    for model, _ in parts:  # weights in the dtype of the products, for both passes
        if model.dtype != "float32":
            kept += block_params(model) * BYTES[model.dtype]
    working = rows * max(working_bytes(*part) for part in parts)
    logits = max(logits_bytes(model, rows, row) for model, row in parts)
    at_head = Memory(gradients=sets * one_set, activations=kept, logits=2 * logits)
    at_block = Memory(gradients=max(sets, 2) * one_set, activations=kept + working)
    fullest = max(at_head, at_block, key=lambda m: m.temporaries)
    least = one_set + logits + rows * sum(least_bytes(*part) for part in parts)
    return dataclasses.replace(fullest, least=least)


def train_step(
    model: TransformerConfig, row: Row, rows: float, parts: int = 1, fsdp: int = 1
) -> Memory:
    """A step of pre-training, SFT or the reward model.

    Args:
        model: shape.
        row: what is computed of each row.
        rows: [rows, T] of a batch on one device.
        parts: microbatches they are cut into.
        fsdp: devices that share the parameters.
    """
    weights = frozen_bytes(model, fsdp)
    sets = 2 if parts > 1 and not unrolled(model) else 1
    step = _backward([(model, row)], rows / parts, fsdp, sets)
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
    fsdp: int = 1,
    accelerator: bool = False,
) -> Memory:
    """The fullest phase of a PPO iteration: rollout, scores, update or ptx.

    Rollout: keys and values [L, B, N, P - 1 + R, H], those of the prompt twice while
    they are laid out, and 3 arrays [B, V]. Scores: forward passes of policy, reference,
    value and reward model side by side, of each 4 [T, D], 1 [T, F] and 2 of pairs.

    Args:
        policy, reward: shapes; a value model of its own has the reward model's.
        rows: episodes [B, P + R] of an iteration on one device.
        prompt, length: P, R.
        minibatches, microbatches: parts of the episodes, parts of each part.
        ptx: rows on one device and T of an iteration's pre-training text [rows, T].
        slots: responses decoded at a time; None means all.
        shared_value: whether the value model is a head on the policy.
        fsdp: devices that share the parameters.
        accelerator: whether on a GPU or TPU.
    """
    spoken = response_row(prompt, 1, length, accelerator, logits=length)
    valued = response_row(prompt, 1, length, accelerator)
    own_value = [] if shared_value else [(reward, valued)]
    parts = minibatches * microbatches
    sets = 2 if microbatches == 1 else 3
    phases = [_backward([(policy, spoken), *own_value], rows / parts, fsdp, sets)]
    ptx_rows, ptx_len = ptx
    if ptx_rows:  # beside the gradients of PPO
        text = text_row(ptx_len, accelerator)
        phases.append(_backward([(policy, text)], ptx_rows / parts, fsdp, sets + 1))

    decoded = rows if slots is None else slots
    cache = decoded * cache_bytes(policy, 1, 2 * (prompt - 1) + length)
    sampled = 3 * 4 * decoded * policy.vocab_size
    phases.append(Memory(cache=cache, logits=sampled, least=cache / 2))

    models = [policy, policy, reward, *(model for model, _ in own_value)]
    working = 0.0
    for model in models:
        inner = 4 * model.model_dim + model.mlp_dim
        working += valued.tokens * BYTES[model.dtype] * inner
        working += _scores(model, valued, 2)
    logits = logits_bytes(policy, rows, spoken)
    phases.append(Memory(activations=rows * working, logits=logits))

    of_policy, of_reward = (frozen_bytes(model, fsdp) for model in (policy, reward))
    trained = of_policy + (0.0 if shared_value else of_reward)
    given = Memory(
        parameters=trained + of_policy,
        optimizer=2 * trained,
        frozen=of_policy + of_reward,
    )
    return _with_arguments(given, phases)


def _with_arguments(given: Memory, phases: list[Memory]) -> Memory:
    """The fullest phase, with what all of them are given."""
    return dataclasses.replace(
        max(phases, key=lambda phase: phase.temporaries),
        parameters=given.parameters,
        optimizer=given.optimizer,
        frozen=given.frozen,
        least=given.arguments + max(phase.least for phase in phases),
    )
