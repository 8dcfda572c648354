"""What a stage costs, from its shapes: FLOPs, bytes moved and bytes held.

FLOPs are those of matrix products as they are computed: 2 for each multiplication,
attention over all pairs that are not cut out (XLA computes much of the half that a
causal mask hides; flash kernels skip most of it). A backward pass is two forwards; what
`remat` computes again is not counted.
"""

import dataclasses

from rlhf_jax.nn.attention import causal_pairs
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.decoding import stretches
from rlhf_jax.nn.transformer import unrolled

BYTES = {"float32": 4, "bfloat16": 2}
ADAM_BYTES = 16  # a trained parameter: itself, two moments, its gradient, float32


@dataclasses.dataclass(frozen=True)
class Work:
    """Cost of one phase.

    Attributes:
        flops: of matrix products.
        bytes: that must cross the device's memory; 0 where FLOPs bound the phase.
    """

    flops: float
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> "Work":
        return Work(times * self.flops, times * self.bytes)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The longer of both, at given rates."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def block_params(cfg: TransformerConfig) -> int:
    """Weights of the dense layers, 12 L D^2: attention [D, 4 D], MLP [D, 8 D]."""
    return 12 * cfg.num_layers * cfg.model_dim**2


def causal_keys(length: int) -> float:
    """Keys that a position of a causal [T, T] is multiplied with, on average."""
    return causal_pairs(length) / max(length, 1)


def forward(
    cfg: TransformerConfig, positions: float, keys: float, logits: float = 0.0
) -> Work:
    """A forward pass.

    24 L D^2 positions + 4 L D positions keys + 2 V D logits

    Args:
        cfg: shape of the model.
        positions: computed, B T.
        keys: that each reads, a mean of S of [T, S]; see `causal_keys`.
        logits: positions with next-token logits [V].
    """
    attention = 4 * cfg.num_layers * cfg.model_dim * positions * keys
    head = 2 * cfg.vocab_size * cfg.model_dim * logits
    return Work(2 * block_params(cfg) * positions + attention + head)


def shared_prompt(
    cfg: TransformerConfig, prompt: int, responses: int, length: int, scored: bool
) -> Work:
    """K responses [K, R] to one prompt [P], the prompt computed once.

    Args:
        cfg: shape of the model.
        prompt, responses, length: P, K, R.
        scored: whether only the last token of each is wanted, see
            `last_response_states`, or all, see `forward_responses`.
    """
    stem, own = prompt - 1, responses * (length + 1)
    pairs = causal_pairs(stem) + own * (prompt + length)
    layers, dim = cfg.num_layers, cfg.model_dim
    work = Work(layers * (24 * dim**2 * (stem + own) + 4 * dim * pairs))
    if not unrolled(cfg):
        return work
    read = responses if scored else own  # the last block's; of the rest keys, values
    rest = 20 * dim**2 * (stem + own - read)
    unread = 4 * dim * (pairs - read * (prompt + length))
    return work + Work(-rest - unread)


def prefill(cfg: TransformerConfig, batch: float, prompt: int) -> Work:
    """Keys and values of prompts [B, P]; the last block computes nothing else."""
    stem = prompt - 1
    unread = 20 * cfg.model_dim**2 * stem + 4 * cfg.model_dim * causal_pairs(stem)
    return forward(cfg, batch * stem, causal_keys(stem)) + Work(-batch * unread)


def decoding(cfg: TransformerConfig, batch: float, prompt: int, length: int) -> Work:
    """Sampling [B, R] after the `prefill` of [B, P]: R steps.

    Each step reads the weights, and of the cache [B, P - 1 + R, 2 L D] the columns that
    its stretch of the response may fill (`stretches`); slots read all of it.
    """
    size, stem, start = BYTES[cfg.dtype], prompt - 1, 0
    weights = size * (block_params(cfg) + cfg.vocab_size * cfg.model_dim)
    work = Work(0.0)
    for end in stretches(length):
        keys = stem + end
        cache = size * batch * keys * 2 * cfg.num_layers * cfg.model_dim
        step = forward(cfg, batch, keys, batch) + Work(0.0, weights + cache)
        work += (end - start) * step
        start = end
    return work


def ppo_iteration(
    policy: TransformerConfig,
    reward: TransformerConfig,
    batch: float,
    prompt: int,
    length: int,
    epochs: int,
    ptx_rows: float = 0,
    ptx_len: int = 0,
) -> dict[str, Work]:
    """Phases of one iteration on [B, P] prompts and [B, R] responses, on one device.

    Args:
        policy, reward: shapes; the value model has the reward model's.
        batch, prompt, length: B, P, R.
        epochs: passes over the episodes.
        ptx_rows, ptx_len: pre-training rows [rows, T] of PPO-ptx.

    Returns:
        prefill, decoding, scores (old and reference log-probabilities, values, score),
        update (policy and value), ptx.
    """
    spoken = shared_prompt(policy, prompt, 1, length, False) + Work(
        2 * policy.vocab_size * policy.model_dim * length
    )
    valued = shared_prompt(reward, prompt, 1, length, False)
    scored = shared_prompt(reward, prompt, 1, length, True)
    ptx_tokens = ptx_rows * ptx_len
    text = forward(policy, ptx_tokens, causal_keys(ptx_len), ptx_tokens)
    return {
        "prefill": prefill(policy, batch, prompt),
        "decoding": decoding(policy, batch, prompt, length),
        "scores": batch * (2 * spoken + valued + scored),
        "update": 3 * epochs * batch * (spoken + valued),
        "ptx": 3 * epochs * text,
    }


def training_bytes(cfg: TransformerConfig, devices: int = 1) -> float:
    """Parameters, Adam's moments and gradients [params], cut over devices."""
    return ADAM_BYTES * cfg.num_params / devices


def param_bytes(cfg: TransformerConfig, devices: int = 1) -> float:
    """Parameters [params] in float32, cut over devices."""
    return 4 * cfg.num_params / devices


def frozen_bytes(cfg: TransformerConfig, devices: int = 1) -> float:
    """A model that is only read: its dense layers are in `dtype`, see `cast_once`."""
    dense = block_params(cfg) + 9 * cfg.num_layers * cfg.model_dim  # and biases
    saved = (4 - BYTES[cfg.dtype]) * dense
    return (4 * cfg.num_params - saved) / devices


def cache_bytes(cfg: TransformerConfig, batch: int, columns: int) -> int:
    """Keys and values, 2 x [L, B, N, S, H], of S columns."""
    return 2 * cfg.num_layers * batch * columns * cfg.model_dim * BYTES[cfg.dtype]
