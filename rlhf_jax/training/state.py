"""Everything a supervised stage changes, as one pytree of arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rlhf_jax.training.optimizers import init_optimizer

Array = jax.Array


@struct.dataclass
class TrainState:
    """State of pre-training, SFT and reward modelling; all of it is checkpointed."""

    step: Array  # int32 [], updates done
    params: Any  # float32
    opt_state: optax.OptState
    key: Array  # typed PRNG key of the stage; folded with `step`, never replaced


def init_state(params: Any, key: Array) -> TrainState:
    """State before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=init_optimizer(params),
        key=key,
    )
