"""Broken files never pass for something else: they are refused, or read as they stand.

Every reader is given files with random wounds. What a reader accepts must be what a
second reading, by the JSON library alone, finds in the file: nothing is dropped and
nothing made up. What it refuses must be named by file and line.
"""

import functools
import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import files, records
from rlhf_jax.data.records import DataError
from rlhf_jax.data.tokenizer import Tokenizer, tokenize_corpus, train_tokenizer

ROOT = Path(__file__).parents[2]
READERS = {
    "demonstrations": records.read_demonstrations,
    "rankings": records.read_rankings,
    "comparisons": functools.partial(records.read_file, "comparisons"),
    "prompts": functools.partial(records.read_file, "prompts"),
}
LINES = {
    "demonstrations": [
        {"prompt": f"Say {i} \u00e9", "response": f"it is {i}\n\n"} for i in range(4)
    ],
    "rankings": [
        {"prompt": "p", "responses": ["a", "b", ""], "ranks": [2, 1, 1]},
        {
            "prompt": "q \U0001f600",
            "responses": ["a", "b"],
            "ranks": [1, 2],
            "ended": [False, True],
            "labeler": "ann",
        },
        {"prompt": "r", "responses": list("abcdefghi"), "ranks": list(range(1, 10))},
    ],
    "comparisons": [
        {"prompt": "p", "chosen": "c", "rejected": ""},
        {"prompt": "q", "chosen": "yes", "rejected": "no", "labeler": "bo"},
    ],
    "prompts": [{"prompt": f"What is {i}?"} for i in range(5)],
}
WOUNDS = [
    *(b"", b"\n", b"\r\n", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xed\xa0\x80"),
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b'{"prompt": "x"}', b"null"),
    *(b"-1", b"1e999", b"NaN", b"1.0", b"true", b'""', b"\\ud800", b"\\u0000", b"/*"),
    *(b'"prompt"', b'"ranks"', b'"responses"', b"99999999999999999999", b"\t", b" "),
]
edits = st.lists(
    st.tuples(
        st.floats(0, 1),  # where
        st.integers(0, 6),  # bytes cut out there
        st.one_of(st.sampled_from(WOUNDS), st.binary(max_size=3)),  # put in instead
    ),
    min_size=1,
    max_size=3,
)


def wounded(content: bytes, wounds) -> bytes:
    for place, cut, put in wounds:
        start = int(place * len(content))
        content = content[:start] + put + content[start + cut :]
    return content


def read_again(kind: str, content: bytes) -> list[dict]:
    """The objects of a JSON-lines file, by the JSON library alone."""
    lines = content.decode().split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def as_fields(kind: str, record) -> dict:
    """A record as the line it must have come from."""
    if kind == "prompts":
        return {"prompt": record.prompt}
    if kind == "demonstrations":
        return {"prompt": record.prompt, "response": record.response}
    fields = {"prompt": record.prompt, "ended": list(record.ended)}
    fields["labeler"] = record.labeler
    if kind == "rankings":
        return fields | {
            "responses": list(record.responses),
            "ranks": list(record.ranks),
        }
    assert record.ranks == (1, 2)
    return fields | dict(zip(("chosen", "rejected"), record.responses, strict=True))


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=150)
@given(wounds=edits)
def test_a_wounded_file_is_refused_or_read_as_it_stands(kind, wounds, tmp_path_factory):
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES[kind])
    content = wounded(whole.encode(), wounds)
    path = tmp_path_factory.getbasetemp() / f"wounded-{kind}.jsonl"
    path.write_bytes(content)
    try:
        found = list(READERS[kind](path))
    except DataError as error:
        place = str(error).removeprefix(f"{path}:").partition(":")[0]
        assert place.isdigit(), error
        number = int(place)
        bad = content.split(b"\n")[number - 1]
        assert bad not in whole.encode().split(b"\n")  # no sound line is blamed
        return
    there = read_again(kind, content)
    assert len(found) == len(there)
    for record, fields in zip(found, there, strict=True):
        for name, value in as_fields(kind, record).items():
            default = [True] * len(record.ended) if name == "ended" else None
            expected = json.dumps(fields.get(name, default))
            assert json.dumps(value) == expected  # 1, not true or 1.0


@settings(max_examples=100)
@given(wounds=edits)
def test_a_wounded_corpus_is_refused_or_keeps_all_its_text(wounds, tmp_path_factory):
    documents = ["One fox.\nTwo foxes.", "It is \u00e9 and \u2581.", "  last\n"]
    whole = "\n<|endoftext|>\n".join(documents)
    content = wounded(whole.encode(), wounds)
    path = tmp_path_factory.getbasetemp() / "wounded.txt"
    path.write_bytes(content)
    try:
        found = list(records.read_corpus(path))
    except DataError as error:
        assert str(error).startswith(f"{path}:")
        lines = content.split(b"\n")
        mark = records.SEPARATOR.encode()
        beside = any(mark in line and line != mark for line in lines)
        assert b"\0" in content or _is_not_text(content) or beside
        return
    kept = "".join("".join(found).split())
    text = content.decode().replace("\r\n", "\n")
    lines = [line for line in text.split("\n") if line != records.SEPARATOR]
    assert kept == "".join("".join(lines).split())


def _is_not_text(content: bytes) -> bool:
    try:
        return content.decode().startswith("\ufeff")
    except UnicodeDecodeError:
        return True


@settings(max_examples=60)
@given(wounds=edits)
def test_wounded_gzip_is_refused_or_whole(wounds, tmp_path_factory):
    whole = b'{"prompt": "a"}\n' * 50
    path = tmp_path_factory.getbasetemp() / "wounded.jsonl.gz"
    path.write_bytes(wounded(gzip.compress(whole, mtime=0), wounds))
    try:
        found = list(records.read_file("prompts", path))
    except DataError as error:
        assert str(error).startswith(f"{path}:")
        return
    # a gzip file may be empty, or be followed by another
    assert found[:50] == [records.Prompt("a")] * min(50, len(found))
    assert len(found) in (0, 50) or gzip.decompress(path.read_bytes()) != whole


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"prompt": "a"}\n' + b"x" * 10**6))
    with pytest.raises(DataError, match="bomb.jsonl.gz:2: the line has more than 1000"):
        list(records.read_file("prompts", bomb))
    fine = tmp_path / "fine.jsonl"
    fine.write_text(json.dumps({"prompt": "y" * 980}) + "\n")
    assert len(list(records.read_file("prompts", fine))) == 1


# ------------------------------------------------- files that strangers have made

TOKENIZER_PROGRAM = """
import random, sys
from rlhf_jax.data.files import DataError
from rlhf_jax.data.tokenizer import Tokenizer
whole = open(sys.argv[1], "rb").read()
draw = random.Random(0)
accepted = 0
for i in range(int(sys.argv[2])):
    content = bytearray(whole)
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    if i % 3 == 0:
        content = content[: draw.randrange(len(content))]
    if i % 7 == 0:
        content = content[:40] + bytes(draw.randrange(256) for _ in range(200))
    try:
        tokenizer = Tokenizer(bytes(content), "hostile.model")
    except DataError as error:
        assert str(error).startswith("hostile.model: "), error
        continue
    accepted += 1
    text = "a fox \\n says  hi"
    tokenizer.decode(tokenizer.encode(text))
print("survived", accepted)
"""


def test_wounded_tokenizers_are_refused_and_never_end_the_process(tmp_path):
    path = tmp_path / "tokenizer.model"
    text = ["The fox runs over the hill and sings a song of rivers."] * 20
    train_tokenizer(text, 300).save(path)
    command = [sys.executable, "-c", TOKENIZER_PROGRAM, str(path), "300"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout.removeprefix("survived ")) < 300


def test_kept_tokens_with_a_pickle_inside_are_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    tokenizer = Tokenizer(train_tokenizer(["a fox"] * 9, 270).serialized)
    tokenize_corpus(["a fox"], tokenizer, tmp_path)
    (kept,) = tmp_path.glob("tokens-*.npz")
    np.savez(kept, ids=np.array([Hostile()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="damaged.*Delete this file"):
        tokenize_corpus(["a fox"], tokenizer, tmp_path)
    kept.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match="damaged.*Delete this file"):
        tokenize_corpus(["a fox"], tokenizer, tmp_path)
    assert not (tmp_path / "ran").exists()
