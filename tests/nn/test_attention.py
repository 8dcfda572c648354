"""Packed documents are read apart; what the mask of one sequence is, the transformer's
own tests show."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from rlhf_jax.nn import attention, responses, transformer
from rlhf_jax.nn.attention import document_numbers, document_positions
from rlhf_jax.nn.responses import (
    forward_responses,
    last_response_states,
    packed_last_states,
)
from rlhf_jax.nn.transformer import forward

NORMS = ["pre", "post"]


def test_documents_are_numbered_and_positions_begin_anew(mode):
    tokens = np.array([[5, 7, 3, 3, 1, 3], [3, 2, 2, 3, 3, 8]], np.int32)
    documents = mode(lambda x: document_numbers(x, 3))(tokens)
    positions = mode(document_positions)(documents)
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


@pytest.mark.parametrize("document_end", [None, 9])
def test_what_shares_a_row_is_read_apart_with_its_documents(
    mode, tiny, random_params, document_end
):
    cfg = tiny(document_end=document_end)
    params = random_params(cfg)
    pieces = [[5, 7, 3], [3], [1, 1, 9, 4, 3]]
    packed = np.array([sum(pieces, [])], np.int32)
    numbers = np.array([[0, 0, 0, 1, 2, 2, 2, 2, 2]], np.int32)
    if document_end is not None:
        pieces[2:] = [[1, 1, 9], [4, 3]]
    states = mode(lambda p, x, d: forward(p, x, cfg, documents=d))(
        params, packed, numbers
    )
    alone = [oracle.hidden_states(params, np.array(d), "pre") for d in pieces]
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


@pytest.mark.parametrize("document_end", [None, 3])
@pytest.mark.parametrize("length", [8, 11, 17, 25])
def test_long_rows_in_blocks_of_queries_have_the_states_of_whole_ones(
    mode, tiny, random_params, monkeypatch, length, document_end
):
    """From 8 tokens on two blocks here, from 16 on four, the last one short."""
    monkeypatch.setattr(attention, "MIN_BLOCK", 4)
    assert len(attention.blocks(length)) == (2 if length < 16 else 4)
    assert attention.causal_pairs(length) < length**2
    cfg = tiny(document_end=document_end)
    params = random_params(cfg)
    tokens = np.random.default_rng(0).integers(0, 11, length).astype(np.int32)
    states = mode(lambda p, tokens: forward(p, tokens, cfg))(params, tokens[None])[0]
    ends = np.flatnonzero(tokens == document_end) + 1 if document_end else []
    alone = [oracle.hidden_states(params, d, "pre") for d in np.split(tokens, ends)]
    np.testing.assert_allclose(states, np.concatenate(alone), atol=1e-5, rtol=1e-5)


def test_long_rows_in_blocks_have_the_gradient_of_whole_ones(
    tiny, random_params, monkeypatch
):
    cfg = tiny()
    params, tokens = random_params(cfg), jnp.arange(18)[None] % 11

    def traced():  # a new function each time: JAX keeps what it has traced of one
        return jax.make_jaxpr(
            jax.grad(lambda p: jnp.sum(forward(p, tokens, cfg)[0, 3:] ** 3))
        )(params)

    def gradient(program):
        return jax.core.eval_jaxpr(program.jaxpr, program.consts, *leaves)

    leaves, program = jax.tree.leaves(params), traced()
    monkeypatch.setattr(attention, "MIN_BLOCK", 4)
    program_in_blocks = traced()
    assert str(program_in_blocks) != str(program)
    whole, in_blocks = gradient(program), gradient(program_in_blocks)
    chex.assert_trees_all_close(in_blocks, whole, rtol=1e-4, atol=1e-4)


def test_blocks_cover_every_query_once():
    for length in (1, 2, 127, 255, 256, 257, 511, 512, 1025):
        pieces = attention.blocks(length)
        covered = [i for start, end in pieces for i in range(start, end)]
        assert covered == list(range(length))


@pytest.fixture
def with_kernel(monkeypatch):
    """Routes attention as for cuDNN, through the same function's portable form."""

    def route(on: bool):
        monkeypatch.setattr(attention, "FUSED_IMPLEMENTATION", "xla")
        for module in (attention, responses):
            monkeypatch.setattr(module, "fused", lambda q: on)

    return route


@pytest.mark.parametrize("document_end", [None, 3])
@pytest.mark.parametrize("length", [6, 7])
def test_the_kernel_reads_what_the_mask_allows(
    tiny, random_params, with_kernel, length, document_end
):
    """States and gradients, of even lengths and of odd ones, which are filled up."""
    cfg = tiny(document_end=document_end)
    params = random_params(cfg)
    tokens = jnp.asarray([[5, 7, 3, 3, 1, 3, 2], [3, 2, 2, 3, 3, 8, 1]])[:, :length]
    cotangent = jax.random.normal(jax.random.key(0), (2, length, 16))

    def loss(params):
        states = forward(params, tokens, cfg)
        return jnp.sum(states * cotangent), states

    found = []
    for on in (True, False):
        with_kernel(on)
        found.append(jax.jit(jax.grad(loss, has_aux=True))(params))
    chex.assert_trees_all_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [1, pytest.param(4, marks=pytest.mark.slow), 5])
def test_the_kernel_reads_the_prompt_and_the_own_branch_only(
    tiny, random_params, with_kernel, width
):
    """Three responses to prompts of one, two and four tokens, states and gradients."""
    cfg = tiny()
    params = random_params(cfg)
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(0, 11, (3, 4)), jnp.int32)
    answers = jnp.asarray(rng.integers(0, 11, (3, 3, width)), jnp.int32)
    lengths = jnp.asarray(rng.integers(0, width + 1, (3, 3)), jnp.int32)
    batch = prompts, jnp.asarray([1, 2, 4]), answers

    def loss(params):
        states = forward_responses(params, *batch, cfg)
        last = last_response_states(params, *batch, lengths, cfg)
        return jnp.sum(jnp.sin(states)) + jnp.sum(jnp.cos(last)), (states, last)

    found = []
    for on in (True, False):
        with_kernel(on)
        found.append(jax.jit(jax.grad(loss, has_aux=True))(params))
    chex.assert_trees_all_close(*found, atol=2e-4, rtol=1e-4)


def test_branches_read_part_0_and_themselves_with_or_without_documents():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 6, 2, 4))
    branches = np.array([[0, 0, 1, 1, 2, 2]])
    expected = np.zeros((6, 2, 4))
    for t in range(6):
        read = [s for s in range(t + 1) if branches[0, s] in (0, branches[0, t])]
        for n in range(2):
            weights = np.exp(k[0, read, n] @ q[0, t, n] / 2.0)
            expected[t, n] = weights / weights.sum() @ v[0, read, n]
    arrays = [jnp.float32(x)[None] for x in (q[0], k[0], v[0])]
    for documents in (None, jnp.zeros((1, 6), jnp.int32)):
        found = attention.causal_attention(*arrays, documents, jnp.asarray(branches))
        np.testing.assert_allclose(found[0], expected, atol=1e-5)


# Two rows: three responses (one empty) to three tokens and two to one; two to four.
PACKED = [
    [([5, 7, 3], [[1, 2], [], [4, 4, 9, 1]]), ([8], [[3], [3, 3]])],
    [([2, 9, 1, 6], [[7, 1, 8, 2, 8], [5]])],
]


def packed(rows, width):
    """Tokens, positions, documents, branches [N, width], and last [N, 5]."""
    found = np.full((4, len(rows), width), 0, np.int32)
    last = np.zeros((len(rows), 5), np.int32)
    for n, row in enumerate(rows):
        t, ends = 0, []
        for document, (prompt, answers) in enumerate(row):
            found[2, n, t:] = document
            for branch, ids in enumerate([prompt, *answers]):
                for place, token in enumerate(ids):
                    position = place + (len(prompt) if branch else 0)
                    found[:, n, t] = token, position, document, branch
                    t += 1
                if branch:
                    ends.append(t - 1 if ids else ends[-1] - len(answers[branch - 2]))
        last[n, : len(ends)] = ends
    return (*found, last)


@pytest.mark.parametrize("few", [True, False], ids=["unrolled", "looped"])
@pytest.mark.parametrize("norm", NORMS)
def test_packed_responses_have_the_states_they_have_alone(
    monkeypatch, tiny, random_params, norm, few
):
    """In four blocks of queries; an empty response is the end of its prompt."""
    monkeypatch.setattr(attention, "MIN_BLOCK", 4)
    if not few:
        monkeypatch.setattr(transformer, "MAX_UNROLLED", 0)
    cfg = tiny(norm=norm, max_len=9)  # less than the row is wide
    params = random_params(cfg)
    batch = packed(PACKED, 17)
    found = jax.jit(lambda p, *x: packed_last_states(p, *x, cfg))(params, *batch)
    for n, row in enumerate(PACKED):
        alone = [prompt + ids for prompt, answers in row for ids in answers]
        expected = [oracle.hidden_states(params, np.array(x), norm)[-1] for x in alone]
        np.testing.assert_allclose(
            found[n, : len(alone)], expected, atol=1e-5, rtol=1e-5
        )


def test_packed_responses_have_the_gradient_of_padded_ones(
    tiny, random_params, with_kernel
):
    """By the kernel too."""
    cfg = tiny()
    params = random_params(cfg)
    batch = packed(PACKED, 17)
    rankings = [ranking for row in PACKED for ranking in row]
    prompts, answers = np.zeros((3, 4), np.int32), np.zeros((3, 3, 5), np.int32)
    lengths = np.zeros((3, 3), np.int32)
    weights = np.zeros((3, 3), np.float32)
    for b, (prompt, own) in enumerate(rankings):
        prompts[b, : len(prompt)] = prompt
        for k, ids in enumerate(own):
            answers[b, k, : len(ids)] = ids
            lengths[b, k], weights[b, k] = len(ids), 1.0
    sizes = np.array([len(prompt) for prompt, _ in rankings])
    cotangent = np.random.default_rng(0).normal(size=(3, 3, 16)) * weights[..., None]

    def padded_loss(params):
        states = last_response_states(params, prompts, sizes, answers, lengths, cfg)
        return jnp.sum(states * cotangent)

    def loss(params):
        states = packed_last_states(params, *batch, cfg)
        by_ranking = [states[0, :3], states[0, 3:5], states[1, :2]]
        parts = [
            jnp.sum(mine * wanted[: len(mine)])
            for mine, wanted in zip(by_ranking, cotangent, strict=True)
        ]
        return sum(parts)

    with_kernel(False)
    expected = jax.jit(jax.grad(padded_loss))(params)
    for on in (False, True):
        with_kernel(on)
        jax.clear_caches()  # JAX keeps what it has traced of a function
        found = jax.jit(jax.grad(loss))(params)
        chex.assert_trees_all_close(found, expected, atol=1e-4, rtol=1e-4)
