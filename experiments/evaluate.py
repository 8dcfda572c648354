"""Held-out evaluation of every model of a run into RUN/evaluate.

python -m experiments.evaluate [preset] --run RUN [--data DIR]
"""

from experiments.run import main
from rlhf_jax.stages import evaluate

if __name__ == "__main__":
    main(
        "experiments.evaluate",
        __doc__ or "",
        lambda cfg, ctx: evaluate.run(cfg.evaluate, ctx),
    )
