"""Models without a table, for a trainer that builds them with transformers.

Such an architecture has the names and shapes of the checkpoint's tensors, but does not map them to
Megatron's or vLLM's parameters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megarl.errors import UserError
from megarl.models.quantization import SCALE, fp8_block, quantization_problem
from megarl.models.spec import ModelSpec, RopeSpec
from megarl.models.table import Architecture, Rule

_HEAD = "lm_head.weight"


def any_architecture(model_dir: str | Path, config: dict[str, Any]) -> Architecture:
    """Build an architecture from the names and shapes of the weights and common keys of ``config``.

    Without weights (a hub id in a dry run) the shapes are those of the model that transformers builds.

    Raises:
        UserError: files of weights are missing, or a size that all decoders have; or there are no weights,
            and transformers cannot build the model.
    """
    if (problem := quantization_problem(config)) is not None:
        raise UserError(f"config.json: {problem}")
    scales = (SCALE,) if fp8_block(config) is not None else ()
    directory = Path(model_dir)
    found = _shapes(directory) if any(directory.glob("*.safetensors*")) else _built_shapes(directory)
    shapes = {name: shape for name, shape in found.items() if not name.endswith(scales)}
    tied = bool(config.get("tie_word_embeddings", _HEAD not in shapes))
    if tied:
        shapes.pop(_HEAD, None)
    try:
        heads = config["num_attention_heads"]
        spec = ModelSpec(
            family=str(config["model_type"]),
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config.get("intermediate_size") or 4 * config["hidden_size"],
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings") or 0,
            norm_eps=config.get("rms_norm_eps") or config.get("layer_norm_eps") or 1e-5,
            rope=RopeSpec(10_000.0),  # transformers' own is computed
            tied_embeddings=tied,
            init_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise UserError(f"{Path(model_dir) / 'config.json'}: field {error.args[0]!r} is missing") from None
    return Architecture(spec, tuple(Rule(name, shape, (), ()) for name, shape in shapes.items()))


def has_engine_table(architecture: Architecture) -> bool:
    """Return whether the table maps vLLM's parameters, so that an engine can alias or copy weights."""
    return any(rule.engine for rule in architecture.rules)


def _built_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that transformers would write of its model, built without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megarl.models.transformers_regions import transformers_regions

    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.path: no weights in {model_dir}, and transformers cannot build the model of its "
            f"config.json: {reason}"
        ) from error
    shapes = {name: tuple(param.shape) for name, param in lm.named_parameters()}
    regions = transformers_regions(lm, shapes, None)
    return {region.hf: tuple(end for _, end in region.box) for region in regions}


def _shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    index = model_dir / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(files):
        if not (model_dir / name).is_file():
            raise UserError(f"model.path: {model_dir} has no {name}")
        with safe_open(model_dir / name, framework="numpy") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes
