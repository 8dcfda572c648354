"""What PPO-ptx would cost at a published size, before anything is run.

python -m experiments.plan gpt3-xl gpt3-6.7b gpt3-175b --devices 256

Counted from the shapes (`rlhf_jax.training.costs`): work in petaflop/s-days, bytes each
device must hold, and hours at the rates given. Each device decodes its own episodes
and reads all weights at every token, as replicas and fsdp do. Links between devices,
activations and copies in bfloat16 are not counted, and nothing is said of what a rate
will be there: give one you have measured.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

from rlhf_jax.nn.config import PUBLISHED_SIZES
from rlhf_jax.training import costs

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
    epochs: int = 1
    """Passes over the episodes of an iteration (IG: 1)."""
    ptx_per_episode: int = 8
    """Pre-training examples per episode (IG: 8)."""
    ptx_len: int = 2048
    """Tokens of a pre-training example (not published; GPT-3's context)."""
    devices: int = 64
    """Devices that share parameters, episodes and text evenly."""
    flops_per_second: float = 3.4e14
    """Of one device in bfloat16 products (an H100 trained 124M at 3.4e14)."""
    bytes_per_second: float = 1.0e12
    """Of one device while it decodes (an H100 at 124M: 1.0e12)."""


def row(cfg: Plan, name: str) -> list[str]:
    """One policy: its cells in the order of the table's columns."""
    policy, reward = (
        dataclasses.replace(PUBLISHED_SIZES[n], dtype="bfloat16")
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
    hours = iterations * sum(w.seconds(*rates) for w in phases.values()) / 3600
    trained = sum(costs.training_bytes(m, cfg.devices) for m in (policy, reward))
    models = (policy, policy, reward)  # the average of the policy, reference, reward
    frozen = sum(costs.frozen_bytes(m, cfg.devices) for m in models)
    columns = cfg.prompt_len + cfg.response_len
    cache = costs.cache_bytes(policy, cfg.batch_size, columns) / cfg.devices
    held = [f"{x / 2**30:.1f}" for x in (trained, frozen, cache)]
    work = [f"{days[phase]:.2f}" for phase in ("rollout", "scores", "update", "ptx")]
    return [name, *held, *work, f"{sum(days.values()):.2f}", f"{hours:.1f}"]


def main() -> None:
    cfg = tyro.cli(Plan, description=__doc__)
    names = "policy trained frozen cache rollout scores update ptx all hours".split()
    print(f"{cfg.devices} devices: GiB held by each, petaflop/s-days in all, hours\n")
    for cells in (names, *(row(cfg, name) for name in cfg.policies)):
        print(f"{cells[0]:12}" + "".join(f"{cell:>9}" for cell in cells[1:]))


if __name__ == "__main__":
    main()
