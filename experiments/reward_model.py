"""Training of a reward model on rankings into RUN/reward_model.

python -m experiments.reward_model [preset] --run RUN [--data DIR]
"""

from experiments.run import main
from rlhf_jax.stages import reward_model

if __name__ == "__main__":
    main(
        "experiments.reward_model",
        __doc__ or "",
        lambda cfg, ctx: reward_model.run(cfg.reward_model, ctx),
    )
