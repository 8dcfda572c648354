"""Means and rates with 95 % intervals, clustered by what belongs together."""

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


def mean_estimate(values: ArrayLike) -> Estimate:
    """Mean of a sample with its 95 % Student-t interval.

    mean +- t_{n-1} s / sqrt(n),  s^2 = sum_i (x_i - mean)^2 / (n - 1)

    A constant sample has a zero width: a share or a rate goes to `rate_estimate`.

    Args:
        values: [n], finite and independent, in any unit: one a prompt or batch.

    Returns:
        The mean in the unit of `values`; one value alone bounds nothing, and its
        interval is (-inf, inf).

    Raises:
        ValueError: `values` is empty or not finite.
    """
    x = _sample(values)
    mean = float(x.mean())
    if x.size == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = _student(x.size) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Estimate(mean, mean - half, mean + half, x.size)


def rate_estimate(values: ArrayLike, clusters: ArrayLike | None = None) -> Estimate:
    """Mean of values in [0, 1] with a 95 % interval that never collapses.

    c +- q sqrt(sum_g (sum_{i in g} (x_i - c))^2) / n, cut to [0, 1], where the sums run
    over the sample with z^2 clusters of d values each added, half of them 0 and half 1,
    and c is its mean. d, at least 1 and at most the mean size of a cluster, is how many
    times the clusters raise the variance of the mean; q = z t_{G-1} / t_{n-1}.

    On independent values of 0 and 1 this is Agresti and Coull's interval; it also holds
    for ties (1/2) and probabilities, and G equal clusters keep a width of order 1 / G.

    Args:
        values: [n], in [0, 1]: 1 where it is so or ours is preferred, 1/2 at a tie.
        clusters: [n], a label per value, of those that belong together (all pairs of
            one prompt); None where the values are independent.

    Returns:
        The mean of `values`, with `n` = G.

    Raises:
        ValueError: `values` is empty, not finite or outside [0, 1], or `clusters` has
            another length.

    Source: Agresti and Coull 1998; Korn and Graubard 1998 and Dean and Pagano 2015 for
        clusters (an effective sample size n / d); the use for values between is ours.
    """
    x = _sample(values)
    _check_rates(x)
    return _with_pseudo_clusters(x, clusters, {0.0: _Z**2 / 2, 1.0: _Z**2 / 2})


def rate_difference(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike | None = None
) -> Estimate:
    """Difference a - b of two rates over the same units, never of zero width.

    As `rate_estimate`, cut to [-1, 1], with z^2 clusters of d values added, half of
    them 1 and half -1: where no unit differs it reaches as far as the rate of an event
    that was never seen.

    Args:
        a: [n], in [0, 1], one value per unit (0 or 1, or the mean of a prompt's
            samples).
        b: [n], the value of the same unit.
        clusters: [n], as in `rate_estimate`.

    Raises:
        ValueError: the shapes differ, or a value is not finite or outside [0, 1].

    Source: ours, after Agresti and Coull; fewer (Agresti and Min 2005 add a unit that
        differs) are too narrow for rare events.
    """
    first, second = _sample(a), _sample(b)
    if first.shape != second.shape:
        raise ValueError(f"pairs of {first.size} and {second.size} values")
    _check_rates(first)
    _check_rates(second)
    pseudo = {1.0: _Z**2 / 2, -1.0: _Z**2 / 2}
    return _with_pseudo_clusters(first - second, clusters, pseudo)


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


def _with_pseudo_clusters(
    x: np.ndarray, clusters: ArrayLike | None, pseudo: Mapping[float, float]
) -> Estimate:
    """Mean with a normal interval around that of the sample with clusters added.

    Args:
        x: [n], between the least and the largest of the added values.
        clusters: as in `rate_estimate`.
        pseudo: values and how many clusters have each, see `rate_estimate`.
    """
    index = _cluster_index(x, clusters)
    num_clusters, mean = int(index.max()) + 1, float(x.mean())
    apart = float(np.sum((x - mean) ** 2))  # of independent values
    size = x.size / num_clusters
    if apart > 0:
        together = float(np.sum(np.bincount(index, weights=x - mean) ** 2))
        size = min(max(together / apart, 1.0), size)
    total = x.size + size * sum(pseudo.values())
    centre = (x.sum() + size * sum(v * w for v, w in pseudo.items())) / total
    squares = np.sum(np.bincount(index, weights=x - centre) ** 2)
    squares += size**2 * sum(w * (v - centre) ** 2 for v, w in pseudo.items())
    quantile = _Z
    if num_clusters < x.size:
        quantile *= _student(num_clusters) / _student(x.size)
    half = quantile * math.sqrt(squares) / total
    low = min(max(float(centre) - half, min(pseudo)), mean)
    high = max(min(float(centre) + half, max(pseudo)), mean)
    return Estimate(mean, low, high, num_clusters)


def _student(count: int) -> float:
    """The quantile of Student's t that leaves 2.5 % above, of so many units."""
    from scipy.special import stdtrit  # an eighth of what a command imports

    return float(stdtrit(count - 1, _UPPER_TAIL)) if count > 1 else math.inf


def _cluster_index(x: np.ndarray, clusters: ArrayLike | None) -> np.ndarray:
    """The number of each value's cluster, [n], from 0 on."""
    if clusters is None:
        return np.arange(x.size)
    labels = np.asarray(clusters)
    if labels.shape != x.shape:
        raise ValueError(f"{x.size} values but clusters of shape {labels.shape}")
    return np.unique(labels, return_inverse=True)[1]


def _check_rates(x: np.ndarray) -> None:
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"rates must lie in [0, 1], got {x.min()} to {x.max()}")


def _sample(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"expected a non-empty list of values, got shape {x.shape}")
    if not np.all(np.isfinite(x)):
        first = int(np.argmin(np.isfinite(x)))
        raise ValueError(f"value {first} of {x.size} is {x[first]}")
    return x
