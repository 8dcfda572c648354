"""Losses and the optimizer are those of PyTorch, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [parity]")

from rlhf_jax.objectives.language_modeling import (  # noqa: E402
    logprobs_and_entropy,
    next_token_loss,
)
from rlhf_jax.objectives.masking import normalize_weights  # noqa: E402
from rlhf_jax.objectives.ranking import ranking_loss  # noqa: E402
from rlhf_jax.training.optimizers import OptimizerConfig, adamw  # noqa: E402


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_next_token_loss_is_cross_entropy_with_ignored_targets(scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(4, 9, 13))).astype(np.float32)
    targets = rng.integers(0, 13, (4, 9)).astype(np.int32)
    mask = rng.random((4, 9)) < 0.6

    def loss(logits):
        logprobs, _ = logprobs_and_entropy(logits, targets)
        return next_token_loss(logprobs, normalize_weights(mask))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    their_logits = torch.tensor(logits, requires_grad=True)
    their_targets = torch.tensor(np.where(mask, targets, -100), dtype=torch.long)
    theirs = torch.nn.functional.cross_entropy(
        their_logits.reshape(-1, 13), their_targets.reshape(-1)
    )
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, their_logits.grad.numpy(), atol=1e-6)


def test_entropy_is_that_of_a_categorical_distribution():
    logits = 3 * np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    _, entropy = logprobs_and_entropy(jnp.asarray(logits), jnp.zeros(5, jnp.int32))
    theirs = torch.distributions.Categorical(logits=torch.tensor(logits)).entropy()
    np.testing.assert_allclose(entropy, theirs.numpy(), rtol=1e-5)


def test_ranking_loss_of_distinct_ranks_is_the_mean_log_sigmoid_over_all_pairs():
    """The loss of Ouyang et al. 2022, equation (1), built from torch's own pieces."""
    rng = np.random.default_rng(2)
    for num in (2, 4, 9):
        scores = rng.normal(size=(3, num)).astype(np.float32)
        ranks = np.stack([rng.permutation(num) + 1 for _ in range(3)]).astype(np.int32)
        value, gradient = jax.value_and_grad(
            lambda s, ranks=ranks: jnp.mean(ranking_loss(s, ranks))
        )(jnp.asarray(scores))
        their_scores = torch.tensor(scores, requires_grad=True)
        order = torch.tensor(ranks).argsort(dim=1)
        ordered = their_scores.gather(1, order)
        better, worse = zip(*torch.combinations(torch.arange(num)), strict=True)
        margins = ordered[:, list(better)] - ordered[:, list(worse)]
        theirs = -torch.nn.functional.logsigmoid(margins).mean()
        theirs.backward()
        np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
        np.testing.assert_allclose(gradient, their_scores.grad.numpy(), atol=1e-6)


def test_adamw_takes_the_steps_of_torch():
    """Clipping by the global norm, then decoupled decay on matrices alone."""
    rng = np.random.default_rng(3)
    params = {
        "embed": rng.normal(size=(7, 5)).astype(np.float32),
        "blocks": {"mlp_up": {"w": rng.normal(size=(1, 5, 6)).astype(np.float32)}},
        "final_norm": {"bias": rng.normal(size=(5,)).astype(np.float32)},
    }
    cfg = OptimizerConfig(weight_decay=0.1, b2=0.95, eps=1e-8, max_grad_norm=1.0)
    transformation = adamw(cfg.scalars(), jnp.float32(0.01))
    state = transformation.init(params)
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in jax.tree.leaves(params)]
    decayed = [x for x in theirs if x.ndim > 1]
    rest = [x for x in theirs if x.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0}],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(20):
        scale = 5.0 if step % 2 else 0.01  # clipped and not
        grads = jax.tree.map(
            lambda x, scale=scale: np.float32(scale * rng.normal(size=x.shape)), params
        )
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for parameter, grad in zip(theirs, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
    for ours, parameter in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, parameter.detach().numpy(), atol=2e-6)
