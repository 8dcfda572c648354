"""K responses to each prompt from mixed sources, and a way to have people rank them."""

import dataclasses
import json
import types

import numpy as np
import ppo_case as case
import pytest

from rlhf_jax.data.inputs import FilesConfig, Inputs
from rlhf_jax.data.prompts import PromptFormat
from rlhf_jax.data.records import DataError, Demonstration
from rlhf_jax.data.simulation.campaign import SimulationConfig, write_campaign
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.stages import collect
from rlhf_jax.stages.collect import CollectConfig, cut_few_shot, sample_responses
from rlhf_jax.stages.common import Context, Model
from rlhf_jax.stages.human_rankings import check_ranked, take_ranked
from rlhf_jax.stages.rankings import has_rankings, ranking_hashes, read_rankings
from rlhf_jax.stages.sampler import Response
from rlhf_jax.training.mesh import MeshConfig
from rlhf_jax.training.run_dir import RunDirError, StageDir, file_hash

FORM = PromptFormat(suffix=":", separator=";")
ALPHABET = "_abcdefghi:; "


class Letters:
    """One id per letter; 0 is pad and end-of-text."""

    pad_id = eos_id = 0
    vocab_size = case.V
    fingerprint = "letters"

    def encode(self, text):
        return np.array([ALPHABET.index(c) for c in text], np.int32)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(ALPHABET[i] for i in ids if i)


CFG = CollectConfig(
    min_responses=3,
    max_responses=6,
    prompt_len=4,
    few_shot_len=9,
    num_few_shot=1,
    sampling=Sampling(response_len=5),
    batch_size=8,
)
PROMPTS = ["a", "bc", "d", "ef", "gh", "i", "ab", "cd", "e", "g"]


@pytest.fixture(scope="module")
def ctx(tmp_path_factory):
    records = [Demonstration("abcdef", "a"), Demonstration("b", "c")]
    inputs = types.SimpleNamespace(simulated=False, read=lambda purpose, split: records)
    run = tmp_path_factory.mktemp("run")
    return Context(run, inputs, MeshConfig().make(), 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models():
    def model(seed):
        return Model(
            "language_model", case.transformer(seed), case.MODEL, Letters(), FORM
        )  # type: ignore # noqa: E501

    return {"gpt_few_shot": model(0), "sft": model(1), "sft_rl": model(2)}


@pytest.fixture(scope="module")
def rows(ctx, models):
    return sample_responses(models, PROMPTS, CFG, ctx, "train")


def test_every_prompt_gets_between_min_and_max_responses(rows):
    counts = {len(row) for row in rows}
    assert len(rows) == len(PROMPTS)
    assert counts <= {3, 4, 5, 6} and len(counts) > 1


def test_sources_are_mixed(rows):
    for row in rows:
        sources = [source for source, _ in row]
        assert sources.count("gpt_few_shot") == 1
        assert abs(sources.count("sft") - sources.count("sft_rl")) <= 1
    places = {[s for s, _ in row].index("gpt_few_shot") for row in rows}
    assert len(places) > 1  # order tells nothing


def test_collecting_again_collects_the_same(rows, ctx, models):
    again = sample_responses(models, PROMPTS, CFG, ctx, "train")
    assert [[(s, r.text, r.ended) for s, r in row] for row in again] == [
        [(s, r.text, r.ended) for s, r in row] for row in rows
    ]


def test_a_few_shot_response_ends_where_the_next_example_begins(rows, models):
    model = models["gpt_few_shot"]
    assert model.format.separator == ";"
    ids = np.zeros(9, np.int32)
    cut = cut_few_shot(Response("ab;c:d", ids, False), model)
    assert (cut.text, cut.ended) == ("ab", True)
    assert (
        cut.ids.tolist() == model.format.encode_response(model.tokenizer, "ab").tolist()
    )
    whole = Response("abc", ids, False)
    assert cut_few_shot(whole, model) is whole
    assert not any(";" in r.text for row in rows for s, r in row if s == "gpt_few_shot")


def test_few_shot_prompts_that_are_too_long_name_their_fields(ctx, models):
    cfg = dataclasses.replace(CFG, few_shot_len=1)
    with pytest.raises(DataError, match="raise few_shot_len or lower num_few"):
        sample_responses(models, PROMPTS, cfg, ctx, "train")


def test_real_examples_of_few_shot_prompting_are_short(ctx):
    assert collect.few_shot_examples(ctx, 1) == [Demonstration("b", "c")]


@pytest.mark.parametrize("bounds", [(1, 4), (5, 4), (0, 0)])
def test_impossible_numbers_of_responses_are_refused(bounds):
    with pytest.raises(ValueError, match="2 <= min_responses <= max_responses"):
        CollectConfig(min_responses=bounds[0], max_responses=bounds[1])


def test_the_defaults_are_instructgpts():
    """Ouyang et al. 2022, section 3.5: K = 4 to 9."""
    assert (CollectConfig().min_responses, CollectConfig().max_responses) == (4, 9)


def test_without_labelers_the_way_to_hand_rankings_in_is_told(tmp_path):
    with pytest.raises(DataError) as caught:
        take_ranked(None, tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "to_rank_train.jsonl") in text
    assert "`ranks`" in text and "--collect.ranked FILE" in text


def _ask(path, prompts, ended=(True, False), as_ascii=True):
    for split, asked in prompts.items():
        rows = [{"prompt": p, "responses": ["a", "b"], "ended": ended} for p in asked]
        text = "".join(json.dumps(row, ensure_ascii=as_ascii) + "\n" for row in rows)
        (path / f"to_rank_{split}.jsonl").write_text(text)


def test_rankings_of_people_are_split_as_they_were_asked(tmp_path):
    """A prompt that was held out when responses were drawn stays held out."""
    file = tmp_path / "ranked.jsonl"
    held_out = ["p3", "p11", "p12"]
    shown = [f"p{n}" for n in range(20) if f"p{n}" not in held_out]
    _ask(tmp_path, {"train": shown, "valid": held_out})
    lines = [
        {
            "prompt": f"p{n // 2}",
            "responses": ["a", "b"],
            "ranks": [2, 1],
            "ended": [True, False],
            "labeler": "kim",
        }
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = take_ranked(file, tmp_path)
    assert counts == {"num_rankings": 40, "ranked": file_hash(file)}
    parts = {
        split: [
            json.loads(line)
            for line in (tmp_path / f"rankings_{split}.jsonl").read_text().splitlines()
        ]
        for split in ("train", "valid")
    }
    assert len(parts["train"]) == 34
    assert {line["prompt"] for line in parts["valid"]} == {"p3", "p11", "p12"}
    assert all(line in lines for part in parts.values() for line in part)


@pytest.mark.parametrize("asked", [[], ["p0"]])
def test_rankings_of_people_for_one_split_only_are_refused(tmp_path, asked):
    file = tmp_path / "ranked.jsonl"
    line = {"prompt": "p0", "responses": ["a", "b"], "ranks": [2, 1]}
    file.write_text(json.dumps(line) + "\n")
    split, other = ("train", "valid") if asked else ("valid", "train")
    _ask(tmp_path, {split: [], other: ["p0"]})
    with pytest.raises(DataError, match=f"ranks no prompt of .*to_rank_{split}.jsonl"):
        take_ranked(file, tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "p1 "}, "ranking 2: field 'prompt': 'p1 ' is in neither"),
        ({"responses": ["a", "b "]}, "ranking 2: field 'responses': 'b ' is none of"),
    ],
)
def test_lines_that_nobody_asked_about_are_refused(tmp_path, change, told):
    """A held-out prompt that a tool has trimmed would be trained on."""
    file = tmp_path / "ranked.jsonl"
    _ask(tmp_path, {"train": ["p0"], "valid": ["p1"]})
    lines = [
        {"prompt": f"p{n}", "responses": ["a", "b"], "ranks": [2, 1]} for n in (0, 1)
    ]
    lines[1] |= change
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=told):
        take_ranked(file, tmp_path)


def test_whether_a_response_ended_is_known_from_when_it_was_drawn(tmp_path):
    """A tool that keeps prompt, responses and ranks loses it, or their order."""
    file = tmp_path / "ranked.jsonl"
    _ask(tmp_path, {"train": ["p0"], "valid": ["p1"]})
    lines = [
        {"prompt": f"p{n}", "responses": ["b", "a"], "ranks": [2, 1]} for n in (0, 1)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    take_ranked(file, tmp_path)
    for split in ("train", "valid"):
        (line,) = (tmp_path / f"rankings_{split}.jsonl").read_text().splitlines()
        assert json.loads(line)["ended"] == [False, True]


def test_prompts_with_unicode_line_ends_are_asked_about_in_one_line(tmp_path):
    """A tool that writes plain UTF-8 leaves them as they are."""
    prompts, file = ["p\u2028q", "p\u0085q"], tmp_path / "ranked.jsonl"
    _ask(tmp_path, {"train": prompts[:1], "valid": prompts[1:]}, as_ascii=False)
    lines = [{"prompt": p, "responses": ["a", "b"], "ranks": [2, 1]} for p in prompts]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text)
    assert take_ranked(file, tmp_path)["num_rankings"] == 2


def _written(path, ranks):
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"prompt": "p", "responses": ["a", "b"], "ranks": ranks}
    path.write_text(json.dumps(line) + "\n")


def test_all_rankings_that_are_read_are_known_by_their_content(tmp_path, monkeypatch):
    """Beside collected ones those of the data's test files are read."""
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    data, run = tmp_path / "data", tmp_path / "run"
    for split in ("train", "valid"):
        _written(run / f"collect/rankings_{split}.jsonl", [1, 2])
    _written(data / "rankings/x_test.jsonl", [1, 2])
    inputs = Inputs(data, FilesConfig(), SimulationConfig(), run)
    ctx = Context(run, inputs, MeshConfig().make(), 0)
    assert not has_rankings(ctx)
    before = ranking_hashes(ctx)
    assert sorted(before) == [
        "rankings/test",
        "rankings_train.jsonl",
        "rankings_valid.jsonl",
    ]
    assert read_rankings(ctx, "test")["rankings/x_test.jsonl"][0].ranks == (1, 2)
    _written(data / "rankings/x_test.jsonl", [2, 1])
    assert ranking_hashes(ctx) != before


def test_collected_rankings_beside_those_of_the_data_are_refused(tmp_path):
    """One of them would be left out without a word."""
    data, run = tmp_path / "data", tmp_path / "run"
    _written(data / "rankings/x_train.jsonl", [1, 2])
    inputs = Inputs(data, FilesConfig(), SimulationConfig(), run)
    ctx = Context(run, inputs, MeshConfig().make(), 0)
    assert has_rankings(ctx)
    _written(run / "collect/rankings_train.jsonl", [1, 2])
    with pytest.raises(DataError, match="Take one away"):
        has_rankings(ctx)


def test_held_out_rankings_without_any_to_train_on_are_refused(tmp_path):
    """Those held out of the collected ones would take their place."""
    data, run = tmp_path / "data", tmp_path / "run"
    _written(data / "comparisons/x_valid.jsonl", [1, 2])
    inputs = Inputs(data, FilesConfig(), SimulationConfig(), run)
    ctx = Context(run, inputs, MeshConfig().make(), 0)
    with pytest.raises(DataError, match="held-out rankings .* none to train on"):
        has_rankings(ctx)


def test_other_rankings_than_those_taken_are_refused(tmp_path):
    """A finished stage must not silently ignore a file that it never read."""
    stage, file = StageDir(tmp_path / "collect"), tmp_path / "ranked.jsonl"
    file.write_text("first")
    stage.finish({"ranked": file_hash(file)})
    check_ranked(file, stage)
    check_ranked(None, stage)
    file.write_text("second")
    with pytest.raises(RunDirError, match="made from other rankings"):
        check_ranked(file, stage)


def test_rankings_that_nobody_asked_for_are_refused(tmp_path):
    """Where labelers are simulated, a file of rankings would be ignored."""
    inputs = types.SimpleNamespace(simulated=True, has=lambda *_: False)
    ctx = Context(tmp_path, inputs, MeshConfig().make(), 0)  # type: ignore[arg-type]
    cfg = dataclasses.replace(CFG, ranked=tmp_path / "ranked.jsonl")
    with pytest.raises(DataError, match="labelers are simulated"):
        collect.run(cfg, ctx)


@pytest.mark.parametrize("held_out", [0, 2])
def test_only_labelers_there_are_rank_for_evaluation(held_out, tmp_path):
    """A file without a record is refused where it is read, after training."""
    sizes = {
        field.name: 2
        for field in dataclasses.fields(SimulationConfig)
        if field.name.startswith("num_")
    }
    sizes["num_held_out_labelers"] = held_out
    write_campaign(SimulationConfig(**sizes), tmp_path / "data")
    prompts = (tmp_path / "data/prompts").glob("*rank*")
    lines = [line for file in prompts for line in file.read_text().splitlines()]
    for split in ("train", "valid"):
        rows = [
            json.loads(line) | {"responses": ["Yes.", "No."], "ended": [True, True]}
            for line in lines
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"to_rank_{split}.jsonl").write_text(text)
    inputs = types.SimpleNamespace(root=tmp_path / "data")
    ctx = Context(tmp_path, inputs, MeshConfig().make(), 0)  # type: ignore[arg-type]
    counts = collect._rank_by_simulation(CFG, ctx, tmp_path)
    assert counts["num_rankings_train"] == len(lines) > 0
    assert counts["num_rankings_test"] == held_out * len(lines)
    assert (tmp_path / "rankings_test.jsonl").exists() == bool(held_out)


def test_as_many_as_asked_for_are_drawn_anew_in_every_turn(ctx, models):
    prompts = ["a"] * 40
    rows = sample_responses(models, prompts, CFG, ctx, "train")
    assert {len(row) for row in rows} == {3, 4, 5, 6}
    five = dataclasses.replace(CFG, min_responses=5, max_responses=5)
    drawn = sample_responses(models, prompts, five, ctx, "train")
    twice = [[r.text for s, r in row if s == "sft"] for row in drawn]
    assert sum(a != b for a, b in twice) > len(twice) / 2
    alike = {r.text for row in rows for s, r in row if s == "sft"}
    assert len(alike) > 8  # nor do batches of 8 repeat each other
    assert {s for row in rows for s, _ in row} == {"gpt_few_shot", "sft", "sft_rl"}


def test_each_split_is_ranked_by_labelers_of_its_own_who_see_what_ended(
    tmp_path, monkeypatch
):
    cfg = SimulationConfig(num_documents=1, num_valid_documents=1)
    write_campaign(cfg, tmp_path / "data")
    seen = []
    rank = collect.simulation.Labeler.rank

    def watched(self, prompt, responses, ended, rng):
        seen.append((self.name, prompt, tuple(ended)))
        return rank(self, prompt, responses, ended, rng)

    monkeypatch.setattr(collect.simulation.Labeler, "rank", watched)
    asked = {}
    for split in ("train", "valid"):
        (file,) = (tmp_path / "data/prompts").glob(f"*rank_{split}*")
        asked[split] = [json.loads(x)["prompt"] for x in file.read_text().splitlines()]
        rows = [
            {"prompt": p, "responses": ["Yes.", "No"], "ended": [True, False]}
            for p in asked[split][:60]
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"to_rank_{split}.jsonl").write_text(text)
    inputs = types.SimpleNamespace(root=tmp_path / "data")
    ctx = Context(tmp_path, inputs, MeshConfig().make(), 0)  # type: ignore[arg-type]
    collect._rank_by_simulation(CFG, ctx, tmp_path)
    for split, group, source, number in (
        ("train", "train-", "train", 6),
        ("valid", "train-", "valid", 6),
        ("test", "held-out-", "valid", 4),
    ):
        lines = (tmp_path / f"rankings_{split}.jsonl").read_text().splitlines()
        names = {json.loads(line)["labeler"] for line in lines}
        assert len(names) == number and all(n.startswith(group) for n in names)
        assert {json.loads(x)["prompt"] for x in lines} == set(asked[source][:60])
    assert {ended for *_, ended in seen} == {(True, False)}


def test_comparisons_are_rankings_of_two(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    data, run = tmp_path / "data", tmp_path / "run"
    _written(data / "rankings/x_train.jsonl", [2, 1])
    (data / "comparisons").mkdir()
    line = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (data / "comparisons/y_train.jsonl").write_text(json.dumps(line) + "\n")
    inputs = Inputs(data, FilesConfig(), SimulationConfig(), run)
    ctx = Context(run, inputs, MeshConfig().make(), 0)
    found = read_rankings(ctx, "train")
    assert set(found) == {"rankings/x_train.jsonl", "comparisons/y_train.jsonl"}
    assert found["comparisons/y_train.jsonl"][0].ranks == (1, 2)


def test_demonstrations_to_rank_are_by_labelers_of_training(tmp_path, monkeypatch):
    write_campaign(SimulationConfig(num_documents=1, num_valid_documents=1), tmp_path)
    seen = []

    def demonstrate(self, prompt, rng):
        seen.append(self.name)
        return "x"

    monkeypatch.setattr(collect.simulation.Labeler, "demonstrate", demonstrate)
    inputs = types.SimpleNamespace(simulated=True, root=tmp_path)
    ctx = Context(tmp_path, inputs, None, 0)  # type: ignore[arg-type]
    assert collect._demonstrations(ctx, ["p"] * 60, "train") == ["x"] * 60
    assert len(set(seen)) == 6 and all(name.startswith("train-") for name in seen)
