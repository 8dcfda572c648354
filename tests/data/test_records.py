"""Every field of every kind of line is checked, and the message says where and what."""

import functools
import gzip
import json

import pytest

from rlhf_jax.data import records
from rlhf_jax.data.records import DataError, Demonstration, Prompt, Ranking

READERS = {
    "demonstrations": records.read_demonstrations,
    "rankings": records.read_rankings,
    "comparisons": functools.partial(records.read_file, "comparisons"),
    "prompts": functools.partial(records.read_file, "prompts"),
}
GOOD = {
    "demonstrations": {"prompt": "Say hi", "response": "hi"},
    "rankings": {"prompt": "Say hi", "responses": ["hi", "no", ""], "ranks": [1, 2, 2]},
    "comparisons": {"prompt": "Say hi", "chosen": "hi", "rejected": ""},
    "prompts": {"prompt": "Say hi"},
}
WITHOUT = object()


def changed(kind, **fields):
    line = {**GOOD[kind], **fields}
    return json.dumps({k: v for k, v in line.items() if v is not WITHOUT})


def ranking(**fields):
    return "rankings", changed("rankings", **fields)


# (kind, line, field named or None, words of the message)
BAD_TEXTS = [
    (kind, changed(kind, **{field: value}), field, words)
    for kind, field in [
        ("demonstrations", "prompt"),
        ("demonstrations", "response"),
        ("rankings", "prompt"),
        ("comparisons", "prompt"),
        ("prompts", "prompt"),
    ]
    for value, words in [
        (WITHOUT, "is missing"),
        ("", "is empty"),
        (" \n\t", "is empty"),
        (None, "is null, not a string"),
        (7, "is 7, not a string"),
        (["a"], "not a string"),
        ("a\0b", "U+0000"),
        ("a\ud83d", "surrogate"),
    ]
]
BAD_PAIRS = [
    ("comparisons", changed("comparisons", **{field: value}), field, words)
    for field in ("chosen", "rejected")
    for value, words in [(WITHOUT, "is missing"), (1.5, "not a string"), ("\0", "U+0")]
]
BAD_RANKINGS = [
    (*ranking(responses=WITHOUT), "responses", "is missing"),
    (*ranking(responses="hi"), "responses", "not a list"),
    (*ranking(responses={"a": 1}), "responses", "not a list"),
    (*ranking(responses=[]), "responses", "holds 0 response"),
    (*ranking(responses=["hi"], ranks=[1]), "responses", "holds 1 response"),
    (*ranking(responses=["hi", None, "a"]), "responses[1]", "is null, not a string"),
    (*ranking(responses=["hi", "a", "b\0"]), "responses[2]", "U+0000"),
    (*ranking(responses=["\udc00", "a", "b"]), "responses[0]", "surrogate"),
    (*ranking(ranks=WITHOUT), "ranks", "is missing"),
    (*ranking(ranks=1), "ranks", "not a list"),
    (*ranking(ranks=[1, 2]), "ranks", "has 2 entries for 3 responses"),
    (*ranking(ranks=[1, 2, 3, 4]), "ranks", "has 4 entries for 3 responses"),
    (*ranking(ranks=[1, 2, 0]), "ranks[2]", "is 0, not a positive integer"),
    (*ranking(ranks=[-1, 2, 3]), "ranks[0]", "is -1, not a positive"),
    (*ranking(ranks=[1, 2.0, 3]), "ranks[1]", "is 2.0, not a positive integer"),
    (*ranking(ranks=[1, "2", 3]), "ranks[1]", "not a positive integer"),
    (*ranking(ranks=[True, 2, 3]), "ranks[0]", "is true, not a positive integer"),
    (*ranking(ranks=[1, None, 3]), "ranks[1]", "is null, not a positive integer"),
    (*ranking(ranks=[1, 2, 2**40]), "ranks[2]", "not a positive integer"),
    (*ranking(ended=True), "ended", "not a list"),
    (*ranking(ended=None), "ended", "not a list"),
    (*ranking(ended=[True, False]), "ended", "has 2 entries for 3 responses"),
    (*ranking(ended=[True, 1, True]), "ended[1]", "is 1, not true or false"),
    (*ranking(ended=[True, True, False]), "ended[2]", "empty response"),
    (*ranking(labeler=3), "labeler", "not a string"),
    (*ranking(labeler=""), "labeler", "is empty"),
]
BAD_LINES = [
    ("prompts", "{", None, "malformed JSON"),
    ("prompts", '{"prompt": "a"', None, "malformed JSON"),
    ("prompts", '{"prompt": "a"} {"prompt": "b"}', None, "malformed JSON"),
    ("prompts", '{"prompt": "a",}', None, "malformed JSON"),
    ("prompts", "{'prompt': 'a'}", None, "malformed JSON"),
    ("prompts", "prompt", None, "malformed JSON"),
    ("prompts", '{"prompt": "a\tb"}', None, "malformed JSON"),
    ("prompts", '{"prompt": "a", "x": NaN}', None, "NaN is not JSON"),
    ("prompts", '{"prompt": "a", "x": ' + "9" * 5000 + "}", None, "malformed JSON"),
    ("prompts", '{"prompt": ' + "[" * 100_000, None, "malformed JSON"),
    ("prompts", '["prompt"]', None, "not a JSON object"),
    ("prompts", '"prompt"', None, "not a JSON object"),
    ("prompts", "null", None, "not a JSON object"),
    ("prompts", "1", None, "not a JSON object"),
    ("prompts", '{"prompt": "a", "prompt": "b"}', "prompt", "is given twice"),
    ("prompts", '{"prompt": "a", "x": {"y": 1, "y": 2}}', "y", "is given twice"),
    ("prompts", "{}", "prompt", "is missing; the line has no field"),
    ("demonstrations", '{"promt": "a"}', "prompt", "the line has 'promt'"),
]


BAD = BAD_TEXTS + BAD_PAIRS + BAD_RANKINGS + BAD_LINES


@pytest.mark.parametrize(
    ("kind", "line", "field", "words"),
    BAD,
    ids=[f"{kind}-{field}-{i}" for i, (kind, _, field, _) in enumerate(BAD)],
)
def test_bad_line_is_named_by_file_line_and_field(tmp_path, kind, line, field, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD[kind])}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(READERS[kind](path))
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert field is None or message.startswith(f"{path}:3: field '{field}': ")
    assert words in message
    assert message.endswith(".") and message.count(". ") >= 1  # says what to do
    assert len(message) < len(str(path)) + 350


def test_there_are_at_least_sixty_bad_lines():
    assert len(BAD) >= 60


def test_good_lines_become_records_and_extra_fields_are_ignored(tmp_path):
    path = tmp_path / "good.jsonl"
    lines = [
        changed("rankings", sources=["x"], score=0.5),
        changed("rankings", ended=[False, True, True], labeler="ann"),
        changed("rankings", ranks=[4, 4, 4]),
    ]
    path.write_text("\n \n".join(lines))
    three = ("hi", "no", "")
    assert list(records.read_rankings(path)) == [
        Ranking("Say hi", three, (1, 2, 2), (True, True, True), None),
        Ranking("Say hi", three, (1, 2, 2), (False, True, True), "ann"),
        Ranking("Say hi", three, (4, 4, 4), (True, True, True), None),
    ]


def test_a_comparison_is_a_ranking_of_two_with_the_chosen_first(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text(changed("comparisons", labeler="bo"))
    expected = Ranking("Say hi", ("hi", ""), (1, 2), (True, True), "bo")
    assert list(records.read_file("comparisons", path)) == [expected]


def test_text_keeps_every_character(tmp_path):
    text = "  \u2028caf\u00e9\r\n\u2581 \U0001f600\ufeff  "
    path = tmp_path / "good.jsonl"
    for ascii_only in (True, False):
        line = json.dumps({"prompt": text, "response": text}, ensure_ascii=ascii_only)
        path.write_bytes((line + "\r\n").encode())
        assert list(records.read_demonstrations(path)) == [Demonstration(text, text)]
        assert list(records.read_file("prompts", path)) == [Prompt(text)]


def test_corpus_documents_are_separated_by_the_line(tmp_path):
    text = (
        "one\ntwo\n\n<|endoftext|>\nIt is <|endoftext|>.\n"
        "<|endoftext|>\n\n \n<|endoftext|>\r\nlast\r\nline\n"
    )
    expected = ["one\ntwo\n", "It is <|endoftext|>.", "last\nline"]
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes(text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    assert list(records.read_corpus(plain)) == expected
    assert list(records.read_corpus(packed)) == expected


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("a.txt", b"one\ntwo \xff\n", 2, "byte 5 of the line (0xff) is not UTF-8"),
        ("a.txt", gzip.compress(b"one\n", mtime=0), 1, "name it *.gz if it is gzip"),
        ("a.txt", "\ufeffone".encode(), 1, "byte-order mark"),
        ("a.txt", b"one\nt\0wo\n", 2, "U+0000"),
        ("a.txt", b"one\n<|endoftext|> \ntwo", 2, "a line of its own"),
        ("a.txt", b"one.<|endoftext|>\ntwo", 1, "a line of its own"),
        ("a.txt.gz", b"one\n", 1, "not gzip"),
        (
            "a.txt.gz",
            gzip.compress(b"one\n" * 9, mtime=0)[:-9],
            1,
            "gzip data cannot be read",
        ),
        (
            "a.txt.gz",
            gzip.compress(b"one\n", mtime=0)[:-4] + b"abcd",
            2,
            "cannot be read",
        ),
        ("a.txt.gz", gzip.compress(b"\xe9\n", mtime=0), 1, "is not UTF-8"),
    ],
)
def test_unreadable_corpus_is_named_by_file_and_line(
    tmp_path, name, content, line, words
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(records.read_corpus(path))
    assert words in str(caught.value)
    reached = int(str(caught.value).removeprefix(f"{path}:").partition(":")[0])
    assert reached == line or "gzip data" in words and reached >= line


@pytest.mark.parametrize("reader", [*READERS.values(), records.read_corpus])
def test_a_missing_file_is_named(tmp_path, reader):
    with pytest.raises(DataError, match="no such file"):
        list(reader(tmp_path / "absent.jsonl"))
