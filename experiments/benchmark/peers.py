"""The other side: GPT-2 of the transformers library with our weights."""

from typing import Any

import jax
import numpy as np

from experiments.benchmark.timing import seconds
from rlhf_jax.nn.config import TransformerConfig


def import_torch() -> tuple[Any, Any]:
    """torch and transformers, or how to get them."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(
            f"error: {error.name} is missing; the other side of this benchmark comes "
            'with `pip install -e ".[bench]"`'
        ) from error
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    return torch, transformers


def torch_matmul_flops(device: Any, size: int = 2048) -> float:
    """FLOP/s of `matmul_flops` by PyTorch: what the other side could reach."""
    torch, _ = import_torch()
    a = torch.randn(size, size, device=device)
    on_gpu = torch.device(device).type == "cuda"

    def product() -> None:
        torch.matmul(a, a)
        if on_gpu:
            torch.cuda.synchronize()

    product()
    return 2 * size**3 / min(seconds(product) for _ in range(20))


def hf_generate(
    model: Any, ids: Any, length: int, mask: Any = None, **options: Any
) -> Any:
    """Exactly `length` new tokens [B, R] after ids [B, P], with a cache.

    Of prompts padded on the left, mask [B, P] tells the tokens.
    """
    torch, _ = import_torch()
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            use_cache=True,
            pad_token_id=0,
            min_new_tokens=length,
            max_new_tokens=length,
            **options,
        )
    return out[:, ids.shape[1] :].cpu().numpy()


def hf_update(
    model: Any, optimizer: Any, ids: Any, bfloat16: bool = False, targets: Any = None
) -> float:
    """Loss of ids [B, T + 1] before one update with gradients clipped to norm 1.

    Targets [B, T] are those after each id unless given, with -100 where none counts.
    """
    torch, _ = import_torch()
    targets = ids[:, 1:] if targets is None else targets
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def hf_gpt2(params: Any, cfg: TransformerConfig) -> Any:
    """A float32 GPT-2 with our weights, sdpa attention, no dropout, on our device.

    Args:
        params: of `init_params`, pre-norm.
        cfg: shape of the model.
    """
    torch, transformers = import_torch()
    config = transformers.GPT2Config(
        n_layer=cfg.num_layers,
        n_embd=cfg.model_dim,
        n_head=cfg.num_heads,
        n_positions=cfg.max_len,
        vocab_size=cfg.vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config)
    D = cfg.model_dim
    params = jax.device_get(params)
    named = {
        "wte.weight": params["embed"],
        "wpe.weight": params["pos_embed"],
        "ln_f.weight": params["final_norm"]["scale"],
        "ln_f.bias": params["final_norm"]["bias"],
    }
    for i in range(cfg.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["blocks"])
        named |= {
            f"h.{i}.ln_1.weight": layer["attn_norm"]["scale"],
            f"h.{i}.ln_1.bias": layer["attn_norm"]["bias"],
            f"h.{i}.ln_2.weight": layer["mlp_norm"]["scale"],
            f"h.{i}.ln_2.bias": layer["mlp_norm"]["bias"],
            f"h.{i}.attn.c_attn.weight": layer["qkv"]["w"].reshape(D, 3 * D),
            f"h.{i}.attn.c_attn.bias": layer["qkv"]["b"].reshape(3 * D),
            f"h.{i}.attn.c_proj.weight": layer["attn_out"]["w"].reshape(D, D),
            f"h.{i}.attn.c_proj.bias": layer["attn_out"]["b"],
            f"h.{i}.mlp.c_fc.weight": layer["mlp_up"]["w"],
            f"h.{i}.mlp.c_fc.bias": layer["mlp_up"]["b"],
            f"h.{i}.mlp.c_proj.weight": layer["mlp_down"]["w"],
            f"h.{i}.mlp.c_proj.bias": layer["mlp_down"]["b"],
        }
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            parameter.copy_(torch.tensor(np.asarray(named.pop(name))))
    assert not named and model.lm_head.weight is model.transformer.wte.weight
    return model.to("cuda" if jax.default_backend() == "gpu" else "cpu")
