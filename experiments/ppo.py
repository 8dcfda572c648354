"""PPO of RUN/sft_rl against RUN/reward_model into RUN/ppo, then PPO-ptx likewise.

python -m experiments.ppo [preset] --run RUN [--data DIR]
"""

from experiments.config import InstructGPT
from experiments.run import main
from rlhf_jax.stages import ppo_run
from rlhf_jax.stages.common import Context


def stages(cfg: InstructGPT, ctx: Context) -> None:
    """Runs PPO, then PPO-ptx."""
    ppo_run.run(cfg.ppo, ctx, "ppo")
    ppo_run.run(cfg.ppo_ptx, ctx, "ppo_ptx")


if __name__ == "__main__":
    main("experiments.ppo", __doc__ or "", stages)
