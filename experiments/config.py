"""The configuration of a whole run."""

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_jax.data.inputs import FilesConfig
from rlhf_jax.data.simulation import SimulationConfig
from rlhf_jax.data.sources import DataError
from rlhf_jax.nn.config import TransformerConfig
from rlhf_jax.stages.collect import CollectConfig
from rlhf_jax.stages.common import check_seed
from rlhf_jax.stages.evaluate import EvaluateConfig
from rlhf_jax.stages.ppo_state import PPOConfig
from rlhf_jax.stages.pretrain import PretrainConfig, TokenizerConfig
from rlhf_jax.stages.reward_model import RewardModelConfig
from rlhf_jax.stages.sft import SFTConfig
from rlhf_jax.training.mesh import MeshConfig


def _jsonl(*names: str) -> tuple[str, ...]:
    """Globs of JSON lines, as they are or compressed."""
    return tuple(f"{name}.jsonl{end}" for name in names for end in ("", ".gz"))


REAL_FILES = FilesConfig(
    demonstrations=_jsonl("demonstrations/alpaca5k_*"),
    rankings=_jsonl(
        "rankings/alpacaeval_k9_train",
        "rankings/alpacaeval_k9_valid",
        "rankings/alpacaeval_k9_test",
        "rankings/ukp_convarg1_train",
        "rankings/ukp_convarg1_valid",
        "rankings/ukp_convarg1_test",
    ),
    comparisons=(),
    ppo_prompts=_jsonl("prompts/alpaca5k_ppo"),
    eval_prompts=_jsonl("demonstrations/alpaca5k_test"),
)
"""Alpaca demonstrations and prompts, AlpacaEval (K = 9) and UKPConvArg1 (K = 6-8)
rankings; what is marked evaluation-only (`_test`) is read by evaluations alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructGPT:
    """Text to a PPO-ptx policy and a report of what each stage changed."""

    run: Path = Path("runs/instructgpt")
    """Directory of the run; finished stages in it are skipped."""
    data: Path | None = None
    """Directory of text and JSON lines (README, "Your data"); None writes and uses the
    embedded simulation."""
    seed: int = 0
    """Of everything random but the simulated world, which has `simulation.seed`."""
    profile: bool = False
    """Trace a few steps of every training stage into its directory `profile`, for
    TensorBoard's profiler or (perfetto_trace.json.gz) https://ui.perfetto.dev."""
    files: FilesConfig = FilesConfig()
    """Which files of the data directory are what."""
    simulation: SimulationConfig = SimulationConfig()
    """The embedded simulation, where `data` is None."""
    mesh: MeshConfig = MeshConfig()
    """How devices are used."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The run's tokenizer."""
    pretrain: PretrainConfig = PretrainConfig()
    """Pre-training."""
    sft: SFTConfig = SFTConfig()
    """The SFT model (InstructGPT: 16 epochs, chosen by reward)."""
    sft_rl: SFTConfig = SFTConfig(num_epochs=2, pretrain_fraction=0.1)
    """The initialisation of PPO and its reference (InstructGPT: 2 epochs, 10 %
    pre-training data)."""
    collect: CollectConfig = CollectConfig()
    """Collecting rankings."""
    reward_model: RewardModelConfig = RewardModelConfig()
    """The reward model."""
    ppo: PPOConfig = PPOConfig()
    """PPO."""
    ppo_ptx: PPOConfig = PPOConfig(ptx_coef=27.8)
    """PPO with pre-training gradients."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Held-out evaluation."""

    def check(self, num_devices: int, num_processes: int = 1) -> None:
        """Refuses what would only fail after earlier stages have run.

        Raises:
            DataError: if a file is missing, the seed is no 32-bit number, a count is
                not positive, anything is longer than the model's context, or a batch
                cannot be cut into its microbatches or dealt over the devices and
                processes.
        """
        ranked = self.collect.ranked
        if ranked is not None and not ranked.is_file():
            raise DataError(f"collect.ranked: {ranked} is no file; mend the path")
        check_seed(self.seed)
        try:
            data, fsdp, _ = self.mesh.shape(num_devices)
        except ValueError as error:
            raise DataError(f"mesh: {error}") from error
        shards = data * fsdp
        if self.data is None and self.files == REAL_FILES:
            raise DataError("this preset reads files of yours: give --data DIR")
        _check_counts("", self)
        batches = {
            "pretrain": (self.pretrain.batch_size, self.pretrain.num_microbatches),
            "ppo": (self.ppo.batch_size, 1),
            "ppo_ptx": (self.ppo_ptx.batch_size, 1),
        }
        for name, (rows, parts) in batches.items():
            if rows % parts or rows % shards:
                raise DataError(
                    f"{name}: batches of {rows} rows must be a multiple of "
                    f"num_microbatches {parts} and of data x fsdp = {shards}; "
                    f"change {name}.batch-size"
                )
        parts = {
            f"{name}.batch-size": getattr(self, name).batch_size
            for name in ("sft", "sft_rl", "reward_model")
        }
        for name in ("sft", "sft_rl"):
            rows = getattr(self, name).num_pretrain_rows
            parts[f"pre-training rows of {name}.batch-size"] = rows
        for name, rows in parts.items():
            if rows % num_processes:
                raise DataError(
                    f"{name} {rows} cannot be dealt over {num_processes} processes; "
                    "change it to a multiple"
                )
        for name in ("ppo", "ppo_ptx"):
            if getattr(self, name).num_slots is not None and shards > 1:
                raise DataError(
                    f"{name}.num_slots takes prompts in turn on one device, and there "
                    f"are {shards} (data x fsdp); leave it out"
                )
        model, default = self.pretrain.model, TransformerConfig()
        for field, instead in (
            ("vocab_size", "the tokenizer has it: --tokenizer.vocab-size"),
            ("document_end", "--pretrain.separate-documents says it"),
        ):
            if getattr(model, field) != getattr(default, field):
                raise DataError(f"pretrain.model.{field} has no effect; {instead}")
        if self.data is None:
            self._check_campaign()
        response_len = self.evaluate.sampling.response_len
        if self.sft.seq_len <= response_len:
            raise DataError(
                f"sft.seq_len {self.sft.seq_len} leaves no room for a prompt before "
                f"the {response_len} tokens of evaluate.sampling.response_len, with "
                "which the epochs of SFT are compared; raise seq_len"
            )
        context = self.pretrain.model.max_len
        lengths = {
            "pretrain.seq_len": self.pretrain.seq_len,
            "sft.seq_len": self.sft.seq_len,
            "sft_rl.seq_len": self.sft_rl.seq_len,
            "reward_model.prompt_len + reward_model.response_len": (
                self.reward_model.prompt_len + self.reward_model.response_len
            ),
        }
        for name in ("collect", "ppo", "ppo_ptx", "evaluate"):
            stage = getattr(self, name)
            for field in ("prompt_len", "few_shot_len"):
                if hasattr(stage, field):
                    lengths[f"{name}.{field} + {name}.sampling.response_len"] = (
                        getattr(stage, field) + stage.sampling.response_len
                    )
            for field in ("ptx_len", "text_len"):
                if hasattr(stage, field):
                    lengths[f"{name}.{field}"] = getattr(stage, field)
        for name, length in lengths.items():
            if length > context:
                raise DataError(
                    f"{name} is {length} tokens, more than pretrain.model.max_len "
                    f"{context}; make it shorter or raise max_len"
                )

    def _check_campaign(self) -> None:
        for name in ("collect", "evaluate"):
            num = getattr(self, name).num_few_shot
            if not 1 <= num <= 5:
                raise DataError(
                    f"{name}.num_few_shot is {num}; the simulation has 1 to 5 examples"
                )


def _check_counts(prefix: str, config: Any) -> None:
    """Refuses counts and lengths below 1 in a config and those inside it."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value) and name != "simulation":  # checks itself
            _check_counts(f"{name}.", value)
        is_count = field.name.startswith(
            ("num_", "min_", "max_", "eval_", "batch_", "labelers_per_")
        )
        is_count |= field.name.endswith(("_len", "_every", "_batches", "_size"))
        if is_count and isinstance(value, int) and value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
