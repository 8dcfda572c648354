"""Eight CPU devices and strict array rules for every test; fixtures they share."""

import os
import subprocess
import sys
from pathlib import Path


def _known(flag: str) -> bool:
    """Whether this XLA has the flag; it ends a process that gives it another's."""
    program = "from jaxlib import xla_client; xla_client.CompileOptions()"
    return not subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": flag},
        capture_output=True,
    ).returncode


# JAX reads these once, when it is first imported; of equal flags the last counts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of the suite's time is compiling: of small programs, for which the older
        # emitters, as long as XLA has them, need two thirds of the time.
        "--xla_backend_optimization_level=0",
        *filter(_known, ["--xla_cpu_use_fusion_emitters=false"]),
    ]
)
sys.path.insert(0, str(Path(__file__).parent))  # makes `import oracle` work

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from rlhf_jax.nn.config import TransformerConfig  # noqa: E402
from rlhf_jax.nn.transformer import init_params  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("default")


def _without_jit(function):
    def call(*args, **kwargs):
        with jax.disable_jit():
            return function(*args, **kwargs)

    return call


@pytest.fixture(scope="session", params=["jit", "no_jit"])
def mode(request):
    """`mode(f)` is `f` compiled, then, in a second run of the test, `f` op by op."""
    return jax.jit if request.param == "jit" else _without_jit


@pytest.fixture(scope="session")
def tiny():
    """Builds the shape of the smallest model with every part of a large one."""

    def make(**changes) -> TransformerConfig:
        shape = {
            "num_layers": 2,
            "model_dim": 16,
            "num_heads": 2,
            "max_len": 32,
            "vocab_size": 11,
        }
        return TransformerConfig(**{**shape, **changes})

    return make


@pytest.fixture(scope="session")
def random_params():
    """Parameters in which no leaf is constant: biases and norms count too."""

    def make(cfg: TransformerConfig, seed: int = 0):
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            centre = 1.0 if path[-1].key == "scale" else 0.0
            return jnp.float32(centre + 0.3 * rng.normal(size=leaf.shape))

        shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), cfg))
        return jax.tree.map_with_path(draw, shapes)

    return make
