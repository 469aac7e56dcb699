"""Settings of the model, and its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megarl.config.section import PathText, Section
from megarl.files import read_json_object


class ModelConfig(Section):
    """The model to train."""

    path: PathText
    """Hugging Face directory: config.json, safetensors, tokenizer (eval also takes Megatron checkpoints)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of parameters and activations. float32 is faster on CPUs without AMX or AVX512-BF16."""
    trust_remote_code: bool = False
    """Run Python code of the model's directory where transformers lacks the model (trainer.backend torch)."""


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Return whether ``path`` is a Megatron distributed checkpoint or has a tracker file that names one."""
    return any((Path(path) / name).is_file() for name in (".metadata", "latest_checkpointed_iteration.txt"))


def read_model_config(path: str) -> dict[str, Any]:
    """Read config.json of a Hugging Face directory; UserError if that fails."""
    return read_json_object(Path(path) / "config.json", "model.path")
