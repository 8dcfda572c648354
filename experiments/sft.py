"""Supervised fine-tuning of RUN/pretrain into RUN/sft and RUN/sft_rl.

RUN/sft is the SFT model, RUN/sft_rl the initialisation of PPO (with pre-training data
mixed in). Where RUN/reward_model exists, the epoch of RUN/sft whose samples score best
is written to RUN/sft_selected.

python -m experiments.sft [preset] --run RUN [--data DIR]
"""

from experiments.config import InstructGPT
from experiments.run import main
from rlhf_jax.stages import sft
from rlhf_jax.stages.common import Context


def stages(cfg: InstructGPT, ctx: Context) -> None:
    """Trains both variants; chooses by reward if there is a reward model."""
    sft.run(cfg.sft, ctx, "sft")
    sft.run(cfg.sft_rl, ctx, "sft_rl")
    if ctx.stage("reward_model").done:
        sft.select(cfg.sft, ctx, cfg.evaluate.sampling)


if __name__ == "__main__":
    main("experiments.sft", __doc__ or "", stages)
