"""A simulated labelling campaign: a small world, its corpus, judge and labelers."""

from rlhf_jax.data.simulation.campaign import (
    CONFIG_FILE,
    SimulationConfig,
    load_campaign,
    write_campaign,
)
from rlhf_jax.data.simulation.corpus import make_documents, web_answer
from rlhf_jax.data.simulation.examples import few_shot_examples
from rlhf_jax.data.simulation.judge import WEIGHTS, Judge, Judgement
from rlhf_jax.data.simulation.labelers import Labeler, make_labelers
from rlhf_jax.data.simulation.tasks import (
    Constraint,
    Task,
    parse_prompt,
    sample_prompt,
)
from rlhf_jax.data.simulation.templates import USE_CASES
from rlhf_jax.data.simulation.world import World, make_world

__all__ = [
    "CONFIG_FILE",
    "USE_CASES",
    "WEIGHTS",
    "Constraint",
    "Judge",
    "Judgement",
    "Labeler",
    "SimulationConfig",
    "Task",
    "World",
    "few_shot_examples",
    "load_campaign",
    "make_documents",
    "make_labelers",
    "make_world",
    "parse_prompt",
    "sample_prompt",
    "web_answer",
    "write_campaign",
]
