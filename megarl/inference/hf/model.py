"""A Hugging Face model with unset weights, and whether its requests can share a forward pass."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from megarl.errors import UserError
from megarl.inference.cpu_linear import cpu_linear
from megarl.inference.hf.attention import NAME, LayerShape, NotPackable, attention_function, measuring

# transformers' layer types whose attention goes through its interface, with a causal mask or a window.
_PAGED_LAYERS = {"full_attention", "sliding_attention", "attention"}
# Rotary frequencies of these change with the longest position in a forward pass, for all rows of it.
_CHANGING_ROPE = {"dynamic", "longrope"}


def build_model(
    model_dir: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    attention: str = NAME,
) -> Any:
    """The model of ``model_dir``/config.json, its weights whatever the memory holds.

    It attends through :mod:`megarl.inference.hf.attention`, or by an ``attention`` of transformers'. Raises
    UserError where transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_function)
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model_dir, **trust)
        with no_init_weights(), device:
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, **trust
            )
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"model.path: transformers cannot build {model_dir}: {error}") from error
    model.tie_weights()  # part of the initialization that was left out
    if device.type == "cpu":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]
    return model.eval().requires_grad_(False)


def _linear(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return cpu_linear(x, module.weight, module.bias)


def why_not_paged(model: Any, max_model_len: int) -> str | None:
    """Return why a model's requests cannot share a forward pass, by its configuration; None if they may."""
    config = model.config.get_text_config(decoder=True)
    if not model._supports_attention_backend:
        return f"{type(model).__name__} does not call transformers' attention interface"
    others = set(getattr(config, "layer_types", None) or ()) - _PAGED_LAYERS
    if others:
        return f"{type(model).__name__} has layers of other kinds: {', '.join(sorted(others))}"
    rope = getattr(config, "rope_parameters", None) or {}
    for rules in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        original = rules.get("original_max_position_embeddings") or config.max_position_embeddings
        if rules.get("rope_type") in _CHANGING_ROPE and max_model_len > original:
            return f"its rotary embedding ({rules['rope_type']}) changes beyond {original} tokens"
    return None


@torch.inference_mode()
def measure(model: torch.nn.Module) -> dict[int, LayerShape]:
    """Return what each layer caches per token; raise NotPackable if its attention does not suit pages."""
    shapes: dict[int, LayerShape] = {}
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with measuring(shapes):
        forward(model, ids, torch.arange(2, device=device)[None], torch.tensor([1], device=device))
    if not shapes:
        raise NotPackable(f"{type(model).__name__} has no attention")
    return shapes


def forward(
    model: Any, token_ids: torch.Tensor, position_ids: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Logits [len(wanted), V] of places in a row of tokens [1, T]; the mask is attention's own matter."""
    some = {"logits_to_keep": wanted} if takes(model, "logits_to_keep") else {}
    logits = model(input_ids=token_ids, position_ids=position_ids, use_cache=False, **some).logits[0]
    return logits if some else logits[wanted]


def takes(model: Any, argument: str) -> bool:
    """Whether the model's forward has this argument by name."""
    return argument in inspect.signature(model.forward).parameters


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint: parameters, tied ones once, and persistent buffers."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    for where, module in model.named_modules():
        for name, buffer in module.named_buffers(where, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found
