"""Held-out evaluation of every model of a run: what each stage changed."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.batches import pad_prompts
from rlhf_jax.data.schedule import evenly
from rlhf_jax.data.sources import DataError
from rlhf_jax.data.widths import fitted_width
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.stages.collect import cut_few_shot, few_shot_examples
from rlhf_jax.stages.common import Context, Model, check_compatible, load_model
from rlhf_jax.stages.comparison import judge_results, sample_lines, summarize
from rlhf_jax.stages.pretrain import corpus_batches, heldout_rows, sum_logprobs
from rlhf_jax.stages.sampler import Response, Sampler, fitting, make_kl
from rlhf_jax.stages.scoring import response_scores
from rlhf_jax.training.loop import tracked
from rlhf_jax.training.mesh import (
    fill_shards,
    jit_measure,
    num_local_shards,
    pad_rows,
    shard_batch,
    shard_whole_batch,
)
from rlhf_jax.training.room import require_room_to_sample
from rlhf_jax.training.run_dir import read_json, write_lines, write_text

MODELS = {
    "gpt": "pretrain",
    "gpt_few_shot": "pretrain",
    "sft": "sft_selected",
    "sft_rl": "sft_rl",
    "ppo": "ppo",
    "ppo_ptx": "ppo_ptx",
}
"""Names in the report, and the stages they come from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation."""

    num_prompts: int = 400
    """Held-out prompts."""
    num_samples: int = 1
    """Responses of each model to each prompt."""
    prompt_len: int = 1024
    """Longest prompt in tokens, P; longer ones are left out."""
    few_shot_len: int = 1792
    """Longest prompt in tokens with few-shot examples before it."""
    sampling: Sampling = Sampling()
    """The distribution responses are drawn from."""
    num_few_shot: int = 3
    """Solved examples before the prompt for few-shot-prompted GPT."""
    batch_size: int = 128
    """Prompts sampled at a time."""
    text_len: int = 1024
    """Tokens per row of held-out pre-training text."""
    text_batches: int = 32
    """Batches of 8 rows of held-out pre-training text."""

    def __post_init__(self):
        if self.sampling.top_k is not None or self.sampling.top_p is not None:
            raise ValueError(
                "evaluate samples from the whole distribution, of which it measures "
                "the KL; set top_k and top_p to None"
            )


def run(cfg: EvaluateConfig, ctx: Context) -> None:
    """Samples from every finished model and measures it into RUN/evaluate.

    Samples of each model are kept as they come: an interrupted evaluation goes on with
    the next model.
    """
    stage = ctx.stage("evaluate")
    parents = {n: ctx.stage(n) for n in dict.fromkeys(MODELS.values())}
    parents["reward_model"] = ctx.stage("reward_model")
    sources = ctx.inputs.fingerprint(
        ("eval_prompts", "test"), ("corpus", "valid"), ("demonstrations", "train")
    )
    made_by = {"evaluate": cfg, "seed": ctx.seed}
    stage.open("evaluate", made_by, sources, parents)
    if stage.done:
        return
    reward = load_model(parents["reward_model"], ctx.mesh, "reward_model")
    reference = load_model(parents["sft_rl"], ctx.mesh, "language_model")
    check_compatible("reward_model", reward, "sft_rl", reference)
    records = ctx.inputs.read("eval_prompts", "test")
    prompts = list(dict.fromkeys(record.prompt for record in records))
    prompts = evenly(fitting(prompts, reference, cfg.prompt_len), cfg.num_prompts)
    if not prompts:
        raise DataError(f"no held-out prompt has at most {cfg.prompt_len} tokens")
    measure = Measurer(reference, reward, prompts, cfg, ctx)
    results = {}
    for name, parent in tracked("evaluate", list(MODELS.items())):
        path = stage.path / "models" / f"{name}.json"
        if not path.exists():
            model = load_model(parents[parent], ctx.mesh, "language_model")
            write_text(path, json.dumps(measure(name, model)))
        results[name] = read_json(path)
    judge_results(results, prompts, ctx)
    report = summarize(
        results, len(prompts), cfg.num_samples, cfg.sampling.temperature, ctx
    )
    write_text(stage.path / "evaluation.json", json.dumps(report, indent=2))
    write_lines(stage.path / "samples.jsonl", sample_lines(results, prompts, ctx))
    stage.finish({"num_prompts": len(prompts)})


class Measurer:
    """Samples from one model after another and measures the samples."""

    def __init__(
        self,
        reference: Model,
        reward: Model,
        prompts: Sequence[str],
        cfg: EvaluateConfig,
        ctx: Context,
    ):
        """Compiles nothing yet.

        Args:
            reference: of the KL, and the shape of all models.
            reward: scores the samples.
            prompts: held out.
            cfg: of the stage.
            ctx: the run.
        """
        self._reference, self._reward, self._prompts = reference, reward, prompts
        self._cfg, self._ctx = cfg, ctx
        model, sampling = reference.cfg, cfg.sampling
        rows, times = cfg.batch_size, cfg.num_samples
        self._plain = Sampler(
            reference, sampling, cfg.prompt_len, rows, ctx, times * (len(MODELS) - 1)
        )
        self._few_shot = Sampler(
            reference, sampling, cfg.few_shot_len, rows, ctx, times
        )
        examples = few_shot_examples(ctx, cfg.num_few_shot)
        self._shown = [reference.format.few_shot_prompt(examples, p) for p in prompts]
        width = max(self._plain.width(prompts), self._few_shot.width(self._shown))
        shape = (rows, width, sampling.response_len)
        # the reference, the reward model's and the one that is sampled from
        require_room_to_sample("evaluate", model, 3, shape, ctx.mesh, measured=True)
        self._kl = make_kl(reference, sampling, ctx.mesh)
        self._scores = jit_measure(response_scores, ctx.mesh, model=reward.cfg)
        self._sums = jit_measure(sum_logprobs, ctx.mesh, model=model)
        self._text = corpus_batches(
            ctx, reference.tokenizer, "valid", heldout_rows(), cfg.text_len, None
        )

    def __call__(self, name: str, model: Model) -> dict[str, Any]:
        """Samples of one model with their rewards and KL, and its language-model loss.

        Returns:
            Lists over samples of lists over prompts: texts, ended, lengths, rewards,
            and kl (null for few-shot prompting, whose examples the reference does not
            see); and pretrain_losses, nats per token of each batch of held-out text.
        """
        check_compatible(name, model, "sft_rl", self._reference)
        few_shot = name == "gpt_few_shot"
        given, sampler = list(self._prompts), self._plain
        if few_shot:
            given, sampler = self._shown, self._few_shot
        kl = functools.partial(self._kl, model.params)
        fields = ("texts", "ended", "lengths", "rewards", "kl")
        measured: dict[str, Any] = {field: [] for field in fields}
        for sample in range(self._cfg.num_samples):
            key = jax.random.fold_in(self._ctx.key("evaluate"), sample)
            responses, values = sampler.measured(
                model.params, given, key, {} if few_shot else {"kl": kl}
            )
            if few_shot:
                responses = [cut_few_shot(r, model) for r in responses]
            measured["texts"].append([r.text for r in responses])
            measured["ended"].append([r.ended for r in responses])
            measured["lengths"].append([len(r.ids) for r in responses])
            measured["rewards"].append(self._rewards(responses))
            measured["kl"].append(None if few_shot else values["kl"].tolist())
        measured["pretrain_losses"] = self._pretrain_losses(model.params)
        return measured

    def _rewards(self, responses: Sequence[Response]) -> list[float]:
        """Scores of texts under the bare prompt."""
        cfg, tokenizer, fmt = self._cfg, self._reward.tokenizer, self._reward.format
        R = cfg.sampling.response_len
        given = [fmt.encode_prompt(tokenizer, prompt) for prompt in self._prompts]
        P = fitted_width(map(len, given), cfg.prompt_len)
        rows = fill_shards(cfg.batch_size, self._ctx.mesh)
        out: list[float] = []
        num_cut = 0
        for first in range(0, len(responses), rows):
            part = responses[first : first + rows]
            # a text may encode to more ids than were sampled: the rest is cut
            ids = [fmt.encode_response(tokenizer, r.text, r.ended) for r in part]
            num_cut += sum(len(answer) > R for answer in ids)
            asked = pad_prompts(given[first : first + rows], rows, P, tokenizer.pad_id)
            said = pad_prompts([x[:R] for x in ids], rows, R, tokenizer.pad_id)
            batch = (asked.prompts, asked.prompt_lengths)
            batch += (said.prompts[:, None], said.prompt_lengths[:, None])
            batch = shard_whole_batch(self._ctx.mesh, batch)
            scores = np.asarray(self._scores(self._reward.params, *batch))
            out += scores[: len(part), 0].tolist()
        if num_cut:
            print(
                f"evaluate: {num_cut} of {len(responses)} responses, encoded anew from "
                f"their text, have over {R} tokens; their scores are of the first {R}",
                file=sys.stderr,
            )
        return out

    def _pretrain_losses(self, params: Any) -> list[float]:
        """Held-out pre-training loss of each batch, in nats per token.

        The batches are spread evenly over the text. A last batch that is not full would
        count as much as the others: it is left out, unless it is the only one.
        """
        losses = []
        whole = max(1, self._text.num_examples // heldout_rows())
        for step in evenly(range(whole), self._cfg.text_batches):
            batch = pad_rows(self._text(step), num_local_shards(self._ctx.mesh))
            batch = shard_batch(self._ctx.mesh, batch)
            total, count = self._sums(params, batch)
            losses.append(-float(total) / float(count))
        return losses
