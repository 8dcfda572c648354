"""Rankings of people: what they were asked to rank, and the file they hand in."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rlhf_jax.data.files import read_lines
from rlhf_jax.data.sources import DataError, Ranking, Split, read_rankings
from rlhf_jax.training.run_dir import RunDirError, StageDir, file_hash, write_lines

ASKED_SPLITS: tuple[Split, ...] = ("train", "valid")
"""Of the prompts that responses are drawn to."""
Asked = dict[str, dict[str, set[bool]]]
"""Prompt -> response -> whether it ended; both where it was drawn twice."""


def take_ranked(file: Path | None, path: Path) -> dict[str, Any]:
    """Writes rankings_{train,valid}.jsonl from what people ranked, split as asked.

    Args:
        file: their rankings; None where nobody has ranked yet.
        path: directory with to_rank_train.jsonl and to_rank_valid.jsonl.

    Returns:
        num_rankings, and the hash of the file.

    Raises:
        DataError: there is no file: how to make one; or it ranks what nobody asked for.
    """
    if file is None:
        raise DataError(
            f"{path / 'to_rank_train.jsonl'}: nobody has ranked these responses yet. "
            "Put its lines and those of to_rank_valid.jsonl into one file, give each a "
            "list `ranks` (1 best, equal numbers tie) and optionally a `labeler`, and "
            "run the command again with --collect.ranked FILE"
        )
    asked = {split: _asked(path / f"to_rank_{split}.jsonl") for split in ASKED_SPLITS}
    rankings = [
        _as_asked(ranking, asked, f"{file}: ranking {number}")
        for number, ranking in enumerate(read_rankings(file), 1)
    ]
    held_out = asked["valid"]
    for split in ASKED_SPLITS:
        if not any((r.prompt in held_out) == (split == "valid") for r in rankings):
            raise DataError(
                f"{file}: ranks no prompt of {path / f'to_rank_{split}.jsonl'}; "
                "rank some of its lines too (train: to learn from, valid: to measure)"
            )
    for split in ASKED_SPLITS:
        lines = [
            {
                "prompt": r.prompt,
                "responses": list(r.responses),
                "ended": list(r.ended),
                "ranks": list(r.ranks),
                **({} if r.labeler is None else {"labeler": r.labeler}),
            }
            for r in rankings
            if (r.prompt in held_out) == (split == "valid")
        ]
        write_lines(path / f"rankings_{split}.jsonl", lines)
    return {
        "num_rankings": len(rankings),
        "ranked": file_hash(file),
    }


def _asked(path: Path) -> Asked:
    """What a file of responses asks to be ranked; a prompt may have several lines."""
    asked: Asked = {}
    for _, line in read_lines(path):
        row = json.loads(line)
        responses = asked.setdefault(row["prompt"], {})
        for response, ended in zip(row["responses"], row["ended"], strict=True):
            responses.setdefault(response, set()).add(ended)
    return asked


def _as_asked(ranking: Ranking, asked: dict[str, Asked], where: str) -> Ranking:
    """The ranking with `ended` as it was sampled; DataError if nobody asked for it."""
    of_prompt = [
        rows[ranking.prompt] for rows in asked.values() if ranking.prompt in rows
    ]
    if not of_prompt:
        raise DataError(
            f"{where}: field 'prompt': {ranking.prompt[:40]!r} is in neither "
            "to_rank_train.jsonl nor to_rank_valid.jsonl, and would be trained on "
            "though it may be held out. Keep the lines as they are and add `ranks`."
        )
    ended = []
    for response, told in zip(ranking.responses, ranking.ended, strict=True):
        sampled = set().union(*(rows.get(response, ()) for rows in of_prompt))
        if not sampled:
            raise DataError(
                f"{where}: field 'responses': {response[:40]!r} is none of the "
                "responses to this prompt. Keep the lines as they are and add `ranks`."
            )
        ended.append(told if len(sampled) == 2 else sampled.pop())
    return dataclasses.replace(ranking, ended=tuple(ended))


def check_ranked(file: Path | None, stage: StageDir) -> None:
    """Refuses a file of rankings other than the one that the stage has taken."""
    taken = stage.summary().get("ranked")
    if file is not None and file_hash(file) != taken:
        raise RunDirError(
            f"{file}: the finished stage {stage.path} was made from other "
            "rankings; use another --run, or delete that folder and those of later "
            "stages"
        )
