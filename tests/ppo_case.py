"""The smallest PPO with every part of a large one; programs are compiled once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.sampling import Rollout, Sampling
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.stages.experience import collect_rollout, make_experience
from rlhf_jax.stages.ppo import optimize, ppo_update
from rlhf_jax.stages.ppo_state import Frozen, PPOConfig, PPOInputs, init_ppo_state
from rlhf_jax.training.optimizers import OptimizerConfig

B, P, R, PTX_LEN, V = 8, 5, 6, 7, 13
EOS = PAD = 3  # equal: nothing may tell padding from end-of-text by its id
MODEL = TransformerConfig(
    num_layers=2, model_dim=16, num_heads=2, max_len=P + R + 4, vocab_size=V
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", eps=1e-3)
CONFIG = PPOConfig(
    num_iterations=10,
    batch_size=B,
    num_minibatches=1,
    prompt_len=P,
    sampling=Sampling(response_len=R, temperature=0.7),
    policy_optimizer=OPTIMIZER,
    value_optimizer=dataclasses.replace(OPTIMIZER, learning_rate=2e-2),
    kl_coef=0.3,
    ema_decay=0.9,
    ptx_per_episode=2,
    ptx_len=PTX_LEN,
)
SHAPES = {"model": MODEL, "reward_model": MODEL}

# Optimised code is not worth the time it takes to make for models this small.
compiled = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@functools.cache
def experience_fn(cfg: PPOConfig):
    return compiled(functools.partial(make_experience, cfg=cfg, **SHAPES))


@functools.cache
def optimize_fn(cfg: PPOConfig):
    return compiled(functools.partial(optimize, cfg=cfg, **SHAPES))


@functools.cache
def rollout_fn(cfg: PPOConfig):
    return compiled(
        functools.partial(collect_rollout, cfg=cfg, model=MODEL, eos_id=EOS, pad_id=PAD)
    )


def update(cfg: PPOConfig):
    """`ppo_update` of this case, not compiled."""
    return functools.partial(ppo_update, cfg=cfg, eos_id=EOS, pad_id=PAD, **SHAPES)


@functools.cache
def transformer(seed: int) -> Any:
    """Parameters in which no leaf is constant."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.float32(centre + 0.3 * rng.normal(size=leaf.shape))

    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))
    return jax.tree.map_with_path(draw, shapes)


@functools.cache
def scalar_model(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    w = jnp.asarray(0.3 * rng.normal(size=MODEL.model_dim), jnp.float32)
    head = {"w": w, "b": jnp.float32(0.2), "shift": jnp.float32(-0.4)}
    return {"transformer": transformer(seed), "head": head}


def zero_head() -> Any:
    w = jnp.zeros(MODEL.model_dim)
    return {"w": w, "b": jnp.zeros(()), "shift": jnp.zeros(())}


def fresh_state(cfg: PPOConfig = CONFIG, seed: int = 0):
    """Before the first iteration: policy = reference, value = reward model."""
    value = scalar_model(1) if cfg.value == "separate" else {"head": zero_head()}
    return init_ppo_state(transformer(0), value, cfg.kl_coef, jax.random.key(seed))


def later_state(cfg: PPOConfig = CONFIG):
    """Later: policy and value model have moved, the step has counted."""
    state = fresh_state(cfg)
    value = scalar_model(3) if cfg.value == "separate" else {"head": some_head(4)}
    params = {"policy": moved(transformer(0), 0.05), "value": value}
    return state.replace(params=params, ema=transformer(5), step=jnp.int32(2))


def some_head(seed: int) -> Any:
    return scalar_model(seed)["head"]


def moved(params: Any, size: float) -> Any:
    rng = np.random.default_rng(9)
    return jax.tree.map(
        lambda x: x + jnp.asarray(size * rng.normal(size=x.shape), jnp.float32), params
    )


def frozen() -> Frozen:
    return Frozen(reference=transformer(0), reward_model=scalar_model(1))


def make_inputs(cfg: PPOConfig = CONFIG, seed: int = 0) -> PPOInputs:
    """Prompts of every length, padded with garbage; text with ragged ends."""
    rng = np.random.default_rng(seed)
    rows = cfg.num_ptx_rows
    ends = rng.integers(1, PTX_LEN + 1, (rows, 1))
    draw = lambda *shape: jnp.asarray(rng.integers(0, V, shape), jnp.int32)  # noqa: E731
    return PPOInputs(
        prompts=draw(B, P),
        prompt_lengths=jnp.asarray(1 + np.arange(B) % P, jnp.int32),
        ptx_tokens=draw(rows, PTX_LEN),
        ptx_targets=draw(rows, PTX_LEN),
        ptx_mask=jnp.asarray(np.arange(PTX_LEN)[None] < ends),
    )


def stored_rollout(seed: int = 0) -> Rollout:
    """Responses of every length; the full-length ones did not end."""
    rng = np.random.default_rng(seed + 100)
    lengths = 1 + np.arange(B) % R
    ended = lengths < R
    ended[-1] = True
    tokens = rng.integers(0, V, (B, R))
    steps = np.arange(R)[None]
    tokens = np.where(
        steps == lengths[:, None] - 1, np.where(ended, EOS, 5)[:, None], tokens
    )
    tokens = np.where(steps < lengths[:, None], tokens, PAD)
    return Rollout(
        responses=jnp.asarray(tokens, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        ended=jnp.asarray(ended),
        logprobs=jnp.asarray(rng.normal(size=(B, R)), jnp.float32),
    )


def assert_trees_close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    paths, _ = jax.tree_util.tree_flatten_with_path(a)
    for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


def assert_trees_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
