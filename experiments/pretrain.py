"""Pre-training of a GPT into RUN/pretrain.

python -m experiments.pretrain [preset] --run RUN [--data DIR]
"""

from experiments.run import main
from rlhf_jax.stages import pretrain

if __name__ == "__main__":
    main(
        "experiments.pretrain",
        __doc__ or "",
        lambda cfg, ctx: pretrain.run(cfg.pretrain, cfg.tokenizer, ctx),
    )
