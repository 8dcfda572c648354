"""The presets of a whole run."""

import dataclasses
import math
from pathlib import Path

from experiments.config import REAL_FILES, InstructGPT
from rlhf_jax.data.simulation import SimulationConfig
from rlhf_jax.nn.config import PUBLISHED_SIZES, TransformerConfig
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.stages.collect import CollectConfig
from rlhf_jax.stages.evaluate import EvaluateConfig
from rlhf_jax.stages.ppo_state import PPOConfig
from rlhf_jax.stages.pretrain import PretrainConfig, TokenizerConfig
from rlhf_jax.stages.reward_model import RewardModelConfig
from rlhf_jax.stages.sft import SFTConfig
from rlhf_jax.training.loop import LoopConfig
from rlhf_jax.training.optimizers import OptimizerConfig


def _adamw(learning_rate: float, **kwargs) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, **kwargs)


def embedded() -> InstructGPT:
    """The simulated campaign on two CPU cores, in minutes.

    Small models want higher learning rates, and a short run fewer episodes, than
    InstructGPT's; what differs from its published constants is chosen here.
    """
    sampling = Sampling(response_len=24)
    prompts = {"prompt_len": 28, "sampling": sampling}
    ppo = PPOConfig(
        num_iterations=45,
        batch_size=128,
        num_minibatches=8,
        policy_optimizer=_adamw(
            3e-4, schedule="constant", warmup_steps=10, warmup_fraction=0.1
        ),
        value_optimizer=_adamw(5e-4, schedule="constant"),
        kl_coef=0.2,
        ema_decay=0.98,
        missing_eos_score=-3.0,
        ptx_len=64,
        eval_prompts=200,
        loop=LoopConfig(checkpoint_every=15, eval_every=20),
        **prompts,
    )
    return InstructGPT(
        run=Path("runs/instructgpt"),
        simulation=SimulationConfig(
            num_demonstrations=120,
            num_ranking_prompts=12000,
            num_ppo_prompts=8000,
            num_eval_prompts=600,
        ),
        tokenizer=TokenizerConfig(vocab_size=768),
        pretrain=PretrainConfig(
            model=TransformerConfig(
                num_layers=3,
                model_dim=64,
                num_heads=2,
                max_len=128,
                embed_std=0.1,
            ),
            num_steps=2000,
            batch_size=16,
            seq_len=100,
            separate_documents=True,
            optimizer=_adamw(3e-3, warmup_steps=50, weight_decay=0.1, b2=0.98),
            loop=LoopConfig(checkpoint_every=400, eval_every=400),
        ),
        sft=SFTConfig(
            num_epochs=16,
            batch_size=16,
            seq_len=52,
            optimizer=_adamw(3e-4),
            checkpoint_every=100,
        ),
        sft_rl=SFTConfig(
            num_epochs=2,
            batch_size=2,
            seq_len=52,
            pretrain_fraction=0.1,
            optimizer=_adamw(6e-4),
            checkpoint_every=100,
        ),
        collect=CollectConfig(
            prompt_len=28,
            few_shot_len=68,
            num_few_shot=2,
            sampling=sampling,
            batch_size=200,
        ),
        reward_model=RewardModelConfig(
            num_epochs=2,
            batch_size=8,
            prompt_len=28,
            response_len=24,
            optimizer=_adamw(6e-4, warmup_steps=10, b2=0.98),
            loop=LoopConfig(checkpoint_every=500, eval_every=500),
        ),
        ppo=ppo,
        ppo_ptx=dataclasses.replace(ppo, ptx_coef=1.0, ptx_per_episode=1),
        evaluate=EvaluateConfig(
            num_prompts=600,
            num_samples=2,
            prompt_len=28,
            few_shot_len=68,
            num_few_shot=2,
            sampling=sampling,
            text_len=128,
            batch_size=200,
        ),
    )


def smoke() -> InstructGPT:
    """Every stage in seconds: does it run? Its models have learned nothing."""
    base = embedded()
    replace = dataclasses.replace
    loop = LoopConfig(checkpoint_every=2, eval_every=2)
    ppo = replace(
        base.ppo, num_iterations=2, batch_size=16, num_minibatches=2, loop=loop
    )
    ppo = replace(ppo, eval_prompts=16)
    return replace(
        base,
        run=Path("runs/smoke"),
        simulation=SimulationConfig(
            num_documents=600,
            num_valid_documents=40,
            num_demonstrations=48,
            num_valid_demonstrations=16,
            num_ranking_prompts=32,
            num_valid_ranking_prompts=16,
            num_ppo_prompts=48,
            num_eval_prompts=32,
        ),
        tokenizer=TokenizerConfig(vocab_size=512),
        pretrain=replace(
            base.pretrain,
            model=TransformerConfig(
                num_layers=2, model_dim=32, num_heads=2, max_len=128
            ),
            num_steps=12,
            loop=loop,
            eval_batches=2,
        ),
        sft=replace(base.sft, num_epochs=2, batch_size=16, checkpoint_every=2),
        sft_rl=replace(base.sft_rl, num_epochs=2, batch_size=16, checkpoint_every=2),
        collect=replace(base.collect, batch_size=32),
        reward_model=replace(base.reward_model, loop=loop),
        ppo=ppo,
        ppo_ptx=dataclasses.replace(ppo, ptx_coef=1.0, ptx_per_episode=1),
        evaluate=replace(base.evaluate, batch_size=32, text_batches=4),
    )


def gpu(name: str = "gpt2") -> InstructGPT:
    """A published model on a GPU, with InstructGPT's constants where it published them.

    Lengths are shares of the model's context (of 1024 positions of it at most). Deeper
    models than 124M recompute blocks; its own activations fit beside the cache of 512
    episodes, which the memory planner takes to be the fullest moment.
    """
    shape = {"dtype": "bfloat16", "vocab_size": TransformerConfig().vocab_size}
    model = dataclasses.replace(PUBLISHED_SIZES[name], **shape)  # tokenizer below
    if model.num_layers > 12:
        model = dataclasses.replace(model, remat="block")
    context = min(model.max_len, 1024)
    half, quarter = context // 2, context // 4
    sampling = Sampling(response_len=quarter)
    ppo = PPOConfig(
        num_microbatches=4, prompt_len=half, sampling=sampling, ptx_len=half
    )
    collect = CollectConfig(
        prompt_len=half, few_shot_len=half + quarter, sampling=sampling
    )
    return InstructGPT(
        run=Path("runs") / name,
        files=REAL_FILES,
        tokenizer=TokenizerConfig(vocab_size=32768),
        pretrain=PretrainConfig(model=model, seq_len=context, num_microbatches=16),
        sft=SFTConfig(seq_len=half + quarter),
        sft_rl=SFTConfig(
            num_epochs=2,
            seq_len=half + quarter,
            pretrain_fraction=0.1,
            optimizer=_adamw(5e-6),
        ),
        collect=collect,
        reward_model=RewardModelConfig(
            prompt_len=half, response_len=half, num_microbatches=16
        ),
        ppo=ppo,
        ppo_ptx=dataclasses.replace(ppo, ptx_coef=27.8, num_microbatches=16),
        evaluate=EvaluateConfig(
            prompt_len=half,
            few_shot_len=half + quarter,
            sampling=sampling,
            text_len=context,
        ),
    )


def published() -> dict[str, tuple[str, InstructGPT]]:
    """The preset "gpu" with each published shape of the model, by its name."""
    return {
        name: (f"gpu with a model of {shape.num_params / 1e6:,.0f}M", gpu(name))
        for name, shape in PUBLISHED_SIZES.items()
    }


def ziegler() -> InstructGPT:
    """The preset "gpu" with the PPO settings of Ziegler et al. 2019 (released code).

    Its PPO-ptx keeps InstructGPT's settings, for there was none before; all models are
    evaluated at PPO's temperature.
    """
    base = gpu()
    optimizer = _adamw(
        1e-5,
        schedule="linear",
        final_fraction=0.0,
        b2=0.999,
        eps=1e-5,
        max_grad_norm=math.inf,
    )
    ppo = dataclasses.replace(
        base.ppo,
        num_iterations=1954,  # a million episodes
        num_epochs=4,
        num_minibatches=1,
        num_microbatches=32,
        sampling=dataclasses.replace(base.ppo.sampling, temperature=0.7),
        policy_optimizer=optimizer,
        value_optimizer=optimizer,  # of the head: theirs has one for everything
        kl_coef=0.15,
        kl_target=6.0,
        value="shared",
        whiten_rewards=True,
        missing_eos_score=-1.0,
        ema_decay=0.0,
    )
    evaluate = dataclasses.replace(base.evaluate, sampling=ppo.sampling)
    return dataclasses.replace(
        base, run=Path("runs/ziegler"), ppo=ppo, evaluate=evaluate
    )


def stiennon() -> InstructGPT:
    """The preset "gpu" with the PPO settings of Stiennon et al. 2020, its 1.3B model.

    Minibatches, temperature, the rest of the optimizer and the score of a response
    that does not end are not stated there: as in Ziegler's.
    """
    base = ziegler()
    optimizer = dataclasses.replace(base.ppo.policy_optimizer, learning_rate=1.5e-5)
    ppo = dataclasses.replace(
        base.ppo,
        policy_optimizer=optimizer,
        value_optimizer=optimizer,
        kl_coef=0.05,
        kl_target=None,
        value="separate",
        whiten_rewards=False,
    )
    return dataclasses.replace(base, run=Path("runs/stiennon"), ppo=ppo)


def cpu() -> InstructGPT:
    """Real text on two CPU cores, in half an hour. The models are small."""
    sampling = Sampling(response_len=64)
    prompts = {"prompt_len": 128, "sampling": sampling}
    ppo = PPOConfig(
        num_iterations=20,
        batch_size=64,
        num_minibatches=8,
        policy_optimizer=_adamw(
            1e-4, schedule="constant", warmup_steps=10, warmup_fraction=0.1
        ),
        value_optimizer=_adamw(1e-4, schedule="constant"),
        kl_coef=0.2,
        ema_decay=0.98,
        ptx_len=128,
        eval_prompts=128,
        loop=LoopConfig(checkpoint_every=10, eval_every=10),
        **prompts,
    )
    return InstructGPT(
        run=Path("runs/cpu"),
        files=REAL_FILES,
        tokenizer=TokenizerConfig(vocab_size=4096),
        pretrain=PretrainConfig(
            model=TransformerConfig(
                num_layers=4, model_dim=192, num_heads=6, max_len=512
            ),
            num_steps=800,
            batch_size=8,
            seq_len=256,
            optimizer=_adamw(1.5e-3, warmup_steps=100, weight_decay=0.1, b2=0.98),
            loop=LoopConfig(checkpoint_every=250, eval_every=250),
        ),
        sft=SFTConfig(
            num_epochs=2,
            batch_size=16,
            seq_len=160,
            dropout=0.1,
            optimizer=_adamw(3e-4),
            checkpoint_every=100,
        ),
        sft_rl=SFTConfig(
            num_epochs=2,
            batch_size=16,
            seq_len=160,
            dropout=0.1,
            pretrain_fraction=0.1,
            optimizer=_adamw(5e-4),
            checkpoint_every=100,
        ),
        collect=CollectConfig(prompt_len=128, few_shot_len=384, sampling=sampling),
        reward_model=RewardModelConfig(
            batch_size=8,
            prompt_len=128,
            response_len=128,
            optimizer=_adamw(1e-4),
            loop=LoopConfig(checkpoint_every=50, eval_every=50),
        ),
        ppo=ppo,
        ppo_ptx=dataclasses.replace(ppo, ptx_coef=1.0, ptx_per_episode=1),
        evaluate=EvaluateConfig(
            prompt_len=128,
            few_shot_len=384,
            sampling=sampling,
            text_len=256,
            batch_size=100,
            num_prompts=200,
        ),
    )


PRESETS: dict[str, tuple[str, InstructGPT]] = {
    "default": ("the embedded simulation, minutes on 2 CPU cores", embedded()),
    "smoke": ("every stage in seconds; nothing is learned", smoke()),
    "cpu": ("real text on 2 CPU cores, half an hour; needs --data", cpu()),
    "gpu": ("GPT-2 124M size on one GPU; needs --data", gpu()),
    "ziegler": ("gpu with the PPO settings of Ziegler et al. 2019", ziegler()),
    "stiennon": ("gpu with the PPO settings of Stiennon et al. 2020", stiennon()),
    **published(),
}
"""Name -> what it is for, and the configuration."""
