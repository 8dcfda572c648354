"""Does the suite notice a wrong formula? Each mutation must make its tests fail.

    python tests/mutations.py [--write] [part of a name ...]

Every mutation changes one line of a copy of the package, then runs the tests that are
named for it. `--write` puts the table into docs/mutations.md.
"""

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One wrong line: `old`, which occurs once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """Files below tests/ to run, the likeliest first."""


_MASKING = "rlhf_jax/objectives/masking.py"
_ADVANTAGES = "rlhf_jax/objectives/advantages.py"
_PPO = "rlhf_jax/objectives/ppo.py"
_RANKING = "rlhf_jax/objectives/ranking.py"
_LM = "rlhf_jax/objectives/language_modeling.py"
_TRANSFORMER = "rlhf_jax/nn/transformer.py"
_ATTENTION = "rlhf_jax/nn/attention.py"
_PPO_STATE = "rlhf_jax/stages/ppo_state.py"
_DEVICES = "rlhf_jax/nn/devices.py"
_SAMPLING = "rlhf_jax/nn/sampling.py"
_RESPONSES = "rlhf_jax/nn/responses.py"
_HEADS = "rlhf_jax/nn/heads.py"
_EXPERIENCE = "rlhf_jax/stages/experience.py"
_PPO_LOSS = "rlhf_jax/stages/ppo_loss.py"
_UPDATE = "rlhf_jax/stages/ppo.py"
_REWARD = "rlhf_jax/stages/reward_model.py"
_STEP = "rlhf_jax/training/step.py"
_MESH = "rlhf_jax/training/mesh.py"
_LOOP = "rlhf_jax/training/loop.py"
_OPTIMIZERS = "rlhf_jax/training/optimizers.py"
_METRICS = "rlhf_jax/training/metrics.py"
_CHECKPOINT = "rlhf_jax/training/checkpoint.py"
_BATCHES = "rlhf_jax/data/batches.py"
_SCHEDULE = "rlhf_jax/data/schedule.py"
_PACKING = "rlhf_jax/data/packing.py"
_RANKINGS = "rlhf_jax/data/packed_rankings.py"

_T_PPO = "objectives/test_ppo.py"
_T_ADVANTAGES = "objectives/test_advantages.py"
_T_UPDATE = "stages/test_ppo.py"
_T_EXPERIENCE = "stages/test_experience.py"
_T_SAMPLING = "nn/test_sampling.py"
_T_TRANSFORMER = "nn/test_transformer.py"
_T_CHECKPOINT = "training/test_checkpoint.py"
_T_BATCHES = "data/test_batches.py"
_T_SFT = "stages/test_sft.py"
_T_LOSS_FIRST = "stages/test_loss_first.py"
_T_LM = "objectives/test_language_modeling.py"

MUTATIONS = (
    Mutation(
        "KL penalty with the wrong sign",
        _ADVANTAGES,
        "penalty = -kl_coef *",
        "penalty = kl_coef *",
        _T_ADVANTAGES,
    ),
    Mutation(
        "score one token late",
        _ADVANTAGES,
        "last = jnp.arange(R)[None] == lengths[:, None] - 1",
        "last = jnp.arange(R)[None] == lengths[:, None]",
        _T_ADVANTAGES,
    ),
    Mutation(
        "KL penalty on padding",
        _ADVANTAGES,
        "return jnp.where(response_mask(lengths, R), penalty + at_end, 0.0)",
        "return penalty + at_end",
        _T_ADVANTAGES,
    ),
    Mutation(
        "GAE reads its own value as the next",
        _ADVANTAGES,
        "rewards + discounts * next_values - values",
        "rewards + discounts * values - values",
        _T_ADVANTAGES,
    ),
    Mutation(
        "GAE without lambda",
        _ADVANTAGES,
        "advantage = delta + discount * lam * advantage",
        "advantage = delta + discount * advantage",
        _T_ADVANTAGES,
    ),
    Mutation(
        "GAE runs forwards",
        _ADVANTAGES,
        "(deltas, discounts), reverse=True)",
        "(deltas, discounts), reverse=False)",
        _T_ADVANTAGES,
    ),
    Mutation(
        "an episode that ends one token early",
        _ADVANTAGES,
        "discounts = jnp.where(response_mask(lengths - 1, R), gamma, 0.0)",
        "discounts = jnp.where(response_mask(lengths - 2, R), gamma, 0.0)",
        _T_ADVANTAGES,
    ),
    Mutation(
        "returns without values",
        _ADVANTAGES,
        "jnp.where(mask, advantages + values, 0.0)",
        "jnp.where(mask, advantages, 0.0)",
        _T_ADVANTAGES,
    ),
    Mutation(
        "adaptive KL moves the wrong way",
        _ADVANTAGES,
        "jnp.clip(kl / target - 1.0",
        "jnp.clip(1.0 - kl / target",
        _T_ADVANTAGES,
    ),
    Mutation(
        "maximum for minimum in the clipped objective",
        _PPO,
        "jnp.minimum(ratio * advantages",
        "jnp.maximum(ratio * advantages",
        _T_PPO,
    ),
    Mutation(
        "inverted ratio",
        _PPO,
        "ratio = jnp.exp(logprobs - old_logprobs)",
        "ratio = jnp.exp(old_logprobs - logprobs)",
        _T_PPO,
    ),
    Mutation(
        "clip of one side",
        _PPO,
        "clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)",
        "clipped = jnp.minimum(ratio, 1.0 + clip)",
        _T_PPO,
    ),
    Mutation(
        "minimum for maximum in the value loss",
        _PPO,
        "0.5 * jnp.maximum(jnp.square(values",
        "0.5 * jnp.minimum(jnp.square(values",
        _T_PPO,
    ),
    Mutation(
        "value clipped around the return",
        _PPO,
        "near = old_values + jnp.clip",
        "near = returns + jnp.clip",
        _T_PPO,
    ),
    Mutation(
        "k3 of the other direction",
        _PPO,
        '"k3": jnp.expm1(-d) + d}',
        '"k3": jnp.expm1(d) - d}',
        _T_PPO,
    ),
    Mutation(
        "unmasked mean",
        _MASKING,
        "jnp.sum(jnp.where(weights != 0, x, 0.0) * weights)",
        "jnp.mean(x)",
        "objectives/test_masking.py",
    ),
    Mutation(
        "weights that sum to the number of tokens",
        _MASKING,
        "return mask / jnp.where(total > 0, total, 1.0)",
        "return mask",
        "objectives/test_masking.py",
    ),
    Mutation(
        "whitening over padding",
        _MASKING,
        "mean = masked_mean(x, mask)\n    white",
        "mean = jnp.mean(x)\n    white",
        "objectives/test_masking.py",
    ),
    Mutation(
        "whitening that drops the mean it should keep",
        _MASKING,
        "white if shift_mean else white + mean",
        "white + mean if shift_mean else white",
        "objectives/test_masking.py",
    ),
    Mutation(
        "mask one token long",
        _MASKING,
        "return steps < lengths[..., None]",
        "return steps <= lengths[..., None]",
        "objectives/test_masking.py",
    ),
    Mutation(
        "the worse response preferred",
        _RANKING,
        "ranks[..., :, None] < ranks[..., None, :]",
        "ranks[..., :, None] > ranks[..., None, :]",
        "objectives/test_ranking.py",
    ),
    Mutation(
        "ties as pairs",
        _RANKING,
        "better = ranks[..., :, None] < ranks",
        "better = ranks[..., :, None] <= ranks",
        "objectives/test_ranking.py",
    ),
    Mutation(
        "absent responses as pairs",
        _RANKING,
        "better & present[..., :, None] & present[..., None, :]",
        "better",
        "objectives/test_ranking.py",
    ),
    Mutation(
        "sum over the pairs of a prompt",
        _RANKING,
        "return total / jnp.maximum(num_pairs, 1.0)",
        "return total",
        "objectives/test_ranking.py",
    ),
    Mutation(
        "labelers compared in the orders they were shown",
        "rlhf_jax/evaluation/rankings.py",
        "zip(*sorted(rows), strict=True)",
        "zip(*rows, strict=True)",
        "evaluation/test_rankings.py",
    ),
    Mutation(
        "samples of one prompt as independent trials",
        "rlhf_jax/evaluation/statistics.py",
        "size = min(max(together / apart, 1.0), size)",
        "size = 1.0",
        "evaluation/test_statistics.py",
    ),
    Mutation(
        "held-out text of the first document alone",
        "rlhf_jax/data/schedule.py",
        "return [items[i * count // kept] for i in range(kept)]",
        "return list(items[:kept])",
        "stages/test_comparison.py",
    ),
    Mutation(
        "a slot that reads what its last prompt left",
        "rlhf_jax/nn/refill.py",
        "own = written[None] >= starts[:, None]",
        "own = written[None] >= 0 * starts[:, None]",
        "nn/test_refill.py",
    ),
    Mutation(
        "a slot whose numbers depend on when it began",
        "rlhf_jax/nn/refill.py",
        "uniforms[places, rows]",
        "uniforms[jnp.mod(step, R), rows]",
        "nn/test_refill.py",
    ),
    Mutation(
        "slots that go on with a row too few",
        "rlhf_jax/nn/refill.py",
        "goals = [*widths, 0]",
        "goals = [*(width + 1 for width in widths), 0]",
        "nn/test_narrower.py",
    ),
    Mutation(
        "rows that go on as those of the batch before",
        _SAMPLING,
        "rows, cache = rows[kept], rows_of(cache, kept)",
        "rows, cache = kept, rows_of(cache, kept)",
        "nn/test_narrower.py",
    ),
    Mutation(
        "the last chunk's gradient alone",
        _LM,
        "embedding_grad + grads[1]",
        "grads[1]",
        _T_LM,
    ),
    Mutation(
        "entropy with the wrong sign",
        _LM,
        "normalizer - jnp.sum(weights * z, axis=-1) / total",
        "normalizer + jnp.sum(weights * z, axis=-1) / total",
        _T_LM,
    ),
    Mutation(
        "attention to the next token",
        _ATTENTION,
        "mask = key <= query",
        "mask = key <= query + 1",
        _T_TRANSFORMER,
    ),
    Mutation(
        "every block of queries begins at position 0",
        _ATTENTION,
        "for a in (start, 0))",
        "for a in (0, 0))",
        "nn/test_attention.py",
    ),
    Mutation(
        "attention across documents",
        _ATTENTION,
        "mask &= other == own",
        "mask |= other == own",
        "nn/test_attention.py",
    ),
    Mutation(
        "packed responses that read each other",
        _ATTENTION,
        "mask &= (other == own) | (other == 0)",
        "mask &= (other == own) | (other <= own)",
        "nn/test_attention.py",
    ),
    Mutation(
        "packed responses that do not read their prompt",
        _ATTENTION,
        "mask &= (other == own) | (other == 0)",
        "mask &= other == own",
        "nn/test_attention.py",
    ),
    Mutation(
        "packed responses that go on where the one before ended",
        _RANKINGS,
        "first = len(prompt) if branch else 0",
        "first = begin",
        _T_BATCHES,
    ),
    Mutation(
        "an empty packed response read at the end of the one before",
        _RANKINGS,
        "(end if len(ids) else asked) - 1",
        "end - 1",
        _T_BATCHES,
    ),
    Mutation(
        "a document that does not hold its end",
        _ATTENTION,
        "jnp.concatenate([first, tokens[:, :-1] == end], axis=1)",
        "tokens == end",
        "nn/test_attention.py",
    ),
    Mutation(
        "the TPU's kernel reads later tokens",
        _ATTENTION,
        'how = {"causal": True',
        'how = {"causal": False',
        "nn/test_flash.py",
    ),
    Mutation(
        "the TPU's kernel reads across documents",
        _ATTENTION,
        "return on_each_device(local, q, k, v, *ids)",
        "return on_each_device(local, q, k, v)",
        "nn/test_flash.py",
    ),
    Mutation(
        "rows dealt over tensor to a kernel",
        _DEVICES,
        "axes = (None if whole_rows else rows",
        "axes = (None if whole_rows else mesh.axis_names",
        "nn/test_flash.py",
    ),
    Mutation(
        "a response reads its later tokens in the last block",
        _RESPONSES,
        "return jnp.tril(jnp.ones((length, length), bool))[None, None, None]",
        "return jnp.ones((1, 1, 1, length, length), bool)",
        "nn/test_transformer.py",
    ),
    Mutation(
        "positions of the last block one off",
        _TRANSFORMER,
        "return x[:, rows:]",
        "return jnp.roll(x, 1, axis=1)[:, rows:]",
        "nn/test_transformer.py",
    ),
    Mutation(
        "frozen models stay on the device",
        _PPO_STATE,
        "return jax.device_put(frozen, jax.memory.Space.Host)",
        "return frozen",
        "stages/test_freeze.py",
    ),
    Mutation(
        "a response reads the padding of its prompt",
        _RESPONSES,
        "return jnp.arange(stem)[None] < prompt_lengths[:, None] - 1",
        "return jnp.arange(stem)[None] < stem + 0 * prompt_lengths[:, None]",
        _T_TRANSFORMER,
    ),
    Mutation(
        "positions that go on after the padding of the prompt",
        _RESPONSES,
        "jnp.tile(prompt_lengths[:, None] - 1 + jnp.arange(R + 1)[None], (1, K))",
        "jnp.tile(stem + jnp.arange(R + 1)[None], (B, K))",
        _T_TRANSFORMER,
    ),
    Mutation(
        "dropout that does not keep the mean",
        _TRANSFORMER,
        "jnp.where(keep, x / (1.0 - rate)",
        "jnp.where(keep, x",
        _T_TRANSFORMER,
    ),
    Mutation(
        "multiplied by the temperature",
        _SAMPLING,
        "logits = logits / temperature",
        "logits = logits * temperature",
        _T_SAMPLING,
    ),
    Mutation(
        "top-p with the token that passes p left out",
        _SAMPLING,
        "jnp.cumsum(probs, axis=-1) - probs",
        "jnp.cumsum(probs, axis=-1)",
        _T_SAMPLING,
    ),
    Mutation(
        "the same random number at every step",
        _SAMPLING,
        "jax.random.uniform(jax.random.fold_in(key, t), (B,))",
        "jax.random.uniform(key, (B,))",
        _T_SAMPLING,
    ),
    Mutation(
        "decoding one position late",
        _SAMPLING,
        "positions = of_rows(prompt_lengths) - 1 + t",
        "positions = of_rows(prompt_lengths) + t",
        _T_SAMPLING,
    ),
    Mutation(
        "layers written out in decoding start from the last",
        "rlhf_jax/nn/decoding.py",
        "layer(i) for i in range(cfg.num_layers))",
        "layer(i) for i in range(cfg.num_layers)[::-1])",
        _T_SAMPLING,
    ),
    Mutation(
        "a cache that is widened before its columns",
        "rlhf_jax/nn/decoding.py",
        "(0, missing), (0, 0)))",
        "(missing, 0), (0, 0)))",
        _T_SAMPLING,
    ),
    Mutation(
        "a stretch decodes one token beyond the cache that it reads",
        _SAMPLING,
        "(carry[0] < end) & (jnp.sum(carry[2]) > enough)",
        "(carry[0] <= end) & (carry[0] < R) & (jnp.sum(carry[2]) > enough)",
        _T_SAMPLING,
    ),
    Mutation(
        "end-of-text not counted",
        _SAMPLING,
        "lengths=rollout.lengths + alive.astype(jnp.int32)",
        "lengths=rollout.lengths + (alive & (drawn != eos_id)).astype(jnp.int32)",
        _T_SAMPLING,
    ),
    Mutation(
        "rows go on after their end",
        _SAMPLING,
        "return t + 1, drawn, alive & (drawn != eos_id), cache",
        "return t + 1, drawn, alive, cache",
        _T_SAMPLING,
    ),
    Mutation(
        "the shift of the head is added",
        _HEADS,
        '+ head["b"] - jax.lax',
        '+ head["b"] + jax.lax',
        "nn/test_heads.py",
    ),
    Mutation(
        "score read before the last token",
        _RESPONSES,
        "rows = stem + jnp.arange(K)[None] * (R + 1) + lengths",
        "rows = stem + jnp.arange(K)[None] * (R + 1) + jnp.maximum(lengths - 1, 0)",
        f"stages/test_reward_model.py {_T_EXPERIENCE}",
    ),
    Mutation(
        "the last token reads what stands after it",
        _RESPONSES,
        "read = jnp.arange(R + 1)[None, None] <= lengths[:, :, None]",
        "read = jnp.arange(R + 1)[None, None] <= R + 0 * lengths[:, :, None]",
        _T_TRANSFORMER,
    ),
    Mutation(
        "every device keeps the gradient of its own rows",
        _STEP,
        "loss, scalars, grads = jax.lax.psum((loss, scalars, grads), axes)",
        "loss, scalars = jax.lax.psum((loss, scalars), axes)",
        "training/test_mesh.py",
    ),
    Mutation(
        "batches dealt over tensor too",
        _MESH,
        'jax.P(("data", "fsdp"))',
        "jax.P(AXES)",
        "training/test_mesh.py",
    ),
    Mutation(
        "tensor cuts what the MLP writes to the residual stream",
        _MESH,
        '"mlp_down/w": -2',
        '"mlp_down/w": -1',
        "training/test_mesh.py",
    ),
    Mutation(
        "heads flattened where tensor has cut them",
        _TRANSFORMER,
        "if on_tensor_axis(w):",
        "if False:",
        "training/test_collectives.py",
    ),
    Mutation(
        "ids looked up in a table cut both ways",
        _DEVICES,
        "return _constrained(table, OPEN, None)",
        "return table",
        "training/test_collectives.py",
    ),
    Mutation(
        "rows gathered where fsdp has cut the weights",
        _DEVICES,
        "return _constrained(x, rows, OPEN, OPEN)",
        "return x",
        "training/test_collectives.py",
    ),
    Mutation(
        "logits without a gradient to the embedding",
        _LM,
        "return rows_grad, _product(grad.T, rows)",
        "return rows_grad, jnp.zeros_like(embedding)",
        _T_LM,
    ),
    Mutation(
        "centring moves scores away from 0",
        _REWARD,
        'shift = head["shift"] + jnp.float32(np.mean',
        'shift = head["shift"] - jnp.float32(np.mean',
        "stages/test_reward_model.py",
    ),
    Mutation(
        "KL to the policy itself",
        _EXPERIENCE,
        "policy_logprobs(frozen.reference, *ids",
        "policy_logprobs(policy, *ids",
        _T_EXPERIENCE,
    ),
    Mutation(
        "missing end-of-text punished where it is there",
        _EXPERIENCE,
        "jnp.where(rollout.ended, raw_scores, cfg.missing_eos_score)",
        "jnp.where(rollout.ended, cfg.missing_eos_score, raw_scores)",
        _T_EXPERIENCE,
    ),
    Mutation(
        "values after each token",
        _EXPERIENCE,
        "values = all_values[:, :-1]",
        "values = all_values[:, 1:]",
        _T_EXPERIENCE,
    ),
    Mutation(
        "the same rollout key in every iteration",
        _EXPERIENCE,
        "jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)",
        "jax.random.fold_in(state.key, 0)",
        f"{_T_EXPERIENCE} {_T_UPDATE}",
    ),
    Mutation(
        "policy loss that is maximised",
        _PPO_LOSS,
        "return -masked_sum(objective, weights)",
        "return masked_sum(objective, weights)",
        _T_UPDATE,
    ),
    Mutation(
        "value loss without its coefficient",
        _PPO_LOSS,
        "return policy_loss + scalars.value_coef * value_loss, extras",
        "return policy_loss + value_loss, extras",
        _T_UPDATE,
    ),
    Mutation(
        "PPO-ptx without its coefficient",
        _UPDATE,
        "lambda g: scalars.ptx_coef * g",
        "lambda g: g",
        _T_UPDATE,
    ),
    Mutation(
        "average with swapped decay",
        _UPDATE,
        "decay * a + (1.0 - decay) * p",
        "(1.0 - decay) * a + decay * p",
        _T_UPDATE,
    ),
    Mutation(
        "the same minibatches in every epoch",
        _UPDATE,
        "jax.random.fold_in(jax.random.fold_in(key, purpose), e)",
        "jax.random.fold_in(key, purpose)",
        _T_UPDATE,
    ),
    Mutation(
        "only the last microbatch counts",
        _STEP,
        "return jax.tree.map(jnp.add, carry, (loss, scalars, grads)), arrays",
        "return (loss, scalars, grads), arrays",
        "training/test_step.py",
    ),
    Mutation(
        "one dropout mask for all steps",
        _STEP,
        "key = jax.random.fold_in(state.key, state.step)",
        "key = state.key",
        "training/test_step.py",
    ),
    Mutation(
        "a resumed run repeats its last step",
        _LOOP,
        "first, state = restored",
        "first, state = restored[0] - 1, restored[1]",
        "training/test_loop.py",
    ),
    Mutation(
        "an update is saved before it was checked",
        _LOOP,
        "written(step, writer.flush())  # an update is kept only once it was checked",
        "pass",
        "training/test_loop.py",
    ),
    Mutation(
        "metrics of lost updates stay",
        _METRICS,
        'if line["step"] <= first_step]',
        'if line["step"] <= first_step + 1]',
        "training/test_metrics.py",
    ),
    Mutation(
        "weight decay on biases",
        _OPTIMIZERS,
        'in_blocks and names[-1] == "w"',
        "in_blocks",
        "training/test_optimizers.py",
    ),
    Mutation(
        "cosine to 0",
        _OPTIMIZERS,
        '"cosine": f + (1.0 - f) * 0.5',
        '"cosine": 0.5',
        "training/test_optimizers.py",
    ),
    Mutation(
        "targets that are not shifted",
        _BATCHES,
        "targets[row, begin:end] = ids[1:]",
        "targets[row, begin:end] = ids[:-1]",
        _T_BATCHES,
    ),
    Mutation(
        "the first response token is not learned",
        _BATCHES,
        "0 if on_all else max(0, len(prompts[i]) - 1)",
        "0 if on_all else len(prompts[i])",
        _T_BATCHES,
    ),
    Mutation(
        "weights over this process's rows only",
        _BATCHES,
        "1.0 / counts[batch].sum()\n        made",
        "1.0 / counts[mine].sum()\n        made",
        _T_BATCHES,
    ),
    Mutation(
        "demonstrations of a row read each other",
        _BATCHES,
        "documents[row, begin:] = number",
        "documents[row, begin:] = 0",
        _T_BATCHES,
    ),
    Mutation(
        "the loss forgets which demonstration a token is of",
        "rlhf_jax/stages/pretrain.py",
        "forward(params, batch.tokens, model, key, batch.documents)",
        "forward(params, batch.tokens, model, key)",
        _T_SFT,
    ),
    Mutation(
        "text beside shared rows is read across its documents",
        _TRANSFORMER,
        "documents = told if documents is None else told + documents",
        "documents = told if documents is None else documents",
        f"nn/test_attention.py {_T_SFT}",
    ),
    Mutation(
        "the rows of the first epoch's fullest batch",
        _PACKING,
        "range(num_epochs * read.steps_per_epoch)",
        "range(read.steps_per_epoch)",
        "data/test_packing.py",
    ),
    Mutation(
        "demonstrations sorted into rows by another seed's batches",
        _PACKING,
        "num_examples, batch_size, seed)",
        "num_examples, batch_size, 0)",
        "data/test_packing.py",
    ),
    Mutation(
        "processes that hold a row too few",
        _PACKING,
        "num_mine = -(-num_rows // count)",
        "num_mine = max(1, num_rows // count)",
        "data/test_packing.py",
    ),
    Mutation(
        "positions that do not begin anew",
        _ATTENTION,
        "return steps - jax.lax.cummax(jnp.where(begins, steps, 0), axis=1)",
        "return steps",
        "nn/test_attention.py",
    ),
    Mutation(
        "every process reads the same rows",
        _SCHEDULE,
        "examples[index * size : (index + 1) * size]",
        "examples[:size]",
        _T_BATCHES,
    ),
    Mutation(
        "a checksum that knows no places",
        _CHECKPOINT,
        "place += index * jnp.uint32(stride % 2**32)",
        "place += index * jnp.uint32(0)",
        _T_CHECKPOINT,
    ),
    Mutation(
        "checksums that are not compared",
        _CHECKPOINT,
        "    if not same.all():",
        "    if False:",
        _T_CHECKPOINT,
    ),
    Mutation(
        "checksums that stay where they were saved",
        _CHECKPOINT,
        "sums = jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=_everywhere(like))",
        "sums = jax.ShapeDtypeStruct((count,), jnp.uint32)",
        _T_CHECKPOINT,
    ),
    Mutation(
        "an invariant that a ratio of 1 forever satisfies",
        "rlhf_jax/stages/invariants.py",
        'values["policy/last_ratio_error"] > 0.0',
        'values["policy/last_ratio_error"] >= 0.0',
        "stages/test_invariants.py",
    ),
    Mutation(
        "samples in the order of their groups, not of their prompts",
        "rlhf_jax/stages/sampler.py",
        "back = np.argsort(np.concatenate(groups))",
        "back = np.arange(len(prompts))",
        "stages/test_sampler.py",
    ),
    Mutation(
        "rows as wide as the shortest of their data",
        "rlhf_jax/data/widths.py",
        "max(lengths, default=0)",
        "min(lengths, default=0)",
        "data/test_widths.py",
    ),
    Mutation(
        "the head's order cut by devices, not by their microbatches",
        _BATCHES,
        "rows.swapaxes(1, 2).reshape(",
        "rows.reshape(",
        _T_LOSS_FIRST,
    ),
    Mutation(
        "a stage that forgets its microbatches where it orders positions",
        "rlhf_jax/stages/sft.py",
        "put_loss_first(batch, shards, parts)",
        "put_loss_first(batch, shards)",
        _T_LOSS_FIRST,
    ),
    Mutation(
        "the head as far as the part with the fewest losses needs",
        _LM,
        "count = jnp.max(last)",
        "count = jnp.min(jnp.max(last, axis=1))",
        f"{_T_LM} {_T_LOSS_FIRST}",
    ),
    Mutation(
        "the last chunk with a loss left out",
        _LM,
        "num = -(-count // xs[1].shape[2])",
        "num = count // xs[1].shape[2]",
        f"{_T_LM} {_T_LOSS_FIRST}",
    ),
    Mutation(
        "devices that wait for each other in every chunk of the head",
        _DEVICES,
        "if any(x.shape[0] % shards for x in arrays):",
        "if shards:",
        "training/test_collectives.py",
    ),
    Mutation(
        "documents of a packed row that see each other",
        "rlhf_jax/stages/pretrain.py",
        "document_end = eos_id if cfg.separate_documents else None",
        "document_end = None",
        "test_dead_config.py",
    ),
)


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails with the mutation; None where all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("rlhf_jax", "experiments", "tests"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / mutation.file
        text = path.read_text()
        assert text.count(mutation.old) == 1, mutation.name
        path.write_text(text.replace(mutation.old, mutation.new))
        tests = [f"tests/{name}" for name in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-n0"]
        done = subprocess.run(
            [*command, *tests], cwd=copy, capture_output=True, text=True
        )
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return failed[1]
    if done.returncode == 0:
        return None
    raise RuntimeError(f"{mutation.name}: pytest broke down\n{done.stdout[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if all(part in m.name for part in args.names)]
    rows, survivors = [], []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutation, test in zip(chosen, pool.map(caught_by, chosen), strict=True):
            print(
                f"{'SURVIVED' if test is None else 'caught'}: {mutation.name}: {test}"
            )
            if test is None:
                survivors.append(mutation.name)
            change = f"`{_line(mutation.old)}` → `{_line(mutation.new)}`"
            rows.append(
                f"| {mutation.name} | `{mutation.file}` | {change} | `{test}` |"
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    if args.write and not survivors:
        (ROOT / "docs" / "mutations.md").write_text(HEADER + "\n".join(rows) + "\n")
    sys.exit(bool(survivors))


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


HEADER = """# Mutations that the tests catch

Each row is a wrong line and the first test that failed with it. Made by
`python tests/mutations.py --write`, which changes a copy of the package line by line.

| what is wrong | file | change | caught by |
|---|---|---|---|
"""

if __name__ == "__main__":
    main()
