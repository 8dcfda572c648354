import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from rlhf_jax.nn import decoding
from rlhf_jax.nn import sampling as sampling_module
from rlhf_jax.nn.attention import NEG_INF
from rlhf_jax.nn.decoding import decode_step, layers_apart, prefill, stretches
from rlhf_jax.nn.responses import forward_responses
from rlhf_jax.nn.sampling import (
    Sampling,
    contract_logits,
    generate,
    sample_tokens,
)
from rlhf_jax.nn.transformer import forward
from rlhf_jax.objectives.language_modeling import token_logprobs

JUST_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))

# ------------------------------------------------------------------ the token sampler


def skewed_logits(V: int) -> np.ndarray:
    """Zipf-like in shuffled order, some tokens impossible."""
    rng = np.random.default_rng(V)
    logits = -1.2 * np.log(1 + rng.permutation(V))
    logits[rng.permutation(V)[: V // 5]] = NEG_INF
    return logits.astype(np.float32)


draw = jax.jit(sample_tokens)


def draw_row(uniforms, logits):
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (len(uniforms), len(logits)))
    return draw(jnp.asarray(uniforms, jnp.float32), rows)


@pytest.mark.parametrize("V", [7, 1000])
def test_draws_follow_the_distribution(V):
    logits = skewed_logits(V)
    n = 20_000
    tokens, _ = draw_row(jax.random.uniform(jax.random.key(V), (n,)), logits)
    counts = np.bincount(tokens, minlength=V)
    expected = n * oracle.softmax(logits.astype(np.float64))
    common = expected >= 5
    observed = np.append(counts[common], np.sum(counts[~common]))
    wanted = np.append(expected[common], np.sum(expected[~common]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("V", [1, 2, 7, 50, 1000])
def test_evenly_spaced_uniforms_draw_each_token_in_exact_proportion(V):
    logits = skewed_logits(V)
    n = 5_000
    tokens, _ = draw_row((np.arange(n) + 0.5) / n, logits)
    expected = n * oracle.softmax(logits.astype(np.float64))
    assert np.max(np.abs(np.bincount(tokens, minlength=V) - expected)) <= 1.01
    assert np.all(np.diff(tokens) >= 0)  # the inverse of a growing function grows


def test_sampler_agrees_with_the_inverse_cdf_token_by_token(mode):
    rng = np.random.default_rng(3)
    logits = 2 * rng.normal(size=(50, 23))
    uniforms = rng.random(50)
    tokens, _ = mode(sample_tokens)(jnp.float32(uniforms), jnp.float32(logits))
    for row in range(50):
        probs = oracle.softmax(logits[row])
        assert int(tokens[row]) == oracle.inverse_cdf(uniforms[row], probs)


@pytest.mark.parametrize("V", [7, 1000])
def test_extreme_uniforms_draw_the_first_and_last_possible_token(V):
    logits = skewed_logits(V)
    logits[:3] = logits[-2:] = NEG_INF
    tokens, _ = draw_row([0.0, JUST_BELOW_ONE, 1.0], logits)
    possible = np.flatnonzero(logits > NEG_INF)
    assert int(tokens[0]) == possible[0]
    assert int(tokens[1]) == int(tokens[2]) == possible[-1]


@pytest.mark.parametrize("V", [1, 7, 100])
def test_one_hot_rows_draw_their_token_for_certain(V):
    logits = np.where(np.eye(V, dtype=bool), np.float32(5), np.float32(NEG_INF))
    for uniform in (0.0, 0.5, JUST_BELOW_ONE):
        tokens, logprobs = draw(jnp.full((V,), uniform, jnp.float32), logits)
        np.testing.assert_array_equal(tokens, np.arange(V))
        np.testing.assert_array_equal(logprobs, 0.0)


def test_impossible_tokens_are_never_drawn():
    V, n = 1000, 20_000
    rng = np.random.default_rng(0)
    logits = np.where(rng.random(V) < 0.7, NEG_INF, rng.normal(size=V))
    uniforms = jax.random.uniform(jax.random.key(0), (n,))
    tokens, _ = draw_row(uniforms, logits.astype(np.float32))
    assert np.all(logits[tokens] > NEG_INF)


def test_rounding_of_parallel_sums_never_draws_an_impossible_token():
    """A prefix sum computed as a tree may grow by rounding where nothing was added."""
    width = 600  # of a block; smaller blocks are summed in order
    rng = np.random.default_rng(0)
    logits = np.full(width * width, NEG_INF, np.float32)
    possible = np.flatnonzero(rng.random(width) < 0.3)  # all in the first block
    logits[possible] = rng.normal(size=len(possible))
    weights = np.asarray(jnp.exp(jnp.asarray(logits[:width] - np.max(logits))))
    sums = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(weights[None]))[0]
    grown = 1 + np.flatnonzero((np.diff(sums) > 0) & (weights[1:] == 0))
    if len(grown) == 0:
        pytest.skip("this backend sums in order: nothing to round")
    uniforms = (sums[grown - 1] / np.sum(weights)).astype(np.float32)
    below, above = (np.nextafter(uniforms, np.float32(end)) for end in (0, 1))
    tokens, _ = draw_row(np.concatenate([below, uniforms, above]), logits)
    assert np.all(logits[tokens] > NEG_INF)


@pytest.mark.parametrize("V", [7, 1000])
def test_returned_logprob_is_the_log_softmax(V):
    rng = np.random.default_rng(1)
    logits = (3 * rng.normal(size=(200, V)) + 50).astype(np.float32)
    uniforms = rng.random(200).astype(np.float32)
    tokens, logprobs = draw(uniforms, logits)
    for row in range(200):
        expected = oracle.log_softmax(logits[row].astype(np.float64))[tokens[row]]
        assert float(logprobs[row]) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------ the contract

V_SMALL = 9


@functools.cache
def contract_probs_of(top_k, top_p):
    cfg = Sampling(top_k=top_k, top_p=top_p)
    return jax.jit(
        lambda logits, temperature: jax.nn.softmax(
            contract_logits(logits, temperature, cfg)
        )
    )


@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 4, 20]),
    top_p=st.sampled_from([None, 0.05, 0.8]),
)
def test_contract_matches_the_oracle(seed, temperature, top_k, top_p):
    logits = 2 * np.random.default_rng(seed).normal(size=V_SMALL)
    if top_p is not None:  # no cumulative mass may sit on the boundary by rounding
        allowed = oracle.contract_probs(logits, temperature, top_k, None)
        masses = np.cumsum(np.sort(allowed)[::-1])
        assume(np.min(np.abs(masses - top_p)) > 1e-4)
    probs = contract_probs_of(top_k, top_p)(jnp.float32(logits), temperature)
    expected = oracle.contract_probs(logits, temperature, top_k, top_p)
    np.testing.assert_allclose(probs, expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"top_p": 1.0}, {"top_k": 50_000}])
def test_a_contract_that_keeps_all_only_divides_by_temperature(changes):
    logits = 4 * jax.random.normal(jax.random.key(0), (3, 5000))
    kept = contract_logits(logits, 0.7, Sampling(**changes))
    np.testing.assert_allclose(kept, logits / 0.7, rtol=1e-6)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 0.9}])
@pytest.mark.parametrize("temperature", [1e-6, 1e-8, 1e-20])
def test_a_tiny_temperature_with_a_cut_is_greedy(cut, temperature):
    """Logits / temperature fall below any constant that excluded tokens could get."""
    logits = jnp.array([[-40.0, -35.0, -36.0, -50.0]])
    kept = contract_logits(logits, temperature, Sampling(**cut))
    np.testing.assert_array_equal(jax.nn.softmax(kept), [[0.0, 1.0, 0.0, 0.0]])
    tokens, logprobs = sample_tokens(jnp.array([0.999]), kept)
    assert (int(tokens[0]), float(logprobs[0])) == (1, 0.0)


def test_contract_applies_to_each_row_alone(mode):
    logits = jax.random.normal(jax.random.key(0), (2, 3, V_SMALL))
    cfg = Sampling(top_k=4, top_p=0.8)
    together = mode(lambda x: contract_logits(x, 0.7, cfg))(logits)
    for index in np.ndindex(2, 3):
        expected = oracle.contract_probs(np.asarray(logits[index]), 0.7, 4, 0.8)
        np.testing.assert_allclose(jax.nn.softmax(together[index]), expected, atol=1e-5)


@pytest.mark.parametrize("cfg", [Sampling(top_k=3), Sampling(top_p=0.6)])
def test_gradients_through_the_contract_reach_kept_tokens_only(cfg):
    logits = jax.random.normal(jax.random.key(0), (V_SMALL,))

    def best(logits):
        return jnp.max(jax.nn.log_softmax(contract_logits(logits, 0.7, cfg)))

    kept = np.asarray(contract_logits(logits, 0.7, cfg)) > NEG_INF
    grads = np.asarray(jax.grad(best)(logits))
    assert np.all(np.isfinite(grads))
    np.testing.assert_array_equal(grads != 0, kept)
    assert 1 < np.sum(kept) < V_SMALL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("response_len", 0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_bad_contracts_are_refused_by_field_name(field, value):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})


# -------------------------------------------------------------------------- generation

PROMPT_LENGTHS = np.array([1, 3, 6, 4], np.int32)
B, P, R, EOS, PAD = 4, 6, 8, 3, 0
CONTRACTS = [
    (Sampling(response_len=R), 0.7),
    (Sampling(response_len=R), 1.0),
    (Sampling(response_len=R), 1.3),
    (Sampling(response_len=R, top_k=3), 0.7),
    (Sampling(response_len=R, top_p=0.8), 1.0),
]


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, 11, (B, P)).astype(np.int32)


@pytest.fixture(scope="module")
def policy(tiny, random_params):
    """A policy that ends some responses early and others not at all."""
    params = random_params(tiny())
    towards_end = 0.25 * params["embed"][EOS]
    norm = params["final_norm"]
    return {**params, "final_norm": {**norm, "bias": norm["bias"] + towards_end}}


@pytest.fixture(scope="session")
def compiled(tiny):
    """`generate` of the tiny model, compiled once for each contract and shape."""
    jitted = jax.jit(
        generate, static_argnames=("eos_id", "pad_id", "model", "sampling")
    )

    def run(params, prompts, lengths, temperature, sampling, *, seed=0, pad_id=PAD):
        return jitted(
            params,
            jnp.asarray(prompts),
            jnp.asarray(lengths),
            jax.random.key(seed),
            temperature,
            eos_id=EOS,
            pad_id=pad_id,
            model=tiny(),
            sampling=sampling,
        )

    return run


def uniforms_of(seed: int, steps: int, rows: int) -> np.ndarray:
    """The documented randomness: step t draws from fold_in(key, t). [B, R]."""
    key = jax.random.key(seed)
    return np.stack(
        [jax.random.uniform(jax.random.fold_in(key, t), (rows,)) for t in range(steps)],
        axis=1,
    )


def inside(rollout) -> np.ndarray:
    return np.arange(R) < np.asarray(rollout.lengths)[:, None]


def assert_same_rollout(actual, expected, rows=slice(None), atol=1e-5):
    np.testing.assert_array_equal(actual.responses[rows], expected.responses[rows])
    np.testing.assert_array_equal(actual.lengths[rows], expected.lengths[rows])
    np.testing.assert_array_equal(actual.ended[rows], expected.ended[rows])
    np.testing.assert_allclose(
        actual.logprobs[rows], expected.logprobs[rows], atol=atol
    )


@pytest.fixture(scope="module")
def teacher_forced(tiny, prompts):
    """Log-probabilities of given responses, as training computes them: [B, R]."""

    @functools.partial(jax.jit, static_argnames="sampling")
    def run(params, responses, temperature, sampling):
        hidden = forward_responses(
            params,
            jnp.asarray(prompts),
            jnp.asarray(PROMPT_LENGTHS),
            responses[:, None],
            tiny(),
        )
        contract = functools.partial(
            contract_logits, temperature=temperature, cfg=sampling
        )
        return token_logprobs(hidden[:, 0, :-1], params["embed"], responses, contract)

    return lambda *args: run(*args)[0]


@pytest.mark.parametrize(("sampling", "temperature"), CONTRACTS)
def test_sampled_logprobs_equal_teacher_forced_ones(
    compiled, teacher_forced, policy, prompts, sampling, temperature
):
    rollout = compiled(policy, prompts, PROMPT_LENGTHS, temperature, sampling)
    logprobs = teacher_forced(policy, rollout.responses, temperature, sampling)
    expected = np.where(inside(rollout), logprobs, 0.0)
    np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)
    assert np.any(rollout.logprobs < -0.1)  # not a certain policy


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_generation_is_sampling_with_the_whole_sequence_run_again(
    mode, tiny, random_params, policy, prompts, norm
):
    """Cache, early exit and batch change nothing: a naive sampler draws the same."""
    cfg = tiny(norm=norm)
    params = policy if norm == "pre" else random_params(cfg)
    sampling = Sampling(response_len=R)
    rollout = mode(
        lambda params, prompts, lengths: generate(
            params,
            prompts,
            lengths,
            jax.random.key(4),
            0.7,
            eos_id=EOS,
            pad_id=PAD,
            model=cfg,
            sampling=sampling,
        )
    )(params, jnp.asarray(prompts), jnp.asarray(PROMPT_LENGTHS))
    uniforms = uniforms_of(4, R, B)
    for row in range(B):
        response, logprobs, ended = oracle.sample_response(
            params,
            prompts[row, : PROMPT_LENGTHS[row]],
            uniforms[row],
            EOS,
            norm,
            lambda logits: oracle.contract_probs(logits, 0.7, None, None),
        )
        n = len(response)
        assert int(rollout.lengths[row]) == n
        assert bool(rollout.ended[row]) == ended
        np.testing.assert_array_equal(rollout.responses[row, :n], response)
        np.testing.assert_allclose(rollout.logprobs[row, :n], logprobs, atol=1e-5)


def test_greedy_decoding_takes_the_likeliest_token_of_a_full_run(
    compiled, policy, prompts
):
    greedy = Sampling(response_len=R, top_k=1)
    rollout = compiled(policy, prompts, PROMPT_LENGTHS, 1.0, greedy)
    for row in range(B):
        sequence = list(prompts[row, : PROMPT_LENGTHS[row]])
        for t in range(int(rollout.lengths[row])):
            logits = oracle.next_token_logits(policy, np.array(sequence), "pre")
            sequence.append(int(np.argmax(logits)))
            assert int(rollout.responses[row, t]) == sequence[-1]
    np.testing.assert_array_equal(rollout.logprobs, 0.0)
    other = compiled(policy, prompts, PROMPT_LENGTHS, 1.0, greedy, seed=9)
    assert_same_rollout(other, rollout)


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_ends_lengths_and_padding_agree(compiled, policy, prompts, pad_id):
    """Also where pad is end-of-text: what is padding follows from lengths alone."""
    seen = []
    for seed in range(4):
        rollout = compiled(
            policy,
            prompts,
            PROMPT_LENGTHS,
            1.0,
            CONTRACTS[0][0],
            seed=seed,
            pad_id=pad_id,
        )
        for row in range(B):
            response = list(np.asarray(rollout.responses[row]))
            n, ended = int(rollout.lengths[row]), bool(rollout.ended[row])
            assert 1 <= n <= R
            assert EOS not in response[: n - 1]
            assert ended == (response[n - 1] == EOS)
            assert ended or n == R
            assert response[n:] == [pad_id] * (R - n)
            assert not np.any(rollout.logprobs[row, n:])
            assert np.all(rollout.logprobs[row, :n] < 0)
            seen.append((ended, n == R))
    assert {(True, False), (False, True)} <= set(seen)  # both kinds were tried


def test_pad_id_changes_nothing_that_is_real(compiled, policy, prompts):
    args = (policy, prompts, PROMPT_LENGTHS, 1.0, CONTRACTS[0][0])
    one, two = compiled(*args), compiled(*args, pad_id=EOS)
    np.testing.assert_array_equal(one.lengths, two.lengths)
    np.testing.assert_array_equal(one.ended, two.ended)
    np.testing.assert_array_equal(one.logprobs, two.logprobs)
    real = inside(one)
    np.testing.assert_array_equal(one.responses[real], two.responses[real])


def test_the_loop_stops_with_the_last_response(monkeypatch, tiny, policy, prompts):
    steps = []

    def counted(*args):
        steps.append(1)
        return decode_step(*args)

    monkeypatch.setattr(sampling_module, "decode_step", counted)
    embed = policy["embed"]
    norm = {"scale": jnp.zeros((16,)), "bias": 3.0 * embed[EOS]}  # one distribution
    eager = {**policy, "final_norm": norm}
    with jax.disable_jit():
        rollout = generate(
            eager,
            jnp.asarray(prompts),
            jnp.asarray(PROMPT_LENGTHS),
            jax.random.key(0),
            1.0,
            eos_id=EOS,
            pad_id=PAD,
            model=tiny(),
            sampling=Sampling(response_len=R),
        )
    assert len(steps) == int(jnp.max(rollout.lengths)) < R


def test_rows_do_not_see_their_batch_mates(compiled, policy, prompts):
    alone = compiled(policy, prompts, PROMPT_LENGTHS, 1.0, CONTRACTS[0][0])
    others = prompts.copy()
    others[1:] = (others[1:] + 4) % 11
    lengths = np.array([1, 6, 2, 1], np.int32)
    together = compiled(policy, others, lengths, 1.0, CONTRACTS[0][0])
    assert_same_rollout(together, alone, rows=slice(0, 1))
    assert np.any(together.responses[1:] != alone.responses[1:])


def test_prompt_padding_is_never_read(compiled, policy, prompts):
    args = (PROMPT_LENGTHS, 1.0, CONTRACTS[0][0])
    expected = compiled(policy, prompts, *args)
    padding = np.arange(P) >= PROMPT_LENGTHS[:, None]
    spoiled = np.where(padding, (prompts + 5) % 11, prompts)
    assert_same_rollout(compiled(policy, spoiled, *args), expected, atol=0.0)
    wider = np.pad(prompts, ((0, 0), (0, 3)), constant_values=7)
    assert_same_rollout(compiled(policy, wider, *args), expected)


def test_the_key_decides_the_draws(compiled, policy, prompts):
    args = (policy, prompts, PROMPT_LENGTHS, 1.3, CONTRACTS[0][0])
    one, again, other = compiled(*args), compiled(*args), compiled(*args, seed=1)
    assert_same_rollout(again, one, atol=0.0)
    assert np.any(one.responses != other.responses)


def test_a_new_temperature_does_not_compile_again(tiny, policy, prompts):
    traces = []

    @jax.jit
    def run(params, temperature):
        traces.append(1)
        return generate(
            params,
            jnp.asarray(prompts),
            jnp.asarray(PROMPT_LENGTHS),
            jax.random.key(0),
            temperature,
            eos_id=EOS,
            pad_id=PAD,
            model=tiny(),
            sampling=Sampling(response_len=2),
        ).logprobs

    cold, hot = run(policy, 0.5), run(policy, 2.0)
    assert len(traces) == 1
    assert np.any(cold != hot)


@pytest.fixture(params=["apart", "written out", "looped"])
def lay_out(request, monkeypatch):
    """Chooses the caches: each layer's own, as on CPUs; one of layers that are written
    out, as on GPUs; one of a loop over layers, as where they are many. Tells which."""

    def choose():
        if request.param == "written out":
            monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        if request.param == "looped":
            monkeypatch.setattr(decoding, "MAX_UNROLLED", 0)
        return request.param

    return choose


def test_one_token_prompts_need_no_prefill(compiled, tiny, policy, prompts, lay_out):
    one = np.ones((B,), np.int32)
    padded = compiled(policy, prompts, one, 1.0, CONTRACTS[0][0])
    lay_out()
    static = {"eos_id": EOS, "pad_id": PAD, "model": tiny()}
    sample = functools.partial(generate, **static, sampling=CONTRACTS[0][0])
    ids = jnp.asarray(prompts[:, :1]), jnp.asarray(one), jax.random.key(0)
    assert_same_rollout(jax.jit(sample)(policy, *ids, 1.0), padded)


def test_decoding_on_the_cache_gives_the_states_of_a_full_run(
    tiny, random_params, lay_out
):
    cfg, layout = tiny(), lay_out()
    params = random_params(cfg)
    tokens = jnp.arange(7, dtype=jnp.int32)[None] % 5
    cache = prefill(params, tokens[:, :4], cfg, num_columns=4)  # holds three tokens
    one, stacked = (1, 2, 3 + 4, 8), (2, 1, 2, 3 + 4, 8)
    shapes = [x.shape for x in jax.tree.leaves(cache)]
    assert shapes == ([one] * 4 if layout == "apart" else [stacked] * 2)
    expected = forward(params, tokens, cfg)
    step = jax.jit(functools.partial(decode_step, cfg=cfg))
    layers = layers_apart(params, cfg)
    assert isinstance(layers["blocks"], tuple) == (layout != "looped")
    for t in range(3, 7):
        hidden, cache = step(
            layers,
            cache,
            tokens[:, t],
            jnp.full((1,), t, jnp.int32),
            jnp.int32(t),
            jnp.arange(7)[None] <= t,
        )
        np.testing.assert_allclose(hidden, expected[:, t], atol=1e-5)


def test_stretches_of_the_cache_change_no_rollout(
    monkeypatch, compiled, tiny, policy, prompts, lay_out
):
    """Also if the last is never reached."""
    eager = policy["final_norm"]["bias"] + 3.0 * policy["embed"][EOS]  # ends sooner
    eager = policy | {"final_norm": policy["final_norm"] | {"bias": eager}}
    args = (prompts, PROMPT_LENGTHS, 1.0, CONTRACTS[0][0])
    expected = [compiled(params, *args) for params in (policy, eager)]
    monkeypatch.setattr(decoding, "MIN_STRETCH", 2)
    lay_out()
    ends = stretches(R)
    last = [np.searchsorted(ends, np.max(rollout.lengths)) for rollout in expected]
    assert len(ends) == 4 and last[1] < last[0]
    static = {"eos_id": EOS, "pad_id": PAD, "model": tiny()}
    static["sampling"] = Sampling(response_len=R)
    sample = jax.jit(functools.partial(generate, **static))
    ids = jnp.asarray(prompts), jnp.asarray(PROMPT_LENGTHS), jax.random.key(0)
    for params, rollout in zip((policy, eager), expected, strict=True):
        assert_same_rollout(sample(params, *ids, 1.0), rollout)


@given(st.integers(1, 1000))
def test_stretches_end_with_the_response(length):
    ends = stretches(length)
    widths = np.diff([0, *ends])
    assert ends[-1] == length and 1 <= len(ends) <= 4
    assert len(ends) == 1 or min(widths) >= decoding.MIN_STRETCH
    assert max(widths) - min(widths) <= 1


def test_too_long_a_rollout_is_refused_with_advice(tiny, policy, prompts):
    with pytest.raises(ValueError, match="max_len 32; shorten"):
        generate(
            policy,
            jnp.asarray(prompts),
            jnp.asarray(PROMPT_LENGTHS),
            jax.random.key(0),
            1.0,
            eos_id=EOS,
            pad_id=PAD,
            model=tiny(),
            sampling=Sampling(response_len=32 - P + 1),
        )
