"""Shape of a transformer, and the published sizes of the GPT family by name."""

import dataclasses
from typing import Any, Literal, get_args

Remat = Literal["none", "elementwise", "block"]


def check_range(cfg: Any, interval: str, *names: str) -> None:
    """Raises ValueError unless fields lie in an interval such as "[0, 1]", not NaN."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(cfg, name)
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} must be in {interval}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a decoder-only transformer; letters as in the shapes of this project."""

    num_layers: int = 12
    """Blocks, L."""
    model_dim: int = 768
    """Width of the residual stream, D."""
    num_heads: int = 12
    """Attention heads, N; each is model_dim / num_heads wide."""
    max_len: int = 1024
    """Longest sequence in tokens (number of learned positions)."""
    vocab_size: int = 50257
    """Tokens, V. A run sets it from its tokenizer."""
    embed_std: float = 0.02
    """Standard deviation of the initial token embeddings (GPT-2: 0.02, at width 768).
    In narrow models more keeps tokens of like contexts apart until they are told so."""
    norm: Literal["pre", "post"] = "pre"
    """Layer norm before each sub-layer (GPT-2 and later) or after it (GPT-1)."""
    dropout: float = 0.0
    """Residual dropout rate on the output of each sub-layer, in training only."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters, norms, softmax, logits and losses are float32."""
    document_end: int | None = None
    """Token that ends a document: attention never crosses it and positions begin anew
    after it. None (GPT-3): packed documents see those before them. A run sets it.
    Prompts of responses must not hold it: only `forward` looks for it."""
    remat: Remat = "none"
    """What the backward pass computes again to hold less: nothing, of each block all
    but its dense layers (norms, gelu, attention), or each block from its input on."""

    def __post_init__(self):
        sizes = ("num_layers", "model_dim", "num_heads", "max_len", "vocab_size")
        check_range(self, "[1, inf)", *sizes)
        if self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim {self.model_dim} is not divisible by num_heads "
                f"{self.num_heads}; choose a multiple"
            )
        check_range(self, "(0, inf)", "embed_std")
        check_range(self, "[0, 1)", "dropout")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {self.norm!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}"
            )
        if self.remat not in get_args(Remat):
            raise ValueError(
                f"remat must be 'none', 'elementwise' or 'block', got {self.remat!r}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, H."""
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP, F = 4 D."""
        return 4 * self.model_dim

    @property
    def num_params(self) -> int:
        """Parameters with tied embeddings and the final norm (GPT-2's layout).

        12 L D^2 + 13 L D + 2 D + V D + max_len D
        """
        d, layers = self.model_dim, self.num_layers
        final_norm = 2 * d if self.norm == "pre" else 0
        blocks = 12 * layers * d * d + 13 * layers * d
        return blocks + final_norm + (self.vocab_size + self.max_len) * d


def _gpt(
    layers: int, dim: int, heads: int, max_len: int, **kwargs
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers, model_dim=dim, num_heads=heads, max_len=max_len, **kwargs
    )


PUBLISHED_SIZES: dict[str, TransformerConfig] = {
    # Radford et al. 2018: post-LN, 40 478 tokens, 512 positions.
    "gpt1": _gpt(12, 768, 12, 512, norm="post", dropout=0.1, vocab_size=40478),
    # Radford et al. 2019, as released: 124M, 355M, 774M, 1.5B.
    "gpt2": _gpt(12, 768, 12, 1024),
    "gpt2-medium": _gpt(24, 1024, 16, 1024),
    "gpt2-large": _gpt(36, 1280, 20, 1024),
    "gpt2-xl": _gpt(48, 1600, 25, 1024),
    # Brown et al. 2020, table 2.1. Two rows contradict themselves there: XL prints 24
    # heads of 128 for width 2048 (16 is the common reading), 13B prints width 5140 for
    # 40 heads of 128 (5120). Dense attention: the width of the sparse bands was never
    # published.
    "gpt3-small": _gpt(12, 768, 12, 2048),
    "gpt3-medium": _gpt(24, 1024, 16, 2048),
    "gpt3-large": _gpt(24, 1536, 16, 2048),
    "gpt3-xl": _gpt(24, 2048, 16, 2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048),
    "gpt3-13b": _gpt(40, 5120, 40, 2048),
    "gpt3-175b": _gpt(96, 12288, 96, 2048),
}
"""Model shapes by name; vocab_size is replaced by the tokenizer's in a run."""
