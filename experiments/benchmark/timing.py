"""Duels: the same work by two programs in turn, and the ratio of their times."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: what was measured.
        against: the other side.
        ratio: median; low, high: smallest and largest of the repetitions.
        unit: of the ratio.
        goal: what must be reached; None where there is no goal.
        note: times and sizes behind the ratio.
    """

    case: str
    against: str
    ratio: float
    low: float
    high: float
    unit: str
    goal: float | None = None
    note: str = ""


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call, its results waited for."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def duel(
    case: str,
    ours: Callable[[], Any],
    against: str,
    theirs: Callable[[], Any],
    repeats: int,
    goal: float | None = None,
    note: str = "",
) -> Row:
    """Times both sides in turn after a first call each; the ratio is theirs / ours.

    Every repetition gives one ratio of neighbouring times, so that a machine that slows
    down does so for both; each time is the better of two calls, since the first after
    a large step of the other side was often the slower one.
    """
    for side in (ours, theirs):
        seconds(side)
    pairs = np.array(
        [(_best(seconds, ours), _best(seconds, theirs)) for _ in range(repeats)]
    )
    ms, their_ms = 1e3 * np.median(pairs, axis=0)
    times = f"{ms:.1f} ms against {their_ms:.1f} ms"
    note = f"{times}; {note}" if note else times
    return row_of(case, against, pairs[:, 1] / pairs[:, 0], goal=goal, note=note)


def duel_by_tokens(
    case: str,
    ours: Callable[[], int],
    against: str,
    theirs: Callable[[], int],
    repeats: int,
    goal: float | None = None,
) -> Row:
    """`duel` of sides that return how many tokens they made: a ratio of tokens/s."""

    def seconds_per_token(side: Callable[[], int]) -> float:
        start = time.perf_counter()
        tokens = side()
        return (time.perf_counter() - start) / tokens

    for side in (ours, theirs):
        seconds_per_token(side)
    times = [
        [_best(seconds_per_token, side) for side in (ours, theirs)]
        for _ in range(repeats)
    ]
    pairs = 1.0 / np.array(times)
    mine, other = np.median(pairs, axis=0)
    note = f"{mine:.0f} against {other:.0f} tokens/s"
    return row_of(case, against, pairs[:, 0] / pairs[:, 1], goal=goal, note=note)


def _best(measure: Callable[[Callable[[], Any]], float], side: Any) -> float:
    """The smaller of two measurements in a row."""
    return min(measure(side), measure(side))


def row_of(
    case: str,
    against: str,
    ratios: Any,
    unit: str = "times as fast",
    goal: float | None = None,
    note: str = "",
) -> Row:
    """The line of a case with the ratio of each repetition, [n]."""
    middle, low, high = (float(f(ratios)) for f in (np.median, np.min, np.max))
    return Row(case, against, middle, low, high, unit, goal, note)


def matmul_flops(size: int = 2048, repeats: int = 5, dtype: str = "float32") -> float:
    """FLOP/s of one square matrix product of random numbers, the best of some."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / _best_of_ten(lambda: product(a), repeats)


def copy_bytes(size: int = 2**30, repeats: int = 5) -> float:
    """Bytes read and written a second by a copy within the device's memory."""
    x = jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    return 2 * size / _best_of_ten(lambda: copy(x), repeats)


def _best_of_ten(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of one of ten calls in a row, launched together, the best of some."""
    seconds(work)
    return (
        min(seconds(lambda: [work() for _ in range(10)]) for _ in range(repeats)) / 10
    )


def check_close(case: str, ours: float, theirs: float, rtol: float = 1e-4) -> None:
    """Refuses to time two programs that do not compute the same."""
    if not np.isclose(ours, theirs, rtol=rtol, atol=1e-5):
        raise SystemExit(
            f"error: {case}: ours computes {ours}, the other side {theirs}; the two "
            "do not do the same work, so their times say nothing"
        )
