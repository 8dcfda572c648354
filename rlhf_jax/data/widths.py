"""How wide padded rows are: as the data needs, in few widths (each is a program)."""

from collections.abc import Iterable, Sequence

import numpy as np

WIDTH_STEP = 64  # tokens; a tile of the attention kernels
MIN_BATCHES = 8  # that a width of its own must save before it is worth a program


def fitted_width(lengths: Iterable[int], limit: int) -> int:
    """Width of rows of these lengths in tokens, none longer than the limit.

    A multiple of 64; the limit itself where that would not save a quarter of it, so
    that like data share a program.
    """
    width = -(-max(lengths, default=0) // WIDTH_STEP) * WIDTH_STEP
    return width if 4 * width <= 3 * limit else limit


def advise_width(lengths: Sequence[int], limit: int, field: str) -> str | None:
    """What a lower limit would save, where few long rows widen all by half or more.

    Args:
        lengths: tokens of each row, [N].
        limit: most tokens of a row; longer ones are left out.
        field: that sets it.

    Returns:
        A sentence, if at most 5 % of the rows make all twice as wide; else None.
    """
    kept = [n for n in lengths if n <= limit]
    width = fitted_width(kept, limit)
    for narrow in range(WIDTH_STEP, width // 2 + 1, WIDTH_STEP):
        num_long = sum(n > narrow for n in kept)
        if num_long <= 0.05 * len(kept):
            return (
                f"{len(kept)} prompts are padded to {width} tokens for {num_long} of "
                f"more than {narrow}; {field} {narrow} would leave those out"
            )
    return None


def width_bounds(
    lengths: Sequence[int], limit: int, batch_size: int, num_calls: int = 1
) -> list[int]:
    """Most tokens of the prompts that are sampled apart from longer ones, ascending.

    64, 128, 256, ... as far as `fitted_width` tells them from the limit, and as far as
    the prompts between two of them fill 8 batches, which a program of its own is worth.

    Args:
        lengths: tokens of each prompt, [N].
        limit: most tokens of a prompt.
        batch_size: prompts sampled at a time.
        num_calls: how often these prompts will be sampled.
    """
    bounds: list[int] = []
    below, width = 0, WIDTH_STEP
    while fitted_width([width], limit) < limit:
        between = num_calls * sum(below < n <= width for n in lengths)
        if between >= MIN_BATCHES * batch_size:
            bounds.append(width)
            below = width
        width *= 2
    return bounds


def width_groups(lengths: Sequence[int], bounds: Sequence[int]) -> list[np.ndarray]:
    """Which prompts are sampled together, so that short ones are not padded to long.

    Args:
        lengths: tokens of each prompt, [N].
        bounds: of `width_bounds`.

    Returns:
        Ascending indices of each group that has any, the shortest prompts first; every
        prompt is in one group.
    """
    group_of = np.searchsorted(bounds, lengths)
    return [np.flatnonzero(group_of == group) for group in np.unique(group_of)]
