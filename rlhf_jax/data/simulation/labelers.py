"""Simulated labelers: each has a taste of its own, makes errors, and writes answers.

A labeler's utility of a response is the weighted sum of the judge's parts with the
labeler's own weights, a small preference on length, and noise. `NOISE` is set so that
two labelers agree on about 73 % of the pairs of model samples that neither ties (paper:
72.6 +- 1.5 % among training labelers, 77.3 +- 1.3 % among held-out ones; Ouyang et al.
2022, section 3.4). The report of a run measures it, and
tests/data/test_simulation_labelers.py on a mixture of good and bad responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_jax.data.simulation.habits import Habits
from rlhf_jax.data.simulation.judge import WEIGHTS, Judge, utility_parts
from rlhf_jax.data.simulation.tasks import parse_prompt
from rlhf_jax.data.simulation.writer import Writer

NOISE = 0.7  # standard deviation of the noise of one judgement, in units of utility
TIE = 0.25  # responses nearer than this in a labeler's eyes tie
TASTE = 0.25  # standard deviation of the logarithm of each weight
LENGTH_TASTE = 0.02  # standard deviation of the utility of one more word


@dataclass(frozen=True)
class Labeler:
    """One simulated labeler.

    Attributes:
        name: "train-0", "held-out-1", ...
        judge: what it knows of the world.
        weights: its own version of `judge.WEIGHTS`.
        length_weight: utility of one more word, positive or negative.
        habits: how it writes demonstrations.
    """

    name: str
    judge: Judge
    weights: dict[str, float]
    length_weight: float
    habits: Habits

    @property
    def held_out(self) -> bool:
        """Whether this labeler's rankings are kept for evaluation."""
        return self.name.startswith("held-out")

    def utility(self, prompt: str, response: str, ended: bool = True) -> float:
        """What this labeler thinks of a response, without noise, in gold units."""
        judgement = self.judge.judge(prompt, response, ended)
        parts = utility_parts(judgement, parse_prompt(prompt).kind)
        total = sum(self.weights[name] * part for name, part in parts.items())
        return total + self.length_weight * min(judgement.num_words, 40)

    def rank(
        self,
        prompt: str,
        responses: Sequence[str],
        ended: Sequence[bool],
        rng: np.random.Generator,
    ) -> list[int]:
        """Ranks the responses to one prompt.

        Args:
            prompt: a prompt of the campaign.
            responses: K texts; equal texts tie.
            ended: K flags, whether each response ended by itself.
            rng: source of the labeler's noise.

        Returns:
            K dense ranks: 1 is best, equal ranks are ties.

        Raises:
            ValueError: if the prompt is not of the campaign, or the lengths differ.
        """
        noise = rng.normal(0.0, NOISE, len(responses))
        seen: dict[tuple[str, bool], float] = {}
        pairs = zip(responses, ended, strict=True)
        for (response, end), error in zip(pairs, noise, strict=True):
            if (response, end) not in seen:
                utility = self.utility(prompt, response, end)
                seen[response, end] = utility + float(error)
        values = [
            seen[response, end] for response, end in zip(responses, ended, strict=True)
        ]
        ranks = [0] * len(values)
        rank, top = 0, float("inf")
        for index in sorted(range(len(values)), key=lambda i: -values[i]):
            if rank == 0 or top - values[index] > TIE:
                rank, top = rank + 1, values[index]
            ranks[index] = rank
        return ranks

    def demonstrate(self, prompt: str, rng: np.random.Generator) -> str:
        """Writes a response to a prompt, as this labeler would like it.

        About one in eight has a small mistake: a missed constraint, a wrong fact or
        an over-long reply. It always ends.

        Args:
            prompt: a prompt of the campaign.
            rng: source of randomness.

        Returns:
            The response.

        Raises:
            ValueError: if the prompt is not of the campaign's grammar.
        """
        writer = Writer(self.judge.world, rng, self.habits)
        return writer.respond(parse_prompt(prompt))


def make_labelers(
    judge: Judge, seed: int, num_train: int = 6, num_held_out: int = 4
) -> list[Labeler]:
    """Draws the labelers of a campaign.

    Args:
        judge: what they know of the world.
        seed: of their tastes.
        num_train: labelers whose rankings train the reward model.
        num_held_out: labelers who are kept for evaluation.

    Returns:
        The labelers, training ones first.
    """
    rng = np.random.default_rng([seed, 1])
    names = [f"train-{i}" for i in range(num_train)]
    names += [f"held-out-{i}" for i in range(num_held_out)]
    labelers = []
    for name in names:
        weights = {
            part: weight * float(np.exp(rng.normal(0.0, TASTE)))
            for part, weight in WEIGHTS.items()
        }
        habits = Habits(
            wrong=float(rng.uniform(0.02, 0.05)),
            guesses=float(rng.uniform(0.02, 0.08)),
            ignores_constraints=float(rng.uniform(0.05, 0.12)),
            rambles=float(rng.uniform(0.01, 0.05)),
            short_answers=float(rng.uniform(0.0, 0.5)),
            mannerisms=float(rng.uniform(0.05, 0.15)),
        )
        length_weight = float(rng.normal(0.0, LENGTH_TASTE))
        labelers.append(Labeler(name, judge, weights, length_weight, habits))
    return labelers
