import jax
import pytest

from rlhf_jax.nn.config import PUBLISHED_SIZES, TransformerConfig
from rlhf_jax.nn.transformer import init_params


def count(cfg: TransformerConfig) -> int:
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), cfg))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt1", 116_534_784),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_sizes_have_the_published_number_of_parameters(name, published):
    cfg = PUBLISHED_SIZES[name]
    assert cfg.num_params == count(cfg) == published


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt3-small", 0.1252),
        ("gpt3-medium", 0.3559),
        ("gpt3-large", 0.7603),
        ("gpt3-xl", 1.316),
        ("gpt3-2.7b", 2.652),
        ("gpt3-6.7b", 6.658),
        ("gpt3-13b", 12.853),  # of width 5120; the 5140 of the paper gives 12.95
        ("gpt3-175b", 174.6),
    ],
)
def test_gpt3_sizes_have_their_computed_number_of_parameters(name, billions):
    cfg = PUBLISHED_SIZES[name]
    assert cfg.max_len == 2048
    assert cfg.num_params / 1e9 == pytest.approx(billions, rel=5e-4)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_num_params_counts_the_leaves(tiny, norm):
    cfg = tiny(norm=norm, num_layers=3)
    assert cfg.num_params == count(cfg)


def test_head_and_mlp_widths(tiny):
    assert (tiny().head_dim, tiny().mlp_dim) == (8, 64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("model_dim", 0),
        ("num_heads", 0),
        ("max_len", 0),
        ("vocab_size", -1),
        ("num_heads", 3),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("norm", "Pre"),
        ("dtype", "float16"),
        ("embed_std", 0.0),
    ],
)
def test_bad_shapes_are_refused_by_field_name(tiny, field, value):
    with pytest.raises(ValueError, match=field):
        tiny(**{field: value})
