"""The loop around a train step: batches, progress, metrics, checkpoints, signals."""

import dataclasses
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.mesh import shard_batch
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.room import tell_allocated

ItemT = TypeVar("ItemT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often a stage looks at itself."""

    checkpoint_every: int = 200
    """Steps between checkpoints of the whole state (the last step is always kept)."""
    eval_every: int = 100
    """Steps between evaluations on held-out data (the last is always evaluated)."""

    def __post_init__(self):
        for name in ("checkpoint_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )


PROFILED = 5  # steps in a trace
SKIPPED_BY_TRACE = 3  # steps before it: the first compiles


class Stopped(SystemExit):
    """Raised after a signal, when the state has been saved."""


def run_loop(
    *,
    name: str,
    directory: Path,
    step_fn: Callable[..., tuple[Any, Any]],
    state: Any,
    batches: Callable[[int], Any],
    num_steps: int,
    mesh: jax.sharding.Mesh,
    cfg: LoopConfig,
    evaluate: Callable[[Any, int], dict[str, float]] | None = None,
    check: Callable[[int, dict[str, float]], None] | None = None,
    show: tuple[str, ...] = ("loss",),
    profile: bool = False,
    rest: tuple[Any, ...] = (),
) -> Any:
    """Runs a stage from its newest checkpoint to its last step.

    Args:
        name: shown at the progress bar.
        directory: of the stage.
        step_fn: of `jit_step`: `(state, batch, *rest) -> (state, metrics)`; donates the
            state.
        state: before step 0, on its devices; its `step` leaf counts updates.
        batches: step -> this process's rows as NumPy arrays, pure.
        num_steps: updates in all.
        mesh: where batches go.
        cfg: how often to save and evaluate.
        evaluate: `(state, step) -> host scalars`, at step 0, every `eval_every`, and at
            the end.
        check: called with the metrics of each step once they are on the host; raises
            to stop the run.
        show: metrics beside the progress bar.
        profile: whether to trace `PROFILED` steps into `directory`/profile, and to tell
            what XLA allocates for a step.
        rest: further arguments of each step.

    Returns:
        The state after `num_steps` updates.

    Raises:
        NonFiniteError: at the first non-finite gradient or metric; nothing of that step
            or later is saved.
        Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    sharding = jax.tree.map(lambda x: x.sharding, state)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding
    )
    checkpoints = Checkpoints(directory)
    restored = checkpoints.restore_latest(like)
    first = 0
    if restored is not None:
        first, state = restored
        print(f"{name}: going on from step {first}", file=sys.stderr)
    try:
        writer = MetricsWriter(directory, first, state.params)
    except OSError:
        checkpoints.close()
        raise
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=console,
        disable=jax.process_index() != 0 or not console.is_terminal,
    )
    stop = _StopSignals()
    trace = _Trace(directory / "profile", first, num_steps, profile)
    log = _PlainProgress(name, num_steps)

    def written(step: int, values: dict[str, float] | None) -> None:
        if values is None:
            return
        if check is not None:
            check(step, values)
        shown = "  ".join(f"{k.split('/')[-1]} {values[k]:.4g}" for k in show)
        progress.update(task, metrics=shown)
        if not progress.console.is_terminal:
            log.write(step, shown)

    def save(step: int, state: Any) -> None:
        written(step, writer.flush())  # an update is kept only once it was checked
        checkpoints.save(step, state)

    def look(step: int, state: Any) -> None:
        if evaluate is not None:
            written(step, writer.flush())
            writer.write(step, evaluate(state, step))

    try:
        with stop, progress:
            task = progress.add_task(name, total=num_steps, completed=first, metrics="")
            if first == 0:
                look(0, state)
            for step in range(first, num_steps):
                trace.before(step)
                with jax.profiler.StepTraceAnnotation(name, step_num=step):
                    batch = shard_batch(mesh, batches(step))
                    if profile and step == first:
                        tell_allocated(name, step_fn, state, batch, *rest)
                    state, metrics = step_fn(state, batch, *rest)
                trace.after(step, state)
                written(step, writer.push(step + 1, metrics))
                progress.update(task, completed=step + 1)
                done = step + 1
                last = done == num_steps
                if done % cfg.eval_every == 0 or last:
                    look(done, state)
                signalled = stop.reached()  # read once: it may come at any moment
                if done % cfg.checkpoint_every == 0 or last or signalled:
                    save(done, state)
                if signalled:
                    raise Stopped(
                        f"{name}: stopped by {signalled} after step {done}, state "
                        "saved; run the same command to go on"
                    )
    finally:
        checkpoints.close()
        writer.close()
        trace.close()
    return state


def tracked(name: str, items: Sequence[ItemT]) -> Iterator[ItemT]:
    """The items one by one, telling on stderr how many are done and the time left."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal and jax.process_index() == 0:
        yield from track(items, description=name, console=console)
        return
    log = _PlainProgress(name, len(items))
    for done, item in enumerate(items, 1):
        yield item
        log.write(done, "")


class _PlainProgress:
    """Progress as lines, every ten seconds, where stderr is no terminal."""

    def __init__(self, name: str, num_steps: int):
        self._name, self._num_steps = name, num_steps
        self._start = self._last = time.monotonic()
        self._compiled: tuple[int, float] | None = None

    def write(self, step: int, shown: str) -> None:
        now = time.monotonic()
        if self._compiled is None:  # the first step tells nothing of the others
            self._compiled = step, now
        if jax.process_index() or (now - self._last < 10 and step < self._num_steps):
            return
        self._last = now
        told = f"{self._name} {step}/{self._num_steps}  {now - self._start:.0f} s"
        first, then = self._compiled
        if step > first or step == self._num_steps:
            left = (now - then) / max(step - first, 1) * (self._num_steps - step)
            told += f", {left:.0f} s left"
        print(f"{told}  {shown}", file=sys.stderr, flush=True)


class _Trace:
    """A trace of some steps for TensorBoard's profiler or Perfetto, once compiled."""

    def __init__(self, directory: Path, first: int, num_steps: int, wanted: bool):
        self._directory, self._open = directory, False
        start = first + min(SKIPPED_BY_TRACE, max(0, num_steps - first - PROFILED))
        self._steps = range(start, start + PROFILED) if wanted else range(0)

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._open = True

    def after(self, step: int, state: Any) -> None:
        if self._open and step == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()


class _StopSignals:
    """Turns SIGTERM and SIGINT into a flag while a loop runs (main thread only).

    Several processes must stop after the same step: there JAX receives SIGTERM, and
    tells all of them at which step to.
    """

    _calls = itertools.count()

    def __init__(self):
        self._received: str | None = None
        self._before: dict[int, Any] = {}

    def reached(self) -> str | None:
        """The signal to stop after this step; called once a step by every process."""
        if jax.process_count() == 1:
            return self._received
        call = next(_StopSignals._calls)
        return "SIGTERM" if reached_preemption_sync_point(call) else None

    def __enter__(self):
        if jax.process_count() > 1:
            return self
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, _frame):
        self._received = signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
