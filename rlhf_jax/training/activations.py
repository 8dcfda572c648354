"""What the forward and backward passes of a transformer hold, from its shapes.

Counted from the code of one block: what autodiff asks for where layers are a loop, what
XLA on CPU keeps of it where they are written out. Bytes are of one device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax.nn.attention import causal_pairs
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import unrolled
from rlhf_jax.objectives.language_modeling import logit_chunks
from rlhf_jax.training.costs import BYTES, block_params


@dataclasses.dataclass(frozen=True)
class Row:
    """What is computed of one row of a batch, and where.

    Attributes:
        tokens: positions, T.
        pairs: of a query and a key, computed for each head.
        logits: positions with next-token logits.
        last: positions that the last block is computed for, of layers written out.
        accelerator: whether on a GPU or TPU.
    """

    tokens: int
    pairs: int
    logits: int
    last: int
    accelerator: bool


def on_accelerator() -> bool:
    """Whether this process computes on a GPU or TPU."""
    return jax.default_backend() != "cpu"


def text_row(length: int, accelerator: bool) -> Row:
    """A row of text [T] with the next-token loss on it."""
    return Row(length, causal_pairs(length), length, length, accelerator)


def response_row(
    prompt: int,
    responses: int,
    length: int,
    accelerator: bool,
    logits: int = 0,
    last_only: bool = False,
) -> Row:
    """K responses [K, R] to one prompt [P], see `forward_responses`.

    P - 1 + K (R + 1) tokens, `causal_pairs(P - 1)` + K (R + 1) (P + R) pairs
    """
    stem, own = prompt - 1, responses * (length + 1)
    pairs = causal_pairs(stem) + own * (prompt + length)
    last = responses if last_only else own
    return Row(stem + own, pairs, logits, last, accelerator)


def activation_size(model: TransformerConfig, row: Row) -> int:
    """Bytes of an activation; XLA on CPU widens bfloat16."""
    return BYTES[model.dtype] if row.accelerator else 4


def score_bytes(model: TransformerConfig, row: Row, arrays: float) -> float:
    """Arrays [N, T, S], half in float32; kernels read bfloat16 without any.

    The one for TPUs reads no branches of responses, whose scores are left out here.
    """
    fused = row.accelerator and model.dtype == "bfloat16" and model.head_dim <= 128
    size = 0 if fused else (4 + activation_size(model, row)) / 2
    return arrays * size * model.num_heads * row.pairs


@functools.cache
def _gelu_factors() -> int:
    """Arrays that autodiff keeps for the derivative of gelu: JAX 0.10 5, 0.12 4."""
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    kept = jax.eval_shape(lambda x: jax.vjp(jax.nn.gelu, x)[1], x)
    return sum(array.shape == x.shape for array in jax.tree.leaves(kept))


def _one_block(model: TransformerConfig, row: Row, looped: bool) -> float:
    """What one block of a row keeps without remat, see `kept_bytes`."""
    D, F = model.model_dim, model.mlp_dim
    mlp, scores = (_gelu_factors() + 1, 2) if looped else (3, 3)
    per_token = 6 * 4 * D + activation_size(model, row) * (6 * D + mlp * F)
    if model.dropout:
        per_token += 2 * D if looped else 4 * 4 * D
    return row.tokens * per_token + score_bytes(model, row, scores)


def kept_bytes(model: TransformerConfig, row: Row) -> float:
    """What the blocks of one row [T, D] keep until its backward pass.

    A loop over layers stacks all that autodiff asks for, [L, ...]. Of each block, per
    token: 3 arrays [D] of both norms in float32; in `dtype` 6 [D] (q, k, v, attention's
    output, the inputs of two products) and 5 or 6 [F] (`_gelu_factors` and the MLP's
    hidden units); per pair of positions and head, exponentials and weights.
    Of layers written out (`unrolled`) XLA keeps 3 [F] and 3 of pairs, and computes the
    rest again where it is read. Dropout keeps two masks [D]; written out, also their
    random bits. With remat a layer keeps its input [D] and, of "elementwise", what its
    products made: q, k, v, attention's output, [F] and, for a norm after it, the MLP's
    output; unless layers are written out on CPU, where XLA merges what was to be
    computed again.
    """
    looped = not unrolled(model)
    if model.remat != "none" and (looped or row.accelerator):
        arrays = 1
        if model.remat == "elementwise":
            arrays = 9 if model.norm == "pre" else 10
        array = row.tokens * model.model_dim * activation_size(model, row)
        return model.num_layers * arrays * array
    layers = model.num_layers - (0.0 if looped else 1 - row.last / row.tokens)
    return layers * _one_block(model, row, looped)


def working_bytes(model: TransformerConfig, row: Row) -> float:
    """Of one block of a row in the backward pass, beside what is kept.

    In a loop, whose stacked arrays stay, gradients of 4 [T, D], 2 [T, F] and 2 of
    pairs, and with remat 1 [T, F] more. Layers written out free what they kept as its
    gradients come: 1 [T, F].
    """
    D, F = model.model_dim, model.mlp_dim
    size = row.tokens * activation_size(model, row)
    if unrolled(model):
        return size * F
    widths = 4 * D + (2 if model.remat == "none" else 3) * F
    return size * widths + score_bytes(model, row, 2)


def logits_bytes(model: TransformerConfig, rows: float, row: Row) -> float:
    """One float32 buffer of the head's chunk, [rows, width, V]."""
    if not row.logits:
        return 0.0
    shape = (max(1, round(rows)), row.logits)
    _, width = logit_chunks(shape, model.vocab_size, row.accelerator)
    return 4.0 * shape[0] * width * model.vocab_size


def gathered_bytes(model: TransformerConfig) -> float:
    """Parameters that devices which share them fetch: of one layer in a loop, of all
    written out, and the embeddings [V, D]."""
    layers = model.num_layers if unrolled(model) else 1
    return 4.0 * (
        block_params(model) * layers / model.num_layers
        + model.vocab_size * model.model_dim
    )


def least_bytes(model: TransformerConfig, row: Row) -> float:
    """What any compiler keeps of one row: the residual stream [T, D] after each block.

    On CPU the factors of each block's products, 10 [T, D] in `dtype` (input, q, k, v,
    attention's output, the MLP's input, its hidden units [F]); with remat, or where XLA
    may recompute by itself, 1. Scores [T, S] need not exist.
    """
    layers = model.num_layers - (1 - row.last / row.tokens)
    arrays = 1 if model.remat != "none" or row.accelerator else 10
    return layers * arrays * row.tokens * model.model_dim * BYTES[model.dtype]
