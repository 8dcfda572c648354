"""Records to NumPy batches: each batch is a pure function of the step.

The shift is made here, once: `tokens = ids[:-1]`, `targets = ids[1:]`, so that position
t of every array speaks of the same decision. Everything is padded on the right with the
pad id; masks come from lengths, never from ids. Rows are as wide as the whole data set
needs (`fitted_width`), so all of its batches have one shape.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import flax.struct
import numpy as np

from rlhf_jax.data.packing import all_batches, fullest_rows, shared_rows
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.records import DataError, Demonstration, Prompt
from rlhf_jax.data.schedule import Batches, Shard
from rlhf_jax.data.tokenizer import Tokenizer, tokenize_corpus
from rlhf_jax.data.widths import fitted_width

Array = Any  # numpy.ndarray here, jax.Array once it is on a device


@flax.struct.dataclass
class TokenBatch:
    """Sequences for next-token prediction."""

    tokens: Array
    """[B, T] int32, inputs."""
    targets: Array
    """[B, T] int32, the token after each input."""
    weights: Array
    """[B, T] float32; sums to 1 over the global batch, 0 where nothing is learned."""
    documents: Array | None = None
    """[B, T] int32, which of the sequences that share a row each token is of; None
    where the model tells by itself."""
    loss_first: Array | None = None
    """[G, B / G T] int32, the positions of each of G parts of the rows, those with a
    weight first, see `put_loss_first`; None where all positions are computed."""


@flax.struct.dataclass
class PromptBatch:
    """Prompts to respond to."""

    prompts: Array
    """[B, P] int32."""
    prompt_lengths: Array
    """[B] int32, at least 1."""


def packed_batches(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    batch_size: int,
    seq_len: int,
    seed: int | None,
    shard: Shard = (0, 1),
    cache_dir: Path | None = None,
) -> Batches[TokenBatch]:
    """Batches of packed documents: each followed by the end token, joined, and cut.

    Windows overlap by one token, so that every token but the first is predicted once.
    All weights of a batch are equal; only the last window may be shorter than T.

    Args:
        documents: texts; their order is shuffled once by the seed, then the windows.
        tokenizer: gives the ids and the end token.
        batch_size: rows of the global batch, B.
        seq_len: tokens per row, T.
        seed: of both orders; None reads in order.
        shard: (index, count) of this process.
        cache_dir: where the ids are kept for the next run; None keeps nothing.

    Raises:
        DataError: there is no text, or the cached ids are damaged.
    """
    ids = tokenize_corpus(documents, tokenizer, cache_dir)
    if len(ids) < 2:
        raise DataError("corpus: holds no text. Give some documents.")
    if seed is not None:
        ends = np.flatnonzero(ids == tokenizer.eos_id) + 1  # text has no end token
        order = np.random.default_rng(seed).permutation(len(ends))
        parts = np.split(ids, ends[:-1])
        ids = np.concatenate([parts[i] for i in order])
    counts = np.full(-(-(len(ids) - 1) // seq_len), seq_len)
    counts[-1] = len(ids) - 1 - (len(counts) - 1) * seq_len

    def make_batch(mine: np.ndarray, batch: np.ndarray, size: int) -> TokenBatch:
        rows = [[(ids[i * seq_len : (i + 1) * seq_len + 1], 0)] for i in mine]
        rows += [[]] * (size - len(rows))
        weight = 1.0 / counts[batch].sum()
        return _token_batch(rows, seq_len, tokenizer.pad_id, weight)

    return Batches(make_batch, len(counts), batch_size, seed, shard)


def demonstration_batches(
    demonstrations: Sequence[Demonstration],
    tokenizer: Tokenizer,
    format: PromptFormat,
    batch_size: int,
    seq_len: int,
    seed: int | None,
    loss_on: Literal["response", "all"] = "response",
    shard: Shard = (0, 1),
    num_epochs: int | None = None,
    width: int | None = None,
) -> Batches[TokenBatch]:
    """Batches [B, T] of prompt, response and end token.

    Demonstrations share rows, each read as if it stood alone, where that saves a
    quarter of the rows of every batch; else each has its own.

    Args:
        demonstrations: those with more than seq_len + 1 tokens are dropped and counted.
        tokenizer: gives the ids.
        format: joins prompt and response.
        batch_size: demonstrations of the global batch.
        seq_len: most tokens of a demonstration.
        seed: of the order; None reads in order.
        loss_on: which targets have weight: those of the response with its end token, or
            those of the prompt too.
        shard: (index, count) of this process.
        num_epochs: how many will be read (1 in order), so that all batches can have
            the rows of the fullest; None gives each demonstration its own row.
        width: T, at least as the longest; None means `fitted_width`.

    Raises:
        DataError: no demonstration fits.
    """
    if loss_on not in ("response", "all"):
        raise ValueError(f"loss_on {loss_on!r}: choose 'response' or 'all'")
    prompts = [format.encode_prompt(tokenizer, d.prompt) for d in demonstrations]
    responses = tokenizer.encode_batch([d.response for d in demonstrations])
    end = np.array([tokenizer.eos_id], np.int32)
    joined = [
        np.concatenate([prompt, response, end])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    all_lengths = [len(ids) - 1 for ids in joined]
    kept = [i for i, length in enumerate(all_lengths) if length <= seq_len]
    _check_some_left("demonstrations", kept, all_lengths, "seq_len", seq_len)
    # The first target of the response is read at the last token of the prompt.
    on_all = loss_on == "all"
    starts = [0 if on_all else max(0, len(prompts[i]) - 1) for i in kept]
    sequences = [(joined[i], start) for i, start in zip(kept, starts, strict=True)]
    lengths = np.array([len(ids) - 1 for ids, _ in sequences])
    counts = lengths - np.array(starts)
    T = fitted_width(lengths, seq_len) if width is None else width
    share = None
    if num_epochs is not None:
        read = all_batches(len(kept), batch_size, seed, num_epochs)
        found = fullest_rows(lengths, T, read, most=3 * batch_size // 4)
        share = found and shared_rows(lengths, T, found[0], shard)

    def make_batch(mine: np.ndarray, batch: np.ndarray, size: int) -> TokenBatch:
        alone = [[i] for i in mine] + [[]] * (size - len(mine))
        rows = share(batch) if share else alone
        read = [[sequences[i] for i in row] for row in rows]
        weight = 1.0 / counts[batch].sum()
        made = _token_batch(read, T, tokenizer.pad_id, weight)
        return made.replace(documents=_documents(read, T)) if share else made  # type: ignore

    num_dropped = len(demonstrations) - len(kept)
    return Batches(make_batch, len(kept), batch_size, seed, shard, num_dropped)


def prompt_batches(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    format: PromptFormat,
    batch_size: int,
    prompt_len: int,
    seed: int | None,
    shard: Shard = (0, 1),
) -> Batches[PromptBatch]:
    """Batches of prompts [B, P], P as wide as the longest needs, see `fitted_width`.

    Args:
        prompts: records; those with more than prompt_len tokens are dropped, counted.
        tokenizer: gives the ids.
        format: what stands around a prompt.
        batch_size: rows of the global batch, B.
        prompt_len: longest prompt in tokens.
        seed: of the order; None reads in order.
        shard: (index, count) of this process.

    Raises:
        DataError: no prompt fits.
    """
    encoded = [format.encode_prompt(tokenizer, p.prompt) for p in prompts]
    lengths = [len(ids) for ids in encoded]
    kept = [i for i, length in enumerate(lengths) if length <= prompt_len]
    _check_some_left("prompts", kept, lengths, "prompt_len", prompt_len)
    P = fitted_width([lengths[i] for i in kept], prompt_len)

    def make_batch(mine: np.ndarray, _: np.ndarray, size: int) -> PromptBatch:
        rows = [encoded[kept[i]] for i in mine]
        return pad_prompts(rows, size, P, tokenizer.pad_id)

    num_dropped = len(prompts) - len(kept)
    return Batches(make_batch, len(kept), batch_size, seed, shard, num_dropped)


def check_any(what: str, records: Sequence[Any]) -> None:
    """Raises DataError where there are no records."""
    if not records:
        raise DataError(f"{what}: there are none. Give at least one.")


def _check_some_left(
    what: str, kept: list[int], lengths: list[int], field: str, limit: int
) -> None:
    check_any(what, lengths)
    if not kept:
        raise DataError(
            f"{what}: all {len(lengths)} are longer than {field} {limit}: they have "
            f"{min(lengths)} to {max(lengths)} tokens. Raise {field}."
        )


def _token_batch(
    rows: list[list[tuple[np.ndarray, int]]], seq_len: int, pad_id: int, weight: float
) -> TokenBatch:
    """Shifts and pads; each row holds sequences whose targets from a start on count."""
    tokens = np.full((len(rows), seq_len), pad_id, np.int32)
    targets = np.full((len(rows), seq_len), pad_id, np.int32)
    weights = np.zeros((len(rows), seq_len), np.float32)
    for row, sequences in enumerate(rows):
        begin = 0
        for ids, start in sequences:
            end = begin + len(ids) - 1
            tokens[row, begin:end] = ids[:-1]
            targets[row, begin:end] = ids[1:]
            weights[row, begin + start : end] = weight
            begin = end
    return TokenBatch(tokens, targets, weights)


def _documents(rows: list[list[tuple[np.ndarray, int]]], seq_len: int) -> np.ndarray:
    """Numbers of the sequences of `_token_batch`; padding is of the last one's."""
    documents = np.zeros((len(rows), seq_len), np.int32)
    for row, sequences in enumerate(rows):
        begin = 0
        for number, (ids, _) in enumerate(sequences):
            documents[row, begin:] = number
            begin += len(ids) - 1
    return documents


def put_loss_first(
    batch: TokenBatch, num_shards: int = 1, num_microbatches: int = 1
) -> TokenBatch:
    """Names the positions with a loss, so that the head is computed for those alone.

    By parts of the rows: what one device computes of one microbatch (as
    `accumulate_gradients` cuts them), so that nothing moves between devices.

    Args:
        batch: [B, T]; B a multiple of shards times microbatches.
        num_shards: devices that share this process's rows.
        num_microbatches: parts that follow each other on each.

    Returns:
        The batch with `loss_first`.
    """
    absent = batch.weights == 0
    rows = absent.reshape(num_shards, -1, num_microbatches, absent.shape[1])
    parts = rows.swapaxes(1, 2).reshape(num_shards * num_microbatches, -1)
    order = np.argsort(parts, axis=1, kind="stable")
    return batch.replace(loss_first=order.astype(np.int32))  # type: ignore


def pad_prompts(
    rows: list[np.ndarray], size: int, prompt_len: int, pad_id: int
) -> PromptBatch:
    """Pads prompts; a padding row is one pad token, so that every length is >= 1."""
    prompts = np.full((size, prompt_len), pad_id, np.int32)
    lengths = np.ones(size, np.int32)
    for row, ids in enumerate(rows):
        prompts[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return PromptBatch(prompts, lengths)
