"""Sampling of K responses to each prompt, and their ranking, into RUN/collect.

Simulated labelers rank the embedded simulation. With data of your own that holds no
rankings, RUN/collect/to_rank_*.jsonl is for your labelers; hand their file in with
--collect.ranked FILE.

python -m experiments.collect [preset] --run RUN [--data DIR]
"""

from experiments.run import main
from rlhf_jax.stages import collect

if __name__ == "__main__":
    main(
        "experiments.collect",
        __doc__ or "",
        lambda cfg, ctx: collect.run(cfg.collect, ctx),
    )
