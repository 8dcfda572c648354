"""The TFDS builder that keeps our records as ArrayRecord, without TensorFlow.

Imported only where records are written or opened (`sources.load`): TFDS takes a
moment to import.
"""

import contextlib
import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data.files import NoFilesError
from rlhf_jax.data.records import DataError, Kind, Split


def features(kind: Kind) -> tfds.features.FeaturesDict:
    """The stored features of a record, named as the fields of its file."""
    text = tfds.features.Text()
    ended = tfds.features.Sequence(np.bool_)
    match kind:
        case "corpus":
            return tfds.features.FeaturesDict({"text": text})
        case "prompts":
            return tfds.features.FeaturesDict({"prompt": text})
        case "demonstrations":
            return tfds.features.FeaturesDict({"prompt": text, "response": text})
        case "comparisons":
            return tfds.features.FeaturesDict(
                {
                    "prompt": text,
                    "chosen": text,
                    "rejected": text,
                    "ended": ended,
                    "labeler": text,
                }
            )
        case "rankings":
            return tfds.features.FeaturesDict(
                {
                    "prompt": text,
                    "responses": tfds.features.Sequence(text),
                    "ranks": tfds.features.Sequence(np.int32),
                    "ended": ended,
                    "labeler": text,
                }
            )


class _LocalInfo(tfds.core.DatasetInfo):
    """Knows only what is on disk here: no bucket is asked, no scratch folder left."""

    def initialize_from_bucket(self) -> None:
        pass


class RlhfText(tfds.core.GeneratorBasedBuilder):
    """Records of one kind and split, kept in the order in which they come."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # no checksum files to look for beside this module

    def __init__(
        self,
        *,
        kind: Kind,
        split: Split,
        examples: Iterable[dict[str, Any]],
        data_dir: Path,
    ):
        self._kind: Kind = kind
        self._split = split
        self._examples = examples
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self, features=features(self._kind), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any, *_: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self._examples)


def write_records(
    directory: Path, kind: Kind, split: Split, examples: Iterable[dict[str, Any]]
) -> None:
    """Writes examples as the dataset `directory/rlhf_text/VERSION`."""
    tfds.disable_progress_bar()
    builder = RlhfText(kind=kind, split=split, examples=examples, data_dir=directory)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it will do
        builder.download_and_prepare()
    shutil.rmtree(directory / "downloads")  # made by TFDS, empty


def read_records(directory: Path, kind: Kind, split: Split) -> Sequence[dict[str, Any]]:
    """Opens what `write_records` wrote for random access."""
    path = directory / RlhfText.name / str(RlhfText.VERSION)
    return _source(path, kind, split)


def dataset_path(root: Path, name: str) -> Path:
    """Where the prepared TFDS dataset `root/name` or its only version below it lies.

    Raises:
        DataError: there is none, or more than one.
    """
    found = sorted(path.parent for path in root.glob(f"{name}/**/dataset_info.json"))
    if len(found) != 1:
        there = ", ".join(str(path.relative_to(root)) for path in found) or "none"
        raise DataError(
            f"{root}: tfds:{name} must name one prepared dataset, found: {there}. "
            "Give NAME, NAME/VERSION or NAME/CONFIG/VERSION of one below this "
            "directory."
        )
    return found[0]


def find_dataset(
    root: Path, name: str, kind: Kind, split: Split
) -> Sequence[dict[str, Any]]:
    """Opens the dataset at `dataset_path`.

    Raises:
        DataError: as there, or it is not ArrayRecord, has no such split, or lacks a
            feature.
    """
    return _source(dataset_path(root, name), kind, split)


def _source(path: Path, kind: Kind, split: Split) -> Sequence[dict[str, Any]]:
    # `Any`: the inferred types of TFDS's builder are too wide to be of use.
    builder: Any = tfds.builder_from_directory(path)
    info = builder.info
    names = {"valid": ("valid", "validation")}.get(split, (split,))
    name = next((name for name in names if name in info.splits), None)
    if name is None:
        raise NoFilesError(
            f"{path}: no split {' or '.join(names)}; it has {', '.join(info.splits)}. "
            "Name its splits so."
        )
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(
            f"{path}: is stored as {info.file_format.value}, which needs TensorFlow. "
            "Prepare it with file_format='array_record'."
        )
    missing = set(features(kind)) - {"ended", "labeler"} - set(info.features)
    if missing:
        raise DataError(
            f"{path}: field '{min(missing)}': is missing for {kind}; the dataset has "
            f"{', '.join(info.features)}. Name its features so."
        )
    return builder.as_data_source(split=name)
