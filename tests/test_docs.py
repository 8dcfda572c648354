"""What the README and docs/ say exists, and the glossary names every metric."""

import ast
import functools
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.data.batches import TokenBatch
from rlhf_jax.data.ranking_batches import RankingBatch
from rlhf_jax.evaluation.measurements import METADATA_LABELS
from rlhf_jax.evaluation.report_text import MODEL_COLUMNS
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.sampling import Sampling
from rlhf_jax.stages.common import init_model
from rlhf_jax.stages.ppo import ppo_update
from rlhf_jax.stages.ppo_state import Frozen, PPOConfig, PPOInputs, init_ppo_state
from rlhf_jax.stages.pretrain import lm_loss
from rlhf_jax.stages.reward_model import WeightedRankings, reward_loss
from rlhf_jax.training.optimizers import OptimizerConfig
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_train_step

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GLOSSARY = ROOT / "docs" / "metrics.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TREE = ("rlhf_jax", "experiments", "tests", "docs", "notebooks")

page = pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


# -------------------------------------------------------------------- the glossary

MODEL = TransformerConfig(
    num_layers=1, model_dim=8, num_heads=2, max_len=12, vocab_size=7
)


def ids(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


def train_step_metrics(loss_fn, kind: str, batch) -> set[str]:
    """Names of what a supervised stage's train step returns."""
    step = make_train_step(
        functools.partial(loss_fn, model=MODEL), OptimizerConfig(), 2
    )

    def run(key, batch):
        state = init_state(init_model(kind, key, MODEL), key)  # type: ignore[arg-type]
        return step(state, batch, OptimizerConfig().scalars())[1]

    return set(jax.eval_shape(run, jax.random.key(0), batch)) - {"nonfinite"}


def language_model_metrics() -> set[str]:
    batch = TokenBatch(ids(2, 5), ids(2, 5), jnp.full((2, 5), 0.1))
    return train_step_metrics(lm_loss, "language_model", batch)


def reward_model_metrics() -> set[str]:
    rankings = RankingBatch(ids(2, 4), ids(2) + 1, ids(2, 3, 5), ids(2, 3), ids(2, 3))
    batch = WeightedRankings(rankings, jnp.full((2,), 0.5))
    return train_step_metrics(reward_loss, "reward_model", batch)


def ppo_metrics() -> set[str]:
    """Names of what `ppo_update` returns with every optional part turned on."""
    cfg = PPOConfig(
        num_iterations=1,
        batch_size=4,
        num_minibatches=2,
        prompt_len=4,
        sampling=Sampling(response_len=5),
        kl_target=6.0,
        whiten_rewards=True,
        missing_eos_score=-1.0,
        ptx_coef=1.0,
        ptx_per_episode=1,
        ptx_len=6,
    )

    def run(key):
        policy = init_model("language_model", key, MODEL)
        reward = init_model("reward_model", key, MODEL)
        rows = (cfg.num_ptx_rows, cfg.ptx_len)
        inputs = PPOInputs(
            ids(4, 4), ids(4) + 1, ids(*rows), ids(*rows), jnp.ones(rows, bool)
        )
        state = init_ppo_state(policy, reward, cfg.kl_coef, key)
        shapes = {"cfg": cfg, "model": MODEL, "reward_model": MODEL}
        frozen = Frozen(policy, reward)
        return ppo_update(
            state, inputs, frozen, cfg.scalars(), eos_id=3, pad_id=0, **shapes
        )[1]

    return set(jax.eval_shape(run, jax.random.key(0))) - {"nonfinite"}


def strings(module: str, pattern: str) -> set[str]:
    """String constants of a module of ours that match a pattern as a whole."""
    tree = ast.parse((ROOT / "rlhf_jax" / module).read_text())
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(pattern, node.value)
    }


def glossary() -> dict[str, list[str]]:
    """Metric names by the chapter (`## ...`) that their table stands in."""
    chapters: dict[str, list[str]] = {}
    for part in re.split(r"^## ", GLOSSARY.read_text(), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        chapters[title] = re.findall(r"^\| `([^`]+)` \|", body, flags=re.MULTILINE)
    return chapters


def test_glossary_names_the_metrics_of_every_update():
    assert set(glossary()["Every stage"]) == strings("training/metrics.py", "seconds")


def test_glossary_names_the_metrics_of_the_supervised_stages():
    produced = language_model_metrics() | reward_model_metrics()
    for stage in ("pretrain", "sft", "reward_model"):
        produced |= strings(f"stages/{stage}.py", r"heldout/\w+")
    assert set(glossary()["Pre-training, SFT, reward model"]) == produced


def test_glossary_names_the_metrics_of_ppo():
    produced = ppo_metrics() | strings("stages/ppo_run.py", r"heldout/\w+")
    assert set(glossary()["PPO and PPO-ptx"]) == produced


def test_glossary_names_what_the_report_says_of_a_model():
    told = {quantity for quantity, _, _ in MODEL_COLUMNS} | set(METADATA_LABELS)
    assert set(glossary()["Collect, evaluate, report"]) == told


def test_glossary_names_each_metric_once_in_full_rows():
    for names in glossary().values():
        assert len(names) == len(set(names))
    for line in GLOSSARY.read_text().splitlines():
        if line.startswith("| `"):
            cells = line.strip("|").split("|")
            assert len(cells) == 7, line
            assert all(cell.strip() for cell in cells), line


def test_starred_metrics_are_those_that_the_invariants_read():
    starred = {
        line.split("`")[1]
        for line in GLOSSARY.read_text().splitlines()
        if line.startswith("| `") and "*" in line.strip("|").split("|")[5]
    }
    tree = ast.parse((ROOT / "rlhf_jax/stages/invariants.py").read_text())
    check = next(
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "check_invariants"
    )
    named = {
        node.args[2].value
        for node in ast.walk(check)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "require"
        and isinstance(node.args[2], ast.Constant)
    }
    # one message speaks of both ends of the entropy, and names the upper one
    assert starred == named | {"policy/entropy_min"}


# ------------------------------------------------------------------ README and docs


@page
def test_every_command_names_a_module(path):
    for name in re.findall(r"-m (experiments\.\w+)", path.read_text()):
        path = ROOT / name.replace(".", "/")
        files = (path.with_suffix(".py"), path / "__main__.py")
        assert any(file.is_file() for file in files), name


@page
def test_every_local_link_leads_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists(), target
        if anchor and not file:
            assert anchor in anchors(text), target


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@page
def test_every_path_of_the_tree_exists(path):
    for quoted in re.findall(r"`([^`\n]+)`", path.read_text()):
        for word in re.findall(rf"(?<![\w/.])(?:{'|'.join(TREE)})/[\w./-]*", quoted):
            assert (ROOT / word).exists(), word


@page
def test_every_dotted_name_can_be_imported(path):
    for name in re.findall(r"`(rlhf_jax(?:\.\w+)+)`", path.read_text()):
        assert resolve(name) is not None, name


def resolve(name: str) -> object:
    """The module, function or attribute of a dotted name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    return None


def equations() -> list[list[str]]:
    """Rows of the README's table of equations: equation, function, test."""
    _, _, rest = README.read_text().partition("\n## Equations\n")
    section, _, _ = rest.partition("\n## ")
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]
    ]


def test_every_equation_has_a_function_and_a_test():
    rows = equations()
    assert len(rows) >= 14
    for row in rows:
        assert len(row) == 3, row
        functions = re.findall(r"`(rlhf_jax(?:\.\w+)+)`", row[1])
        assert functions, row
        assert all(callable(resolve(name)) for name in functions), row
        tests = re.findall(r"`(tests/[\w/]+\.py)`", row[2])
        assert tests, row
        for test in tests:
            source = (ROOT / test).read_text()
            used = [name.rpartition(".")[2] for name in functions]
            assert any(re.search(rf"\b{name}\b", source) for name in used), (test, used)


def test_the_map_is_the_tree():
    _, _, rest = README.read_text().partition("\n## Map\n")
    section, _, _ = rest.partition("\n## ")
    named, folder = set(), ""
    for line in section.split("```")[1].splitlines():
        if match := re.match(r"(\S+/)", line):
            folder = match[1]
            assert (ROOT / folder).is_dir(), folder
        elif match := re.match(r"  (\w+\.py)\b", line):
            named.add(folder + match[1])
    there = {
        str(path.relative_to(ROOT))
        for top in ("rlhf_jax", "experiments")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py" and "simulation" not in path.parts
    }
    assert named == there
