"""What every stage is given, and how a model passes from one stage to the next."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any, Literal

import jax

from rlhf_jax.data.inputs import Inputs
from rlhf_jax.data.prompts import PromptFormat, check_same_format, check_same_tokenizer
from rlhf_jax.data.records import DataError
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.nn.heads import init_scalar_head
from rlhf_jax.nn.transformer import init_params
from rlhf_jax.training.checkpoint import load_params, save_params
from rlhf_jax.training.mesh import state_sharding
from rlhf_jax.training.run_dir import (
    RunDirError,
    StageDir,
    model_from_json,
    read_json,
    to_json,
    write_text,
)

Kind = Literal["language_model", "reward_model"]


@dataclasses.dataclass(frozen=True)
class Context:
    """The run a stage belongs to."""

    run: Path
    inputs: Inputs
    mesh: jax.sharding.Mesh
    seed: int
    profile: bool = False

    def stage(self, name: str) -> StageDir:
        """Directory of a stage of this run."""
        return StageDir(self.run / name)

    def key(self, stage: str) -> jax.Array:
        """Typed PRNG key of a stage: fold_in(root, stage)."""
        return jax.random.fold_in(
            jax.random.key(self.seed), zlib.crc32(stage.encode()) & 0x7FFFFFFF
        )

    def data_seed(self, stage: str) -> int:
        """Seed of the order of a stage's data."""
        return zlib.crc32(f"{self.seed}/{stage}".encode()) & 0x7FFFFFFF

    @property
    def shard(self) -> tuple[int, int]:
        """(index, count) of this process: which rows of a batch it makes."""
        return jax.process_index(), jax.process_count()


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with everything needed to feed it text."""

    kind: Kind
    params: Any
    cfg: TransformerConfig
    tokenizer: Tokenizer
    format: PromptFormat


def check_seed(seed: int) -> None:
    """Raises DataError unless a seed has 32 bits; `jax.random.key` drops the others."""
    if not 0 <= seed < 2**32:
        raise DataError(f"seed must be from 0 to 2**32 - 1, got {seed}")


def init_model(kind: Kind, key: jax.Array, cfg: TransformerConfig) -> Any:
    """Fresh parameters: of a transformer, or of a reward model with its head."""
    if kind == "language_model":
        return init_params(key, cfg)
    keys = jax.random.split(key)
    return {
        "transformer": init_params(keys[0], cfg),
        "head": init_scalar_head(keys[1], cfg.model_dim),
    }


def save_model(stage: StageDir, model: Model) -> None:
    """Writes what the next stage reads: parameters, shape, tokenizer, prompt format."""
    save_params(stage.path / "params", model.params)
    model.tokenizer.save(stage.path / "tokenizer.model")
    write_text(stage.path / "prompt_format.json", model.format.to_json())
    described = {"kind": model.kind, **to_json(model.cfg)}
    write_text(stage.path / "model.json", json.dumps(described, indent=2))


def load_model(stage: StageDir, mesh: jax.sharding.Mesh, kind: Kind) -> Model:
    """Reads what `save_model` wrote onto the devices of a mesh.

    Raises:
        RunDirError, CheckpointError, DataError: naming the file that is missing,
            damaged or of another kind.
    """
    path, format_path = stage.path / "model.json", stage.path / "prompt_format.json"
    if not path.exists():
        raise RunDirError(
            f"{stage.path}: no model here; run that stage first (models are in a "
            "run's stages, e.g. RUN/sft, RUN/ppo)"
        )
    found = read_json(path)
    if found.get("kind") != kind:
        raise RunDirError(
            f"{path}: holds a {found.get('kind')}, a {kind} is needed here; give "
            "the directory of another stage"
        )
    cfg = model_from_json(path)
    like = jax.eval_shape(lambda: init_model(kind, jax.random.key(0), cfg))
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        like,
        state_sharding(mesh, like),
    )
    if not format_path.exists():
        raise RunDirError(
            f"{format_path}: is missing; copy that of another stage of the run, or "
            "delete the stage's folder and run the stage again"
        )
    return Model(
        kind=kind,
        params=load_params(stage.path / "params", like),
        cfg=cfg,
        tokenizer=Tokenizer.load(stage.path / "tokenizer.model"),
        format=PromptFormat.from_json(format_path.read_text(), str(format_path)),
    )


def check_compatible(name_a: str, a: Model, name_b: str, b: Model) -> None:
    """Raises DataError unless both models read the same ids in the same format."""
    check_same_tokenizer(name_a, a.tokenizer, name_b, b.tokenizer)
    check_same_format(name_a, a.format, name_b, b.format)
