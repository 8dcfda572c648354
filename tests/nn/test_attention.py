"""Packed documents are read apart; what the mask of one sequence is, the transformer's
own tests show."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from rlhf_jax.nn.attention import documents_and_positions
from rlhf_jax.nn.transformer import forward

NORMS = ["pre", "post"]


def test_documents_are_numbered_and_positions_begin_anew(mode):
    tokens = np.array([[5, 7, 3, 3, 1, 3], [3, 2, 2, 3, 3, 8]], np.int32)
    documents, positions = mode(lambda x: documents_and_positions(x, 3))(tokens)
    np.testing.assert_array_equal(documents, [[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 2, 3]])
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 0, 0]])


@pytest.mark.parametrize("norm", NORMS)
def test_packed_documents_have_the_states_they_have_alone(
    mode, tiny, random_params, norm
):
    """Attention never crosses the end of a document, and positions begin anew."""
    cfg = tiny(norm=norm, document_end=3)
    params = random_params(cfg)
    documents = [[5, 7, 3], [3], [1, 1, 9, 4, 3], [8, 2]]
    packed = np.array([sum(documents, [])], np.int32)
    states = mode(lambda params, tokens: forward(params, tokens, cfg))(params, packed)
    alone = [oracle.hidden_states(params, np.array(d), norm) for d in documents]
    np.testing.assert_allclose(states[0], np.concatenate(alone), atol=1e-5, rtol=1e-5)


def test_no_gradient_crosses_the_end_of_a_document(tiny, random_params):
    """What is learned from one document does not depend on the one before it."""
    cfg = tiny(document_end=3)
    params = random_params(cfg)

    def gradient(first):
        tokens = jnp.array([[*first, 3, 6, 2, 9]])
        loss = lambda p: jnp.sum(forward(p, tokens, cfg)[0, 3:] ** 3)  # noqa: E731
        return jax.grad(loss)(params)

    chex.assert_trees_all_close(gradient([5, 7]), gradient([1, 10]), rtol=1e-6)
