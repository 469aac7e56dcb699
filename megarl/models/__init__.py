"""Architecture tables (docs/models.md). ``load_architecture`` selects the family by model_type."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.files import read_json_object
from megarl.models import deepseek_v3, gemma, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, smollm3
from megarl.models.any_family import any_architecture
from megarl.models.options import check_options, with_defaults
from megarl.models.table import Architecture

FAMILIES: dict[str, Callable[[dict[str, Any]], Architecture]] = {
    "llama": llama.architecture,
    "mistral": mistral.architecture,
    "qwen2": qwen2.architecture,
    "qwen3": qwen3.architecture,
    "qwen3_moe": qwen3_moe.architecture,
    "mixtral": mixtral.architecture,
    "deepseek_v3": deepseek_v3.architecture,
    "smollm3": smollm3.architecture,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3_text,
}


def load_architecture(model_dir: str | Path, *, any_family: bool = False) -> Architecture:
    """Read ``model_dir``/config.json; raise UserError for missing or unsupported settings.

    With ``any_family``, a model without a table gets one from its weights (:mod:`megarl.models.any_family`).
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"model.path: {path} does not exist")
    config = read_json_object(path)
    model_type = config.get("model_type")
    if any_family and not _has_table(model_type, config):
        return any_architecture(model_dir, config)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, 1)
        hint = f"; nearest is {near[0]}" if near else ""
        known = f"known: {', '.join(sorted(FAMILIES))}{hint}"
        raise UserError(
            f"{path}: model_type {model_type!r} is not supported ({known}); trainer.backend=torch trains "
            "most models that transformers has"
        )
    if not any(path.parent.glob("*.safetensors")):  # a plan has no weights to read, however they are stored
        config.pop("quantization_config", None)
    try:
        check_options(model_type, config)
        return FAMILIES[model_type](with_defaults(model_type, config))
    except KeyError as error:
        raise UserError(f"{path}: field {error.args[0]!r} is missing") from None


def _has_table(model_type: Any, config: dict[str, Any]) -> bool:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        return False
    try:
        check_options(model_type, config)
        return FAMILIES[model_type](with_defaults(model_type, config)).spec.not_trainable is None
    except (KeyError, UserError):
        return False
