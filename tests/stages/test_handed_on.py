"""What a whole run hands on and measures, against its own files, value by value."""

import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import some_devices

from experiments.instructgpt import stages
from experiments.presets import smoke
from rlhf_jax.data.inputs import Inputs
from rlhf_jax.data.records import read_demonstrations
from rlhf_jax.nn.heads import init_scalar_head, scalar_head
from rlhf_jax.nn.transformer import forward
from rlhf_jax.stages.common import Context, load_model
from rlhf_jax.stages.ppo_run import make_state
from rlhf_jax.stages.pretrain import corpus_batches
from rlhf_jax.stages.sampler import Sampler
from rlhf_jax.stages.sft import training_batches
from rlhf_jax.training.checkpoint import Checkpoints, load_params
from rlhf_jax.training.optimizers import learning_rate
from rlhf_jax.training.run_dir import RunDirError, StageDir


def small():
    cfg = smoke()
    replace = dataclasses.replace
    return replace(
        cfg,
        pretrain=replace(cfg.pretrain, num_steps=3, eval_batches=10**6),
        reward_model=replace(cfg.reward_model, num_centering=5, batch_size=4),
        evaluate=replace(cfg.evaluate, num_samples=2, num_prompts=10, batch_size=4),
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        cfg = dataclasses.replace(small(), run=run)
        inputs = Inputs(None, cfg.files, cfg.simulation, run)
        ctx = Context(run, inputs, some_devices(1, 1), 0)
        stages(cfg, ctx)
        yield cfg, ctx


def read(path: Path):
    return json.loads(path.read_text())


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(same))


def model_of(ctx, name, kind="language_model"):
    return load_model(ctx.stage(name), ctx.mesh, kind)


@functools.partial(jax.jit, static_argnames="cfg")
def states_of(params, ids, cfg):
    return forward(params, ids, cfg)


def hidden_states(params, ids, cfg):
    """Of one sequence; all are as wide as the model, so that one program does."""
    padded = np.zeros((1, cfg.max_len), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(states_of(params, padded, cfg)[0, : len(ids)])


def logprobs(model, params, ids):
    """log p(ids[t + 1] | ids[..t]) of one sequence."""
    logits = hidden_states(params, ids[:-1], model.cfg) @ np.asarray(params["embed"]).T
    chosen = logits[np.arange(len(ids) - 1), np.asarray(ids[1:])]
    return chosen - np.logaddexp.reduce(logits, axis=1)


def heldout(ctx, model, params):
    """Mean over the response tokens of the held-out demonstrations."""
    found = []
    for d in read_demonstrations(
        ctx.run / "data/demonstrations/simulation_valid.jsonl"
    ):
        prompt = model.format.encode_prompt(model.tokenizer, d.prompt)
        response = model.format.encode_response(model.tokenizer, d.response)
        ids = np.concatenate([prompt, response])
        found.append(-logprobs(model, params, ids)[len(prompt) - 1 :])
    return np.concatenate(found).mean()


def test_pretraining_is_measured_on_held_out_text(ran):
    cfg, ctx = ran
    model = model_of(ctx, "pretrain")
    text = (ctx.run / "data/corpus/simulation_valid.txt").read_text()
    ids = []
    for document in text.removesuffix("\n").split("\n<|endoftext|>\n"):
        ids += [*model.tokenizer.encode(document), model.tokenizer.eos_id]
    T, nll = cfg.pretrain.seq_len, []
    for start in range(0, len(ids) - 1, T):
        nll.append(-logprobs(model, model.params, ids[start : start + T + 1]))
    found = read(ctx.run / "pretrain/done.json")["heldout_loss"]
    np.testing.assert_allclose(found, np.concatenate(nll).mean(), rtol=1e-4)


@pytest.mark.parametrize("name", ["sft", "sft_rl"])
def test_sft_hands_on_its_last_epoch_and_keeps_each(ran, name):
    cfg, ctx = ran
    model, base = model_of(ctx, name), model_of(ctx, "pretrain")
    folders = sorted((ctx.run / name / "epochs").iterdir())
    assert [folder.name for folder in folders] == ["01", "02"]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    first, last = (load_params(folder, like) for folder in folders)
    assert equal(model.params, last) and not equal(first, last)
    assert not equal(first, base.params)
    found = read(ctx.run / name / "done.json")["heldout_loss"]
    np.testing.assert_allclose(found, heldout(ctx, model, model.params), rtol=1e-4)
    # dropout is on: the first loss is not that of the model as it is
    batch = training_batches(getattr(cfg, name), ctx, base, name)[1](0)
    hidden = forward(
        base.params, jnp.asarray(batch.tokens), base.cfg, documents=batch.documents
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(
        hidden @ base.params["embed"].T, jnp.asarray(batch.targets)
    )
    plain = float(jnp.sum(nll * batch.weights))
    logged = next(x for x in lines(ctx.run / name / "metrics.jsonl") if "loss" in x)
    assert logged["step"] == 1
    assert 1e-6 < abs(logged["loss"] - plain) < 0.5


def test_the_selected_epoch_is_the_one_with_the_highest_reward(ran):
    _, ctx = ran
    model = model_of(ctx, "sft_selected")
    told = read(ctx.run / "sft_selected/done.json")
    best = max(told["reward_by_epoch"], key=told["reward_by_epoch"].get)
    assert len(set(told["reward_by_epoch"].values())) == 2
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    assert equal(model.params, load_params(ctx.run / "sft/epochs" / best, like))
    assert told["reward"] == told["reward_by_epoch"][best]


def encoded(reward, prompt, response, ended=True):
    ids = reward.format.encode_prompt(reward.tokenizer, prompt)
    return ids, reward.format.encode_response(reward.tokenizer, response, ended)


def score(reward, prompt, response, ended, most=None):
    ids, answer = encoded(reward, prompt, response, ended)
    ids = np.concatenate([ids, answer[:most]])
    hidden = hidden_states(reward.params["transformer"], ids, reward.cfg)[-1]
    head = jax.device_get(reward.params["head"])
    return float(hidden @ head["w"] + head["b"] - head["shift"])


def test_the_reward_model_is_centred_and_measured_on_held_out_rankings(ran):
    cfg, ctx = ran
    reward = model_of(ctx, "reward_model", "reward_model")
    demos = list(
        read_demonstrations(ctx.run / "data/demonstrations/simulation_train.jsonl")
    )
    some = [demos[i * len(demos) // 5] for i in range(5)]
    limits = cfg.reward_model.prompt_len, cfg.reward_model.response_len
    fits = lambda d: all(  # noqa: E731
        len(ids) <= most
        for ids, most in zip(encoded(reward, d.prompt, d.response), limits, strict=True)
    )
    scores = [score(reward, d.prompt, d.response, True) for d in some if fits(d)]
    np.testing.assert_allclose(np.mean(scores), 0.0, atol=1e-4)
    assert np.ptp(scores) > 1e-3
    done = read(ctx.run / "reward_model/done.json")
    steps = -(-done["num_rankings"] // cfg.reward_model.batch_size)
    assert done["num_steps"] == cfg.reward_model.num_epochs * steps > steps
    shares = []
    for row in lines(ctx.run / "collect/rankings_valid.jsonl"):
        R = cfg.reward_model.response_len
        fits = [
            len(reward.format.encode_response(reward.tokenizer, r, e)) <= R
            for r, e in zip(row["responses"], row["ended"], strict=True)
        ]
        rated = [
            (rank, score(reward, row["prompt"], r, e))
            for rank, r, e, ok in zip(
                row["ranks"], row["responses"], row["ended"], fits, strict=True
            )
            if ok
        ]
        pairs = [
            np.heaviside(a[1] - b[1], 0.5)
            for a, b in itertools.permutations(rated, 2)
            if a[0] < b[0]
        ]
        if pairs:
            shares.append(np.mean(pairs))
    logged = [
        x["heldout/accuracy"]
        for x in lines(ctx.run / "reward_model/metrics.jsonl")
        if "heldout/accuracy" in x
    ]
    np.testing.assert_allclose(logged[-1], np.mean(shares), atol=2e-3)


@pytest.mark.parametrize("name", ["ppo", "ppo_ptx"])
def test_ppo_hands_on_the_average_and_ends_where_it_says(ran, name):
    cfg, ctx = ran
    reference = model_of(ctx, "sft_rl")
    reward = model_of(ctx, "reward_model", "reward_model")
    state, sharding = make_state(
        getattr(cfg, name), reference, reward, ctx.key(name), ctx.mesh
    )
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding
    )
    step, last = Checkpoints(ctx.run / name).restore_latest(like)
    assert step == cfg.ppo.num_iterations
    model = model_of(ctx, name)
    assert equal(model.params, last.ema)
    assert not equal(model.params, last.params["policy"])


def test_evaluation_scores_each_text_under_its_own_prompt(ran):
    cfg, ctx = ran
    reward = model_of(ctx, "reward_model", "reward_model")
    rows = lines(ctx.run / "evaluate/samples.jsonl")
    given = lines(ctx.run / "data/prompts/simulation_eval_test.jsonl")
    given = list(dict.fromkeys(row["prompt"] for row in given))
    most = cfg.evaluate.prompt_len
    fit = [p for p in given if len(encoded(reward, p, "")[0]) <= most]
    kept = [fit[i * len(fit) // 10] for i in range(10)]  # of all files, not the first
    assert [row["prompt"] for row in rows] == kept
    R = cfg.evaluate.sampling.response_len
    separator = reward.format.separator
    checked = 0
    for name in ("gpt_few_shot", "sft", "ppo"):
        kept = read(ctx.run / f"evaluate/models/{name}.json")
        assert kept["texts"][0] != kept["texts"][1]  # two samples, not one twice
        for s in range(2):
            for n, row in enumerate(rows):
                text, ended = kept["texts"][s][n], kept["ended"][s][n]
                checked += 1
                np.testing.assert_allclose(
                    kept["rewards"][s][n],
                    score(reward, row["prompt"], text, ended, R),
                    atol=1e-3,
                )
                if name == "gpt_few_shot":
                    assert separator not in text
    assert checked == 60


@pytest.mark.parametrize("name", ["collect", "evaluate"])
def test_few_shot_examples_are_part_of_what_a_stage_was_made_from(ran, name):
    _, ctx = ran
    assert "demonstrations/train" in read(ctx.run / name / "config.json")["data"]


def test_a_model_without_its_prompt_format_is_named(ran, tmp_path):
    _, ctx = ran
    shutil.copytree(ctx.run / "sft", tmp_path / "sft")
    (tmp_path / "sft/prompt_format.json").unlink()
    with pytest.raises(RunDirError, match=r"prompt_format\.json: is missing"):
        load_model(StageDir(tmp_path / "sft"), ctx.mesh, "language_model")


def logged(ctx, stage, name):
    """Step -> a metric, as far as it was written."""
    rows = lines(ctx.run / stage / "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if name in row}


def text_losses(ctx, name, length, rows, most):
    """Nats per token of `most` batches of held-out text, by the model of a stage."""
    model = model_of(ctx, name)
    batches = corpus_batches(ctx, model.tokenizer, "valid", rows, length, None)
    whole = max(1, batches.num_examples // rows)
    steps = [i * whole // min(most, whole) for i in range(min(most, whole))]
    found = []
    for batch in map(batches, steps):
        hidden = states_of(model.params, batch.tokens, model.cfg)
        nll = optax.softmax_cross_entropy_with_integer_labels(
            hidden @ model.params["embed"].T, jnp.asarray(batch.targets)
        )
        found.append(float(jnp.sum(nll * batch.weights)))  # which sum to 1
    return found


def test_the_reward_model_starts_from_sft_with_a_head_and_rates_of_its_own(ran):
    cfg, ctx = ran
    base, opt = model_of(ctx, cfg.reward_model.init_from), cfg.reward_model.optimizer
    head = init_scalar_head(ctx.key("reward_model"), base.cfg.model_dim)
    start = optax.tree.norm((base.params, head))
    found = logged(ctx, "reward_model", "param_norm")
    np.testing.assert_allclose(found[1], start, rtol=1e-6)
    num_steps = read(ctx.run / "reward_model/done.json")["num_steps"]
    for step, rate in logged(ctx, "reward_model", "learning_rate").items():
        expected = learning_rate(jnp.int32(step - 1), opt, opt.scalars(), num_steps)
        np.testing.assert_allclose(rate, expected, rtol=1e-5)


def test_ppo_starts_from_the_model_it_is_compared_with(ran):
    cfg, ctx = ran
    start = text_losses(ctx, "sft_rl", cfg.ppo.ptx_len, 8, 16)
    found = logged(ctx, "ppo", "heldout/pretrain_loss")[0]
    np.testing.assert_allclose(found, np.mean(start), rtol=2e-3)
    other = text_losses(ctx, "pretrain", cfg.ppo.ptx_len, 8, 16)
    assert abs(np.mean(other) - found) > 10 * abs(np.mean(start) - found)


def test_each_name_of_the_evaluation_is_the_model_it_says(ran):
    cfg, ctx = ran
    stages = {
        "gpt": "pretrain",
        "sft": "sft_selected",
        "sft_rl": "sft_rl",
        "ppo": "ppo",
    }
    for name, stage in stages.items():
        kept = read(ctx.run / f"evaluate/models/{name}.json")
        expected = text_losses(ctx, stage, cfg.evaluate.text_len, 8, 4)
        np.testing.assert_allclose(kept["pretrain_losses"], expected, rtol=1e-5)
        at_reference = np.abs(kept["kl"]).max() < 1e-4
        assert at_reference == (name == "sft_rl")


def test_an_epoch_is_chosen_by_the_mean_over_held_out_prompts(ran):
    cfg, ctx = ran
    model = model_of(ctx, "sft_selected")
    reward = model_of(ctx, "reward_model", "reward_model")
    sampling = cfg.evaluate.sampling
    most = min(model.cfg.max_len, cfg.sft.seq_len) - sampling.response_len
    demos = read_demonstrations(ctx.run / "data/demonstrations/simulation_valid.jsonl")
    prompts = [d.prompt for d in demos if len(encoded(reward, d.prompt, "")[0]) <= most]
    sampler = Sampler(model, sampling, most, 64, ctx)
    responses = sampler(model.params, prompts, ctx.key("sft_selected"))
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = np.concatenate([encoded(reward, prompt, "")[0], response.ids])
        hidden = states_of(reward.params["transformer"], ids[None], reward.cfg)[0, -1]
        scores.append(float(scalar_head(reward.params["head"], hidden)))
    told = read(ctx.run / "sft_selected/done.json")["reward"]
    np.testing.assert_allclose(told, np.mean(scores), rtol=1e-3, atol=1e-4)
