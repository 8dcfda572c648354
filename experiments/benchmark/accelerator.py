"""Published sizes in bfloat16 on one accelerator: beside its own limits and PyTorch.

The limits are measured in the same run: the rate of a matrix product of 8192 and the
bandwidth of a copy. FLOPs and bytes are counted from the shapes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.peers import (
    hf_generate,
    hf_gpt2,
    hf_update,
    import_torch,
)
from experiments.benchmark.ppo import Workload, against_trl, our_iteration
from experiments.benchmark.timing import (
    Row,
    check_close,
    copy_bytes,
    duel,
    matmul_flops,
    row_of,
    seconds,
)
from experiments.benchmark.training import train_flops
from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.nn.config import PUBLISHED_SIZES, Remat, TransformerConfig
from rlhf_jax.nn.sampling import Sampling, generate
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.training import costs
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

V = 50304  # GPT-2's 50257 filled up to a multiple of 128, on both sides


@functools.cache
def limits() -> tuple[float, float]:
    """FLOP/s of a matrix product in bfloat16 and bytes/s of a copy, measured once."""
    return matmul_flops(8192, dtype="bfloat16"), copy_bytes()


def shape(name: str, remat: Remat = "none") -> TransformerConfig:
    """A published model in bfloat16."""
    return dataclasses.replace(
        PUBLISHED_SIZES[name], dtype="bfloat16", vocab_size=V, remat=remat
    )


def share(
    case: str, against: str, floor: float, times: list[float], goal: float, note: str
) -> Row:
    """The time that the limits allow as a share of the time taken."""
    ratios = floor / np.array(times)
    note = f"{1e3 * np.median(times):.2f} ms, floor {1e3 * floor:.2f} ms; {note}"
    return row_of(case, against, ratios, "of the limit", goal, note)


def train(
    cfg: TransformerConfig, batch_size: int, goal: float, repeats: int
) -> list[Row]:
    """A whole update of [B, 1024] tokens, float32 master weights on both sides."""
    torch, _ = import_torch()
    T, B, case = cfg.max_len, batch_size, f"train/{cfg.num_params / 1e6:.0f}M"
    params = init_params(jax.random.key(0), cfg)
    model = hf_gpt2(params, cfg).train()
    if cfg.remat != "none":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
    ids = torch.tensor(rows, dtype=torch.long, device=model.device)
    weights = jnp.full((B, T), 1.0 / (B * T), jnp.float32)
    batch = TokenBatch(jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:]), weights)
    opt = OptimizerConfig(learning_rate=1e-4, schedule="constant")
    loss_fn = functools.partial(lm_loss, model=cfg)
    step = jax.jit(make_train_step(loss_fn, opt, 1000), donate_argnums=0)
    scalars, state = opt.scalars(), init_state(params, jax.random.key(1))
    del params

    def ours():
        nonlocal state
        for _ in range(4):
            state, metrics = step(state, batch, scalars)
        return metrics["loss"]

    def theirs():
        return [hf_update(model, optimizer, ids, bfloat16=True) for _ in range(4)][-1]

    check_close(case, float(ours()), theirs(), rtol=5e-3)  # after four updates
    against = "transformers, autocast, sdpa, fused AdamW"
    row = duel(case, ours, against, theirs, repeats, note="four steps")
    rate, _ = limits()
    times = [seconds(ours) / 4 for _ in range(max(3, repeats))]
    floor = train_flops(cfg, B * T, T) / rate
    note = f"{B * T / min(times):.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s"
    limit = "a matrix product of 8192"
    return [row, share(f"{case}/limit", limit, floor, times, goal, note)]


def decode(
    cfg: TransformerConfig, batch_size: int, goal: float, repeats: int
) -> list[Row]:
    """128 sampled tokens after prompts of 256."""
    torch, _ = import_torch()
    B, P, R = batch_size, 256, 128
    case = f"generate/{cfg.num_params / 1e6:.0f}M"
    params = init_params(jax.random.key(0), cfg)
    prompts = np.random.default_rng(0).integers(0, V, (B, P)).astype(np.int32)
    lengths = jnp.full((B,), P, jnp.int32)
    sampling = Sampling(response_len=R)
    static = {"eos_id": -1, "pad_id": 0, "model": cfg, "sampling": sampling}
    sample = jax.jit(functools.partial(generate, **static))
    model = hf_gpt2(params, cfg).bfloat16().eval()
    ids = torch.tensor(prompts, dtype=torch.long, device=model.device)
    batch = params, jnp.asarray(prompts), lengths, jax.random.key(1), 1.0

    def ours():
        return sample(*batch).responses

    def theirs():
        return hf_generate(model, ids, R, do_sample=True, top_k=0)

    row = duel(case, ours, "transformers generate, bfloat16", theirs, repeats)
    rate, bandwidth = limits()
    times = [seconds(ours) for _ in range(max(3, repeats))]
    floor = rollout_floor(cfg, B, P, R, rate, bandwidth)
    note = f"{B * R / min(times):.0f} tokens/s, {bandwidth / 1e9:.0f} GB/s"
    limit = "weights and cache read once a step"
    return [row, share(f"{case}/limit", limit, floor, times, goal, note)]


def rollout_floor(
    cfg: TransformerConfig, B: int, P: int, R: int, rate: float, bandwidth: float
) -> float:
    """Seconds: prefill at the matrix rate, then each step the larger of its bytes at
    the bandwidth (bfloat16 weights, keys and values) and its FLOPs at the rate."""
    layers, dim = cfg.num_layers, cfg.model_dim
    n, head = costs.block_params(cfg), cfg.vocab_size * dim
    cache = B * (P + R / 2) * 4 * layers * dim
    step = max((2 * (n + head) + cache) / bandwidth, 2 * (n + head) * B / rate)
    return 2 * n * B * P / rate + R * step


def ppo(work: Workload, goal: float, repeats: int) -> list[Row]:
    """One iteration beside the sum of the floors of its phases."""
    _, ours = our_iteration(work)
    seconds(ours)
    times = [seconds(ours) for _ in range(max(2, repeats))]
    rate, bandwidth = limits()
    cfg, B, P, R = work.model, work.episodes, work.prompt_len, work.response_len
    n, head = costs.block_params(cfg), cfg.vocab_size * cfg.model_dim
    rollout = rollout_floor(cfg, B, P, R, rate, bandwidth)
    # reference, reward and value read P + R tokens; old log-probabilities come from the
    # rollout; an update is three forwards of policy and value
    score = 2 * B * (3 * n * (P + R) + head * R) / rate
    update = work.epochs * 6 * B * (2 * n * (P + R) + head * R) / rate
    note = (
        f"{B} episodes of {P} + {R}, {work.epochs} epoch(s); floors: rollout "
        f"{rollout:.3f} s, scores {score:.3f} s, update {update:.3f} s"
    )
    case, floor = f"ppo/{cfg.num_params / 1e6:.0f}M/limit", rollout + score + update
    return [share(case, "the sum of its phases' floors", floor, times, goal, note)]


def measurements(repeats: int):
    """All cases, goals as shares of the limits."""
    repeats = min(repeats, 3)
    small, medium, large = (
        shape("gpt2"),
        shape("gpt2-medium"),
        shape("gpt2-xl", "elementwise"),
    )
    many = Workload(small, 512, 256, 256, epochs=1, microbatch=32, minibatches=8)
    few = Workload(small, 64, 256, 256, epochs=1, microbatch=16, minibatches=1)
    return [
        lambda: train(small, 16, 0.5, repeats),
        lambda: train(medium, 8, 0.5, repeats),
        lambda: train(large, 8, 0.6, repeats),
        lambda: decode(small, 64, 0.35, repeats),
        lambda: decode(medium, 64, 0.6, repeats),
        lambda: ppo(many, 0.45, repeats),
        lambda: against_trl("ppo/124M", few, repeats, None),
    ]
