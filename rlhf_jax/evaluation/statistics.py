"""Means, rates and preferences with 95 % intervals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

Unit = Literal["", "%", "points"]

CONFIDENCE = 0.95
_UPPER_TAIL = 0.5 + CONFIDENCE / 2
_Z = NormalDist().inv_cdf(_UPPER_TAIL)


@dataclass(frozen=True)
class Estimate:
    """A measured mean with its 95 % interval.

    Attributes:
        mean: the point estimate, in the unit of the measured values.
        low: lower end of the interval; -inf where the sample cannot bound it (n = 1).
        high: upper end of the interval; +inf where the sample cannot bound it.
        n: number of independent units behind it: values, or clusters of values.
    """

    mean: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.low <= self.mean <= self.high):
            raise ValueError(
                f"an estimate needs a finite mean inside its interval, got "
                f"{self.mean} [{self.low}, {self.high}]"
            )
        if self.n < 1:
            raise ValueError(f"an estimate needs n >= 1, got n = {self.n}")

    def to_json(self) -> dict[str, float | int | None]:
        """The estimate as strict JSON: an unbounded end of the interval is null."""
        return {
            "mean": self.mean,
            "low": self.low if math.isfinite(self.low) else None,
            "high": self.high if math.isfinite(self.high) else None,
            "n": self.n,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Estimate":
        """The estimate that `to_json` wrote.

        Raises:
            ValueError: a field is missing, or the values are no estimate.
        """
        missing = [name for name in ("mean", "low", "high", "n") if name not in data]
        if missing:
            raise ValueError(f"estimate {dict(data)} lacks {', '.join(missing)}")
        low, high = data["low"], data["high"]
        return cls(
            mean=float(data["mean"]),
            low=-math.inf if low is None else float(low),
            high=math.inf if high is None else float(high),
            n=int(data["n"]),
        )

    def complement(self) -> "Estimate":
        """The estimate of 1 - x: a win rate seen from the other side."""
        return Estimate(1 - self.mean, 1 - self.high, 1 - self.low, self.n)

    def negated(self) -> "Estimate":
        """The estimate of -x: a difference seen from the other side."""
        return Estimate(0.0 - self.mean, 0.0 - self.high, 0.0 - self.low, self.n)


def mean_estimate(
    values: ArrayLike, clusters: ArrayLike | None = None, *, shares: bool = True
) -> Estimate:
    """Mean of a sample with its 95 % Student-t interval.

    mean +- t_{G-1} sqrt(G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2) / n

    over G clusters g of values that belong together (several responses to one prompt,
    all pairs of one ranking); without clusters every value is its own, and this is the
    textbook interval. Values that are all 0 or 1 are a rate: without clusters they get
    Wilson's interval, with clusters the one above cut to [0, 1]; where they are all
    equal, Wilson's at G trials. A constant sample of anything else has a zero width.

    Args:
        values: [n], finite, in any unit.
        clusters: [n], a label per value; None where the values are independent.
        shares: False where values that are all 0 or 1 are no rate (a KL of 0).

    Returns:
        The mean in the unit of `values`, with `n` = G; one cluster alone bounds
        nothing, and its interval is (-inf, inf).

    Raises:
        ValueError: `values` is empty or not finite, or `clusters` has another length.

    Source: Liang and Zeger 1986 for the clusters; few-cluster t as in Cameron and
        Miller 2015.
    """
    x = _sample(values)
    is_rate = shares and bool(np.all((x == 0) | (x == 1)))
    if clusters is None:
        if is_rate:
            return rate_estimate(int(x.sum()), x.size)
        return _student_estimate(x, np.arange(x.size))
    labels = np.asarray(clusters)
    if labels.shape != x.shape:
        raise ValueError(f"{x.size} values but clusters of shape {labels.shape}")
    _, index = np.unique(labels, return_inverse=True)
    if not is_rate:
        return _student_estimate(x, index)
    num_clusters = int(index.max()) + 1
    if np.all(x == x[0]):
        return rate_estimate(int(x[0]) * num_clusters, num_clusters)
    estimate = _student_estimate(x, index)
    return Estimate(
        estimate.mean, max(estimate.low, 0.0), min(estimate.high, 1.0), estimate.n
    )


def rate_estimate(successes: int, n: int) -> Estimate:
    """Share of successes in n independent trials with its 95 % Wilson interval.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    The interval is never of zero width, also at 0 and at n successes.

    Raises:
        ValueError: n < 1, or successes outside [0, n].

    Source: Wilson 1927, "Probable inference".
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"a rate needs 0 <= successes <= n >= 1, got {successes} of {n}"
        )
    p = successes / n
    shrink = 1 + _Z**2 / n
    centre = (p + _Z**2 / (2 * n)) / shrink
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / shrink
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Estimate(p, low, high, n)


def preference_rate(preferences: ArrayLike) -> Estimate:
    """Mean of preferences in [0, 1] with a 95 % interval that never collapses.

    m +- z sqrt(v / (n + z^2)), cut to [0, 1], where m and v are mean and variance of
    the sample with z^2 pseudo-observations added, half of them 0 and half of them 1.

    On preferences of 0 and 1 this is Agresti and Coull's interval; it also holds for
    ties (1/2) and probabilities, and n equal preferences keep a width of order 1 / n.

    Args:
        preferences: [n], in [0, 1]; 1 where ours is preferred, 1/2 at a tie.

    Raises:
        ValueError: `preferences` is empty, not finite or outside [0, 1].

    Source: Agresti and Coull 1998; the use for values between 0 and 1 is ours.
    """
    x = _sample(preferences)
    if x.min() < 0 or x.max() > 1:
        raise ValueError(
            f"preferences must lie in [0, 1], got {x.min()} to {x.max()}; "
            "scores are compared by `win_rate`"
        )
    size = x.size + _Z**2
    centre = (x.sum() + _Z**2 / 2) / size
    variance = (np.sum(x**2) + _Z**2 / 2) / size - centre**2
    half = _Z * math.sqrt(variance / size)
    mean = float(x.mean())
    low = min(max(float(centre) - half, 0.0), mean)
    high = max(min(float(centre) + half, 1.0), mean)
    return Estimate(mean, low, high, x.size)


def win_rate(
    ours: ArrayLike, theirs: ArrayLike, tie: float = 0.0
) -> tuple[Estimate, float, float, float]:
    """How often our score beats theirs on the same prompts; a tie counts one half.

    Args:
        ours: [n] or [n, samples], scores of our responses to n prompts.
        theirs: the same shape; `theirs[i]` answers the same prompt as `ours[i]`.
        tie: scores at most this far apart are a tie, in the unit of the scores.

    Returns:
        The win rate with its interval over prompts, and the shares of wins, ties and
        losses, which sum to 1.

    Raises:
        ValueError: the shapes differ, or a score is not finite.
    """
    margin = _differences(ours, theirs)
    wins, losses = margin > tie, margin < -tie
    outcomes = 0.5 + 0.5 * wins - 0.5 * losses
    rate = preference_rate(outcomes.reshape(margin.shape[0], -1).mean(axis=1))
    ties = ~(wins | losses)
    return rate, float(wins.mean()), float(ties.mean()), float(losses.mean())


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike | None = None
) -> Estimate:
    """Mean of a - b over n pairs with its 95 % Student-t interval.

    Args:
        a: [n], e.g. one value per prompt.
        b: [n], the value of the same prompt.
        clusters: [n], as in `mean_estimate`.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    difference = _sample(_differences(a, b))
    if clusters is None:
        return _student_estimate(difference, np.arange(difference.size))
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return _student_estimate(difference, index)


def rate_difference(a: ArrayLike, b: ArrayLike) -> Estimate:
    """Difference a - b of two rates over the same units, never of zero width.

    m +- z sqrt(v / (n + 2)), cut to [-1, 1], where m and v are mean and variance of the
    differences with two pseudo-observations added: half a 1, half a -1 and one 0.

    Args:
        a: [n], in [0, 1], one value per unit (0 or 1, or the mean of a prompt's
            samples).
        b: [n], the value of the same unit.

    Raises:
        ValueError: the shapes differ, or a value is not finite or outside [0, 1].

    Source: Agresti and Min 2005 for values of 0 and 1; the use for values between is
        ours.
    """
    x = _sample(_differences(a, b))
    for values in (np.asarray(a), np.asarray(b)):
        if values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"rates must lie in [0, 1], got {values.min()} to {values.max()}"
            )
    size = x.size + 2
    centre = float(x.sum()) / size
    half = _Z * math.sqrt(((np.sum(x**2) + 1) / size - centre**2) / size)
    mean = float(x.mean())
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    return Estimate(mean, min(low, mean), max(high, mean), x.size)


def format_estimate(estimate: Estimate, unit: Unit = "") -> str:
    """`0.123 [0.100, 0.146]`; a rate `12.3 % [10.0, 14.6]`, a difference of rates
    `12.3 points [10.0, 14.6]`."""
    scale, digits = (100, 1) if unit else (1, 3)
    if not math.isfinite(estimate.high - estimate.low):
        interval = f"[no interval, n = {estimate.n}]"
    else:
        low, high = scale * estimate.low, scale * estimate.high
        interval = f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"{scale * estimate.mean:.{digits}f}{unit and ' '}{unit} {interval}"


def _student_estimate(x: np.ndarray, cluster_index: np.ndarray) -> Estimate:
    mean = float(x.mean())
    sums = np.bincount(cluster_index, weights=x - mean)
    num_clusters = sums.size
    if num_clusters == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    variance = num_clusters / (num_clusters - 1) * float(np.sum(sums**2)) / x.size**2
    from scipy.special import stdtrit  # an eighth of what a command imports

    half = float(stdtrit(num_clusters - 1, _UPPER_TAIL)) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, num_clusters)


def _sample(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"expected a non-empty list of values, got shape {x.shape}")
    if not np.all(np.isfinite(x)):
        first = int(np.argmin(np.isfinite(x)))
        raise ValueError(f"value {first} of {x.size} is {x[first]}")
    return x


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(
            f"pairs need two non-empty arrays of one shape, got {first.shape} and "
            f"{second.shape}"
        )
    if not (np.all(np.isfinite(first)) and np.all(np.isfinite(second))):
        raise ValueError("a value of a pair is not finite")
    return first - second
