"""The examples that a few-shot-prompted GPT is shown."""

from __future__ import annotations

from rlhf_jax.data.simulation.phrases import capitalize
from rlhf_jax.data.simulation.world import ENTITIES, World


def few_shot_examples(world: World, num: int = 3) -> list[tuple[str, str]]:
    """Good (prompt, response) pairs of different use cases, always the same.

    Args:
        world: what is true.
        num: how many, at most 5.

    Returns:
        The pairs; three of them have about 50 words.

    Raises:
        ValueError: if `num` is not in 1..5.
    """
    first, second, third = ENTITIES[:3]
    facts = world.facts
    pairs = [
        (
            f"Write about the {first}. Use two sentences.",
            f"The {first} lives in the {facts[first]['home']}. "
            f"It eats {facts[first]['food']}.",
        ),
        (
            f"What colour is the {second}?",
            f"The {second} is {facts[second]['colour']}.",
        ),
        (
            f"Write a story about the {third}. Begin with Well.",
            f"Well, the {third} ran to the river. It saw the moon.",
        ),
        ("List three foods.", capitalize("bread, nuts and fish.")),
        ("Anna says: Good night. Answer Anna.", "Good night, Anna."),
    ]
    if not 1 <= num <= len(pairs):
        raise ValueError(f"num is {num}; there are 1 to {len(pairs)} examples")
    return pairs[:num]
