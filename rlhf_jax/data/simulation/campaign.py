"""The simulated labelling campaign: writes its files, and recreates it from them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_jax.data.files import write_atomically
from rlhf_jax.data.simulation.corpus import make_documents
from rlhf_jax.data.simulation.examples import few_shot_examples
from rlhf_jax.data.simulation.judge import Judge
from rlhf_jax.data.simulation.labelers import Labeler, make_labelers
from rlhf_jax.data.simulation.tasks import parse_prompt, sample_prompt
from rlhf_jax.data.simulation.templates import USE_CASES
from rlhf_jax.data.simulation.world import World, make_world, pick

VERSION = 4
CONFIG_FILE = "simulation.json"
MAX_REDRAWS = 2000  # of a prompt that is in use, before its use case counts as used up
DOCUMENT_SEPARATOR = "\n<|endoftext|>\n"


@dataclass(frozen=True)
class SimulationConfig:
    """Sizes and seed of a simulated labelling campaign."""

    seed: int = 0
    """Seed of the world, the labelers and every text."""
    num_documents: int = 20000
    """Documents of the training corpus, about 30 words each."""
    num_valid_documents: int = 800
    """Documents held out to measure the pre-training loss."""
    num_demonstrations: int = 400
    """Prompts that training labelers answer for supervised fine-tuning."""
    num_valid_demonstrations: int = 60
    """Demonstrations held out to measure the fine-tuning loss."""
    num_ranking_prompts: int = 800
    """Prompts whose sampled responses training labelers rank."""
    num_valid_ranking_prompts: int = 120
    """Prompts whose responses are ranked to measure the reward model."""
    num_ppo_prompts: int = 1200
    """Prompts of reinforcement learning; nobody answers or ranks them."""
    num_eval_prompts: int = 300
    """Prompts held out to compare the models."""
    num_train_labelers: int = 6
    """Labelers who write demonstrations and rank for training."""
    num_held_out_labelers: int = 4
    """Labelers whose rankings are used for evaluation only; may be 0."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("seed", "num_held_out_labelers") else 1
            if getattr(self, field.name) < least:
                raise ValueError(
                    f"{field.name} must be at least {least}, "
                    f"got {getattr(self, field.name)}"
                )


def write_campaign(cfg: SimulationConfig, directory: str | Path) -> None:
    """Writes the files of a campaign; equal configs give equal bytes.

    Writes corpus/, demonstrations/ and prompts/ in the layout of `--data`, and last,
    at once, `simulation.json` with the config: where it is, the campaign is complete.

    Args:
        cfg: sizes and seed.
        directory: where to write; made if needed.
    """
    directory = Path(directory)
    _, judge, labelers = _people(cfg)
    rng = np.random.default_rng([cfg.seed, 2])
    held_out = {prompt for prompt, _ in few_shot_examples(judge.world, 5)}  # solved
    splits = {
        name: _prompts(judge.world, rng, num, held_out, "train" not in name)
        for name, num in (
            ("eval_test", cfg.num_eval_prompts),
            ("rank_valid", cfg.num_valid_ranking_prompts),
            ("demonstrations_valid", cfg.num_valid_demonstrations),
            ("demonstrations_train", cfg.num_demonstrations),
            ("rank_train", cfg.num_ranking_prompts),
            ("ppo_train", cfg.num_ppo_prompts),
        )
    }
    trained: list[str] = []
    for split, num in (
        ("train", cfg.num_documents),
        ("valid", cfg.num_valid_documents),
    ):
        documents = make_documents(judge.world, rng, num, held_out, frozenset(trained))
        trained += documents
        text = DOCUMENT_SEPARATOR.join(documents) + "\n"
        _write(directory / "corpus" / f"simulation_{split}.txt", text)
    writers = [labeler for labeler in labelers if not labeler.held_out]
    for split in ("train", "valid"):
        records = []
        for prompt in splits.pop(f"demonstrations_{split}"):
            labeler = pick(rng, writers)
            records.append(
                {
                    "prompt": prompt,
                    "response": labeler.demonstrate(prompt, rng),
                    "labeler": labeler.name,
                    "use_case": parse_prompt(prompt).use_case,
                }
            )
        _write_jsonl(
            directory / "demonstrations" / f"simulation_{split}.jsonl", records
        )
    for split, prompts in splits.items():
        records = [
            {"prompt": prompt, "use_case": parse_prompt(prompt).use_case}
            for prompt in prompts
        ]
        _write_jsonl(directory / "prompts" / f"simulation_{split}.jsonl", records)
    config = {"version": VERSION, "config": dataclasses.asdict(cfg)}
    _write(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def load_campaign(
    directory: str | Path,
) -> tuple[SimulationConfig, World, Judge, list[Labeler]]:
    """Recreates the world, the judge and the labelers of a written campaign.

    Args:
        directory: what `write_campaign` wrote.

    Returns:
        The config, the world, the judge and the labelers.

    Raises:
        FileNotFoundError: if the directory holds no complete campaign.
        ValueError: if another version of the simulation wrote it.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file, so the directory holds no complete simulated "
            "campaign; write one with rlhf_jax.data.simulation.write_campaign"
        )
    try:
        content = json.loads(path.read_text())
        version, fields = content["version"], content["config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the config of a simulated campaign ({error}); delete the "
            "directory and write the campaign again"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path}: field 'version' is {version}, this library writes {VERSION}; "
            "delete the directory and write the campaign again"
        )
    known = {field.name for field in dataclasses.fields(SimulationConfig)}
    if set(fields) != known:
        raise ValueError(
            f"{path}: field 'config' must name exactly {sorted(known)}, it differs in "
            f"{sorted(set(fields) ^ known)}; write the campaign again"
        )
    cfg = SimulationConfig(**fields)
    return (cfg, *_people(cfg))


def _people(cfg: SimulationConfig) -> tuple[World, Judge, list[Labeler]]:
    world = make_world(cfg.seed)
    judge = Judge(world)
    labelers = make_labelers(
        judge, cfg.seed, cfg.num_train_labelers, cfg.num_held_out_labelers
    )
    return world, judge, labelers


def _prompts(
    world: World, rng: np.random.Generator, num: int, held_out: set[str], hold: bool
) -> list[str]:
    """`num` prompts with Table 1's proportions of use cases, in random order.

    None is held out. With `hold` they are from now on, and differ from each other;
    training prompts may come again, as those of customers do.
    """
    prompts: list[str] = []
    shares = np.cumsum(list(USE_CASES.values()))
    bounds = np.rint(shares / shares[-1] * num).astype(int)
    for use_case, start, stop in zip(USE_CASES, [0, *bounds], bounds, strict=False):
        for _ in range(stop - start):
            failures = 0
            prompt = sample_prompt(world, rng, use_case)
            while prompt in held_out:
                failures += 1
                if failures > MAX_REDRAWS:
                    raise ValueError(
                        f"the grammar has too few different {use_case} prompts for "
                        "this campaign; ask for fewer prompts"
                    )
                prompt = sample_prompt(world, rng, use_case)
            if hold:
                held_out.add(prompt)
            prompts.append(prompt)
    return [prompts[int(i)] for i in rng.permutation(len(prompts))]


def _write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    _write(path, "".join(json.dumps(record) + "\n" for record in records))


def _write(path: Path, text: str) -> None:
    """Writes a file at once: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial:
        partial.write_text(text)
