"""Learning a reward from rankings of K responses to one prompt."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def preferred_pairs(ranks: Array) -> Array:
    """Which response of each pair is strictly better.

    Args:
        ranks: int32, [..., K]; 1 is best, equal ranks tie, 0 marks an absent response.

    Returns:
        bool, [..., K, K]: True at (i, j) where both exist and i ranks before j.
    """
    present = ranks > 0
    better = ranks[..., :, None] < ranks[..., None, :]
    return better & present[..., :, None] & present[..., None, :]


def pair_mean(
    of_margin: Callable[[Array], Array], scores: Array, ranks: Array
) -> Array:
    """Mean over each prompt's strictly ordered pairs of a function of their margins.

    mean_{(i, j): rank_i < rank_j} f(r_i - r_j)

    Args:
        of_margin: f, of margins [B, K, K] in reward units.
        scores: float32, [B, K], in reward units.
        ranks: int32, [B, K]; 1 best, equal = tie, 0 = absent.

    Returns:
        float32, [B]; 0 where no pair is ordered. Scores of absent responses may be NaN.
    """
    chex.assert_rank([scores, ranks], 2)
    chex.assert_equal_shape([scores, ranks])
    scores = jnp.where(ranks > 0, scores, 0.0)
    pairs = preferred_pairs(ranks)
    margins = scores[:, :, None] - scores[:, None, :]
    total = jnp.sum(jnp.where(pairs, of_margin(margins), 0.0), axis=(1, 2))
    num_pairs = jnp.sum(pairs, axis=(1, 2), dtype=jnp.float32)
    return total / jnp.maximum(num_pairs, 1.0)


def ranking_loss(scores: Array, ranks: Array) -> Array:
    """K-way comparison loss of each prompt: the mean over its strictly ordered pairs.

    loss_b = - mean_{(i, j): rank_i < rank_j} log sigmoid(r_i - r_j)

    All pairs of a prompt stay in one batch element. K = 2 is the Bradley-Terry loss.
    Ties are left out, and the mean is over the pairs that remain (whether 1 / C(K, 2)
    counts ties is not published).

    Args:
        scores, ranks: [B, K] each, see `pair_mean`.

    Returns:
        float32, [B], nats per comparison (chance: log 2); 0 where no pair is ordered.

    Source: Ouyang et al. 2022, eq. (1), arXiv:2203.02155.
    """
    return pair_mean(lambda margins: -jax.nn.log_sigmoid(margins), scores, ranks)


def ranking_accuracy(scores: Array, ranks: Array) -> Array:
    """Share of a prompt's ordered pairs whose better response scores higher.

    Args:
        scores, ranks: [B, K] each, see `pair_mean`.

    Returns:
        float32, [B], in [0, 1]; equal scores count one half; 0 where no pair is
        ordered.
    """
    return pair_mean(lambda margins: jnp.heaviside(margins, 0.5), scores, ranks)
