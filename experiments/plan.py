"""What PPO-ptx would cost at a published size, before anything is run.

python -m experiments.plan gpt3-xl gpt3-6.7b gpt3-175b --devices 256

Counted from the shapes (`rlhf_jax.training.costs`): work in petaflop/s-days, bytes each
device must hold, and hours at the rates given. Each device decodes its own episodes
and reads all weights at every token, as replicas and fsdp do. Bytes are with
blocks computed again in the backward pass (`remat` block), work is without that. Links
between devices are not counted, and nothing is said of what a rate will be there: give
one you have measured, in FLOPs of the model, with `remat`.

trained: parameters, moments, gradients. frozen: reference, average, reward model.
cache: while sampling. logits: of a microbatch of text. peak: all that is held at the
fullest moment of an iteration (`rlhf_jax.training.memory`), activations: their part.
"""

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from rlhf_jax.nn.config import PUBLISHED_SIZES
from rlhf_jax.training import costs, memory
from rlhf_jax.training.activations import logits_bytes, text_row

DAY = 1e15 * 86400  # FLOPs of a petaflop/s-day
Name = Literal[tuple(PUBLISHED_SIZES)]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True)
class Plan:
    """InstructGPT's PPO-ptx (256k episodes, 8 pre-training examples each)."""

    policies: Annotated[tuple[Name, ...], tyro.conf.Positional] = (  # type: ignore[valid-type]
        "gpt3-xl",
        "gpt3-6.7b",
        "gpt3-175b",
    )
    """Shapes of the policy (IG: 1.3B, 6B, 175B)."""
    reward_model: Name = "gpt3-6.7b"  # type: ignore[valid-type]
    """Shape of the reward and value model (IG: 6B for every policy)."""
    episodes: int = 256_000
    """Episodes in all (IG: 256k)."""
    batch_size: int = 512
    """Episodes per iteration (IG: 512)."""
    prompt_len: int = 256
    """Tokens of a prompt, P (not published as a mean; at most 1024)."""
    response_len: int = 256
    """Tokens of a response, R (not published as a mean; at most 1024)."""
    num_minibatches: int = 8
    """Optimizer steps per epoch (IG: 8)."""
    num_microbatches: int = 1
    """Sequential parts of each minibatch, to save memory."""
    epochs: int = 1
    """Passes over the episodes of an iteration (IG: 1)."""
    ptx_per_episode: int = 8
    """Pre-training examples per episode (IG: 8)."""
    ptx_len: int = 2048
    """Tokens of a pre-training example (not published; GPT-3's context)."""
    devices: int = 64
    """Devices that share parameters, episodes and text. Hours are those of the device
    with most rows of a minibatch: beyond one row a device more of them do not help."""
    flops_per_second: float = 3.4e14
    """Of the model, by one device (an H100, bfloat16: 3.4e14 training 124M without
    `remat`, 3.2e14 training 1558M with `remat` block)."""
    bytes_per_second: float = 1.0e12
    """Of one device while it decodes (an H100 at 124M: 1.0e12)."""

    def check(self) -> None:
        """Raises ValueError, naming the field, for what no run could do."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "ptx_per_episode" and value == 0:
                continue  # PPO without the text
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{field.name} must be above 0, got {value}")
        parts = self.num_minibatches * self.num_microbatches
        for name, divisor in (("devices", self.devices), ("num_minibatches", parts)):
            if self.batch_size % divisor:
                raise ValueError(
                    f"batch_size {self.batch_size} is not divisible by {divisor} "
                    f"({name}{'' if name == 'devices' else ' x num_microbatches'})"
                )
        if self.episodes < self.batch_size:
            raise ValueError(
                f"episodes {self.episodes} are fewer than batch_size {self.batch_size}"
            )
        row = self.prompt_len + self.response_len
        lengths = {"prompt_len + response_len": row}
        if self.ptx_per_episode:
            lengths["ptx_len"] = self.ptx_len
        for name in (*self.policies, self.reward_model):
            max_len = PUBLISHED_SIZES[name].max_len
            for field, length in lengths.items():
                if length > max_len and (field != "ptx_len" or name in self.policies):
                    raise ValueError(
                        f"{field} is {length} tokens, more than the {max_len} of {name}"
                    )


def row(cfg: Plan, name: str) -> list[str]:
    """One policy: its cells in the order of the table's columns."""
    policy, reward = (
        dataclasses.replace(PUBLISHED_SIZES[n], dtype="bfloat16", remat="block")
        for n in (name, cfg.reward_model)
    )
    phases = costs.ppo_iteration(
        policy,
        reward,
        cfg.batch_size / cfg.devices,
        cfg.prompt_len,
        cfg.response_len,
        cfg.epochs,
        cfg.batch_size * cfg.ptx_per_episode / cfg.devices,
        cfg.ptx_len,
    )
    iterations = cfg.episodes / cfg.batch_size
    total = iterations * cfg.devices / DAY
    days = {phase: total * work.flops for phase, work in phases.items()}
    rates = cfg.flops_per_second, cfg.bytes_per_second
    # where rows of a minibatch cannot be dealt evenly, some devices wait for others
    for phase, examples in (("update", 1), ("ptx", cfg.ptx_per_episode)):
        mine = cfg.batch_size * examples / (cfg.devices * cfg.num_minibatches)
        phases[phase] = math.ceil(mine) / max(mine, 1e-9) * phases[phase]
    hours = iterations * sum(w.seconds(*rates) for w in phases.values()) / 3600
    trained = sum(costs.training_bytes(m, cfg.devices) for m in (policy, reward))
    frozen = costs.param_bytes(policy, cfg.devices)  # its average
    frozen += sum(costs.frozen_bytes(m, cfg.devices) for m in (policy, reward))
    columns = cfg.prompt_len + cfg.response_len
    cache = costs.cache_bytes(policy, cfg.batch_size, columns) / cfg.devices
    episodes, text = (
        cfg.batch_size * n / cfg.devices for n in (1, cfg.ptx_per_episode)
    )
    peak = memory.ppo_iteration(
        policy,
        reward,
        episodes,
        cfg.prompt_len,
        cfg.response_len,
        cfg.num_minibatches,
        cfg.num_microbatches,
        (text, cfg.ptx_len),
        holders=cfg.devices,
        accelerator=True,
    )
    rows = text / (cfg.num_minibatches * cfg.num_microbatches)
    logits = 2 * logits_bytes(policy, rows, text_row(cfg.ptx_len, True)) * (text > 0)
    parts = (trained, frozen, cache, peak.activations, logits, peak.total)
    held = [f"{x / 2**30:.1f}" for x in parts]
    days["rollout"] = days.pop("prefill") + days.pop("decoding")
    work = [f"{days[phase]:.2f}" for phase in ("rollout", "scores", "update", "ptx")]
    return [name, *held, *work, f"{sum(days.values()):.2f}", f"{hours:.1f}"]


def main() -> None:
    cfg = tyro.cli(Plan, prog="python -m experiments.plan", description=__doc__)
    try:
        cfg.check()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    names = "policy trained frozen cache activations logits peak"
    names += " rollout scores update ptx all hours"
    print(f"{cfg.devices} devices: GiB held by each, petaflop/s-days in all, hours\n")
    for cells in (names.split(), *(row(cfg, name) for name in cfg.policies)):
        widths = (max(9, len(title) + 2) for title in names.split()[1:])
        padded = (f"{x:>{w}}" for x, w in zip(cells[1:], widths, strict=True))
        print(f"{cells[0]:12}" + "".join(padded))


if __name__ == "__main__":
    main()
