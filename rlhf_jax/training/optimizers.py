"""AdamW with a schedule, its numbers kept as data so that a sweep never recompiles."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rlhf_jax.nn.config import check_range

Array = jax.Array
Schedule = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW: decay on matrices only, global-norm clipping, warm-up and a schedule."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Shape after the warm-up, from the peak to final_fraction of it."""
    final_fraction: float = 0.1
    """Share of the peak that the schedule has come to after the last step (GPT-3,
    InstructGPT: 0.1)."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_fraction: float = 0.0
    """Share of the peak at step 0 of the warm-up (InstructGPT's PPO: 0.1)."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment (GPT-3, InstructGPT: 0.95)."""
    eps: float = 1e-8
    """Added to the root of the second moment (GPT-3: 1e-8)."""
    weight_decay: float = 0.0
    """Decoupled decay of weights with two or more axes (GPT-3: 0.1)."""
    max_grad_norm: float = 1.0
    """Global norm to clip gradients to (GPT-3: 1.0); inf turns it off."""

    def __post_init__(self):
        check_range(self, "[0, inf)", "learning_rate", "warmup_steps")
        check_range(self, "[0, inf)", "weight_decay")
        check_range(self, "(0, inf)", "eps")  # a gradient of 0 would be 0 / 0
        check_range(self, "[0, 1]", "final_fraction", "warmup_fraction")
        check_range(self, "[0, 1)", "b1", "b2")
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule must be one of {get_args(Schedule)}, got {self.schedule!r}"
            )
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm must be above 0, got {self.max_grad_norm}; use inf to "
                "turn clipping off"
            )

    def scalars(self) -> "OptimizerScalars":
        """The floats of this config as device scalars."""
        names = [f.name for f in dataclasses.fields(OptimizerScalars)]
        return OptimizerScalars(**{n: jnp.float32(getattr(self, n)) for n in names})


@struct.dataclass
class OptimizerScalars:
    """What a sweep may change without recompiling; float32 scalars, see the config."""

    learning_rate: Array
    final_fraction: Array
    warmup_fraction: Array
    b1: Array
    b2: Array
    eps: Array
    weight_decay: Array
    max_grad_norm: Array


def learning_rate(
    step: Array, cfg: OptimizerConfig, scalars: OptimizerScalars, num_steps: int
) -> Array:
    """Learning rate of update `step` (0 is the first) out of `num_steps`.

    warm-up: peak (w0 + (1 - w0) step / warmup_steps)
    cosine:  peak (f + (1 - f) (1 + cos(pi u)) / 2),  u = share of the rest done
    linear:  peak (f + (1 - f) (1 - u))

    Args:
        step: int32, [].
        cfg: reads `schedule` and `warmup_steps`.
        scalars: peak, w0 = `warmup_fraction`, f = `final_fraction`.
        num_steps: the schedule ends here.

    Returns:
        float32, [].
    """
    t = step.astype(jnp.float32)
    rest = max(num_steps - cfg.warmup_steps, 1)
    u = jnp.clip((t - cfg.warmup_steps) / rest, 0.0, 1.0)
    f = scalars.final_fraction
    shape = {
        "constant": jnp.ones_like(u),
        "linear": f + (1.0 - f) * (1.0 - u),
        "cosine": f + (1.0 - f) * 0.5 * (1.0 + jnp.cos(jnp.pi * u)),
    }[cfg.schedule]
    w0 = scalars.warmup_fraction
    warm = w0 + (1.0 - w0) * t / max(cfg.warmup_steps, 1)
    return scalars.learning_rate * jnp.where(t < cfg.warmup_steps, warm, shape)


def decayed(params: Any) -> Any:
    """Which leaves weight decay applies to: matrices and embeddings, by their names.

    Biases, norms and scalar heads are left alone. Names decide, since stacking layers
    adds an axis to every leaf.
    """

    def is_matrix(path, _):
        names = [getattr(p, "key", None) for p in path]
        in_blocks = "blocks" in names
        return names[-1] in ("embed", "pos_embed") or (in_blocks and names[-1] == "w")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def adamw(
    scalars: OptimizerScalars, learning_rate: Array
) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled decay, step: what every stage updates parameters with.

    Built inside the compiled step from traced numbers; its state does not depend on
    them.
    """
    return optax.chain(
        optax.clip_by_global_norm(scalars.max_grad_norm),  # type: ignore[arg-type]
        _adam(scalars),
        optax.add_decayed_weights(scalars.weight_decay, decayed),
        optax.scale(-learning_rate),  # type: ignore[arg-type]
    )


def _adam(scalars: OptimizerScalars) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(scalars.b1, scalars.b2, scalars.eps)  # type: ignore

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # Optax: float ** integer count
            return adam.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


def init_optimizer(params: Any) -> optax.OptState:
    """State of `adamw` before the first step."""
    return adamw(OptimizerConfig().scalars(), jnp.float32(0.0)).init(params)
