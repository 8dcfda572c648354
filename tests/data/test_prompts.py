"""Prompt and response join to what a corpus document says, and formats are compared."""

import json

import numpy as np
import pytest

from rlhf_jax.data.prompts import (
    PromptFormat,
    check_same_format,
    check_same_tokenizer,
)
from rlhf_jax.data.records import DataError, Demonstration
from rlhf_jax.data.tokenizer import train_tokenizer

PAIRS = [
    Demonstration("Name a fruit.", "An apple."),
    Demonstration("Name two.\nBe short.", " pear, plum "),
    Demonstration("Say caf\u00e9", "caf\u00e9"),
]
BLOCK = (
    "Name a fruit.\nAn apple.\n\n"
    "Name two.\nBe short.\n pear, plum \n\n"
    "Say caf\u00e9\ncaf\u00e9\n\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([BLOCK * 5, "An apple and a pear."], 310)


def test_prompt_and_response_decode_to_the_few_shot_block(tokenizer):
    form = PromptFormat()
    ids = np.concatenate(
        [
            part
            for pair in PAIRS
            for part in (
                form.encode_prompt(tokenizer, pair.prompt),
                form.encode_response(tokenizer, pair.response, ended=False),
                tokenizer.encode(form.separator),
            )
        ]
    )
    assert tokenizer.decode(ids) == BLOCK
    # The parts meet at newlines, so a corpus document has the same tokens.
    np.testing.assert_array_equal(ids, tokenizer.encode(BLOCK))


def test_a_few_shot_prompt_ends_where_the_response_begins(tokenizer):
    form = PromptFormat()
    prompt = form.few_shot_prompt(PAIRS[:2], PAIRS[2].prompt)
    ids = form.encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(ids) == BLOCK[: BLOCK.rindex("caf\u00e9")]
    assert form.few_shot_prompt([], "Hi") == "Hi"


def test_suffix_and_end_token_stand_where_they_should(tokenizer):
    form = PromptFormat(suffix="\nA:", separator="\n--\n")
    assert tokenizer.decode(form.encode_prompt(tokenizer, "Hi")) == "Hi\nA:"
    ended = form.encode_response(tokenizer, "Yo")
    assert ended[-1] == tokenizer.eos_id and ended.dtype == np.int32
    cut = form.encode_response(tokenizer, "Yo", ended=False)
    np.testing.assert_array_equal(ended[:-1], cut)
    assert form.encode_response(tokenizer, "").tolist() == [tokenizer.eos_id]
    assert form.few_shot_prompt(PAIRS[:1], "x") == "Name a fruit.\nA:An apple.\n--\nx"


def test_a_format_survives_json():
    form = PromptFormat(suffix='"\u00e9\n\nA:', separator=" ")
    assert PromptFormat.from_json(form.to_json()) == form
    assert json.loads(PromptFormat().to_json())["suffix"] == "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "malformed JSON"),
        ("[]", "exactly the fields"),
        ('{"suffix": ""}', "exactly the fields"),
        ('{"suffix": "", "separator": "", "x": ""}', "exactly"),
        ('{"suffix": 1, "separator": ""}', "field 'suffix': is 1"),
    ],
)
def test_a_bad_format_is_named(text, words):
    with pytest.raises(DataError, match=words) as caught:
        PromptFormat.from_json(text, "RUN/sft/prompt_format.json")
    assert str(caught.value).startswith("RUN/sft/prompt_format.json: ")


def test_different_formats_are_shown_side_by_side():
    check_same_format("sft", PromptFormat(), "reward_model", PromptFormat())
    with pytest.raises(DataError) as caught:
        check_same_format("sft", PromptFormat(), "ppo", PromptFormat(suffix="\nA:"))
    for words in ("sft has", "ppo has", r"suffix='\n'", r"suffix='\nA:'", "run the"):
        assert words in str(caught.value)


def test_different_tokenizers_are_shown_side_by_side(tokenizer):
    check_same_tokenizer("sft", tokenizer, "reward_model", tokenizer)
    other = train_tokenizer([BLOCK * 5], 300)
    with pytest.raises(DataError) as caught:
        check_same_tokenizer("sft", tokenizer, "ppo", other)
    for words in ("sft has 310 ids", "ppo has 300 ids", other.fingerprint[:16]):
        assert words in str(caught.value)
