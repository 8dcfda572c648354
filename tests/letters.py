"""A tokenizer and a prompt format that one reads at a glance."""

import numpy as np
import ppo_case as case

from rlhf_jax.data.prompts import PromptFormat

FORM = PromptFormat(suffix=":", separator="")


class Letters:
    """One id per letter a..i; pad equal to end-of-text."""

    pad_id = eos_id = 0
    vocab_size = case.V
    fingerprint = "letters"

    def encode(self, text):
        return np.array([1 + "abcdefghi:".index(c) for c in text], np.int32)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join("abcdefghi:"[i - 1] for i in ids if 0 < i <= 10)


LETTERS: "Letters" = Letters()
