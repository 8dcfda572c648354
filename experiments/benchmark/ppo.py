"""PPO iterations: ours, and against TRL's PPOTrainer on the same four networks."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.peers import hf_gpt2, import_torch
from experiments.benchmark.timing import Row, check_close, duel
from experiments.benchmark.training import model_config
from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import init_scalar_head, scalar_head
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.nn.transformer import forward, init_params
from rlhf_jax.stages.ppo import ppo_update
from rlhf_jax.stages.ppo_state import (
    PPOConfig,
    PPOInputs,
    freeze,
    init_ppo_state,
)
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.training.mesh import MeshConfig, jit_step, state_sharding
from rlhf_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """One iteration: sizes that both sides share."""

    model: TransformerConfig
    episodes: int
    prompt_len: int
    response_len: int
    epochs: int
    microbatch: int
    minibatches: int = 1


def our_iteration(work: Workload) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The four networks at the start, and a call that runs one more iteration."""
    adamw = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    cfg = PPOConfig(
        num_iterations=1000,
        batch_size=work.episodes,
        num_minibatches=work.minibatches,
        num_epochs=work.epochs,
        num_microbatches=work.episodes // work.minibatches // work.microbatch,
        prompt_len=work.prompt_len,
        sampling=Sampling(response_len=work.response_len),
        policy_optimizer=adamw,
        value_optimizer=adamw,
        kl_coef=0.05,
    )
    policy, value = (init_params(jax.random.key(i), work.model) for i in (0, 1))
    head = init_scalar_head(jax.random.key(2), work.model.model_dim)
    reward = {"transformer": value, "head": head}
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    shapes = {"model": work.model, "reward_cfg": work.model}
    frozen = freeze(copy(policy), copy(reward), cfg=cfg, **shapes)
    start = jax.device_get({"policy": policy, "reward": reward})
    V, shape = work.model.vocab_size, (work.episodes, work.prompt_len)
    prompts = np.random.default_rng(0).integers(2, V, shape).astype(np.int32)
    inputs = PPOInputs(
        prompts=jnp.asarray(prompts),
        prompt_lengths=jnp.full((work.episodes,), work.prompt_len, jnp.int32),
        ptx_tokens=jnp.zeros((0, 1), jnp.int32),
        ptx_targets=jnp.zeros((0, 1), jnp.int32),
        ptx_mask=jnp.zeros((0, 1), bool),
    )
    static = {"cfg": cfg, "model": work.model, "reward_model": work.model}
    update = functools.partial(ppo_update, **static, eos_id=-1, pad_id=0)
    scalars, mesh = cfg.scalars(), MeshConfig().make()
    state = init_ppo_state(policy, reward, cfg.kl_coef, jax.random.key(3))
    sharding = state_sharding(mesh, state)
    state = jax.device_put(state, sharding)
    step = jit_step(update, mesh, sharding)

    def iteration():
        nonlocal state
        state, metrics = step(state, inputs, frozen, scalars)
        return metrics

    return start | {"prompts": prompts}, iteration


def trl_iteration(
    start: dict[str, Any], work: Workload
) -> tuple[Callable[[], Any], tuple[float, float]]:
    """The same by TRL.

    Returns:
        A call that runs one more iteration and returns its metrics; `probe` of its
        policy and reward model.
    """
    torch, transformers = import_torch()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from accelerate.utils import set_seed  # noqa: F401  what trl needs
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from trl.experimental.ppo import PPOConfig as TRLConfig
        from trl.experimental.ppo import PPOTrainer
    except ImportError as error:
        raise SystemExit(
            f"error: {error.name} is missing; TRL 1.12.0, the last with a PPO trainer, "
            'comes with `pip install -e ".[bench]"`'
        ) from error
    model, device = work.model, "cuda" if jax.default_backend() == "gpu" else "cpu"
    policy, reference = (hf_gpt2(start["policy"], model) for _ in range(2))
    reward, value = (_classifier(start["reward"], model) for _ in range(2))
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    args = TRLConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        num_sample_generations=0,
        use_cpu=device == "cpu",
        total_episodes=work.episodes,
        per_device_train_batch_size=work.microbatch,
        gradient_accumulation_steps=work.episodes // work.microbatch,
        num_mini_batches=work.minibatches,
        num_ppo_epochs=work.epochs,
        local_rollout_forward_batch_size=min(work.episodes, 64),
        response_length=work.response_len,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        temperature=1.0,
        kl_coef=0.05,
        vf_coef=0.1,
    )
    seen: dict[str, float] = {}

    class Watched(PPOTrainer):
        def log(self, logs, *_, **__):  # what it would print
            seen.update(logs)

    trainer = Watched(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": start["prompts"].tolist()}),
    )
    trainer.accelerator.print = lambda *_: None

    def iteration():
        bfloat16 = model.dtype == "bfloat16"  # its own option reaches no forward pass
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            trainer.train()
        if device == "cuda":
            torch.cuda.synchronize()
        return seen

    prompts = torch.tensor(start["prompts"][:2], dtype=torch.long, device=device)
    with torch.no_grad():
        loss = policy(prompts, labels=prompts).loss
        score = reward(prompts).logits.mean()
    return iteration, (float(loss), float(score))


def probe(start: dict[str, Any], cfg: TransformerConfig) -> tuple[float, float]:
    """Next-token loss and mean score of the first two prompts, in float32."""
    cfg = dataclasses.replace(cfg, dtype="float32")
    prompts = jnp.asarray(start["prompts"][:2])
    B, P = prompts.shape
    weights = jnp.full((B, P - 1), 1 / (B * (P - 1)))
    batch = TokenBatch(prompts[:, :-1], prompts[:, 1:], weights)
    loss, _ = lm_loss(start["policy"], batch, jax.random.key(0), model=cfg)
    last = forward(start["reward"]["transformer"], prompts, cfg)[:, -1]
    return float(loss), float(scalar_head(start["reward"]["head"], last).mean())


def _classifier(reward: Any, cfg: TransformerConfig) -> Any:
    """GPT-2 with a scalar head, our weights."""
    torch, transformers = import_torch()
    trunk = hf_gpt2(reward["transformer"], cfg)
    trunk.config.num_labels, trunk.config.pad_token_id = 1, 0
    model = transformers.GPT2ForSequenceClassification(trunk.config)
    model.transformer = trunk.transformer
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(np.asarray(reward["head"]["w"]))[None])
    return model.to(trunk.device)


def against_trl(
    case: str, work: Workload, repeats: int, goal: float | None
) -> list[Row]:
    """One iteration: rollout, scores of four networks, all updates."""
    start, ours = our_iteration(work)
    theirs, theirs_of_prompts = trl_iteration(start, work)
    for mine, other in zip(probe(start, work.model), theirs_of_prompts, strict=True):
        check_close(f"{case} on its prompts", mine, other, rtol=1e-3)
    mine, other = jax.device_get(ours()), dict(theirs())
    rounding = 1e-4 if work.model.dtype == "float32" else 0.1  # nats per response
    for kl in (float(mine["objective/kl"]), other["objective/kl"]):
        if abs(kl) > rounding:  # nothing has been updated yet
            raise SystemExit(f"error: {case}: a KL of {kl} from equal policies")
    against = "TRL 1.12.0 PPOTrainer"
    row = duel(case, ours, against, theirs, repeats, goal)
    return [row]


def iteration(vocab_size: int, goal: float, repeats: int) -> list[Row]:
    """16 episodes of 64 + 64 tokens, 4 epochs, parts of 8."""
    work = Workload(model_config(vocab_size), 16, 64, 64, epochs=4, microbatch=8)
    return against_trl(f"ppo/V{vocab_size}", work, repeats, goal)
