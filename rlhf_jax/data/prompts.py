"""How a prompt and a response become one sequence of ids: one object, kept with a run.

A labelled pair reads `prompt suffix response <eos>`; the prompt side and the
response side are encoded apart, so that training and sampling see the same ids.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.records import DataError, Demonstration
from rlhf_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The texts that stand around a prompt and a response."""

    suffix: str = "\n"
    """Between the prompt and the response."""
    separator: str = "\n\n"
    """After a response that another example follows (few-shot prompts)."""

    def encode_prompt(self, tokenizer: Tokenizer, prompt: str) -> np.ndarray:
        """Encodes `prompt + suffix`; returns ids `[P]` int32."""
        return tokenizer.encode(prompt + self.suffix)

    def encode_response(
        self, tokenizer: Tokenizer, response: str, ended: bool = True
    ) -> np.ndarray:
        """Encodes a response and its end token; returns ids `[R]` int32.

        Args:
            tokenizer: The tokenizer.
            response: The text.
            ended: Whether it ended by itself; the end token is added only then.
        """
        ids = tokenizer.encode(response)
        return np.append(ids, np.int32(tokenizer.eos_id)) if ended else ids

    def few_shot_prompt(self, examples: Sequence[Demonstration], prompt: str) -> str:
        """Puts solved examples before a prompt.

        The final suffix is left out, because `encode_prompt` adds it.
        """
        shots = [e.prompt + self.suffix + e.response + self.separator for e in examples]
        return "".join(shots) + prompt

    def to_json(self) -> str:
        """Writes the format as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, name: str = "prompt format") -> "PromptFormat":
        """Reads what `to_json` wrote.

        Raises:
            DataError: not a JSON object with exactly these fields, as strings.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{name}: malformed JSON: {error}. Write the fields {names}."
            ) from error
        if not isinstance(fields, dict) or sorted(fields) != sorted(names):
            raise DataError(
                f"{name}: must be an object with exactly the fields {names}."
            )
        for field, value in fields.items():
            if not isinstance(value, str):
                raise DataError(f"{name}: field '{field}': is {value!r}, not a string.")
        return cls(**fields)


def check_same_format(
    name_a: str, format_a: PromptFormat, name_b: str, format_b: PromptFormat
) -> None:
    """Compares the prompt formats of two stages.

    Raises:
        DataError: they differ; the message shows both and the way out.
    """
    if format_a != format_b:
        raise DataError(
            f"prompt format: {name_a} has {format_a}, {name_b} has {format_b}. A model "
            "reads only the format it was trained on: give both stages the same, or "
            "run the earlier stage again with the new one."
        )


def check_same_tokenizer(
    name_a: str, tokenizer_a: Tokenizer, name_b: str, tokenizer_b: Tokenizer
) -> None:
    """Compares the tokenizers of two stages by fingerprint.

    Raises:
        DataError: they differ; the message shows both and the way out.
    """
    if tokenizer_a.fingerprint != tokenizer_b.fingerprint:
        raise DataError(
            f"tokenizer: {name_a} has {_described(tokenizer_a)}, {name_b} has "
            f"{_described(tokenizer_b)}. Ids mean other pieces: use directories of "
            "one run, or run the earlier stage again with this tokenizer."
        )


def _described(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.vocab_size} ids, SHA-256 {tokenizer.fingerprint[:16]}"
