"""Sweeps by vmap, compile time by depth, process start, and several devices."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.timing import Row, duel, row_of
from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step


def _problem(cfg: TransformerConfig, B: int, T: int, mesh=None):
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T + 1))
    ids = jnp.asarray(ids, jnp.int32)
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], jnp.full((B, T), 1.0 / (B * T)))
    opt = OptimizerConfig(schedule="constant")
    loss_fn = functools.partial(lm_loss, model=cfg)
    step = make_train_step(loss_fn, opt, 1000, mesh=mesh)
    return batch, step, opt.scalars()


def _child(code: str, *args: int, **env: str) -> list[str]:
    """Lines that a Python process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(
        command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()


def _on_cpu_devices(count: int) -> dict[str, str]:
    """Environment of a process whose CPU shows so many devices."""
    flag = f"--xla_force_host_platform_device_count={count}"  # the last counts
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


_SWEEP = """
import dataclasses, json, sys
from experiments.benchmark.system import sweep_here
from rlhf_jax.training.host import keep_freed_memory
keep_freed_memory()
print(json.dumps(dataclasses.asdict(sweep_here(int(sys.argv[1])))))
"""
SEEDS = 8


def sweep(repeats: int) -> list[Row]:
    """`sweep_here`, on a CPU in a process that shows each core as a device.

    Operations of this size leave much of a second core idle, seeds do not.
    """
    if jax.default_backend() != "cpu":
        return [sweep_here(repeats)]
    cores = _most_even(os.cpu_count() or 1)
    printed = _child(_SWEEP, repeats, **_on_cpu_devices(cores))
    return [Row(**json.loads(printed[-1]))]


def _most_even(devices: int) -> int:
    """How many of the devices can share the seeds evenly."""
    return max(n for n in range(1, devices + 1) if SEEDS % n == 0)


def sweep_here(repeats: int) -> Row:
    """Ten updates of 8 seeds, mapped and dealt over devices, against in turn."""
    cfg = TransformerConfig(
        num_layers=3, model_dim=64, num_heads=2, max_len=128, vocab_size=768
    )
    batch, step, scalars = _problem(cfg, 4, 64)

    def run(key):
        state = init_state(init_params(key, cfg), key)
        body = lambda state, _: (step(state, batch, scalars)[0], None)  # noqa: E731
        return jax.lax.scan(body, state, length=10)[0].params

    keys = jax.random.split(jax.random.key(0), SEEDS)
    dealt, count = jax.P("seed"), _most_even(jax.device_count())
    mesh = jax.sharding.Mesh(jax.devices()[:count], ("seed",))
    mapped = jax.jit(  # left to XLA, devices would gather each other's activations
        jax.shard_map(
            jax.vmap(run), mesh=mesh, in_specs=dealt, out_specs=dealt, check_vma=False
        )
    )
    single = jax.jit(run)
    together, apart = mapped(keys), [single(key) for key in keys]
    stacked = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(apart))
    chex.assert_trees_all_close(jax.device_get(together), stacked, atol=1e-4)
    ours = lambda: mapped(keys)  # noqa: E731
    theirs = lambda: [single(key) for key in keys]  # noqa: E731
    note = f"{count} device(s)"
    return duel("sweep/8seeds", ours, "8 runs in turn", theirs, repeats, 1.5, note)


def compile_depth(repeats: int) -> list[Row]:
    """Tracing and compiling a train step of 48 layers against one of 5, both loops."""

    def compile_seconds(layers: int) -> float:
        cfg = TransformerConfig(
            num_layers=layers, model_dim=128, num_heads=4, max_len=64, vocab_size=512
        )
        batch, step, scalars = _problem(cfg, 2, 64)
        make = lambda key: init_state(init_params(key, cfg), key)  # noqa: E731
        state = jax.eval_shape(make, jax.random.key(0))
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(step).lower(state, batch, scalars).compile()
        return time.perf_counter() - start

    compile_seconds(5)  # what is loaded once
    pairs = np.array(
        [(compile_seconds(48), compile_seconds(5)) for _ in range(repeats)]
    )
    ratios = pairs[:, 0] / pairs[:, 1]
    deep, flat = np.median(pairs, axis=0)
    return [
        row_of(
            "compile/depth",
            "5 layers (4 and fewer are unrolled)",
            ratios,
            "of its compile time",
            1.1,
            f"48 layers {deep:.2f} s, 5 layers {flat:.2f} s",
        )
    ]


_START = """
import time; start = time.perf_counter()
import jax
jax.config.update("jax_compilation_cache_dir", {cache!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from experiments.benchmark.system import _problem, init_params, init_state
from rlhf_jax.nn.config import TransformerConfig
imported = time.perf_counter() - start
cfg = TransformerConfig(num_layers=24, model_dim=64, num_heads=2, max_len=64,
                        vocab_size=512)
batch, step, scalars = _problem(cfg, 2, 64)
make = jax.jit(lambda key: init_state(init_params(key, cfg), key))
jax.block_until_ready(jax.jit(step)(make(jax.random.key(0)), batch, scalars))
print(time.time(), imported, time.perf_counter() - start)
import sys
print(*[m for m in ("torch", "tensorflow_datasets", "orbax.checkpoint", "matplotlib")
        if m in sys.modules])
"""


def start_warm(repeats: int) -> list[Row]:
    """A process's start to its first train step of 24 layers, programs in the cache."""
    with tempfile.TemporaryDirectory() as cache:
        times, loaded = [], ""
        for _ in range(repeats + 1):
            begin = time.time()  # the clock that both processes share
            out = _child(_START.format(cache=cache))
            end, *parts = map(float, out[0].split())
            times.append((end - begin, *parts))
            loaded = out[1]
    total, imported, first = np.array(times[1:]).T
    note = (
        f"imports {np.median(imported):.2f} s, first step {np.median(first):.2f} s "
        f"after Python began; first run {times[0][0]:.1f} s; heavy modules loaded: "
        f"{loaded or 'none'}"
    )
    return [row_of("start/warm", "the clock", total, "s", 1.0, note)]


_DEVICES = """
import json, sys, time, jax, numpy as np
from rlhf_jax.training.host import keep_freed_memory
keep_freed_memory()
from experiments.benchmark.system import _problem, init_params, init_state
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.training.mesh import (
    MeshConfig, jit_step, replicas, shard_batch, state_sharding)
cfg = TransformerConfig(num_layers=4, model_dim=256, num_heads=4, max_len=256,
                        vocab_size=8192)
mesh = MeshConfig().make()
batch, step, scalars = _problem(cfg, int(sys.argv[1]), 256, replicas(mesh))
key = jax.random.key(0)
make = lambda key: init_state(init_params(key, cfg), key)
sharding = state_sharding(mesh, jax.eval_shape(make, key))
state = jax.jit(make, out_shardings=sharding)(key)
batch = shard_batch(mesh, batch)
compiled = jit_step(step, mesh, sharding)
text = compiled.lower(state, batch, scalars).compile().as_text()
times, losses = [], []
for _ in range(4):
    start = time.perf_counter()
    state, metrics = compiled(state, batch, scalars)
    losses.append(float(metrics["loss"])); times.append(time.perf_counter() - start)
print(json.dumps({"time": min(times[1:]), "loss": losses,
                  "all_gathers": text.count(" all-gather(")}))
"""


def devices(count: int, repeats: int) -> list[Row]:
    """A train step on simulated devices of one processor, against one device.

    On the same batch, of 8 rows a device: every device repeats the optimizer's step,
    which weighs the more the fewer rows it has.
    """
    rows = 8 * count

    def measure(n: int) -> dict:
        return json.loads(_child(_DEVICES, rows, **_on_cpu_devices(n))[-1])

    runs = [(measure(count), measure(1)) for _ in range(repeats)]
    runs.sort(key=lambda pair: pair[0]["time"] / pair[1]["time"])
    ratios = [a["time"] / b["time"] for a, b in runs]
    many, one = runs[len(runs) // 2]
    apart = max(abs(x - y) for x, y in zip(many["loss"], one["loss"], strict=True))
    return [
        row_of(
            f"devices/{count}",
            "one device, same cores",
            ratios,
            "of its time",
            1.05,
            f"{rows} rows: {1e3 * many['time']:.0f} ms against "
            f"{1e3 * one['time']:.0f} ms; losses "
            f"{apart:.1e} apart; {many['all_gathers']} all-gathers",
        )
    ]
