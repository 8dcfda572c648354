"""The stage around `ppo_update`: models in, batches, held-out looks, the policy out."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batches import TokenBatch, prompt_batches
from rlhf_jax.data.schedule import evenly
from rlhf_jax.data.widths import advise_width
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import init_scalar_head
from rlhf_jax.stages.common import (
    Context,
    Model,
    check_compatible,
    load_model,
    save_model,
)
from rlhf_jax.stages.invariants import check_invariants, warn_of_trouble
from rlhf_jax.stages.ppo import ppo_update
from rlhf_jax.stages.ppo_state import (
    PPOConfig,
    PPOInputs,
    PPOState,
    freeze,
    init_ppo_state,
    on_device,
)
from rlhf_jax.stages.pretrain import (
    corpus_batches,
    heldout_rows,
    make_heldout_loss,
)
from rlhf_jax.stages.sampler import (
    Sampler,
    fitting,
    make_kl,
    prompt_lengths,
    reward_measure,
)
from rlhf_jax.training import memory
from rlhf_jax.training.activations import on_accelerator
from rlhf_jax.training.loop import run_loop
from rlhf_jax.training.mesh import (
    jit_step,
    num_holders,
    replicas,
    state_sharding,
)
from rlhf_jax.training.room import require_room
from rlhf_jax.training.run_dir import write_text


def make_inputs(
    cfg: PPOConfig, reference: Model, ctx: Context, name: str
) -> tuple[Any, int]:
    """Step -> this process's rows of `PPOInputs`, and how many prompts are too long."""
    records = ctx.inputs.read("ppo_prompts", "train")
    lengths = prompt_lengths([record.prompt for record in records], reference)
    advice = advise_width(lengths, cfg.prompt_len, f"{name}.prompt_len")
    if advice and jax.process_index() == 0:
        print(f"{name}: {advice}", file=sys.stderr)
    prompts = prompt_batches(
        records,  # type: ignore[arg-type]
        reference.tokenizer,
        reference.format,
        cfg.batch_size,
        cfg.prompt_len,
        ctx.data_seed("ppo"),  # PPO and PPO-ptx see the same prompts
        shard=ctx.shard,
    )
    text = None
    if cfg.num_ptx_rows:
        text = corpus_batches(
            ctx,
            reference.tokenizer,
            "train",
            cfg.num_ptx_rows,
            cfg.ptx_len,
            ctx.data_seed(f"{name}/ptx"),
        )
    empty = np.zeros((0, cfg.ptx_len), np.int32)
    no_text = TokenBatch(empty, empty, empty.astype(np.float32))

    def inputs(step: int) -> PPOInputs:
        batch = prompts(step)
        ptx = no_text if text is None else text(step)
        return PPOInputs(
            prompts=batch.prompts,
            prompt_lengths=batch.prompt_lengths,
            ptx_tokens=ptx.tokens,
            ptx_targets=ptx.targets,
            ptx_mask=ptx.weights > 0,
        )

    return inputs, prompts.num_dropped


def make_state(
    cfg: PPOConfig, reference: Model, reward: Model, key: jax.Array, mesh: Any
) -> tuple[PPOState, Any]:
    """State before the first iteration, on the mesh, and its shardings."""

    def make(policy, value):
        return init_ppo_state(policy, value, cfg.kl_coef, key)

    if cfg.value == "separate":
        value = jax.tree.map(jnp.copy, reward.params)
    else:
        head = init_scalar_head(key, reference.cfg.model_dim)
        value = {"head": head | {"w": jnp.zeros_like(head["w"])}}
    sharding = state_sharding(mesh, jax.eval_shape(make, reference.params, value))
    return jax.jit(make, out_shardings=sharding)(reference.params, value), sharding


def predict_memory(
    cfg: PPOConfig,
    prompt: int,
    policy: TransformerConfig,
    reward: TransformerConfig,
    mesh: jax.sharding.Mesh,
) -> memory.Memory:
    """Bytes on each device of the mesh at the fullest moment of an iteration.

    Args:
        cfg: of the stage.
        prompt: tokens of the padded prompts, P.
        policy, reward: shapes of the models.
        mesh: of the run.
    """
    return memory.ppo_iteration(
        policy,
        reward,
        cfg.batch_size / mesh.size,
        prompt,
        cfg.sampling.response_len,
        cfg.num_minibatches,
        cfg.num_microbatches,
        (cfg.num_ptx_rows / mesh.size, cfg.ptx_len),
        None if cfg.num_slots is None else cfg.num_slots / mesh.size,
        cfg.value == "shared",
        num_holders(mesh),
        on_accelerator(),
        cfg.offload_frozen,
    )


def run(cfg: PPOConfig, ctx: Context, name: str = "ppo") -> None:
    """Optimises RUN/sft_rl against RUN/reward_model into RUN/`name`.

    The policy handed on is the moving average of the weights.
    """
    stage = ctx.stage(name)
    parents = {n: ctx.stage(n) for n in ("pretrain", "sft_rl", "reward_model")}
    purposes = [("ppo_prompts", "train"), ("eval_prompts", "test"), ("corpus", "valid")]
    if cfg.num_ptx_rows:
        purposes.append(("corpus", "train"))
    sources = ctx.inputs.fingerprint(*purposes)  # type: ignore[arg-type]
    stage.open(name, {name: cfg, "seed": ctx.seed}, sources, parents)
    if stage.done:
        return
    reference = load_model(parents["sft_rl"], ctx.mesh, "language_model")
    reward = load_model(parents["reward_model"], ctx.mesh, "reward_model")
    check_compatible("sft_rl", reference, "reward_model", reward)
    inputs, num_dropped = make_inputs(cfg, reference, ctx, name)
    P = inputs(0).prompts.shape[1]
    predicted = predict_memory(cfg, P, reference.cfg, reward.cfg, ctx.mesh)
    lengths = (f"{name}.prompt_len", f"{name}.sampling.response_len")
    lengths += (f"{name}.ptx_len",) if cfg.num_ptx_rows else ()
    rows = cfg.batch_size / cfg.num_minibatches / cfg.num_microbatches
    require_room(name, predicted, reference.cfg, lengths, ctx.mesh, rows)

    state, sharding = make_state(cfg, reference, reward, ctx.key(name), ctx.mesh)
    frozen = freeze(
        reference.params,
        reward.params,
        cfg=cfg,
        model=reference.cfg,
        reward_cfg=reward.cfg,
    )
    reference = dataclasses.replace(reference, params=frozen.reference)
    reward = dataclasses.replace(reward, params=frozen.reward_model)
    scalars = cfg.scalars()
    update = functools.partial(
        ppo_update,
        cfg=cfg,
        model=reference.cfg,
        reward_model=reward.cfg,
        eos_id=reference.tokenizer.eos_id,
        pad_id=reference.tokenizer.pad_id,
        mesh=replicas(ctx.mesh),
    )
    compiled = jit_step(update, ctx.mesh, sharding)

    def check(update: int, values: dict[str, float]) -> None:
        model = reference.cfg
        check_invariants(update, values, cfg, model.vocab_size, model.dtype)
        warn_of_trouble(update, values)

    state = run_loop(
        name=name,
        directory=stage.path,
        step_fn=compiled,
        rest=(frozen, scalars),
        state=state,
        batches=inputs,
        num_steps=cfg.num_iterations,
        mesh=ctx.mesh,
        cfg=cfg.loop,
        evaluate=make_evaluate(cfg, reference, reward, ctx, name),
        check=check,
        show=("objective/score", "objective/kl", "policy/entropy"),
        profile=ctx.profile,
    )
    save_model(stage, dataclasses.replace(reference, params=state.ema))
    stage.finish(
        {
            "num_iterations": cfg.num_iterations,
            "num_dropped": num_dropped,
            "kl_coef": float(state.kl_coef),
        }
    )


def make_evaluate(
    cfg: PPOConfig, reference: Model, reward: Model, ctx: Context, name: str
) -> Any:
    """Returns `(state, step) -> metrics` on held-out prompts; keeps samples to read."""
    records = ctx.inputs.read("eval_prompts", "test")
    prompts = fitting([r.prompt for r in records], reference, cfg.prompt_len)
    prompts = evenly(prompts, cfg.eval_prompts)
    sampler = Sampler(reference, cfg.sampling, cfg.prompt_len, cfg.eval_prompts, ctx)
    rows = heldout_rows()
    text = corpus_batches(ctx, reference.tokenizer, "valid", rows, cfg.ptx_len, None)
    pretrain_loss = make_heldout_loss(reference.cfg, text, ctx.mesh, 16)

    def brought(model: Model) -> Model:
        if not cfg.offload_frozen:
            return model
        return dataclasses.replace(model, params=on_device(model.params))

    def evaluate(state: PPOState, step: int) -> dict[str, float]:
        policy = state.params["policy"]
        kl = make_kl(brought(reference), cfg.sampling, ctx.mesh)
        score = reward_measure(brought(reward), ctx.mesh)
        measures = {"score": score, "kl": functools.partial(kl, policy)}
        key = ctx.key("ppo/heldout")
        responses, values = sampler.measured(policy, prompts, key, measures)
        rows = [
            {
                "step": step,
                "prompt": prompts[n],
                "response": responses[n].text,
                "ended": responses[n].ended,
                "score": float(values["score"][n]),
            }
            for n in range(min(8, len(prompts)))
        ]
        keep_samples(ctx.stage(name).path / "samples.jsonl", step, rows)
        return {
            "heldout/score": float(values["score"].mean()),
            "heldout/kl": float(values["kl"].mean()),
            "heldout/eos_rate": float(np.mean([r.ended for r in responses])),
            "heldout/length": float(np.mean([len(r.ids) for r in responses])),
            "heldout/pretrain_loss": pretrain_loss(policy),
        }

    return evaluate


def keep_samples(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Adds samples of a step, without what an interrupted run wrote from there on."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    kept += [json.dumps(row) for row in rows]
    write_text(path, "".join(line + "\n" for line in kept))
