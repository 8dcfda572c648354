"""Metrics to a file and TensorBoard, one step late, and the progress people watch."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from rlhf_jax.training.run_dir import RunDirError
from rlhf_jax.training.step import leaf_names


class NonFiniteError(FloatingPointError):
    """A gradient, a loss or a metric is NaN or infinite."""


class MetricsWriter:
    """Writes scalars of each step to `metrics.jsonl` and TensorBoard event files.

    Where a run has several processes, all check the metrics and the first writes them.
    `push` keeps the metrics of a step on the device until the next one has been
    dispatched, so that the device never waits for the disk.
    """

    def __init__(self, directory: Path, first_step: int, grads_like: Any):
        """Opens the files of a stage directory, and drops lines after `first_step`.

        Args:
            directory: of the stage.
            first_step: updates done when the run goes on; later lines belong to
                updates that an interrupted run did not checkpoint and are done again.
            grads_like: pytree whose leaf names `nonfinite` flags refer to.
        """
        self._names = leaf_names(grads_like)
        self._pending: tuple[int, Any] | None = None
        self._last_time = time.monotonic()
        self._file: TextIO | None = None
        if jax.process_index() == 0:
            self._open(directory, first_step)

    def _open(self, directory: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._path = directory / "metrics.jsonl"
        lines = read_metrics(self._path) if first_step else []
        kept = [line for line in lines if line["step"] <= first_step]
        if first_step and (not kept or kept[-1]["step"] < first_step):
            print(
                f"warning: {self._path}: lacks steps up to {first_step}, which were "
                "done before; the report's figures will lack them too",
                file=sys.stderr,
            )
        partial = self._path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self._path)
        self._file = self._path.open("a", buffering=1)
        # SummaryWriter's thread dies where the disk is full, and its queue then waits
        (directory / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(directory / "tensorboard" / "events"))
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        begin = self._events.SessionLog(status=self._events.SessionLog.START)
        hidden = first_step + 1 if first_step else 0  # from here on, of earlier files
        self._record(step=hidden, session_log=begin)

    def _record(self, **event: Any) -> None:
        self._board.write_event(self._events.Event(wall_time=time.time(), **event))

    def push(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        """Takes the metrics of `step`; writes and returns those of the step before."""
        written = self._write_pending()
        self._pending = (step, metrics)
        return written

    def flush(self) -> dict[str, float] | None:
        """Waits for the pending metrics, checks them and brings all to the disk.

        Raises:
            NonFiniteError: naming the step, the metric and the first bad leaf.
        """
        written = self._write_pending()
        if self._file is not None:
            self._board.flush()
        return written

    def _write_pending(self) -> dict[str, float] | None:
        if self._pending is None:
            return None
        step, metrics = self._pending
        self._pending = None
        host = jax.device_get(metrics)
        bad = host.pop("nonfinite")
        values = {name: float(np.asarray(x)) for name, x in host.items()}
        now = time.monotonic()
        values["seconds"] = now - self._last_time
        self._last_time = now
        self.write(step, values, bad)
        return values

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        bad: Sequence[bool] | None = None,
    ) -> None:
        """Writes host scalars of a step, e.g. of an evaluation.

        Args:
            step: the updates done.
            values: by name.
            bad: a flag for each leaf of the gradient, whether it is not finite; None
                where there is no gradient.

        Raises:
            NonFiniteError: naming the step, the metric and the first bad leaf.
        """
        self._check(step, bad, values)
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        summary = self._summaries.Summary()
        for name, value in values.items():
            summary.value.add(tag=name, simple_value=value)
        self._record(step=step, summary=summary)

    def _check(
        self, step: int, bad: Sequence[bool] | None, values: Mapping[str, float]
    ) -> None:
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        flags = [False] * len(self._names) if bad is None else bad
        leaves = [n for n, flag in zip(self._names, flags, strict=True) if flag]
        if leaves or wrong:
            first = f"the gradient of {leaves[0]}" if leaves else f"metric {wrong[0]}"
            raise NonFiniteError(
                f"update {step}: {first} is not finite ({len(leaves)} of "
                f"{len(self._names)} gradient leaves, metrics {wrong}). Nothing was "
                f"saved from this step on. The usual causes are a learning rate that "
                f"is too high or a batch with broken input; lower the rate and run "
                f"again in a new directory."
            )

    def close(self) -> None:
        """Closes both files."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`, without a last one that a killed writer cut short."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunDirError(
                f"{path}:{number}: not JSON ({error}); remove the line to go on"
            ) from error
    return records
