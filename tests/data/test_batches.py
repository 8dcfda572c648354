"""A batch is a pure function of the step; shift, weights, shards, counts are exact."""

import collections

import numpy as np
import pytest

from rlhf_jax.data.batches import (
    Batches,
    TokenBatch,
    demonstration_batches,
    packed_batches,
    prompt_batches,
)
from rlhf_jax.data.packed_rankings import packed_ranking_batches
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.ranking_batches import encode_rankings, ranking_batches
from rlhf_jax.data.records import DataError, Demonstration, Prompt, Ranking

FORM = PromptFormat(suffix=":", separator=" ")


class Letters:
    """A tokenizer small enough to check by hand: one id per letter, pad equal to eos.

    The ids of text may be 0 as well ("_"), so that nothing can be masked by id.
    """

    pad_id = eos_id = 0
    bos_id = 1
    vocab_size = 128
    fingerprint = "letters"

    def encode(self, text):
        return np.array([0 if c == "_" else ord(c) for c in text], np.int32)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


LETTERS = Letters()


def ids(text):
    """Ids of a text in which "." is the end token."""
    return [0 if c in "._" else ord(c) for c in text]


def demonstrations(count):
    return [Demonstration(chr(65 + i % 26) * (1 + i % 3), "r") for i in range(count)]


def prompts(count):
    return [Prompt(f"{i:03d}") for i in range(count)]


def rankings(count):
    return [
        Ranking(f"{i:03d}", ("a", "bb"), (1, 2), (True, True)) for i in range(count)
    ]


def documents(count):
    return [f"{i:05d}" for i in range(count)]  # with its end, one window of 6 each


def build(kind, count, batch_size, seed, shard=(0, 1)):
    match kind:
        case "packed":
            return packed_batches(documents(count), LETTERS, batch_size, 6, seed, shard)
        case "demonstrations":
            records = [Demonstration(f"{i:03d}", "r") for i in range(count)]
            return demonstration_batches(
                records, LETTERS, FORM, batch_size, 8, seed, shard=shard
            )
        case "rankings":
            encoded = encode_rankings(rankings(count), LETTERS, FORM, 5, 4)
            return ranking_batches(encoded, batch_size, seed, shard)
        case "prompts":
            return prompt_batches(
                prompts(count), LETTERS, FORM, batch_size, 5, seed, shard
            )


KINDS = ["packed", "demonstrations", "rankings", "prompts"]


def arrays(batch):
    found = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return {name: array for name, array in found.items() if array is not None}


def assert_same(a, b):
    assert type(a) is type(b)
    for name, value in arrays(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)
        assert value.dtype == getattr(b, name).dtype


def first_array(batch):
    return batch.tokens if hasattr(batch, "tokens") else batch.prompts


def keys(batches, rows):
    """The examples of the given global rows, by their own ids."""
    by_step = collections.defaultdict(list)
    size = batches(0).tokens.shape[0] if hasattr(batches(0), "tokens") else None
    size = size or batches(0).prompts.shape[0]
    for row in rows:
        by_step[row // size].append(row % size)
    return [
        first_array(batches(step))[i].tobytes()
        for step, places in by_step.items()
        for i in places
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, None])
def test_a_batch_is_a_pure_function_of_the_step(kind, seed):
    steps = 4 if seed is None else 11  # into later epochs
    forward = build(kind, 13, 4, seed)
    expected = [forward(step) for step in range(steps)]
    again = build(kind, 13, 4, seed)
    for step in [*reversed(range(steps)), 2, 2]:
        assert_same(again(step), expected[step])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (13, 4), (3, 4), (1, 2)])
def test_every_example_comes_once_per_epoch(kind, count, batch_size):
    batches = build(kind, count, batch_size, 0)
    assert batches.num_examples == count
    assert batches.steps_per_epoch == -(-count // batch_size)
    epochs = [keys(batches, range(e * count, (e + 1) * count)) for e in range(4)]
    for epoch in epochs:
        assert len(set(epoch)) == count and set(epoch) == set(epochs[0])
    if count > 10:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_give_orders_of_their_own():
    # Grain's epoch e of seed s is its epoch e - 1 of seed s + 1; ours must not be.
    orders = set()
    for seed in range(3):
        batches = Batches(lambda mine, batch, size: mine, 20, 20, seed)
        orders |= {tuple(batches(epoch).tolist()) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("processes", [2, 4])
def test_process_shards_tile_the_global_batch(kind, seed, processes):
    whole = build(kind, 13, 4, seed)
    parts = [build(kind, 13, 4, seed, (p, processes)) for p in range(processes)]
    for step in range(4 if seed is None else 9):
        pieces = [arrays(part(step)) for part in parts]
        for name, value in arrays(whole(step)).items():
            joined = np.concatenate([piece[name] for piece in pieces])
            np.testing.assert_array_equal(joined, value)
            assert pieces[0][name].shape[0] == 4 // processes
        assert {part.real_rows(step) for part in parts} == {whole.real_rows(step)}


@pytest.mark.parametrize("shard", [(0, 3), (0, 8)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(shard):
    with pytest.raises(ValueError, match="multiple of the number of processes"):
        build("prompts", 9, 4, 0, shard)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(shard):
    with pytest.raises(ValueError, match="must be"):
        build("prompts", 9, 4, 0, shard)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_seed_examples_come_in_order_and_end(kind):
    batches = build(kind, 10, 4, None)
    assert [batches.real_rows(step) for step in range(3)] == [4, 4, 2]
    seen = [first_array(batches(step))[:, :3] for step in range(3)]
    numbers = ["".join(map(chr, row)) for row in np.concatenate(seen)[:10]]
    width = 5 if kind == "packed" else 3
    assert numbers == [f"{i:0{width}d}"[:3] for i in range(10)]
    for step in (3, -1):
        with pytest.raises(IndexError):
            batches(step)
    last = batches(2)
    if hasattr(last, "weights"):
        assert np.all(last.weights[2:] == 0) and np.all(last.tokens[2:] == 0)
        np.testing.assert_allclose(last.weights.sum(), 1, rtol=1e-6)
    else:
        assert np.all(last.prompt_lengths[2:] == 1)
    if hasattr(last, "ranks"):
        assert np.all(last.ranks[2:] == 0) and np.all(last.response_lengths[2:] == 0)


@pytest.mark.parametrize("kind", ["packed", "demonstrations"])
@pytest.mark.parametrize("seed", [1, None])
def test_weights_sum_to_one_over_the_global_batch(kind, seed):
    parts = [build(kind, 13, 4, seed, (p, 2)) for p in range(2)]
    for step in range(4):
        total = sum(part(step).weights.astype(np.float64).sum() for part in parts)
        np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_packed_windows_predict_every_token_once():
    texts = ["ab_", "", "cdefg", "h"]
    batches = packed_batches(texts, LETTERS, 2, 4, None)
    stream = ids("ab_..cdefg.h.")
    assert batches.num_examples == 3 and batches.steps_per_epoch == 2
    first, second = batches(0), batches(1)
    np.testing.assert_array_equal(first.tokens, [ids("ab_."), ids(".cde")])
    np.testing.assert_array_equal(first.targets, [ids("b_.."), ids("cdef")])
    np.testing.assert_array_equal(first.weights, np.full((2, 4), 1 / 8, np.float32))
    np.testing.assert_array_equal(second.tokens, [ids("fg.h"), [0] * 4])
    np.testing.assert_array_equal(second.targets, [ids("g.h."), [0] * 4])
    np.testing.assert_array_equal(second.weights, [[0.25] * 4, [0] * 4])
    rows = [b.targets[b.weights > 0] for b in (first, second)]
    assert np.concatenate(rows).tolist() == stream[1:]


@pytest.mark.parametrize("length", range(1, 14))
@pytest.mark.parametrize("seq_len", [1, 3, 4, 20])
def test_packing_loses_no_token_at_any_length(length, seq_len):
    text = "abcdefghijklmnop"[:length]
    batches = packed_batches([text], LETTERS, 2, seq_len, None)
    got = [batches(step) for step in range(batches.steps_per_epoch)]
    targets = np.concatenate([b.targets[b.weights > 0] for b in got])
    inputs = np.concatenate([b.tokens[b.weights > 0] for b in got])
    assert targets.tolist() == ids(text + ".")[1:]
    assert inputs.tolist() == ids(text)
    for batch in got:
        np.testing.assert_allclose(batch.weights.sum(), 1, rtol=1e-6)


def test_packing_shuffles_whole_documents_once():
    texts = [chr(65 + i) * 3 for i in range(26)]
    orders = []
    for seed in (0, 0, 1, None):
        batches = packed_batches(texts, LETTERS, 1, 104, seed)
        assert batches.steps_per_epoch == 1
        stream = [int(batches(0).tokens[0, 0]), *batches(0).targets[0].tolist()]
        stream = "".join("." if i == 0 else chr(i) for i in stream[:104])
        assert sorted(stream.split(".")[:-1]) == texts
        orders.append(stream)
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3 and orders[3] == ".".join(texts) + "."


def test_demonstrations_are_shifted_once_and_weigh_the_response():
    records = [Demonstration("a_", "_c"), Demonstration("d", "e")]
    response, everything = (
        demonstration_batches(records, LETTERS, FORM, 2, 6, None, loss_on=loss_on)(0)
        for loss_on in ("response", "all")
    )
    # a_:_c. has 6 tokens, d:e. has 4; "." is the end token, which equals pad and "_".
    for batch in (response, everything):
        np.testing.assert_array_equal(batch.tokens, [ids("a_:_c") + [0], ids("d:e...")])
        np.testing.assert_array_equal(batch.targets, [ids("_:_c.."), ids(":e....")])
        assert batch.tokens.dtype == batch.targets.dtype == np.int32
        assert batch.weights.dtype == np.float32
    np.testing.assert_allclose(
        response.weights, np.array([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]) / 5
    )
    np.testing.assert_allclose(
        everything.weights, np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]) / 8
    )


def test_demonstrations_share_rows_and_each_is_there_as_if_alone():
    records = [Demonstration("a_", "_c"), Demonstration("d", ""), Demonstration("", "")]
    records += [Demonstration("f", "gh"), Demonstration("i", "j")]
    batch = demonstration_batches(records, LETTERS, FORM, 5, 7, None, num_epochs=1)(0)
    # Tokens read of each: 5, 2, 1, 4, 3; the end of a response is a target alone.
    rows = ["a_:_cd:", "f:ghi:j", ":......"]
    targets = ["_:_c.:.", ":gh.:j.", "......."]
    np.testing.assert_array_equal(batch.tokens, [ids(row) for row in rows])
    np.testing.assert_array_equal(batch.targets, [ids(row) for row in targets])
    np.testing.assert_array_equal(
        batch.documents,
        [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0] * 7],
    )
    on = [[0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(batch.weights, np.array(on) / 10, rtol=1e-6)


def sequences(batch):
    """What the documents of a batch hold: tokens, targets and weights of each."""
    found = []
    for row in range(len(batch.tokens)):
        numbers = batch.documents[row]
        length = np.flatnonzero(batch.weights[row])[-1:] + 1  # the rest is padding
        for number in np.unique(numbers[: int(length.sum())]):
            at = np.flatnonzero(numbers == number)
            parts = [x[row, at] for x in (batch.tokens, batch.targets, batch.weights)]
            end = np.flatnonzero(parts[2])[-1] + 1
            found.append(tuple(tuple(part[:end].tolist()) for part in parts))
    return sorted(found)


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("processes", [1, 2])
def test_batches_of_shared_rows_have_one_shape_and_lose_nothing(seed, processes):
    sizes = np.random.default_rng(0).integers(0, 12, (50, 2))
    records = [Demonstration("a" * n, "b" * m) for n, m in sizes]
    records.append(Demonstration("c" * 40, "d"))
    epochs = 1 if seed is None else 3

    def batches(shard=(0, 1), num_epochs=None):
        how = {"shard": shard, "num_epochs": num_epochs, "width": 45}
        return demonstration_batches(records, LETTERS, FORM, 8, 60, seed, **how)

    alone = batches()
    parts = [batches((p, processes), epochs) for p in range(processes)]
    shapes = set()
    for step in range(epochs * alone.steps_per_epoch):
        made = [arrays(part(step)) for part in parts]
        shapes |= {part["tokens"].shape for part in made}
        whole = {name: np.concatenate([p[name] for p in made]) for name in made[0]}
        expected = alone(step)
        numbers = np.zeros_like(expected.tokens)
        assert sequences(TokenBatch(**whole)) == sequences(
            expected.replace(documents=numbers)
        )
    ((rows, width),) = shapes
    assert width == 45 and rows * processes <= 6


def test_demonstrations_that_save_no_quarter_of_the_rows_stay_alone():
    records = [Demonstration("a" * 20, "b")] * 3 + [Demonstration("a", "b")]
    made = demonstration_batches(records, LETTERS, FORM, 4, 30, None, num_epochs=1)
    assert made(0).documents is not None  # three of four rows
    records[3] = records[0]
    made = demonstration_batches(records, LETTERS, FORM, 4, 30, None, num_epochs=1)
    assert made(0).documents is None and len(made(0).tokens) == 4


def test_the_longest_demonstration_that_fits_is_kept_and_longer_ones_counted():
    records = [Demonstration("p", "r" * n) for n in (1, 2, 3, 4, 5)]
    batches = demonstration_batches(records, LETTERS, FORM, 3, 5, None)
    assert (batches.num_examples, batches.num_dropped) == (3, 2)
    np.testing.assert_array_equal(batches(0).targets[2], ids(":rrr."))
    with pytest.raises(DataError) as caught:
        demonstration_batches(records[2:], LETTERS, FORM, 3, 4, None)
    for words in ("all 3 are longer than seq_len 4", "5 to 7", "Raise seq_len"):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="'response' or 'all'"):
        demonstration_batches(records, LETTERS, FORM, 3, 5, None, loss_on="none")


def test_rankings_are_laid_out_with_lengths_and_ranks():
    records = [
        Ranking("p", ("a", "_b", ""), (2, 1, 2), (True, False, True)),
        Ranking("qq", ("c", "dd"), (7, 3), (True, True)),
    ]
    encoded = encode_rankings(records, LETTERS, FORM, 4, 3)
    batch = ranking_batches(encoded, 2, None)(0)
    np.testing.assert_array_equal(batch.prompts, [ids("p:.."), ids("qq:.")])
    np.testing.assert_array_equal(batch.prompt_lengths, [2, 3])
    np.testing.assert_array_equal(
        batch.responses,
        [
            [ids("a.."), ids("_b."), ids("...")],
            [ids("c.."), ids("dd."), ids("...")],
        ],
    )
    np.testing.assert_array_equal(batch.response_lengths, [[2, 2, 1], [2, 3, 0]])
    np.testing.assert_array_equal(batch.ranks, [[2, 1, 2], [7, 3, 0]])
    assert {value.dtype for value in arrays(batch).values()} == {np.dtype(np.int32)}


def test_long_responses_and_rankings_without_a_pair_are_counted():
    ended = (True,) * 3
    records = [
        Ranking("p", ("a", "b", "long!"), (1, 2, 3), ended),  # loses one response
        Ranking("p", ("a", "long!", "long!"), (1, 2, 3), ended),  # one is left
        Ranking("p", ("a", "b", "long!"), (1, 1, 2), ended),  # a tie is left
        Ranking("p", ("a", "b", "c"), (2, 2, 2), ended),  # only ties
        Ranking("longp", ("a", "b", "c"), (1, 2, 3), ended),  # prompt too long
        Ranking("p", ("cc", "d", "e"), (1, 2, 3), ended),  # fits exactly
    ]
    encoded = encode_rankings(records, LETTERS, FORM, 3, 3)
    batches = ranking_batches(encoded, 2, None)
    assert (batches.num_examples, encoded.num_dropped) == (2, 4)
    assert (encoded.num_tied, encoded.num_dropped_responses) == (1, 4)
    np.testing.assert_array_equal(batches(0).ranks, [[1, 2, 0], [1, 2, 3]])
    nothing = encode_rankings(records[1:5], LETTERS, FORM, 3, 3)
    with pytest.raises(DataError) as caught:
        ranking_batches(nothing, 2, None)
    for words in ("none of 4 is left", "6 tokens (prompt_len 3)", "6 (response_len 3)"):
        assert words in str(caught.value)


def laid_out(batch):
    """Sorted (prompt, [(response, rank)]) of packed rankings, by their own arrays."""
    found = []
    for n, g in np.argwhere((batch.ranks > 0).any(axis=2)):
        tokens, positions, branches = (
            x[n] for x in (batch.tokens, batch.positions, batch.branches)
        )
        here = np.flatnonzero(batch.documents[n] == g)
        here = here[here <= max(here[0], batch.last[n, g].max())]  # padding is behind
        asked = here[branches[here] == 0]
        np.testing.assert_array_equal(positions[asked], np.arange(len(asked)))
        responses = []
        for k in np.flatnonzero(batch.ranks[n, g]):
            own = here[branches[here] == k + 1]
            following = len(asked) + np.arange(len(own))
            np.testing.assert_array_equal(positions[own], following)
            assert batch.last[n, g, k] == (own if len(own) else asked)[-1]
            responses.append((tokens[own].tolist(), int(batch.ranks[n, g, k])))
        found.append((tokens[asked].tolist(), responses))
    return sorted(found)


def padded(batch):
    """The same of padded ones."""
    found = []
    for b in range(len(batch.ranks)):
        prompt = batch.prompts[b, : batch.prompt_lengths[b]]
        kept = np.flatnonzero(batch.ranks[b])
        sizes = batch.response_lengths[b]
        responses = [batch.responses[b, k, : sizes[k]].tolist() for k in kept]
        ranks = batch.ranks[b, kept].tolist()
        found.append((prompt.tolist(), list(zip(responses, ranks, strict=True))))
    return sorted(found)


@pytest.mark.parametrize("processes", [1, 2])
def test_packed_rankings_have_one_shape_and_lose_nothing(processes):
    rng = np.random.default_rng(0)

    def ranking(i):
        count = rng.integers(2, 6)
        sizes = rng.integers(0, 30, count)
        responses = tuple("abcdefgh"[(i + k) % 8] * n for k, n in enumerate(sizes))
        ended = tuple(bool(x) for x in rng.integers(0, 2, count))
        ranks = tuple(range(count, 0, -1))
        return Ranking("i" * rng.integers(20), responses, ranks, ended)

    encoded = encode_rankings([ranking(i) for i in range(50)], LETTERS, FORM, 20, 30)
    epochs, size, seed = 3, 8, 4
    alone = ranking_batches(encoded, size, seed)
    parts = [
        packed_ranking_batches(encoded, size, seed, epochs, 2, (p, processes))
        for p in range(processes)
    ]
    shapes = set()
    for step in range(epochs * alone.steps_per_epoch):
        made = [part(step) for part in parts if part is not None]
        shapes |= {tuple(x.shape for x in arrays(batch).values()) for batch in made}
        found = sorted(ranking for batch in made for ranking in laid_out(batch))
        assert found == padded(alone(step))
    ((shape, *_),) = shapes
    rows = shape[0] * processes
    assert rows % 2 == 0 and shape[1] % 64 == 0
    assert rows * shape[1] < size * (20 - 1 + 5 * (30 + 1))


def test_rankings_stay_padded_where_packing_saves_nothing():
    """P 3, K 2, R 40: 84 positions a ranking when padded, in rows of 64 or more."""
    short = Ranking("p", ("a" * 20, "b"), (1, 2), (True, True))
    long = Ranking("pp", ("a" * 39, "b" * 39), (1, 2), (True, True))
    for records, num_packed in (([short, long] * 2, 256), ([long] * 4, None)):
        encoded = encode_rankings(records, LETTERS, FORM, 3, 40)
        packed = packed_ranking_batches(encoded, 4, 0, num_epochs=1)
        assert num_packed == (packed and packed(0).tokens.size)


def test_prompts_are_padded_and_long_ones_counted():
    records = [Prompt("a_"), Prompt("bcd"), Prompt("efgh")]
    batches = prompt_batches(records, LETTERS, FORM, 2, 4, None)
    assert (batches.num_examples, batches.num_dropped) == (2, 1)
    np.testing.assert_array_equal(batches(0).prompts, [ids("a_:."), ids("bcd:")])
    np.testing.assert_array_equal(batches(0).prompt_lengths, [3, 4])
    with pytest.raises(DataError, match="all 3 .*prompt_len 2.* 3 to 5 .*Raise prompt"):
        prompt_batches(records, LETTERS, FORM, 2, 2, None)


def test_no_records_is_an_error_in_every_kind():
    nothing = encode_rankings([], LETTERS, FORM, 4, 4)
    for make in (
        lambda: packed_batches([], LETTERS, 1, 4, 0),
        lambda: packed_batches([""], LETTERS, 1, 4, 0),
        lambda: demonstration_batches([], LETTERS, FORM, 1, 4, 0),
        lambda: ranking_batches(nothing, 1, 0),
        lambda: packed_ranking_batches(nothing, 1, 0, 1),
        lambda: prompt_batches([], LETTERS, FORM, 1, 4, 0),
    ):
        with pytest.raises(DataError, match="there are none|holds no text"):
            make()


def test_shuffled_rows_far_ahead_need_no_replay():
    batches = Batches(lambda mine, batch, size: mine, 1000, 8, 5)
    far = batches(10**6)
    assert far.shape == (8,) and np.all((far >= 0) & (far < 1000))
    np.testing.assert_array_equal(far, batches(10**6))
