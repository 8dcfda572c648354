"""Talk to the model of any stage: one prompt, or one after another from the terminal.

python -m experiments.generate --from RUN/ppo --prompt "Tell me about the fox."

python -m experiments.generate --from RUN/ppo
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax.data.batches import prompt_batches
from rlhf_jax.data.records import parse_prompt
from rlhf_jax.data.sources import DataError, Prompt
from rlhf_jax.nn.config import check_range
from rlhf_jax.nn.sampling import Sampling, generate
from rlhf_jax.stages.common import Model, check_seed, load_model
from rlhf_jax.training.checkpoint import CheckpointError
from rlhf_jax.training.mesh import MeshConfig, jit_measure
from rlhf_jax.training.run_dir import RunDirError, StageDir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """What to sample from, and how."""

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """Directory of a stage with a language model, e.g. RUN/ppo."""
    prompt: str | None = None
    """The prompt; None reads prompts from the terminal, line by line."""
    num_samples: int = 1
    """Responses to each prompt."""
    sampling: Sampling = Sampling(response_len=64)
    """The distribution responses are drawn from."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self):
        check_range(self, "[1, inf)", "num_samples")


def main(cfg: Generate) -> None:
    """Prints responses until the prompts end."""
    check_seed(cfg.seed)
    mesh = MeshConfig().make()
    model = load_model(StageDir(cfg.source), mesh, "language_model")
    tokenizer = model.tokenizer
    prompt_len = model.cfg.max_len - cfg.sampling.response_len
    if prompt_len < 1:
        raise DataError(
            f"response_len {cfg.sampling.response_len} leaves no room for a prompt in "
            f"the model's {model.cfg.max_len} positions; make it smaller"
        )
    sample = jit_measure(
        generate,
        mesh,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        model=model.cfg,
        sampling=cfg.sampling,
    )
    temperature = jnp.float32(cfg.sampling.temperature)
    for turn, prompt in enumerate(_prompts(cfg.prompt)):
        try:
            record = _fitting(prompt, model, prompt_len)
        except DataError as error:
            if cfg.prompt is not None:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        read = [record] * cfg.num_samples, tokenizer, model.format
        batch = prompt_batches(*read, cfg.num_samples, prompt_len, None)(0)
        key = jax.random.fold_in(jax.random.key(cfg.seed), turn)
        ids = (jnp.asarray(batch.prompts), jnp.asarray(batch.prompt_lengths))
        rollout = jax.device_get(sample(model.params, *ids, key, temperature))
        for row in range(cfg.num_samples):
            text = tokenizer.decode(rollout.responses[row, : rollout.lengths[row]])
            print(text + ("" if rollout.ended[row] else " ..."), flush=True)


def _fitting(prompt: str, model: Model, prompt_len: int) -> Prompt:
    """The prompt as a record; DataError if it is no text or too long."""
    record = parse_prompt({"prompt": prompt}, "the prompt")
    num_tokens = len(model.format.encode_prompt(model.tokenizer, prompt))
    if num_tokens > prompt_len:
        raise DataError(
            f"the prompt has {num_tokens} tokens, this model has room for "
            f"{prompt_len} before the response; shorten it or lower "
            "--sampling.response-len"
        )
    return record


def _prompts(prompt: str | None):
    if prompt is not None:
        yield prompt
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


if __name__ == "__main__":
    try:
        main(
            tyro.cli(
                Generate, prog="python -m experiments.generate", description=__doc__
            )
        )
    except (DataError, RunDirError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
