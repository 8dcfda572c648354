"""What must be true of PPO before it has learned anything, and warnings for later."""

import math
import sys
from collections.abc import Mapping

from rlhf_jax.stages.ppo_state import PPOConfig

COLLAPSED = 0.01  # nats of entropy a token below which a policy has collapsed


class InvariantError(RuntimeError):
    """PPO's arithmetic contradicts itself; the message names the likely causes."""


def check_invariants(
    update: int,
    values: Mapping[str, float],
    cfg: PPOConfig,
    vocab_size: int,
    dtype: str = "float32",
) -> None:
    """Checks the metrics of an update.

    Every update: the first minibatch has ratio 1 and the last, where there are several,
    another; the sampler's log-probabilities are those of the training forward pass,
    whitened advantages have mean 0 and variance 1, the entropy lies in [0, log V].
    First update: the KL to the reference is 0, the value after the last token is the
    reward model's score (where the value model starts from it), some response ends.

    Args:
        update: updates done, 1 for the first.
        values: metrics of `ppo_update` on the host.
        cfg: of PPO.
        vocab_size: V.
        dtype: of the models' activations; bfloat16 rounds log-probabilities by some
            hundredths, so that its tolerance is ten times as wide.

    Raises:
        InvariantError: naming what is violated, by how much, and the usual causes.
    """
    tolerance = 1e-2 if dtype == "float32" else 1e-1

    def require(ok: bool, what: str, name: str, causes: str) -> None:
        if not ok:
            raise InvariantError(
                f"PPO update {update}: {what}, but {name} = {values[name]:.6g}. Usual "
                f"causes: {causes}. Nothing of this update was saved."
            )

    require(
        values["policy/first_ratio_error"] < tolerance,
        "the ratio of the first minibatch must be 1",
        "policy/first_ratio_error",
        "dropout left on, another temperature or mask than when old_logprobs were made",
    )
    several = cfg.num_epochs * cfg.num_minibatches > 1
    if (
        several
        and values["policy/entropy"] >= COLLAPSED  # what collapsed has no gradient
        and values["policy/learning_rate"] > 0
        and values["advantages/std"] > 1e-3
    ):
        require(
            values["policy/last_ratio_error"] > 0.0,
            "the ratio of the last minibatch must have left 1",
            "policy/last_ratio_error",
            "old_logprobs made anew after each step, no gradient, advantages all 0",
        )
    require(
        values["rollout/logprob_mismatch_mean"] < tolerance,
        "the sampler and the training forward pass must agree on log-probabilities",
        "rollout/logprob_mismatch_mean",
        "a temperature missing on one side, shifted positions, bfloat16 decoding of a "
        "poorly conditioned model",
    )
    require(
        values["policy/entropy_min"] >= -tolerance,
        "entropies must not be negative",
        "policy/entropy_min",
        "an unmasked mean, logits that are not normalised",
    )
    require(
        values["policy/entropy_max"] <= math.log(vocab_size) + tolerance,
        f"entropies must be at most log V = {math.log(vocab_size):.4g}",
        "policy/entropy_max",
        "an unmasked mean, logits that are not normalised",
    )
    if cfg.whiten_advantages and values["advantages/std"] > 1e-3:
        require(
            abs(values["advantages/whitened_mean"]) < tolerance,
            "whitened advantages must have mean 0",
            "advantages/whitened_mean",
            "whitening over padding",
        )
        require(
            abs(values["advantages/whitened_variance"] - 1.0) < tolerance,
            "whitened advantages must have variance 1",
            "advantages/whitened_variance",
            "whitening over padding",
        )
    if update > 1:
        return
    require(
        abs(values["objective/kl_per_token"]) < tolerance,
        "the KL to the reference must be 0 before the first update",
        "objective/kl_per_token",
        "another reference than the policy's start, or another temperature for it",
    )
    if cfg.value == "separate":
        require(
            values["value/last_minus_score"] < tolerance,
            "the value model must repeat the reward model's score at the last token",
            "value/last_minus_score",
            "the value was read one position off, or started from another model",
        )
    require(
        values["rollout/eos_rate"] > 0.0
        or cfg.batch_size < 64,  # else it may be chance
        "some response must end by itself",
        "rollout/eos_rate",
        "a response_len that is too short, an SFT model that never saw end-of-text",
    )


def warn_of_trouble(update: int, values: Mapping[str, float]) -> None:
    """Says on stderr what to look at when training drifts; never stops the run."""
    trouble = []
    if values["objective/kl"] < -1.0:
        trouble.append(
            "the KL to the reference is clearly negative: sampler and trainer disagree "
            "(temperature, masks)"
        )
    if values["policy/entropy"] < COLLAPSED:
        trouble.append("the entropy is nearly 0: raise kl_coef or lower the rate")
    if values["rollout/eos_rate"] < 0.05:
        trouble.append("hardly any response ends: check SFT and missing_eos_score")
    if abs(values["rollout/score_length_correlation"]) > 0.9:
        trouble.append("the score follows length: look at the reward model's lengths")
    for text in trouble:
        print(f"warning: PPO update {update}: {text}", file=sys.stderr)
