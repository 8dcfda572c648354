"""SentencePiece tokenizer: text to ids and back without loss.

Byte-pair encoding with byte fallback, so that every text has ids; identity
normalisation, so that `decode(encode(text)) == text`.
"""

import hashlib
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.data.files import DataError, write_atomically

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
EOS_PIECE = "<|endoftext|>"

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_CHUNK = 4_000_000  # characters tokenized at a time
_LINE_BYTES = 8192  # longest line handed to the trainer
# Spaces, breaks and characters that a normalisation rule would change.
_PROBE = f"  Ab\t\r\n\n \ufb01\u00a0\u200b\uff21e\u0301{_SPACE}\U0001f600{EOS_PIECE} "
_NEEDED = (
    "Give a model with pad_id 0, unk_id 1, bos_id 2, eos_id 3, eos_piece "
    f"'{EOS_PIECE}', byte_fallback, normalization_rule_name 'identity', no "
    "add_dummy_prefix, no remove_extra_whitespaces, user_defined_symbols '\\n'; or "
    "let the run train one on its corpus."
)


class Tokenizer:
    """A SentencePiece model with this project's special ids.

    Text that holds the letters `<|endoftext|>` is encoded as these letters: the end
    token is only ever added by id.

    Raises:
        DataError: not a SentencePiece model, or one with other special ids or rules.
    """

    pad_id = PAD_ID
    bos_id = BOS_ID
    eos_id = EOS_ID

    def __init__(self, serialized: bytes, name: str = "tokenizer"):
        from sentencepiece import SentencePieceProcessor

        if not serialized:
            raise DataError(f"{name}: is empty. {_NEEDED}")
        try:
            self._model = SentencePieceProcessor(model_proto=serialized)
            self._check(name)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise DataError(
                f"{name}: is not a whole SentencePiece model ({error}). {_NEEDED}"
            ) from error
        self.serialized = serialized

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Reads a `.model` file.

        Raises:
            DataError: the file is missing or unfit; the message says what is needed.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer file. Check the path.")
        return cls(path.read_bytes(), str(path))

    def save(self, path: Path | str) -> None:
        """Writes the model to a file, whole or not at all."""
        with write_atomically(Path(path)) as unfinished:
            unfinished.write_bytes(self.serialized)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model; equal fingerprints give equal ids."""
        return hashlib.sha256(self.serialized).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids, V."""
        return self._model.get_piece_size()

    def encode(self, text: str) -> np.ndarray:
        """Encodes a text without special ids; returns ids `[T]` int32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts without special ids; returns ids `[T]` int32 for each."""
        # Cut at newlines, which are pieces of their own: the cost of a merge grows with
        # the length of the line. The character that stands for a space goes by bytes.
        cut = [re.split(f"([\n{_SPACE}])", text) for text in texts]
        lines = [line for parts in cut for line in parts[::2]]
        if len(lines) > 16:
            encoded = iter(self._model.encode(lines, out_type=int))
        else:  # without the threads of a batch, which take 0.1 ms to start
            encoded = (self._model.encode(line, out_type=int) for line in lines)
        arrays = []
        for parts in cut:
            ids = []
            for i, part in enumerate(parts):
                ids.extend(next(encoded) if i % 2 == 0 else self._cut_ids[part])
            arrays.append(np.array(ids, np.int32))
        return arrays

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes ids to text; pad, bos and eos are dropped."""
        control = (PAD_ID, BOS_ID, EOS_ID)
        kept = [i for i in np.asarray(ids, np.int64).tolist() if i not in control]
        return self._model.decode(kept) if kept else ""

    def _check(self, name: str) -> None:
        model = self._model
        special = {
            "pad_id": (model.pad_id(), PAD_ID),
            "unk_id": (model.unk_id(), UNK_ID),
            "bos_id": (model.bos_id(), BOS_ID),
            "eos_id": (model.eos_id(), EOS_ID),
        }
        for field, (found, needed) in special.items():
            if found != needed:
                raise DataError(f"{name}: field '{field}': is {found}. {_NEEDED}")
        if model.id_to_piece(EOS_ID) != EOS_PIECE:
            found = model.id_to_piece(EOS_ID)
            raise DataError(f"{name}: field 'eos_piece': is '{found}'. {_NEEDED}")
        space = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if not all(model.is_byte(i) for i in space):
            raise DataError(f"{name}: field 'byte_fallback': is off. {_NEEDED}")
        newline = model.piece_to_id("\n")
        if model.encode("a\n\nb", out_type=int).count(newline) != 2:
            raise DataError(f"{name}: '\\n' is not a piece of its own. {_NEEDED}")
        self._cut_ids = {"\n": [newline], _SPACE: space}
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise DataError(f"{name}: changes the text {_PROBE!r}. {_NEEDED}")


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, *, max_bytes: int = 10_000_000
) -> Tokenizer:
    """Trains a byte-pair encoding on documents; the same input gives the same bytes.

    Args:
        documents: Text to train on.
        vocab_size: Number of ids, V, with the special ids and the 256 bytes.
        max_bytes: Training text in bytes of UTF-8; of a longer corpus, lines evenly
            spread over all of it are used.

    Raises:
        DataError: the text is too small for `vocab_size`, or `vocab_size` is too small
            for the characters of the text; the message names the limit.
    """
    from sentencepiece import SentencePieceTrainer

    lines = [line for document in documents for line in _training_lines(document)]
    total = sum(len(line.encode()) for line in lines)
    if total == 0:
        raise DataError("tokenizer: the corpus holds no text. Give some documents.")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sample(lines, max_bytes / total),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_piece="<pad>",
            eos_piece=EOS_PIECE,
            max_sentence_length=2 * _LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _too_small_or_large(vocab_size, error) from error
    return Tokenizer(model.getvalue())


_DAMAGE = (zipfile.BadZipFile, ValueError, KeyError, RuntimeError, OSError, EOFError)
"""What reading a broken .npz raises."""


def tokenize_corpus(
    documents: Sequence[str], tokenizer: Tokenizer, cache_dir: Path | None = None
) -> np.ndarray:
    """Encodes documents, each followed by the end token, into one array.

    Args:
        documents: texts.
        tokenizer: gives the ids and the end token.
        cache_dir: directory that keeps the array as `.npz` (with a checksum), named by
            the content of the documents and the tokenizer; None keeps nothing.

    Returns:
        ids [T] int32.

    Raises:
        DataError: the kept array is damaged; the message says what to delete.
    """
    if cache_dir is None:
        return _flat_ids(documents, tokenizer)
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    path = Path(cache_dir) / f"tokens-{digest.hexdigest()[:20]}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = _flat_ids(documents, tokenizer)
        with write_atomically(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, ids=ids)
    try:
        with path.open("rb") as file, np.load(file) as kept:
            return kept["ids"]
    except _DAMAGE as error:
        raise DataError(
            f"{path}: the kept tokens are damaged ({error}). Delete this file and run "
            "again: it is made anew."
        ) from error


def _training_lines(document: str) -> Iterator[str]:
    """Splits a document at its newlines, and at spaces where a line is too long."""
    # SentencePiece keeps U+2581 and U+2585 for itself and drops lines with the latter.
    for line in re.split("[\n\u2581\u2585]", document):
        start = 0
        while start < len(line):
            end = start + _LINE_BYTES // 4  # a character has at most 4 bytes
            if end < len(line):
                space = line.rfind(" ", start + 1, end)
                end = space if space > start else end
            yield line[start:end]
            start = end


def _sample(lines: list[str], fraction: float) -> Iterator[str]:
    """Yields `fraction` of the lines, evenly spread; all of them from 1 on."""
    for i, line in enumerate(lines):
        if fraction >= 1 or int((i + 1) * fraction) > int(i * fraction):
            yield line


def _too_small_or_large(vocab_size: int, error: RuntimeError) -> DataError:
    largest = re.search(r"value <= (\d+)", str(error))
    if largest:
        return DataError(
            f"tokenizer: field 'vocab_size': is {vocab_size}, more than the corpus "
            f"has pieces for. The largest possible is {largest[1]}; lower it or give "
            "more text."
        )
    smallest = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    if smallest:
        return DataError(
            f"tokenizer: field 'vocab_size': is {vocab_size}, too few for the special "
            f"ids, 256 bytes and the characters of the corpus. Raise it to at least "
            f"{smallest[1]}."
        )
    return DataError(f"tokenizer: SentencePiece cannot train on this text: {error}.")


def _flat_ids(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    end = np.array([tokenizer.eos_id], np.int32)
    parts = []
    for chunk in _chunks(documents):
        for ids in tokenizer.encode_batch(chunk):
            parts += [ids, end]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _chunks(documents: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
