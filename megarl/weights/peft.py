"""Low-rank adapters as PEFT's files: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megarl.config.hub import is_model_id
from megarl.config.lora import LoraConfig
from megarl.errors import UserError
from megarl.files import writing
from megarl.models.lora import adapted_modules, adapter_shapes, targets_of
from megarl.models.table import Architecture, name_problems


def export_adapter(
    directory: str | Path,
    base: str,
    architecture: Architecture,
    lora: LoraConfig,
    tensors: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """Write a directory that ``peft.PeftModel.from_pretrained`` loads on top of the model ``base``.

    ``base`` may be an id of the hub with a revision. ``tensors`` are all A and B under PEFT's names. The
    directory appears atomically, complete or not at all.

    Raises:
        UserError: tensors are missing or left over.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    found = dict(tensors)
    expected = adapter_shapes(adapted_modules(architecture, lora), lora.rank)
    if problems := name_problems(expected, found, str(directory)):
        raise UserError("\n".join(problems))
    with writing(partial):
        save_file(found, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.partition("@")[0] if is_model_id(base) else base,
        "revision": (base.partition("@")[2] or None) if is_model_id(base) else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets_of(architecture, lora),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def initial_a(seed: int, module: str, rank: int, inputs: int) -> torch.Tensor:
    """Draw A [rank, inputs] as PEFT, uniform in +-1/sqrt(inputs); depends on seed and name only."""
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    whole = torch.empty(rank, inputs)
    torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    return whole


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return weight [out, in] + scale * b [out, r] a [r, in], added in fp32, rounded once to its dtype."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
