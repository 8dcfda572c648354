"""A PPO iteration of ours beside google-tunix, whose networks have Qwen2's layout.

tunix has no GPT-2, and ours has no Qwen2. Both sides get the same layers, width, heads,
vocabulary, prompts, response length, epochs and microbatches; four networks each, tied
embeddings in the policy, and a SwiGLU as wide as makes the matrices of a block equal.
What is left differs: RMSNorm, rotary positions and three matrices in the MLP there,
layer norm, learned positions and two matrices here.
"""

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.ppo import Workload, our_iteration
from experiments.benchmark.timing import Row, check_close, duel, row_of
from experiments.benchmark.training import model_config
from rlhf_jax.nn.config import TransformerConfig

NEVER = -1  # a token id that is never sampled, so that no response ends or is padded


def import_tunix() -> SimpleNamespace:
    """The parts of tunix that PPO needs, or how to get them."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from absl import logging
        from flax import nnx
        from tunix.models.qwen2 import model  # pyright: ignore[reportMissingImports]
        from tunix.rl import (  # pyright: ignore[reportMissingImports]
            rl_cluster,
            utils,
        )
        from tunix.rl.ppo import ppo_learner  # pyright: ignore[reportMissingImports]
        from tunix.rl.rollout import (  # pyright: ignore[reportMissingImports]
            base_rollout,
        )
    except ImportError as error:
        raise SystemExit(
            f"error: {error.name} is missing; google-tunix 0.1.7 comes with "
            '`pip install -e ".[tunix]"`'
        ) from error
    logging.set_verbosity(logging.ERROR)  # one line about every array it places
    return SimpleNamespace(
        nnx=nnx,
        qwen2=model,
        cluster=rl_cluster,
        utils=utils,
        ppo=ppo_learner,
        rollout=base_rollout,
    )


class Numbers:
    """A tokenizer whose text is the ids themselves: "5 17 3"."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(token)) for token in ids)

    def bos_id(self) -> int:
        return 0  # tunix adds none

    def eos_id(self) -> int:
        return NEVER

    def pad_id(self) -> int:
        return NEVER


def swiglu_width(model_dim: int) -> int:
    """F with 3 D F = 8 D^2, the MLP matrices of GPT-2, cut to a multiple of 8."""
    return 8 * model_dim // 3 // 8 * 8


def qwen2(cfg: TransformerConfig, seed: int, head: bool) -> Any:
    """A float32 Qwen2 of our sizes, every matrix drawn with standard deviation 0.02.

    Args:
        cfg: our model.
        seed: of the weights.
        head: whether its output is one scalar a token instead of tied logits.
    """
    tunix = import_tunix()
    nnx = tunix.nnx
    model = tunix.qwen2.Qwen2(
        tunix.qwen2.ModelConfig(
            num_layers=cfg.num_layers,
            vocab_size=cfg.vocab_size,
            embed_dim=cfg.model_dim,
            hidden_dim=swiglu_width(cfg.model_dim),
            num_heads=cfg.num_heads,
            head_dim=cfg.head_dim,
            num_kv_heads=cfg.num_heads,
            rope_theta=10000,
            norm_eps=1e-6,
            use_tied_embedding=not head,
        ),
        rngs=nnx.Rngs(seed),
    )
    if head:
        model = tunix.utils.create_critic_model(model)
    rng = np.random.default_rng(seed)

    def draw(x):
        return x if x.ndim < 2 else jnp.float32(0.02 * rng.normal(size=x.shape))

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    return model


def tunix_iteration(
    prompts: np.ndarray, work: Workload
) -> tuple[Any, dict[str, Any], Callable[[], Any]]:
    """An iteration by tunix.

    Args:
        prompts: int32 [B, P].
        work: sizes; one minibatch, since tunix samples anew for each.

    Returns:
        Its cluster; what the last iteration did, filled by each call: the token ids it
        read and sampled, and its metrics; a call that runs one more.
    """
    tunix = import_tunix()
    Role = tunix.cluster.Role
    axes = (jax.sharding.AxisType.Auto,) * 2
    one = jax.make_mesh((1, 1), ("fsdp", "tp"), axes, devices=jax.devices()[:1])
    adam = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(1e-6, b1=0.9, b2=0.95, eps=1e-8)
    )
    length = work.prompt_len + work.response_len
    seen: dict[str, Any] = {"metrics": {}}

    def keep_tokens(prompts, completions, **_):
        seen["prompts"], seen["responses"] = list(prompts), list(completions)
        return {}

    cluster = tunix.cluster.RLCluster(
        actor=qwen2(work.model, 0, head=False),
        reference=qwen2(work.model, 0, head=False),
        critic=qwen2(work.model, 1, head=True),
        reward=qwen2(work.model, 1, head=True),
        tokenizer=Numbers(),
        cluster_config=tunix.cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(Role, one),
            training_config=tunix.cluster.RLTrainingConfig(
                actor_optimizer=adam,
                critic_optimizer=adam,
                mini_batch_size=work.episodes // work.minibatches,
                train_micro_batch_size=work.microbatch,
                rollout_micro_batch_size=work.episodes,
                compute_logps_micro_batch_size=work.episodes,
                max_steps=10**9,
                eval_every_n_steps=10**9,
            ),
            rollout_config=tunix.rollout.RolloutConfig(
                max_tokens_to_generate=work.response_len,
                max_prompt_length=work.prompt_len,
                kv_cache_size=length,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=[NEVER],
            ),
        ),
    ).with_external_metrics_logger(
        lambda buffer: seen["metrics"].update(buffer.metrics)
    )
    learner = tunix.ppo.PPOLearner(
        cluster,
        tunix.ppo.PPOConfig(num_iterations=work.epochs, beta=0.05, kl_method="kl"),
        metric_fns=[keep_tokens],
    )
    batch = {"prompts": [Numbers().decode(row) for row in prompts]}

    def iteration():
        learner.train([batch])
        return tunix.nnx.state(cluster.actor_trainer.model)

    return cluster, seen, iteration


def check_same_work(
    case: str, work: Workload, start: dict[str, Any], mine: Any, cluster: Any, seen: Any
) -> None:
    """Ends the program where the first iterations differ in what they had to do.

    The layouts differ, so no loss can be compared: what is compared is the size of the
    matrices, the tokens read and sampled, the updates, and a KL of 0 from the reference
    that both policies start as.

    Args:
        case: what is measured.
        work: what both were asked for.
        start: of `our_iteration`.
        mine: our metrics of the first iteration.
        cluster, seen: of `tunix_iteration`, after its first.
    """
    nnx = import_tunix().nnx
    same = lambda what, ours, theirs: check_close(f"{case}, {what}", ours, theirs)  # noqa: E731
    blocks = jax.tree_util.tree_leaves_with_path(start["policy"]["blocks"])
    ours = sum(x.size for path, x in blocks if path[-1].key == "w")
    layers = jax.tree.leaves(nnx.state(cluster.actor_trainer.model.layers, nnx.Param))
    theirs = sum(x.size for x in layers if x.ndim > 1)
    check_close(f"{case}, parameters of the blocks' matrices", ours, theirs, rtol=1e-2)

    ids = [
        [Numbers().encode(text) for text in seen[k]] for k in ("prompts", "responses")
    ]
    if ids[0] != start["prompts"].tolist():
        raise SystemExit(f"error: {case}: the two sides read different prompts")
    same("responses", work.episodes, len(ids[1]))
    for length in {len(response) for response in ids[1]}:
        same("tokens of a response", float(mine["rollout/length_min"]), length)
    same("tokens of a response", float(mine["rollout/length_min"]), work.response_len)
    updates = work.epochs * work.minibatches
    same("updates of the policy", updates, cluster.actor_trainer.train_steps)
    same("updates of the value model", updates, cluster.critic_trainer.train_steps)
    (their_kl,) = seen["metrics"]["rewards/reward_kl_penalty"][0]  # nats per token
    for kl in (float(mine["objective/kl_per_token"]), float(their_kl)):
        if abs(kl) > 1e-5:  # nothing has been updated yet
            raise SystemExit(f"error: {case}: a KL of {kl} from equal policies")


def against_tunix(
    case: str,
    work: Workload,
    repeats: int,
    goal: float | None = None,
    first_goal: float | None = None,
) -> list[Row]:
    """One iteration when all is compiled, and the first, which compiles."""

    def timed(side: Callable[[], Any]) -> tuple[float, Any]:
        begin = time.perf_counter()
        out = jax.block_until_ready(side())
        return time.perf_counter() - begin, out

    firsts = []
    for _ in range(max(1, repeats // 2)):
        jax.clear_caches()
        start, ours = our_iteration(work)
        cluster, seen, theirs = tunix_iteration(start["prompts"], work)
        (my_time, mine), (their_time, _) = timed(ours), timed(theirs)
        check_same_work(case, work, start, jax.device_get(mine), cluster, seen)
        firsts.append((my_time, their_time))
    against = "google-tunix 0.1.7 PPO, Qwen2's layout"
    what = "another layout, as many parameters in matrices; four networks each"
    mine, other = np.median(firsts, axis=0)
    shares = [a / b for a, b in firsts]
    return [
        duel(case, ours, against, theirs, repeats, goal, what),
        row_of(
            f"{case}/first",
            against,
            shares,
            "of its time",
            first_goal,
            f"{mine:.1f} s against {other:.1f} s, compilation included; {what}",
        ),
    ]


def iteration(repeats: int) -> list[Row]:
    """16 episodes of 64 + 64 tokens, 4 epochs, parts of 8, V = 8192."""
    work = Workload(model_config(8192), 16, 64, 64, epochs=4, microbatch=8)
    return against_tunix("ppo/tunix", work, repeats, goal=1.2, first_goal=0.67)
