"""Text comes back whole, ids are the same everywhere, and unfit models are refused."""

import hashlib
import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_jax.data.records import DataError
from rlhf_jax.data.tokenizer import Tokenizer, tokenize_corpus, train_tokenizer

DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog.\nThe dog sleeps.\n\nThe end.",
    "A caf\u00e9 in the town; the fox and the dog eat there every day.",
] * 3
VOCAB = 330
RULES = dict(
    model_type="bpe",
    vocab_size=VOCAB,
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    user_defined_symbols=["\n"],
    pad_id=0,
    unk_id=1,
    bos_id=2,
    eos_id=3,
    eos_piece="<|endoftext|>",
    minloglevel=2,
)


def model_with(**rules) -> bytes:
    """A model trained by SentencePiece itself, with some rules of ours changed."""
    model = io.BytesIO()
    lines = "\n".join(DOCUMENTS).split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**RULES, **rules}
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, VOCAB)


TEXT = st.text(
    st.one_of(
        st.sampled_from(list(" \n\t\r\u2581\u2585\u00e9<|>")),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    )
) | st.lists(
    st.sampled_from(
        [" ", "\n", "the", "<|endoftext|>", "<s>", "<unk>", "<pad>", "<0x0A>", "\u2581"]
        + ["\U0001f600\u200d\U0001f525", "\r\n", "fox", "e\u0301", "\ufffd", "\ufeff"]
    )
).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=TEXT)
@example(text="")
@example(text="  two  spaces \n\n and newlines\n ")
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32 and ids.ndim == 1
    # Text never makes a special id, and an id is an index into the vocabulary.
    assert np.all((ids > 3) & (ids < tokenizer.vocab_size))
    # An end token is dropped, as is padding.
    assert tokenizer.decode([2, *ids, 3, 0, 0]) == text


@settings(max_examples=100, deadline=None)
@given(first=TEXT, second=TEXT)
def test_a_newline_is_a_boundary_of_tokens(tokenizer, first, second):
    whole = tokenizer.encode(first + "\n" + second)
    parts = [tokenizer.encode(part) for part in (first + "\n", second)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_batches_encode_as_single_texts(tokenizer):
    texts = [*DOCUMENTS, "", "\n", "\u2581", "a\u2581\nb"]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_cutting_at_newlines_gives_sentencepieces_own_ids(tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.serialized)
    for text in DOCUMENTS:
        assert tokenizer.encode(text).tolist() == model.encode(text)


def test_pieces_are_merged_and_the_vocabulary_has_the_size_asked(tokenizer):
    assert tokenizer.vocab_size == VOCAB
    assert len(tokenizer.encode("the dog and the fox")) < 10


def test_training_twice_gives_the_same_bytes(tokenizer):
    again = train_tokenizer(iter(DOCUMENTS), VOCAB)
    assert again.serialized == tokenizer.serialized
    digest = hashlib.sha256(tokenizer.serialized).hexdigest()
    assert again.fingerprint == tokenizer.fingerprint == digest
    other = train_tokenizer(DOCUMENTS, VOCAB + 1)
    assert other.fingerprint != tokenizer.fingerprint


def test_training_uses_long_lines_and_reserved_characters(capfd):
    # SentencePiece itself would drop a line so long, and a line with U+2585.
    line = "zebra crossing " * 20_000
    tokenizer = train_tokenizer([line, "\u2585 giraffe giraffe giraffe"], 295)
    assert len(tokenizer.encode("zebra crossing")) < 5
    assert len(tokenizer.encode(" giraffe")) < 5
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert capfd.readouterr() == ("", "")


def test_a_sample_covers_the_whole_corpus():
    early, late = ["early bird\n" * 300] * 10, ["late worm\n" * 300] * 10
    tokenizer = train_tokenizer([*early, *late], 285, max_bytes=2_000)
    assert len(tokenizer.encode(" bird")) < 4 and len(tokenizer.encode(" worm")) < 4


def test_vocabulary_limits_are_named(capfd):
    with pytest.raises(DataError, match="largest possible is") as caught:
        train_tokenizer(DOCUMENTS, 5000)
    largest = int(str(caught.value).split("largest possible is ")[1].split(";")[0])
    assert train_tokenizer(DOCUMENTS, largest).vocab_size == largest
    with pytest.raises(DataError, match="Raise it to at least") as caught:
        train_tokenizer(DOCUMENTS, 261)
    smallest = int(str(caught.value).split("at least ")[1].rstrip("."))
    assert train_tokenizer(DOCUMENTS, smallest).vocab_size == smallest
    for empty in ([], ["\n", ""]):
        with pytest.raises(DataError, match="holds no text"):
            train_tokenizer(empty, 300)
    assert capfd.readouterr() == ("", "")


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    tokenizer.save(path)
    tokenizer.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint


def test_a_model_made_by_sentencepiece_with_these_rules_is_accepted(tmp_path):
    path = tmp_path / "given.model"
    path.write_bytes(model_with())
    assert Tokenizer.load(path).decode(Tokenizer.load(path).encode("  a b")) == "  a b"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (dict(pad_id=-1, unk_id=0, bos_id=1, eos_id=2), "field 'pad_id': is -1"),
        (dict(bos_id=3, eos_id=2), "field 'bos_id': is 3"),
        (dict(eos_piece="</s>"), "field 'eos_piece': is '</s>'"),
        (dict(byte_fallback=False, vocab_size=60), "field 'byte_fallback': is off"),
        (dict(user_defined_symbols=[]), "is not a piece of its own"),
        (dict(add_dummy_prefix=True), "changes the text"),
        (dict(remove_extra_whitespaces=True), "changes the text"),
        (dict(normalization_rule_name="nmt_nfkc"), "changes the text"),
        (dict(normalization_rule_name="nfkc"), "changes the text"),
        (dict(normalization_rule_name="nmt_nfkc_cf"), "changes the text"),
    ],
)
def test_a_model_with_other_rules_is_refused(tmp_path, rules, words):
    path = tmp_path / "other.model"
    path.write_bytes(model_with(**rules))
    with pytest.raises(DataError) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "pad_id 0, unk_id 1, bos_id 2, eos_id 3" in str(caught.value)


def test_a_file_that_is_no_model_is_refused(tokenizer, tmp_path, capfd):
    path = tmp_path / "bad.model"
    with pytest.raises(DataError, match="no such tokenizer file"):
        Tokenizer.load(path)
    whole = tokenizer.serialized
    for content in (b"", b"some text", *(whole[:n] for n in range(1, len(whole), 97))):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            Tokenizer.load(path)
        assert str(caught.value).startswith(f"{path}: ")
    assert capfd.readouterr() == ("", "")


def test_a_corpus_is_one_array_with_an_end_after_each_document(tokenizer):
    documents = ["one", "", "the <|endoftext|>\n"]
    ids = tokenize_corpus(documents, tokenizer)
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert len(ends) == 3 and ends[-1] == len(ids) - 1
    starts = [0, *(ends[:-1] + 1)]
    parts = [ids[a:b] for a, b in zip(starts, ends, strict=True)]
    assert [tokenizer.decode(part) for part in parts] == documents


def test_kept_tokens_are_reused_and_named_by_content(tokenizer, tmp_path):
    def tokens(documents, by=tokenizer):
        return np.asarray(tokenize_corpus(documents, by, tmp_path / "cache"))

    first = tokens(["one", "two"])
    (path,) = (tmp_path / "cache").iterdir()
    stamp = path.stat().st_mtime_ns
    np.testing.assert_array_equal(tokens(["one", "two"]), first)
    np.testing.assert_array_equal(tokenize_corpus(["one", "two"], tokenizer), first)
    assert path.stat().st_mtime_ns == stamp
    for documents in (["onet", "wo"], ["one two"], ["two", "one"], ["one"]):
        expected = tokenize_corpus(documents, tokenizer)
        np.testing.assert_array_equal(tokens(documents), expected)
    other = train_tokenizer(DOCUMENTS, VOCAB - 20)
    expected = tokenize_corpus(["one", "two"], other)
    np.testing.assert_array_equal(tokens(["one", "two"], other), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_damaged_kept_tokens_say_what_to_delete(tokenizer, tmp_path):
    tokenize_corpus(["one", "two"], tokenizer, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    ids = whole.index(tokenize_corpus(["one", "two"], tokenizer).tobytes())
    directory = whole.index(b"PK\1\2")
    # an id that the vocabulary may not even have; how the file is packed; where it is
    wounds = [bytearray(whole) for _ in range(4)]
    for wound, place in zip(wounds, (ids + 1, directory + 10, -5, -8), strict=True):
        wound[place] ^= 64
    for content in (whole[:-1], whole[:20], b"", *wounds):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tokens-.*\.npz: .*Delete this file"):
            tokenize_corpus(["one", "two"], tokenizer, tmp_path)
