"""PPO against a reward model, with a KL penalty to the reference, and PPO-ptx.

One iteration is one pure function, `ppo_update`: rollout, scores, advantages, then
clipped policy and value steps over minibatches. With `ptx_coef` each step adds the
gradient of the pre-training loss to the same update (PPO-ptx).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.objectives.advantages import adaptive_kl_coef
from rlhf_jax.objectives.masking import masked_mean, normalize_weights
from rlhf_jax.objectives.ppo import ppo_diagnostics
from rlhf_jax.stages.experience import (
    Experience,
    collect_rollout,
    make_experience,
)
from rlhf_jax.stages.ppo_loss import ppo_loss, ptx_loss
from rlhf_jax.stages.ppo_state import (
    Frozen,
    PPOConfig,
    PPOInputs,
    PPOScalars,
    PPOState,
)
from rlhf_jax.training.optimizers import adamw, learning_rate
from rlhf_jax.training.step import accumulate_gradients, nonfinite_leaves

Array = jax.Array
Metrics = dict[str, Array]


def optimize(
    state: PPOState,
    experience: Experience,
    inputs: PPOInputs,
    scalars: PPOScalars,
    *,
    cfg: PPOConfig,
    model: TransformerConfig,
    reward_model: TransformerConfig,
    mesh: Mesh | None = None,
) -> tuple[PPOState, Metrics]:
    """Epochs of minibatch steps on one rollout.

    Each step adds the gradient of PPO and, in PPO-ptx, ptx_coef times the gradient of
    the pre-training loss, then updates once: the paper's single objective.

    Args:
        state: before.
        experience: arrays [B, R].
        inputs: reads the pre-training rows, `cfg.num_ptx_rows`.
        scalars, cfg, model, reward_model: constants. To sweep `scalars.ptx_coef` give
            a `cfg.ptx_coef` above 0, which says that there is such text.
        mesh: see `accumulate_gradients`.

    Returns:
        The state with new parameters, optimizer states and average; means over the
        steps of what to watch, and `policy/first_ratio_error`, the largest |ratio - 1|
        of the first step, which is 0 up to rounding.

    Raises:
        ValueError: when traced, if the inputs have other numbers of pre-training rows.

    Source: Ouyang et al. 2022, eq. (2) and appendix C.4.
    """
    loss_fn = functools.partial(
        ppo_loss, scalars=scalars, cfg=cfg, model=model, reward_model=reward_model
    )
    ptx_fn = functools.partial(ptx_loss, model=model)
    given = inputs.ptx_tokens.shape[0]
    if given != cfg.num_ptx_rows:
        raise ValueError(
            f"inputs hold {given} pre-training rows, and by ptx_coef "
            f"{cfg.ptx_coef}, batch_size and ptx_per_episode there must be "
            f"{cfg.num_ptx_rows}"
        )
    M = cfg.num_minibatches
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
    lr = {
        name: learning_rate(state.step, opt, opt_scalars, cfg.num_iterations)
        for name, opt, opt_scalars in (
            ("policy", cfg.policy_optimizer, scalars.policy_optimizer),
            ("value", cfg.value_optimizer, scalars.value_optimizer),
        )
    }

    def minibatch(carry, index_and_rows):
        params, opt_state, ema = carry
        index, rows, ptx_rows = index_and_rows
        part = jax.tree.map(lambda x: x[rows], experience)
        batch = (part, normalize_weights(part.mask))
        step_key = jax.random.fold_in(key, index)
        (_, extras), grads = accumulate_gradients(
            loss_fn, params, batch, step_key, cfg.num_microbatches, mesh
        )
        logprobs = extras.pop("logprobs")
        values = extras.pop("values")
        metrics = {
            "policy/loss": extras["policy_loss"],
            "policy/update_entropy": extras["entropy"],
            "value/loss": extras["value_loss"],
            "value/clip_fraction": masked_mean(
                (jnp.abs(values - part.old_values) > scalars.value_clip).astype(
                    jnp.float32
                ),
                part.mask,
            ),
        }
        diagnostics = ppo_diagnostics(
            logprobs, part.old_logprobs, part.advantages, part.mask, scalars.clip
        )
        metrics |= {f"policy/{name}": x for name, x in diagnostics.items()}
        ratio_error = jnp.max(
            jnp.where(part.mask, jnp.abs(jnp.expm1(logprobs - part.old_logprobs)), 0.0)
        )
        metrics["policy/ratio_error"] = ratio_error
        metrics["policy/ppo_grad_norm"] = optax.tree.norm(grads["policy"])
        if cfg.num_ptx_rows:
            ptx_batch = (
                inputs.ptx_tokens[ptx_rows],
                inputs.ptx_targets[ptx_rows],
                normalize_weights(inputs.ptx_mask[ptx_rows]),
            )
            (loss, _), ptx_grads = accumulate_gradients(
                ptx_fn, params, ptx_batch, step_key, cfg.num_microbatches, mesh
            )
            ptx_grads = jax.tree.map(lambda g: scalars.ptx_coef * g, ptx_grads)
            dot = optax.tree.vdot(grads["policy"], ptx_grads["policy"])
            ptx_norm = optax.tree.norm(ptx_grads["policy"])
            norms = metrics["policy/ppo_grad_norm"] * ptx_norm
            metrics |= {
                "ptx/loss": loss,
                "ptx/grad_norm": ptx_norm,
                "ptx/grad_cosine": jnp.where(
                    norms > 0, dot / jnp.where(norms > 0, norms, 1.0), 0.0
                ),
            }
            grads = jax.tree.map(jnp.add, grads, ptx_grads)

        new_params, new_opt_state = {}, {}
        for name, opt_scalars in (
            ("policy", scalars.policy_optimizer),
            ("value", scalars.value_optimizer),
        ):
            updates, new_opt_state[name] = adamw(opt_scalars, lr[name]).update(
                grads[name], opt_state[name], params[name]
            )
            new_params[name] = optax.apply_updates(params[name], updates)
            metrics |= {
                f"{name}/grad_norm": optax.tree.norm(grads[name]),
                f"{name}/update_norm": optax.tree.norm(updates),
                f"{name}/param_norm": optax.tree.norm(params[name]),
            }
        decay = scalars.ema_decay
        ema = jax.tree.map(
            lambda a, p: decay * a + (1.0 - decay) * p, ema, new_params["policy"]
        )
        metrics["nonfinite"] = nonfinite_leaves(grads)
        return (new_params, new_opt_state, ema), metrics

    def permutations(purpose: int, num_rows: int):
        keys = (
            jax.random.fold_in(jax.random.fold_in(key, purpose), e)
            for e in range(cfg.num_epochs)
        )
        return jnp.concatenate(
            [jax.random.permutation(k, num_rows).reshape(M, -1) for k in keys]
        )

    num_updates = cfg.num_epochs * M
    rows = permutations(10**6, cfg.batch_size)
    ptx_rows = permutations(10**6 + 1, cfg.num_ptx_rows)
    carry = (state.params, state.opt_state, state.ema)
    (params, opt_state, ema), history = jax.lax.scan(
        minibatch, carry, (jnp.arange(num_updates), rows, ptx_rows)
    )
    bad = jnp.any(history.pop("nonfinite"), axis=0)
    ratio_errors = history.pop("policy/ratio_error")
    metrics: Metrics = {name: jnp.mean(x) for name, x in history.items()}
    metrics |= {
        "policy/ratio_max": jnp.max(history["policy/ratio_max"]),
        "policy/ratio_min": jnp.min(history["policy/ratio_min"]),
        "policy/first_ratio_error": ratio_errors[0],
        "policy/last_ratio_error": ratio_errors[-1],
        "policy/learning_rate": lr["policy"],
        "value/learning_rate": lr["value"],
        "nonfinite": bad,
    }
    state = dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema)
    return state, metrics


def ppo_update(
    state: PPOState,
    inputs: PPOInputs,
    frozen: Frozen,
    scalars: PPOScalars,
    *,
    cfg: PPOConfig,
    model: TransformerConfig,
    reward_model: TransformerConfig,
    eos_id: int,
    pad_id: int,
    mesh: Mesh | None = None,
) -> tuple[PPOState, Metrics]:
    """One iteration of PPO: rollout, scores, advantages, minibatch steps. Pure.

    Args:
        state: everything PPO changes.
        inputs: prompts [B, P] and pre-training rows.
        frozen: reference and reward model, of `freeze` or as they were trained.
        scalars: floats, traced: a sweep over them does not recompile and may `vmap`.
        cfg, model, reward_model: shapes and control flow.
        eos_id, pad_id: token ids; they may be equal.
        mesh: see `accumulate_gradients`.

    Returns:
        The next state and the metrics of the iteration (docs/metrics.md).
    """
    with jax.named_scope("rollout"):  # names for profiles
        rollout = collect_rollout(
            state, inputs, scalars, cfg=cfg, model=model, eos_id=eos_id, pad_id=pad_id
        )
    with jax.named_scope("experience"):
        experience, metrics = make_experience(
            state,
            frozen,
            inputs,
            rollout,
            scalars,
            cfg=cfg,
            model=model,
            reward_model=reward_model,
        )
    with jax.named_scope("optimize"):
        state, update_metrics = optimize(
            state,
            experience,
            inputs,
            scalars,
            cfg=cfg,
            model=model,
            reward_model=reward_model,
            mesh=mesh,
        )
    kl_coef = state.kl_coef
    if cfg.kl_target is not None:
        kl_coef = adaptive_kl_coef(
            kl_coef,
            metrics["objective/kl"],
            cfg.kl_target,
            scalars.kl_horizon,
            cfg.batch_size,
        )
    return dataclasses.replace(
        state, step=state.step + 1, kl_coef=kl_coef
    ), metrics | update_metrics
