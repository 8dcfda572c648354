"""Constants and state of PPO; every number InstructGPT did not publish says so."""

import dataclasses
from math import isfinite
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.nn.config import TransformerConfig, check_range
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.nn.transformer import cast_once
from rlhf_jax.training.loop import LoopConfig
from rlhf_jax.training.optimizers import (
    OptimizerConfig,
    OptimizerScalars,
    init_optimizer,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Constants of PPO. "IG" marks those InstructGPT published (appendix C.4)."""

    num_iterations: int = 500
    """Iterations of rollout and update (IG: 256k episodes / 512)."""
    batch_size: int = 512
    """Episodes per iteration (IG: 512)."""
    num_minibatches: int = 8
    """Optimizer steps per epoch over the episodes (IG: 8 of 64 episodes)."""
    num_epochs: int = 1
    """Passes over the episodes (IG: 1; Ziegler, Stiennon: 4)."""
    num_microbatches: int = 1
    """Sequential parts of each minibatch, to save memory; replicas cut no further than
    a row a device, with fsdp parts of fewer rows than devices cost time."""
    prompt_len: int = 1024
    """Longest prompt in tokens, P; longer prompts are dropped with a count."""
    sampling: Sampling = Sampling()
    """The distribution responses are drawn from (IG: temperature 1)."""
    num_slots: int | None = None
    """Responses decoded at a time; where one ends, the next prompt takes its place. The
    same samples from a smaller cache, sooner where lengths vary; one device. None
    decodes all at once."""
    offload_frozen: bool = False
    """Keep reference and reward model in the host's memory and bring them to the device
    to score an iteration's responses and held-out ones; the same numbers."""
    policy_optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=8e-6, schedule="constant", warmup_steps=10, warmup_fraction=0.1
    )
    """Of the policy, in iterations. IG: constant after a 10-iteration warm-up from 0.1
    of the peak; the peak of the released models is not published, without PPO-ptx
    rates above 8.05e-6 diverged."""
    value_optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=9e-6, schedule="constant"
    )
    """Of the value model, in iterations (IG: 9e-6 for 1.3B and 6B)."""
    kl_coef: float = 0.02
    """Reward units per nat of KL to the reference, at the start (IG: 0.02)."""
    kl_target: float | None = None
    """Nats per response that an adaptive coefficient aims at (Ziegler: 6); None keeps
    the coefficient fixed (IG, Stiennon)."""
    kl_horizon: float = 10000.0
    """Episodes over which the adaptive coefficient moves (Ziegler: 10000)."""
    gamma: float = 1.0
    """Discount per token (IG: none)."""
    lam: float = 0.95
    """Of GAE (Ziegler, Stiennon; IG did not publish it)."""
    clip: float = 0.2
    """Half width of the ratio's trust interval (IG: 0.2); inf clips nothing."""
    value_clip: float = 0.2
    """Reward units a value may move per iteration (Ziegler; not published by IG); inf
    clips nothing."""
    value: Literal["separate", "shared"] = "separate"
    """A value model of its own, initialised from the reward model (IG, Stiennon), or a
    zero head on the policy's trunk (Ziegler)."""
    value_coef: float = 0.1
    """Weight of the value loss, which matters where the trunk is shared (Ziegler)."""
    whiten_advantages: bool = True
    """To mean 0, variance 1 over the rollout (Ziegler, Stiennon's code; not published
    by IG)."""
    whiten_rewards: bool = False
    """Scale rewards to variance 1 over the rollout, keeping their mean (Ziegler)."""
    missing_eos_score: float | None = None
    """Replaces the score of a response that does not end (Ziegler: -1; not
    published by IG); None keeps the reward model's."""
    ema_decay: float = 0.992
    """Per optimizer step, of the averaged policy (IG: 0.992; whether per step or per
    iteration is not published)."""
    ptx_coef: float = 0.0
    """Weight of the pre-training loss (IG: 27.8 for PPO-ptx, 0 for PPO; whether its
    loss is a mean per token, as here, or a sum is not published)."""
    ptx_per_episode: int = 8
    """Pre-training examples per episode (IG: 8)."""
    ptx_len: int = 1024
    """Tokens of a pre-training example (not published by IG)."""
    eval_prompts: int = 256
    """Held-out prompts the policy is looked at with while it learns, all at once."""
    loop: LoopConfig = LoopConfig(checkpoint_every=20, eval_every=20)
    """How often to save and evaluate, in iterations."""

    def __post_init__(self):
        if self.sampling.top_k is not None or self.sampling.top_p is not None:
            raise ValueError(
                "PPO samples from the whole distribution: a token outside the "
                "reference's top_k or top_p would have an infinite KL penalty; set "
                "both to None and lower the temperature instead"
            )
        if self.ptx_coef and self.ptx_per_episode < 1:
            raise ValueError(
                f"ptx_per_episode must be at least 1, got {self.ptx_per_episode}; set "
                "ptx_coef to 0 for PPO without pre-training text"
            )
        check_range(self, "[0, inf)", "kl_coef", "ptx_coef", "value_coef")
        check_range(self, "[0, 1]", "gamma", "lam")
        check_range(self, "(0, inf]", "clip", "value_clip")
        check_range(self, "[0, 1)", "ema_decay")
        check_range(self, "[1, inf)", "num_epochs", "num_minibatches")
        if self.value not in ("separate", "shared"):
            raise ValueError(
                f"value must be 'separate' or 'shared', got {self.value!r}"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "kl_coef is 0, which kl_target multiplies and never moves; give it a "
                "start above 0, or set kl_target to None"
            )
        if self.kl_target is not None and not self.kl_target > 0:
            raise ValueError(f"kl_target must be above 0 or None, got {self.kl_target}")
        if self.kl_target is not None and not self.kl_horizon > 0.2 * self.batch_size:
            raise ValueError(
                f"kl_horizon must be above 0.2 batch_size = {0.2 * self.batch_size:g}, "
                f"got {self.kl_horizon:g}: kl_coef could change its sign at once"
            )
        if self.missing_eos_score is not None and not isfinite(self.missing_eos_score):
            raise ValueError(f"missing_eos_score is {self.missing_eos_score}")
        minibatch = self.batch_size // self.num_minibatches
        if self.batch_size % self.num_minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by num_minibatches "
                f"{self.num_minibatches}"
            )
        if self.num_microbatches < 1 or minibatch % self.num_microbatches:
            raise ValueError(
                f"a minibatch of {minibatch} episodes is not divisible by "
                f"num_microbatches {self.num_microbatches}"
            )

    @property
    def num_ptx_rows(self) -> int:
        """Pre-training examples per iteration; 0 without PPO-ptx."""
        return self.batch_size * self.ptx_per_episode if self.ptx_coef else 0

    def scalars(self) -> "PPOScalars":
        """The floats of this config as device scalars."""
        names = ("gamma", "lam", "clip", "value_clip", "value_coef", "ptx_coef")
        names += ("ema_decay", "kl_horizon")
        return PPOScalars(
            policy_optimizer=self.policy_optimizer.scalars(),
            value_optimizer=self.value_optimizer.scalars(),
            temperature=jnp.float32(self.sampling.temperature),
            **{name: jnp.float32(getattr(self, name)) for name in names},
        )


@struct.dataclass
class PPOScalars:
    """What a sweep may change without recompiling; float32 scalars, see the config."""

    policy_optimizer: OptimizerScalars
    value_optimizer: OptimizerScalars
    temperature: Array
    gamma: Array
    lam: Array
    clip: Array
    value_clip: Array
    value_coef: Array
    ptx_coef: Array
    ema_decay: Array
    kl_horizon: Array


@struct.dataclass
class PPOState:
    """Everything PPO changes; all of it is checkpointed."""

    step: Array  # int32 [], iterations done
    params: Any  # {"policy": transformer, "value": scalar model or head}
    opt_state: Any  # {"policy": ..., "value": ...}
    ema: Any  # averaged policy, starts as the policy
    kl_coef: Array  # float32 []
    key: Array  # typed PRNG key; folded with `step`, never replaced


@struct.dataclass
class Frozen:
    """Models PPO reads and never changes."""

    reference: Any  # transformer, the policy at the start
    reward_model: Any  # {"transformer": ..., "head": ...}


def freeze(
    reference: Any,
    reward_model: Any,
    *,
    cfg: PPOConfig,
    model: TransformerConfig,
    reward_cfg: TransformerConfig,
) -> Frozen:
    """The models that PPO only reads, as small as they are the same to the bit.

    Args:
        reference: parameters of the policy at the start.
        reward_model: `{"transformer", "head"}`.
        cfg: reads `offload_frozen`.
        model, reward_cfg: their shapes; dense layers are kept in the `dtype` that they
            are multiplied in.
    """
    scorer, _ = cast_once(reward_model["transformer"], reward_cfg)
    frozen = Frozen(
        reference=cast_once(reference, model)[0],
        reward_model=reward_model | {"transformer": scorer},
    )
    if not cfg.offload_frozen:
        return frozen
    return jax.device_put(frozen, jax.memory.Space.Host)


def on_device(tree: Any) -> Any:
    """Copies on the device of arrays that are in the host's memory; traced too."""
    return jax.device_put(tree, jax.memory.Space.Device)


@struct.dataclass
class PPOInputs:
    """What one iteration reads."""

    prompts: Array  # int32 [B, P]
    prompt_lengths: Array  # int32 [B]
    ptx_tokens: Array  # int32 [B * ptx_per_episode or 0, ptx_len]
    ptx_targets: Array  # the same shape
    ptx_mask: Array  # bool, the same shape; False on padding


def init_ppo_state(policy: Any, value: Any, kl_coef: float, key: Array) -> PPOState:
    """State before the first iteration.

    Args:
        policy: transformer parameters of the reference.
        value: `{"transformer", "head"}` of the reward model, or `{"head"}` where the
            trunk is shared.
        kl_coef: at the start.
        key: typed PRNG key.
    """
    params = {"policy": policy, "value": value}
    return PPOState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state={name: init_optimizer(p) for name, p in params.items()},
        ema=jax.tree.map(jnp.copy, policy),
        kl_coef=jnp.float32(kl_coef),
        key=key,
    )
