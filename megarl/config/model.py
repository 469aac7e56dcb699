"""The model to train, and what its directory says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megarl.config.section import PathText, Section
from megarl.files import read_json_object


class ModelConfig(Section):
    """The model to train."""

    path: PathText
    """Hugging Face directory: config.json, safetensors, tokenizer (eval: or a Megatron checkpoint)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type. fp32 is the fast one on CPUs without AMX/AVX512-BF16."""
    trust_remote_code: bool = False
    """Run Python code of the model's directory where transformers lacks the model (trainer.backend torch)."""


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether a directory is a Megatron distributed checkpoint, or has a tracker file that names one."""
    return any((Path(path) / name).is_file() for name in (".metadata", "latest_checkpointed_iteration.txt"))


def read_model_config(path: str) -> dict[str, Any]:
    """config.json of a Hugging Face directory; UserError where it cannot be read."""
    return read_json_object(Path(path) / "config.json", "model.path")
