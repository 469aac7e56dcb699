"""Which of transformers' layers become single autograd steps, and that they compute what they did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.torch.families import FAMILIES, SIZES

# Fused MLPs and norms of two layers (Gemma's norms and those of heads included); GPT-OSS has experts alone.
EXPECTED = {"mistral": (2, 5), "gemma2": (2, 9), "gemma3_text": (2, 13), "olmo2": (2, 9), "gpt_oss": (0, 5)}


def build(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | FAMILIES[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    return model


def learn(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Logits, gradients, and the elements that autograd kept, parameters left out."""
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(40)[None] * 7 % 250
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(ids, use_cache=False).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_fused_layers_are_transformers_own(name: str) -> None:
    from megarl.trainer.torch.fused_layers import fuse

    model = build(name)
    fused = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    fuse(fused)
    assert torch.equal(state, torch.random.get_rng_state())
    changed = [type(module).__name__ for module in fused.modules() if "forward" in module.__dict__]
    mlps, norms = EXPECTED[name]
    assert sum(kind.endswith("RMSNorm") for kind in changed) == norms
    assert len(changed) - norms == mlps
    logits, gradients, kept = learn(model)
    found, their_gradients, kept_fused = learn(fused)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients.items():
        error = (their_gradients[key] - gradient).abs().max()
        assert error <= 1e-4 * gradient.abs().max().clamp(min=1e-3), key
    assert kept_fused < kept


def test_a_layer_of_another_form_stays_as_it_is() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    from megarl.trainer.torch.fused_layers import fuse

    class ShiftedMLP(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    class CenteredRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean(-1, keepdim=True))

    config = build("mistral").config
    config.mlp_bias = False
    model = nn.ModuleList([ShiftedMLP(config), CenteredRMSNorm(64)])
    fuse(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_norms_in_16_bits_round_as_transformers_does() -> None:
    from megarl.trainer.torch.fused_layers import fuse

    fused = build("mistral").bfloat16()
    plain = copy.deepcopy(fused)
    fuse(fused)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(fused(ids).logits, plain(ids).logits)
