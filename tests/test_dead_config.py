"""No option is dead: each changes a compiled program or its inputs, or is read.

What a program is made from (shapes, sampling, optimizer, PPO) is changed field by
field: the traced program or the scalars it is given must change. The campaign's
options must change a file. The rest, which counts steps, rows and files on the host,
must be read by the stage that has it.
"""

import ast
import dataclasses
import functools
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import ppo_case as case
import pytest

from experiments.config import InstructGPT
from rlhf_jax.data.simulation import SimulationConfig, write_campaign
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.sampling import Sampling, generate
from rlhf_jax.nn.transformer import forward, init_params
from rlhf_jax.stages.ppo_state import PPOConfig
from rlhf_jax.training.optimizers import OptimizerConfig, adamw, learning_rate

ROOT = Path(__file__).parents[1]
SHAPE = TransformerConfig(
    num_layers=2, model_dim=8, num_heads=2, max_len=12, vocab_size=9, dropout=0.1
)
# Values that differ from those of the base configs, where a guess would not do.
OTHER = {
    "norm": "post",
    "remat": "elementwise",
    "dtype": "bfloat16",
    "document_end": 3,
    "num_heads": 4,
    "top_k": 2,
    "top_p": 0.5,
    "schedule": "linear",
    "value": "shared",
    "kl_target": 6.0,
    "missing_eos_score": -1.0,
    "num_microbatches": 2,
    "num_minibatches": 2,
    "num_slots": 2,
    "warmup_steps": 5,
}


def program(function, *args) -> str:
    """The traced program, which has every static choice and constant in it."""
    return str(jax.make_jaxpr(function)(*args))


def of_transformer(cfg: TransformerConfig) -> str:
    def run(key, tokens):
        params = init_params(key, cfg)
        grad = jax.grad(lambda p: jnp.sum(forward(p, tokens, cfg, key) ** 2))
        return params, grad(params)

    return program(run, jax.random.key(0), jnp.zeros((2, 6), jnp.int32))


def of_sampling(cfg: Sampling) -> str:
    params = init_params(jax.random.key(0), SHAPE)

    def run(temperature):
        ids = (jnp.zeros((2, 3), jnp.int32), jnp.ones((2,), jnp.int32))
        return generate(
            params,
            *ids,
            jax.random.key(0),
            temperature,
            eos_id=1,
            pad_id=0,
            model=SHAPE,
            sampling=cfg,
        )

    scalars = dataclasses.replace(case.CONFIG, sampling=_whole(cfg)).scalars()
    return program(run, jnp.float32(1.0)) + str(scalars.temperature)


def _whole(cfg: Sampling) -> Sampling:
    return dataclasses.replace(cfg, top_k=None, top_p=None)  # PPO takes no other


def of_optimizer(cfg: OptimizerConfig) -> str:
    scalars = cfg.scalars()
    schedule = program(
        lambda step: learning_rate(step, cfg, scalars, 20), jnp.zeros((), jnp.int32)
    )
    params = {"embed": jnp.ones((3, 2))}
    transformation = adamw(scalars, jnp.float32(0.1))
    state = transformation.init(params)
    for gradient in (2.0, -1.0, 0.1):
        grads = jax.tree.map(lambda x, g=gradient: g * x, params)
        updates, state = transformation.update(grads, state, params)
    rates = [float(learning_rate(jnp.int32(i), cfg, scalars, 20)) for i in range(20)]
    return schedule + str(rates) + str(updates)


def of_ppo(cfg: PPOConfig) -> str:
    state = case.fresh_state(cfg)
    inputs = case.make_inputs(cfg)
    arguments = (state, inputs, case.frozen(), cfg.scalars())
    return program(case.update(cfg), *arguments)


BASES = {
    "transformer": (of_transformer, SHAPE),
    "sampling": (of_sampling, Sampling(response_len=4)),
    "optimizer": (
        of_optimizer,
        OptimizerConfig(
            warmup_steps=2, weight_decay=0.1, warmup_fraction=0.1, eps=1e-3
        ),
    ),
    "ppo": (
        of_ppo,
        dataclasses.replace(
            case.CONFIG,
            ptx_coef=1.0,
            kl_target=3.0,
            policy_optimizer=dataclasses.replace(case.OPTIMIZER, schedule="cosine"),
            value_optimizer=dataclasses.replace(case.OPTIMIZER, schedule="cosine"),
        ),
    ),
}
# Of PPO: rows, their widths and how often to look, read by its stage (tested below).
ON_THE_HOST = {"batch_size", "prompt_len", "ptx_len", "eval_prompts", "loop"}


def changed(cfg, name: str):
    value = getattr(cfg, name)
    if name in OTHER and OTHER[name] != value:
        other = OTHER[name]
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, int):
        other = 2 * value
    elif isinstance(value, float):
        other = value / 2
    elif isinstance(value, OptimizerConfig):
        other = dataclasses.replace(value, learning_rate=0.5)
    elif isinstance(value, Sampling):
        other = dataclasses.replace(value, temperature=0.5)
    else:
        raise AssertionError(f"give another value for {name} = {value!r} in OTHER")
    return dataclasses.replace(cfg, **{name: other})


CASES = [
    (kind, field.name)
    for kind, (_, base) in BASES.items()
    for field in dataclasses.fields(base)
    if not (kind == "ppo" and field.name in ON_THE_HOST)
]


@functools.cache
def effect_of_base(kind: str) -> str:
    effect, base = BASES[kind]
    return effect(base)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_changed_field_changes_the_program_or_its_scalars(kind, name):
    effect, base = BASES[kind]
    other = changed(base, name)
    # that every scalar of PPO counts is tested below
    same = kind != "ppo" or same_numbers(other, base)
    assert not same or effect(other) != effect_of_base(kind)


def same_numbers(other: PPOConfig, base: PPOConfig) -> bool:
    """Whether PPO is given the same scalars."""
    if other.kl_coef != base.kl_coef:  # part of the state
        return False
    return str(other.scalars()) == str(base.scalars())


def test_the_same_config_gives_the_same_program():
    for kind, (effect, base) in BASES.items():
        assert effect(dataclasses.replace(base)) == effect_of_base(kind)


def test_every_scalar_of_ppo_changes_its_numbers():
    # two steps: in the first the ratio is 1, whatever the clip
    cfg = dataclasses.replace(BASES["ppo"][1], num_minibatches=2)
    update = case.compiled(case.update(cfg))
    inputs, frozen = case.make_inputs(cfg), case.frozen()
    state = case.later_state(cfg)

    def numbers(scalars):
        new, metrics = update(state, inputs, frozen, scalars)
        leaves = jax.tree.leaves((new.params, new.ema, new.kl_coef, metrics))
        return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])

    scalars = cfg.scalars()
    before = numbers(scalars)
    np.testing.assert_array_equal(before, numbers(scalars))
    paths, tree = jax.tree_util.tree_flatten_with_path(scalars)
    leaves = [leaf for _, leaf in paths]
    for i, (path, leaf) in enumerate(paths):
        name = jax.tree_util.keystr(path)
        if "warmup_fraction" in name:  # these schedules have no warm-up
            continue
        # a tight clip, so that its ends are reached
        other = (
            leaf * 0.01 if "clip" in name or "max_grad" in name else leaf * 0.5 + 0.1
        )
        changed = tree.unflatten([*leaves[:i], other, *leaves[i + 1 :]])
        assert np.any(numbers(changed) != before), name


SMALL = SimulationConfig(
    num_documents=6,
    num_valid_documents=3,
    num_demonstrations=4,
    num_valid_demonstrations=3,
    num_ranking_prompts=4,
    num_valid_ranking_prompts=3,
    num_ppo_prompts=4,
    num_eval_prompts=3,
    num_train_labelers=2,
    num_held_out_labelers=1,
)


def files_of(cfg: SimulationConfig, directory: Path) -> str:
    from rlhf_jax.data.simulation import load_campaign

    write_campaign(cfg, directory)
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != "simulation.json":
            digest.update(path.read_bytes())
    people = load_campaign(directory)
    return digest.hexdigest() + str(people)


def test_a_changed_campaign_changes_a_file(tmp_path):
    before = files_of(SMALL, tmp_path / "base")
    assert files_of(SMALL, tmp_path / "again")[:64] == before[:64]
    for field in dataclasses.fields(SimulationConfig):
        directory = tmp_path / field.name
        after = files_of(
            dataclasses.replace(SMALL, **{field.name: getattr(SMALL, field.name) + 1}),
            directory,
        )
        if field.name != "num_held_out_labelers":  # they only rank, in `collect`
            assert after[:64] != before[:64], field.name


# ------------------------------------------------------------- read by its stage

STAGES = {
    "pretrain": "stages/pretrain.py",
    "tokenizer": "stages/pretrain.py",
    "sft": "stages/sft.py",
    "sft_rl": "stages/sft.py",
    "collect": "stages/collect.py",
    "reward_model": "stages/reward_model.py stages/rankings.py",
    "ppo": "stages/ppo_run.py stages/ppo.py stages/experience.py stages/ppo_state.py",
    "ppo_ptx": "stages/ppo_run.py stages/ppo.py stages/experience.py "
    "stages/ppo_state.py",
    "evaluate": "stages/evaluate.py",
    "mesh": "training/mesh.py",
    "files": "data/inputs.py",
}


def reads(modules: str) -> set[str]:
    """Attributes read in modules, outside the checks of a config itself."""
    names = set()
    for module in modules.split():
        tree = ast.parse((ROOT / "rlhf_jax" / module).read_text())
        checks = {
            node
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            and function.name == "__post_init__"
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node not in checks:
                names.add(node.attr)
            # `getattr(files, kind)` over names that are listed
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_of_a_stage_is_read_there(stage):
    config = getattr(InstructGPT(), stage)
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields <= reads(STAGES[stage]), fields - reads(STAGES[stage])


def test_every_stage_and_option_of_a_run_is_read_by_a_command():
    names = set()
    for path in (ROOT / "experiments").glob("*.py"):
        if path.name not in ("config.py", "presets.py"):
            tree = ast.parse(path.read_text())
            names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    fields = {field.name for field in dataclasses.fields(InstructGPT)}
    assert fields <= names


def test_packed_documents_are_separated_in_the_model_where_asked():
    """`pretrain.separate_documents` reaches the shape that every stage reads."""
    from rlhf_jax.stages.pretrain import PretrainConfig, model_of_run

    for separate, end in ((True, 3), (False, None)):
        cfg = PretrainConfig(model=SHAPE, separate_documents=separate)
        model = model_of_run(cfg, vocab_size=300, eos_id=3)
        assert model.document_end == end and model.vocab_size == 300
