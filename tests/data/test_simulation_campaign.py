"""The campaign's files: reproducible, disjoint, in Table 1's proportions, learnable."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.data.simulation import (
    USE_CASES,
    SimulationConfig,
    few_shot_examples,
    load_campaign,
    parse_prompt,
    sample_prompt,
    web_answer,
    write_campaign,
)
from rlhf_jax.data.simulation import campaign as simulation_campaign
from rlhf_jax.data.simulation.language import parse

SMALL = SimulationConfig(seed=3, num_documents=1200, num_valid_documents=60)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("campaign")
    write_campaign(SMALL, directory)
    return directory


def _records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _prompt_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.jsonl"))


def _documents(directory: Path, split: str = "train") -> list[str]:
    text = (directory / "corpus" / f"simulation_{split}.txt").read_text()
    return text.rstrip("\n").split("\n<|endoftext|>\n")


def test_equal_configs_write_equal_bytes(campaign: Path, tmp_path: Path) -> None:
    write_campaign(SMALL, tmp_path)
    names = sorted(p.relative_to(campaign) for p in campaign.rglob("*") if p.is_file())
    assert names == sorted(
        p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()
    )
    for name in names:
        assert (campaign / name).read_bytes() == (tmp_path / name).read_bytes()


def test_another_seed_writes_another_world(campaign: Path, tmp_path: Path) -> None:
    write_campaign(SimulationConfig(seed=4, num_documents=10), tmp_path)
    assert load_campaign(tmp_path)[1].facts != load_campaign(campaign)[1].facts


def test_no_held_out_prompt_is_in_two_files_or_twice(campaign: Path) -> None:
    """Training prompts may come twice; what is held out is held out of everything."""
    prompts: dict[bool, list[str]] = {True: [], False: []}
    for path in _prompt_files(campaign):
        train = path.stem.endswith("_train")
        prompts[train] += [record["prompt"] for record in _records(path)]
    assert len(prompts[True]) == 400 + 800 + 1200
    assert len(prompts[False]) == 60 + 120 + 300
    assert len(set(prompts[False])) == len(prompts[False])
    assert not set(prompts[True]) & set(prompts[False])


def test_no_held_out_document_is_one_that_is_trained_on(campaign: Path) -> None:
    valid = _documents(campaign, "valid")
    assert len(valid) == SMALL.num_valid_documents
    assert not set(valid) & set(_documents(campaign))


def test_the_prompts_of_the_solved_examples_are_asked_nowhere(campaign: Path) -> None:
    solved = {prompt for prompt, _ in few_shot_examples(load_campaign(campaign)[1], 5)}
    for path in _prompt_files(campaign):
        assert not solved & {record["prompt"] for record in _records(path)}


def test_held_out_prompts_are_in_no_document(campaign: Path) -> None:
    lines = {line for document in _documents(campaign) for line in document.split("\n")}
    for path in _prompt_files(campaign):
        if not path.stem.endswith("_train"):
            assert not lines & {record["prompt"] for record in _records(path)}


def test_use_cases_have_the_proportions_of_table_1(campaign: Path) -> None:
    for path in _prompt_files(campaign):
        records = _records(path)
        counts = Counter(parse_prompt(record["prompt"]).use_case for record in records)
        assert counts == Counter(record["use_case"] for record in records)
        for use_case, fraction in USE_CASES.items():
            assert abs(counts[use_case] - fraction * len(records)) <= 1.0


def test_there_are_at_least_1500_prompts(campaign: Path) -> None:
    world, rng = load_campaign(campaign)[1], np.random.default_rng(0)
    assert len({sample_prompt(world, rng) for _ in range(12_000)}) >= 1500


def test_loading_recreates_world_and_labelers(campaign: Path) -> None:
    cfg, world, judge, labelers = load_campaign(campaign)
    again = load_campaign(campaign)
    assert cfg == SMALL
    assert world == again[1]
    assert judge.world == world
    assert [x.weights for x in labelers] == [x.weights for x in again[3]]
    assert len(labelers) == 10


def test_demonstrations_are_far_better_than_web_answers_than_lists(
    campaign: Path,
) -> None:
    _, world, judge, _ = load_campaign(campaign)
    rng = np.random.default_rng(0)
    records = _records(campaign / "demonstrations" / "simulation_train.jsonl")
    prompts = [record["prompt"] for record in records]

    def mean(responses: list[str]) -> float:
        pairs = zip(prompts, responses, strict=True)
        return float(np.mean([judge.gold_score(p, r) for p, r in pairs]))

    demonstrated = mean([record["response"] for record in records])
    web = mean([web_answer(world, rng, prompt) for prompt in prompts])
    listed = mean(["\n".join(sample_prompt(world, rng) for _ in range(3))] * 400)
    assert demonstrated > web + 0.4
    assert web > listed + 2.0


def test_words_are_few_and_texts_are_short(campaign: Path) -> None:
    text = (campaign / "corpus" / "simulation_train.txt").read_text()
    forms = set(re.findall(r"[A-Za-z]+", text.replace("<|endoftext|>", "")))
    assert len(forms) <= 350
    for record in _records(campaign / "demonstrations" / "simulation_train.jsonl"):
        assert len(re.findall(r"\w+|[^\w\s]", record["response"])) <= 32
    for path in _prompt_files(campaign):
        for record in _records(path):
            assert len(re.findall(r"\w+|[^\w\s]", record["prompt"])) <= 40


def test_an_instruction_alone_is_often_followed_by_another(campaign: Path) -> None:
    followed = Counter()
    for document in _documents(campaign):
        first, *rest = document.split("\n")
        if rest:
            parse_prompt(first)
            try:
                parse_prompt(rest[0])
                followed["instruction"] += 1
            except ValueError:
                followed["answer"] += 1
    share = followed["instruction"] / followed.total()
    assert 0.25 < share < 0.4


def test_most_of_what_the_corpus_tells_is_true_and_some_is_not(campaign: Path) -> None:
    world = load_campaign(campaign)[1]
    true = total = 0
    for document in _documents(campaign):
        if "\n" not in document:
            for sentence in parse(document):
                for claim in sentence.claims:
                    truth = None
                    if claim.entity is not None:
                        truth = world.value(claim.entity, claim.attribute)
                    if truth is not None:
                        true += (claim.value == truth) != claim.negated
                        total += 1
    assert 0.82 < true / total < 0.93  # 0.875 of many more documents


def test_every_document_sentence_is_of_the_language(campaign: Path) -> None:
    for document in _documents(campaign):
        if "\n" not in document:
            for sentence in parse(document):
                assert sentence.accounted == sentence.num_words, sentence.text


def test_few_shot_examples_are_perfect_fixed_and_short(campaign: Path) -> None:
    _, world, judge, _ = load_campaign(campaign)
    pairs = few_shot_examples(world, 5)
    assert few_shot_examples(world) == pairs[:3]
    assert len({parse_prompt(prompt).kind for prompt, _ in pairs}) == 5
    for prompt, response in pairs:
        judgement = judge.judge(prompt, response)
        assert judgement.quality == 1.0
        assert judgement.constraints_met is not False
    words = re.findall(r"\w+|[^\w\s]", " ".join(" ".join(pair) for pair in pairs[:3]))
    assert len(words) <= 65
    with pytest.raises(ValueError, match="1 to 5"):
        few_shot_examples(world, 6)


def test_a_directory_without_a_complete_campaign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"simulation\.json.*write_campaign"):
        load_campaign(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not the config"),
        ('{"version": 0, "config": {}}', "field 'version' is 0"),
        ('{"version": 4, "config": {"sed": 1}}', "field 'config'.*sed"),
    ],
)
def test_a_damaged_config_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "simulation.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_campaign(tmp_path)


def test_too_many_prompts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation_campaign, "MAX_REDRAWS", 5)
    cfg = SimulationConfig(num_documents=1, num_eval_prompts=30_000)
    with pytest.raises(ValueError, match="too few different"):
        write_campaign(cfg, tmp_path)


@pytest.mark.parametrize(
    ("field", "least"),
    [("num_documents", 1), ("num_train_labelers", 1), ("num_held_out_labelers", 0)],
)
def test_sizes_that_make_no_campaign_are_refused(field: str, least: int) -> None:
    """Before anything is written or trained."""
    SimulationConfig(**{field: least})
    message = f"{field} must be at least {least}, got {least - 1}"
    with pytest.raises(ValueError, match=message):
        SimulationConfig(**{field: least - 1})


def test_training_labelers_write_demonstrations(tmp_path):
    write_campaign(SimulationConfig(num_documents=1, num_valid_documents=1), tmp_path)
    lines = (tmp_path / "demonstrations/simulation_train.jsonl").read_text()
    who = {json.loads(line)["labeler"] for line in lines.splitlines()}
    assert len(who) == 6 and all(name.startswith("train-") for name in who)
