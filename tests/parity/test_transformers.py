"""Forward and backward of GPT-1 and GPT-2 are those of the transformers library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

from rlhf_jax.nn.attention import causal_attention  # noqa: E402
from rlhf_jax.nn.heads import lm_logits  # noqa: E402
from rlhf_jax.nn.transformer import transformer  # noqa: E402

SHAPES = {
    "one layer": {"num_layers": 1, "model_dim": 8, "num_heads": 1, "vocab_size": 7},
    "heads": {"num_layers": 2, "model_dim": 48, "num_heads": 6, "vocab_size": 31},
    "deep": {"num_layers": 6, "model_dim": 32, "num_heads": 4, "vocab_size": 64},
    "wide": {"num_layers": 2, "model_dim": 192, "num_heads": 3, "vocab_size": 211},
}


def theirs(cfg):
    """The same shape in the library, dropout off."""
    shape = {
        "n_layer": cfg.num_layers,
        "n_embd": cfg.model_dim,
        "n_head": cfg.num_heads,
        "n_positions": cfg.max_len,
        "vocab_size": cfg.vocab_size,
    }
    name = "GPT2" if cfg.norm == "pre" else "OpenAIGPT"
    config = getattr(transformers, f"{name}Config")(**shape)
    return getattr(transformers, f"{name}LMHeadModel")(config).eval()


def copy_weights(params, model, cfg) -> None:
    """Writes our parameters into the library's model, each under its name there."""
    D, pre = cfg.model_dim, cfg.norm == "pre"
    blocks = jax.device_get(params["blocks"])
    written = {
        "wte" if pre else "tokens_embed": params["embed"],
        "wpe" if pre else "positions_embed": params["pos_embed"],
    }
    if pre:
        written["ln_f"] = params["final_norm"]
    for i in range(cfg.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], blocks)
        written |= {
            f"h.{i}.ln_1": layer["attn_norm"],
            f"h.{i}.ln_2": layer["mlp_norm"],
            f"h.{i}.attn.c_attn": {
                "w": layer["qkv"]["w"].reshape(D, 3 * D),
                "b": layer["qkv"]["b"].reshape(3 * D),
            },
            f"h.{i}.attn.c_proj": {
                "w": layer["attn_out"]["w"].reshape(D, D),
                "b": layer["attn_out"]["b"],
            },
            f"h.{i}.mlp.c_fc": layer["mlp_up"],
            f"h.{i}.mlp.c_proj": layer["mlp_down"],
        }
    state = {}
    for name, leaf in written.items():
        leaves = leaf if isinstance(leaf, dict) else {"w": leaf}
        for key, value in leaves.items():
            suffix = "bias" if key in ("b", "bias") else "weight"
            state[f"transformer.{name}.{suffix}"] = torch.tensor(np.asarray(value))
    state["lm_head.weight"] = torch.tensor(np.asarray(params["embed"]))
    left_out = {
        name for name, _ in model.named_buffers()
    }  # causal masks and position ids, which are not parameters
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= left_out


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_input_gradients_are_the_librarys(norm, shape, tiny, random_params):
    cfg = tiny(**SHAPES[shape], max_len=24, norm=norm)
    params = random_params(cfg)
    params["blocks"]["qkv"]["w"] *= 0.5  # keeps attention away from one-hot weights
    model = theirs(cfg)
    copy_weights(params, model, cfg)
    rng = np.random.default_rng(1)
    B, T = 3, 17
    tokens = rng.integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    weights = rng.normal(size=(B, T, cfg.vocab_size)).astype(np.float32)
    weights /= np.sqrt(weights.size)

    def logits_and_sum(embed):
        # one row of the table per input token: its gradient is that of the input
        table = {**params, "embed": embed.reshape(B * T, cfg.model_dim)}
        places = jnp.arange(B * T).reshape(B, T)
        positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        hidden = transformer(table, places, positions, causal_attention, cfg)
        logits = lm_logits(params, hidden)
        return jnp.sum(logits * weights), logits

    inputs = params["embed"][tokens]
    grad_fn = jax.jit(jax.grad(logits_and_sum, has_aux=True))
    gradient, logits = grad_fn(inputs)

    their_inputs = torch.tensor(np.asarray(inputs), requires_grad=True)
    their_logits = model(inputs_embeds=their_inputs).logits
    (their_logits * torch.tensor(weights)).sum().backward()

    scale = float(np.abs(their_logits.detach().numpy()).max())
    assert scale > 1.0  # logits worth comparing
    np.testing.assert_allclose(
        logits, their_logits.detach().numpy(), rtol=1e-4, atol=1e-4 * scale
    )
    their_gradient = their_inputs.grad.numpy()
    np.testing.assert_allclose(
        gradient,
        their_gradient,
        rtol=1e-4,
        atol=1e-4 * float(np.abs(their_gradient).max()),
    )
