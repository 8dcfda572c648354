"""Sampling with a cache, against `generate` of transformers."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.peers import hf_generate, hf_gpt2, import_torch
from experiments.benchmark.timing import Row, duel, duel_by_tokens
from experiments.benchmark.training import model_config
from rlhf_jax.data.widths import fitted_width, width_bounds, width_groups
from rlhf_jax.nn.refill import generate_refilled
from rlhf_jax.nn.sampling import Sampling, generate
from rlhf_jax.nn.transformer import init_params

P = 64


def fixed(
    batch_size: int, goal: float, repeats: int, vocab_size: int = 50257
) -> list[Row]:
    """128 new tokens after each prompt, sampled at temperature 1, no end."""
    torch, _ = import_torch()
    cfg, R = model_config(vocab_size), 128
    params = init_params(jax.random.key(0), cfg)
    prompts = np.random.default_rng(0).integers(0, vocab_size, (batch_size, P))
    prompts = jnp.asarray(prompts, jnp.int32)
    lengths = jnp.full((batch_size,), P, jnp.int32)
    model = hf_gpt2(params, cfg).eval()
    ids = torch.tensor(np.asarray(prompts), dtype=torch.long, device=model.device)

    def sampler(sampling):
        def sample(params, key):
            return generate(
                params,
                prompts,
                lengths,
                key,
                1.0,
                eos_id=-1,
                pad_id=0,
                model=cfg,
                sampling=sampling,
            ).responses

        return jax.jit(sample)

    greedy = sampler(Sampling(response_len=R, top_k=1))
    same = np.asarray(greedy(params, jax.random.key(0))) == hf_generate(
        model, ids, R, do_sample=False
    )
    case = f"generate/B{batch_size}"
    if same[:, :16].mean() < 0.99:  # later tokens may part at a tie
        raise SystemExit(f"error: {case}: the greedy tokens differ; not the same work")
    sample, key = sampler(Sampling(response_len=R)), jax.random.key(1)
    ours = lambda: sample(params, key)  # noqa: E731
    theirs = lambda: hf_generate(model, ids, R, do_sample=True, top_k=0)  # noqa: E731
    note = f"greedy tokens equal: {100 * same.mean():.1f} %"
    against = "transformers generate with cache"
    return [duel(case, ours, against, theirs, repeats, goal, note)]


def varying(goal: float, repeats: int) -> list[Row]:
    """256 prompts whose responses end after a third of the limit of 128 on average.

    Ours has 32 slots that take the next prompt when a row ends; the others go batch by
    batch of 32, each until its longest row has ended. Compared by tokens a second:
    both draw their own lengths, from one distribution.
    """
    torch, _ = import_torch()
    N, B, R, V, end = 256, 32, 128, 8192, 1
    cfg = model_config(V)
    params = init_params(jax.random.key(0), cfg)
    # raises the logit of the end from 1 in V to about 1 in R / 3
    bias = np.log(3 * V / R) * params["embed"][end] / jnp.sum(params["embed"][end] ** 2)
    params["final_norm"]["bias"] = bias
    prompts = jnp.asarray(np.random.default_rng(0).integers(2, V, (N, P)), jnp.int32)
    lengths = jnp.full((N,), P, jnp.int32)
    model = hf_gpt2(params, cfg).eval()
    ids = torch.tensor(np.asarray(prompts), dtype=torch.long, device=model.device)
    static = {"eos_id": end, "pad_id": 0, "model": cfg}
    static["sampling"] = Sampling(response_len=R)
    in_slots = jax.jit(functools.partial(generate_refilled, **static, num_slots=B))
    batched = jax.jit(functools.partial(generate, **static))
    keys = map(jax.random.key, itertools.count())

    def ours() -> int:
        return int(in_slots(params, prompts, lengths, next(keys), 1.0).lengths.sum())

    def ours_batched() -> int:
        key, total = next(keys), 0
        for i in range(0, N, B):
            part = prompts[i : i + B], lengths[i : i + B], jax.random.fold_in(key, i)
            total += int(batched(params, *part, 1.0).lengths.sum())
        return total

    def theirs() -> int:
        total = 0
        for part in ids.split(B):
            with torch.no_grad():
                out = model.generate(
                    part,
                    attention_mask=torch.ones_like(part),
                    use_cache=True,
                    do_sample=True,
                    top_k=0,
                    eos_token_id=end,
                    pad_token_id=0,
                    max_new_tokens=R,
                )[:, P:]
            total += int((out != 0).sum())
        return total

    against = "transformers generate, batch by batch"
    rows = [duel_by_tokens("generate/varying", ours, against, theirs, repeats, goal)]
    against = "ours, batch by batch with early exit"
    case = "generate/refill"
    return rows + [duel_by_tokens(case, ours, against, ours_batched, repeats)]


def long_tail(repeats: int) -> list[Row]:
    """64 new tokens after each of 192 prompts, most of them short, 16 at a time.

    Lengths as of instructions: lognormal of median 20, at most 320 tokens. Ours in
    groups of like length (`width_groups`), against batches in the order given that are
    each padded to their longest, and against ours with all as wide as the longest.
    """
    torch, _ = import_torch()
    N, B, R, V, longest = 192, 16, 64, 8192, 320
    cfg = model_config(V)
    params = init_params(jax.random.key(0), cfg)
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(20), 0.9, N)).astype(int).clip(4, longest)
    lengths[0] = longest
    prompts = [rng.integers(0, V, length) for length in lengths]
    key, limit = jax.random.key(1), cfg.max_len - R
    static = {"eos_id": -1, "pad_id": 0, "model": cfg}

    def sampler(sampling: Sampling) -> Callable:
        return jax.jit(functools.partial(generate, **static, sampling=sampling))

    greedy = sampler(Sampling(response_len=R, top_k=1))
    sample = sampler(Sampling(response_len=R))

    def padded(rows: np.ndarray, width: int, left: bool = False) -> np.ndarray:
        out = np.zeros((len(rows), width), np.int64)
        for row, n in zip(out, rows, strict=True):
            row[width - lengths[n] if left else 0 :][: lengths[n]] = prompts[n]
        return out

    def batches_of(groups: list[np.ndarray]) -> list[tuple[np.ndarray, int]]:
        """Rows and width of each batch; the last of a group repeats rows of its own."""
        return [
            (np.resize(group[i : i + B], B), fitted_width(lengths[group], limit))
            for group in groups
            for i in range(0, len(group), B)
        ]

    def ours_in(groups: list[np.ndarray], sample: Callable) -> list[jax.Array]:
        out = []
        for rows, width in batches_of(groups):
            ids = jnp.asarray(padded(rows, width), jnp.int32)
            given = jnp.asarray(lengths[rows], jnp.int32)
            out.append(sample(params, ids, given, key, 1.0).responses)
        return out

    model = hf_gpt2(params, cfg).eval()

    def theirs(**options) -> list[np.ndarray]:
        out = []
        for part in range(0, N, B):
            rows = np.arange(part, part + B)
            width = lengths[rows].max()
            mask = np.arange(width) >= width - lengths[rows][:, None]
            ids = torch.tensor(padded(rows, width, left=True), device=model.device)
            mask = torch.tensor(mask, dtype=torch.long, device=model.device)
            out.append(hf_generate(model, ids, R, mask, **options))
        return out

    sizes = lengths.tolist()
    groups = width_groups(sizes, width_bounds(sizes, limit, B))
    whole = [np.arange(N)]
    case = "generate/long_tail"
    expected = np.concatenate(theirs(do_sample=False))
    same = np.concatenate(
        [
            np.concatenate(ours_in(part, greedy))
            == expected[np.concatenate([rows for rows, _ in batches_of(part)])]
            for part in (groups, whole)
        ]
    )
    if same[:, :16].mean() < 0.99:  # later tokens may part at a tie
        raise SystemExit(f"error: {case}: the greedy tokens differ; not the same work")
    note = f"{', '.join(str(len(group)) for group in groups)} prompts in groups"
    grouped = lambda: ours_in(groups, sample)  # noqa: E731
    sampled = lambda: theirs(do_sample=True, top_k=0)  # noqa: E731
    against = "transformers generate, padded batch by batch"
    rows = [duel(case, grouped, against, sampled, repeats, note=note)]
    against = "ours, all as wide as the longest"
    one_width = lambda: ours_in(whole, sample)  # noqa: E731
    return rows + [duel("generate/groups", grouped, against, one_width, repeats)]
