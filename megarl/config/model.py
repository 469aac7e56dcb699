"""Settings of the model, and its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.config.dtypes import Dtype
from megarl.config.hub import ModelPath
from megarl.config.section import Section
from megarl.files import read_json_object


class ModelConfig(Section):
    """The model to train."""

    path: ModelPath
    """Hugging Face directory (config.json, safetensors, tokenizer), an id of the hub (org/name[@revision]), a
    checkpoint of either backend, a run directory, whose newest checkpoint is taken, or PEFT adapters. The
    latter three are converted into the run directory first."""
    dtype: Dtype = "float32"
    """Dtype of parameters and activations. float32 is faster on CPUs without AMX or AVX512-BF16."""
    trust_remote_code: bool = False
    """Run Python code of the model's directory where transformers lacks the model (trainer.backend torch)."""


def is_checkpoint(path: str | Path) -> bool:
    """Return whether ``path`` is a checkpoint, names one in a tracker file, or is a run or an adapter."""
    try:
        return _holds_checkpoints(path) or is_run_directory(path) or is_adapter(path)
    except OSError:  # a name that the file system does not take
        return False


def is_adapter(path: str | Path) -> bool:
    """Return whether ``path`` is a directory of PEFT adapters, without the weights of their base."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def is_run_directory(path: str | Path) -> bool:
    """Return whether a run keeps its checkpoints in ``path``.

    A checkpoint in whose directory something ran (an evaluation of it) stays a checkpoint.
    """
    is_run = (Path(path) / "config.yaml").is_file() and (Path(path) / "checkpoints").is_dir()
    return is_run and not _holds_checkpoints(path)


def _holds_checkpoints(path: str | Path) -> bool:
    names = (".metadata", "latest_checkpointed_iteration.txt")
    return any((Path(path) / name).is_file() for name in names)


def read_model_config(path: str) -> dict[str, Any]:
    """Read config.json of a Hugging Face directory; UserError if that fails."""
    return read_json_object(Path(path) / "config.json", "model.path")
