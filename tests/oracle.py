"""Slow NumPy versions of every formula: float64, plain loops, written from the papers.

Nothing here imports `rlhf_jax`. Sequences are single and unpadded wherever a formula
speaks of one sequence, so that padding and masks have nothing to agree with but them.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Params = Any  # nested dict of arrays, blocks stacked on a leading axis


# ------------------------------------------------------------------ transformer


def layer_norm(params: Params, x: Array) -> Array:
    """Radford et al. 2019, released code: biased variance, epsilon 1e-5."""
    out = np.empty_like(x)
    for t in range(x.shape[0]):
        mean = sum(x[t]) / len(x[t])
        variance = sum((value - mean) ** 2 for value in x[t]) / len(x[t])
        out[t] = (x[t] - mean) / math.sqrt(variance + 1e-5)
    return out * params["scale"] + params["bias"]


def gelu(x: Array) -> Array:
    """The tanh form, Hendrycks and Gimpel 2016."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    exps = np.exp(x - np.max(x))
    return exps / np.sum(exps)


def log_softmax(x: Array) -> Array:
    shifted = x - np.max(x)
    return shifted - np.log(np.sum(np.exp(shifted)))


def attention(params: Params, x: Array) -> Array:
    """Causal multi-head attention of one sequence [T, D], one head and query a time."""
    T = x.shape[0]
    _, _, num_heads, head_dim = params["qkv"]["w"].shape
    out = np.zeros_like(x) + params["attn_out"]["b"]
    for head in range(num_heads):
        w, b = params["qkv"]["w"][:, :, head], params["qkv"]["b"][:, head]
        q, k, v = (x @ w[:, part] + b[part] for part in range(3))
        for t in range(T):
            scores = np.array([q[t] @ k[s] for s in range(t + 1)])
            weights = softmax(scores / math.sqrt(head_dim))
            mixed = sum(weights[s] * v[s] for s in range(t + 1))
            out[t] += mixed @ params["attn_out"]["w"][head]
    return out


def mlp(params: Params, x: Array) -> Array:
    up = gelu(x @ params["mlp_up"]["w"] + params["mlp_up"]["b"])
    return up @ params["mlp_down"]["w"] + params["mlp_down"]["b"]


def hidden_states(params: Params, tokens: Array, norm: str) -> Array:
    """Last hidden states of one sequence: GPT-1 for "post", GPT-2 for "pre"."""
    params = _float64(params)
    x = np.stack(
        [
            params["embed"][token] + params["pos_embed"][t]
            for t, token in _numbered(tokens)
        ]
    )
    num_layers = params["blocks"]["qkv"]["w"].shape[0]
    for index in range(num_layers):
        layer = _map(lambda leaf, index=index: leaf[index], params["blocks"])
        if norm == "pre":
            x = x + attention(layer, layer_norm(layer["attn_norm"], x))
            x = x + mlp(layer, layer_norm(layer["mlp_norm"], x))
        else:
            x = layer_norm(layer["attn_norm"], x + attention(layer, x))
            x = layer_norm(layer["mlp_norm"], x + mlp(layer, x))
    return layer_norm(params["final_norm"], x) if norm == "pre" else x


def next_token_logits(params: Params, tokens: Array, norm: str) -> Array:
    """Logits after the last token of a sequence: [V], tied embedding."""
    return (
        np.asarray(params["embed"], np.float64)
        @ hidden_states(params, tokens, norm)[-1]
    )


def _numbered(tokens: Array) -> list[tuple[int, int]]:
    return list(enumerate(int(token) for token in tokens))


def _map(function: Callable, tree: Params) -> Params:
    if isinstance(tree, dict):
        return {name: _map(function, child) for name, child in tree.items()}
    return function(tree)


def _float64(tree: Params) -> Params:
    return _map(lambda leaf: np.asarray(leaf, np.float64), tree)


# --------------------------------------------------------------------- sampling


def contract_probs(
    logits: Array, temperature: float, top_k: int | None, top_p: float | None
) -> Array:
    """Probabilities [V] that a row of distinct logits is sampled from."""
    probs = softmax(np.asarray(logits, np.float64) / temperature)
    order = [int(v) for v in np.argsort(-probs, kind="stable")]
    if top_k is not None:
        order = order[:top_k]
        probs = _restrict(probs, order)
    if top_p is not None:
        kept, mass = [], 0.0
        for token in order:
            kept.append(token)
            mass += probs[token]
            if mass >= top_p:
                break
        probs = _restrict(probs, kept)
    return probs


def _restrict(probs: Array, kept: list[int]) -> Array:
    out = np.zeros_like(probs)
    for token in kept:
        out[token] = probs[token]
    return out / np.sum(out)


def inverse_cdf(uniform: float, probs: Array) -> int:
    """The smallest token whose cumulative probability exceeds `uniform`."""
    total = 0.0
    for token, prob in enumerate(probs):
        total += prob
        if prob > 0 and total > uniform:
            return token
    return int(np.max(np.flatnonzero(probs)))


def sample_response(
    params: Params,
    prompt: Array,
    uniforms: Array,
    eos_id: int,
    norm: str,
    probs_of: Callable[[Array], Array],
) -> tuple[list[int], list[float], bool]:
    """Draws a response by running the whole sequence again for every token.

    Returns its tokens, their log-probabilities, and whether it ended in `eos_id`.
    """
    sequence, response, logprobs = list(prompt), [], []
    for uniform in uniforms:
        probs = probs_of(next_token_logits(params, np.array(sequence), norm))
        token = inverse_cdf(float(uniform), probs)
        sequence.append(token)
        response.append(token)
        logprobs.append(math.log(probs[token]))
        if token == eos_id:
            return response, logprobs, True
    return response, logprobs, False


# ---------------------------------------------------------------- reductions


def masked_values(x: Array, mask: Array) -> list[float]:
    flat, keep = np.ravel(x), np.ravel(mask)
    return [float(value) for value, kept in zip(flat, keep, strict=True) if kept]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def variance(values: list[float]) -> float:
    """Biased: divided by the number of values."""
    centre = mean(values)
    return mean([(value - centre) ** 2 for value in values])


def whiten(x: Array, mask: Array, shift_mean: bool) -> Array:
    """Ziegler et al. 2019, released code; 0 outside the mask."""
    values = masked_values(x, mask)
    centre, scale = mean(values), math.sqrt(variance(values) + 1e-8)
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        if mask[index]:
            out[index] = (x[index] - centre) / scale + (0.0 if shift_mean else centre)
    return out


# ------------------------------------------------------------- language modelling


def logprob_and_entropy(logits: Array, target: int) -> tuple[float, float]:
    logprobs = log_softmax(np.asarray(logits, np.float64))
    entropy = 0.0
    for logprob in logprobs:
        entropy -= math.exp(logprob) * logprob
    return float(logprobs[target]), entropy


def numerical_gradient(function: Callable[[Array], float], x: Array) -> Array:
    """Central differences of a scalar function in float64."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = 1e-5
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


# ---------------------------------------------------------------------- ranking


def ordered_pairs(ranks: Array) -> list[tuple[int, int]]:
    """(winner, loser) of every strictly ordered pair; rank 0 is absent, 1 is best."""
    indices = range(len(ranks))
    return [
        (i, j)
        for i in indices
        for j in indices
        if ranks[i] != 0 and ranks[j] != 0 and ranks[i] < ranks[j]
    ]


def ranking_loss(scores: Array, ranks: Array) -> float:
    """Ouyang et al. 2022, eq. (1), of one prompt; 0 without an ordered pair."""
    losses = []
    for winner, loser in ordered_pairs(ranks):
        margin = float(scores[winner]) - float(scores[loser])
        losses.append(math.log1p(math.exp(-margin)))
    return mean(losses)


def ranking_accuracy(scores: Array, ranks: Array) -> float:
    points = []
    for winner, loser in ordered_pairs(ranks):
        higher, lower = scores[winner], scores[loser]
        points.append(1.0 if higher > lower else 0.5 if higher == lower else 0.0)
    return mean(points)


# ------------------------------------------------------------------- advantages


def gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> list[float]:
    """Schulman et al. 2016, eq. (16), as the double sum; one finished episode."""
    T = len(rewards)
    deltas = []
    for t in range(T):
        next_value = values[t + 1] if t + 1 < T else 0.0
        deltas.append(rewards[t] + gamma * next_value - values[t])
    return [
        sum((gamma * lam) ** step * deltas[t + step] for step in range(T - t))
        for t in range(T)
    ]


def kl_penalized_rewards(
    score: float, logprobs: Array, ref_logprobs: Array, length: int, kl_coef: float
) -> Array:
    """Ziegler et al. 2019, eq. (2), spread over one response; 0 after it."""
    rewards = np.zeros(len(logprobs))
    for t in range(length):
        rewards[t] = -kl_coef * (float(logprobs[t]) - float(ref_logprobs[t]))
    if length > 0:
        rewards[length - 1] += score
    return rewards


# -------------------------------------------------------------------------- PPO


def ppo_objective(
    logprob: float, old_logprob: float, advantage: float, clip: float
) -> float:
    """Schulman et al. 2017, eq. (7), of one token."""
    ratio = math.exp(logprob - old_logprob)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return min(ratio * advantage, clipped * advantage)


def clipped_value_loss(
    value: float, old_value: float, target: float, clip: float
) -> float:
    """Ziegler et al. 2019, released code, of one token."""
    near = min(max(value, old_value - clip), old_value + clip)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2)


def ppo_diagnostics(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: float
) -> dict[str, float]:
    differences = masked_values(logprobs - old_logprobs, mask)
    signs = masked_values(advantages, mask)
    ratios = [math.exp(difference) for difference in differences]
    low = [r < 1 - clip and a < 0 for r, a in zip(ratios, signs, strict=True)]
    high = [r > 1 + clip and a > 0 for r, a in zip(ratios, signs, strict=True)]
    return {
        "ratio_mean": mean(ratios),
        "ratio_max": max(ratios),
        "ratio_min": min(ratios),
        "ratio_var": variance(ratios),
        "approx_kl": mean(
            [r - 1 - d for r, d in zip(ratios, differences, strict=True)]
        ),
        "clip_fraction": (sum(low) + sum(high)) / len(ratios),
        "clip_low": sum(low) / len(ratios),
        "clip_high": sum(high) / len(ratios),
    }
