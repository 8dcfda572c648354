"""The whole of InstructGPT: pre-training to a PPO-ptx policy and a report.

python -m experiments.instructgpt                        # embedded simulation

python -m experiments.instructgpt cpu --data DIR --run runs/real

python -m experiments.instructgpt smoke --ppo.kl-coef 0.1

Stages that are finished in --run are skipped; an interrupted one goes on where it was.
"""

import sys

import jax

from experiments.config import InstructGPT
from experiments.run import main
from rlhf_jax.data.records import Split
from rlhf_jax.stages import (
    collect,
    evaluate,
    ppo_run,
    pretrain,
    reward_model,
    sft,
)
from rlhf_jax.stages.common import Context
from rlhf_jax.stages.rankings import has_rankings


def stages(cfg: InstructGPT, ctx: Context) -> None:
    """Runs every stage in order."""
    sources = ("rankings", "comparisons") if has_rankings(ctx) else ("ranking_prompts",)

    def ranked(split: Split) -> tuple[str, Split]:
        there = (source for source in sources if ctx.inputs.has(source, split))
        return next(there, sources[0]), split

    ctx.inputs.check(
        [
            ranked("train"),
            ranked("valid"),
            ("corpus", "train"),
            ("corpus", "valid"),
            ("demonstrations", "train"),
            ("demonstrations", "valid"),
            ("ppo_prompts", "train"),
            ("eval_prompts", "test"),
        ]
    )
    if not ctx.stage("pretrain").done:
        for line in ctx.inputs.shared_prompts():
            if jax.process_index() == 0:
                print(f"warning: {ctx.inputs.root}: {line}", file=sys.stderr)
    pretrain.run(cfg.pretrain, cfg.tokenizer, ctx)
    sft.run(cfg.sft, ctx, "sft")
    sft.run(cfg.sft_rl, ctx, "sft_rl")
    collect.run(cfg.collect, ctx)
    reward_model.run(cfg.reward_model, ctx)
    sft.select(cfg.sft, ctx, cfg.evaluate.sampling)
    ppo_run.run(cfg.ppo, ctx, "ppo")
    ppo_run.run(cfg.ppo_ptx, ctx, "ppo_ptx")
    evaluate.run(cfg.evaluate, ctx)
    if jax.process_index():
        return
    from rlhf_jax.evaluation.report import write_report  # matplotlib imports slowly

    print(f"report: {write_report(cfg.run)}")


if __name__ == "__main__":
    main("experiments.instructgpt", __doc__ or "", stages)
