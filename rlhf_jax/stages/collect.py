"""Collecting comparisons: sample K responses to a prompt, have labelers rank them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import simulation
from rlhf_jax.data.sources import DataError, Demonstration
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.stages.common import Context, Model, check_compatible, load_model
from rlhf_jax.stages.human_rankings import ASKED_SPLITS, check_ranked, take_ranked
from rlhf_jax.stages.rankings import has_rankings
from rlhf_jax.stages.sampler import Response, Sampler, fitting
from rlhf_jax.training.loop import tracked
from rlhf_jax.training.room import require_room_to_sample
from rlhf_jax.training.run_dir import write_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Collection of rankings. "IG" marks what InstructGPT published."""

    min_responses: int = 4
    """Fewest responses to rank, K (IG: 4)."""
    max_responses: int = 9
    """Most responses to rank, K (IG: 9)."""
    prompt_len: int = 1024
    """Longest prompt in tokens, P; longer ones are left out."""
    few_shot_len: int = 1792
    """Longest prompt in tokens with few-shot examples before it."""
    sampling: Sampling = Sampling()
    """The distribution responses are drawn from."""
    num_few_shot: int = 3
    """Solved examples before the prompt for few-shot-prompted GPT."""
    labelers_per_heldout_prompt: int = 3
    """Labelers that rank each held-out prompt, to measure their agreement."""
    batch_size: int = 128
    """Prompts sampled at a time."""
    ranked: Path | None = None
    """Your labelers' rankings, where nobody is simulated: one file with the lines of
    RUN/collect/to_rank_train.jsonl and to_rank_valid.jsonl and `ranks` filled in."""

    def __post_init__(self):
        if not 2 <= self.min_responses <= self.max_responses:
            raise ValueError(
                f"need 2 <= min_responses <= max_responses, got {self.min_responses} "
                f"and {self.max_responses}"
            )


def few_shot_examples(ctx: Context, count: int) -> list[Demonstration]:
    """Solved examples for few-shot prompting: the simulation's, or short real ones."""
    if ctx.inputs.simulated:
        _, world, _, _ = simulation.load_campaign(ctx.inputs.root)
        pairs = simulation.few_shot_examples(world, count)
        return [Demonstration(prompt, response) for prompt, response in pairs]
    records = ctx.inputs.read("demonstrations", "train")
    some = [records[i] for i in range(min(len(records), 500))]
    return sorted(some, key=lambda d: len(d.prompt) + len(d.response))[:count]


def cut_few_shot(response: Response, model: Model) -> Response:
    """Ends a few-shot response where the model begins the next example."""
    text, found, _ = response.text.partition(model.format.separator)
    if not found:
        return response
    ids = model.format.encode_response(model.tokenizer, text)
    return Response(text=text, ids=ids, ended=True)


def sample_responses(
    models: dict[str, Model],
    prompts: Sequence[str],
    cfg: CollectConfig,
    ctx: Context,
    split: str,
) -> list[list[tuple[str, Response]]]:
    """K in [min, max] responses to each prompt from SFT, PPO's start and few-shot GPT.

    The first is few-shot-prompted GPT's, the others take turns between the two SFT
    models; where labelers write demonstrations, one of those is added.
    """
    rng = np.random.default_rng(ctx.data_seed(f"collect/{split}"))
    counts = rng.integers(cfg.min_responses, cfg.max_responses + 1, len(prompts))
    written = _demonstrations(ctx, prompts, split)
    examples = few_shot_examples(ctx, cfg.num_few_shot)
    key = ctx.key(f"collect/{split}")
    out: list[list[tuple[str, Response]]] = [[] for _ in prompts]
    for index, text in enumerate(written):
        out[index].append(
            ("demonstration", Response(text, np.zeros(0, np.int32), True))
        )
    gpt, sft = models["gpt_few_shot"], models["sft"]
    few_shot = Sampler(gpt, cfg.sampling, cfg.few_shot_len, cfg.batch_size, ctx)
    turns = cfg.min_responses - 1  # about so many of all prompts, one is few-shot's
    plain = Sampler(sft, cfg.sampling, cfg.prompt_len, cfg.batch_size, ctx, turns)
    given = [gpt.format.few_shot_prompt(examples, text) for text in prompts]
    width = max(few_shot.width(given), plain.width(prompts))
    shape = (cfg.batch_size, width, cfg.sampling.response_len)
    require_room_to_sample("collect", sft.cfg, len(models), shape, ctx.mesh)
    sources = ["gpt_few_shot", *(["sft", "sft_rl"] * cfg.max_responses)]
    sources = sources[: int(counts.max()) - len(out[0])]
    for turn, source in enumerate(tracked(f"collect {split}", sources)):
        wanted = [i for i in range(len(prompts)) if len(out[i]) < counts[i]]
        texts = [prompts[i] for i in wanted]
        turn_key = jax.random.fold_in(key, turn)
        if source == "gpt_few_shot":
            drawn = few_shot(gpt.params, [given[i] for i in wanted], turn_key)
            drawn = [cut_few_shot(r, gpt) for r in drawn]
        else:
            drawn = plain(models[source].params, texts, turn_key)
        for i, response in zip(wanted, drawn, strict=True):
            out[i].append((source, response))
    for row in out:
        rng.shuffle(row)  # type: ignore[arg-type]
    return out


def _demonstrations(ctx: Context, prompts: Sequence[str], split: str) -> list[str]:
    if not ctx.inputs.simulated:
        return []
    _, _, _, labelers = simulation.load_campaign(ctx.inputs.root)
    writers = [labeler for labeler in labelers if not labeler.held_out]
    rng = np.random.default_rng(ctx.data_seed(f"collect/{split}/demonstrations"))
    return [writers[rng.integers(len(writers))].demonstrate(p, rng) for p in prompts]


def run(cfg: CollectConfig, ctx: Context) -> None:
    """Writes RUN/collect/rankings_{train,valid,test}.jsonl.

    train: ranked by one training labeler each; valid: held-out prompts ranked by
    several training labelers; test: the same prompts ranked by held-out labelers, if
    there are any. Skipped where the data already holds rankings.

    Raises:
        DataError: where nobody can rank: it says which file to have ranked and how to
            hand it in.
    """
    ranked = has_rankings(ctx)
    if cfg.ranked is not None and (ranked or ctx.inputs.simulated):
        raise DataError(
            f"{cfg.ranked}: nothing asks for people's rankings here: "
            + ("the data has rankings" if ranked else "labelers are simulated")
            + "; leave --collect.ranked out"
        )
    if ranked:
        return
    stage = ctx.stage("collect")
    parents = {name: ctx.stage(name) for name in ("pretrain", "sft", "sft_rl")}
    sources = ctx.inputs.fingerprint(
        ("ranking_prompts", "train"),
        ("ranking_prompts", "valid"),
        ("demonstrations", "train"),  # examples of few-shot prompts
    )
    described = dataclasses.replace(cfg, ranked=None)
    made_by = {"collect": described, "seed": ctx.seed}
    stage.open("collect", made_by, sources, parents)
    if stage.done:
        check_ranked(cfg.ranked, stage)
        return
    names = {"gpt_few_shot": "pretrain", "sft": "sft", "sft_rl": "sft_rl"}
    models = {
        name: load_model(parents[parent], ctx.mesh, "language_model")
        for name, parent in names.items()
    }
    check_compatible("pretrain", models["gpt_few_shot"], "sft", models["sft"])
    for split in ASKED_SPLITS:
        path = stage.path / f"to_rank_{split}.jsonl"
        if path.exists():
            continue
        records = ctx.inputs.read("ranking_prompts", split)
        prompts = [record.prompt for record in records]
        prompts = fitting(prompts, models["sft"], cfg.prompt_len)
        if not prompts:
            raise DataError(
                f"ranking prompts ({split}): none of {len(records)} has at most "
                f"{cfg.prompt_len} tokens; raise collect.prompt_len"
            )
        rows = sample_responses(models, prompts, cfg, ctx, split)
        lines = [
            {
                "prompt": prompt,
                "responses": [r.text for _, r in row],
                "ended": [r.ended for _, r in row],
                "sources": [source for source, _ in row],
            }
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        write_lines(path, lines)
    if ctx.inputs.simulated:
        counts = _rank_by_simulation(cfg, ctx, stage.path)
    else:
        counts = take_ranked(cfg.ranked, stage.path)
    stage.finish(counts)


def _rank_by_simulation(cfg: CollectConfig, ctx: Context, path: Path) -> dict[str, Any]:
    _, _, judge, people = simulation.load_campaign(ctx.inputs.root)
    training = [labeler for labeler in people if not labeler.held_out]
    held_out = [labeler for labeler in people if labeler.held_out]
    groups = {
        "train": ("train", training, 1),
        "valid": ("valid", training, cfg.labelers_per_heldout_prompt),
        "test": ("valid", held_out, cfg.labelers_per_heldout_prompt),
    }
    counts = {}
    for split, (asked, labelers, per_prompt) in groups.items():
        rng = np.random.default_rng(ctx.data_seed(f"collect/rank/{split}"))
        lines = []
        for text in (path / f"to_rank_{asked}.jsonl").read_text().splitlines():
            row = json.loads(text)
            labels = [
                judge.metadata_labels(row["prompt"], response, ended)
                for response, ended in zip(row["responses"], row["ended"], strict=True)
            ]
            chosen = rng.permutation(len(labelers))[:per_prompt]
            for labeler in (labelers[i] for i in chosen):
                ranks = labeler.rank(row["prompt"], row["responses"], row["ended"], rng)
                extra = {"labeler": labeler.name, "labels": labels}
                lines.append(row | {"ranks": [int(r) for r in ranks]} | extra)
        if lines:  # none where nobody is held out
            write_lines(path / f"rankings_{split}.jsonl", lines)
        counts[f"num_rankings_{split}"] = len(lines)
    return counts
