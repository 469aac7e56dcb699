"""Checks of what a configuration names on disk: data files, and the model's directory and sizes.

Nothing is parsed beyond config.json and the safetensors index, so this takes milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarl.config.data import parts_of
from megarl.config.evaluate import EvalConfig
from megarl.config.model import is_megatron_checkpoint, read_model_config
from megarl.config.rollout import Sampling
from megarl.config.section import Section
from megarl.config.violation import Violation

Violations = Iterator[Violation]
_MODEL_PATH = ("model", "path")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def find_file_violations(config: Section, *, weights: bool = True) -> list[Violation]:
    """What is missing or does not fit on disk; sections that failed the schema are left out.

    Without ``weights`` model.path needs config.json and a tokenizer alone, and no other model is looked for.
    """
    return [
        *_run_directory(getattr(config, "run", None)),
        *_data_files(getattr(config, "data", None)),
        *_model(config, weights),
        *(_other_models(config) if weights else ()),
    ]


def _run_directory(run: Any) -> Violations:
    directory = getattr(run, "dir", None)
    if directory is not None and Path(directory).exists() and not Path(directory).is_dir():
        yield Violation(("run", "dir"), f"is a file, not a directory (got {directory!r})")


def _data_files(data: Any) -> Violations:
    for split in ("train", "held_out"):
        for at, source in parts_of(getattr(data, split, None), f"data.{split}"):
            copy, file = getattr(source, "directory", None), getattr(source, "path", None)
            if copy is not None and not Path(copy).exists():
                why = f"nothing there (got {copy!r}){_from_here(copy)}"
                yield Violation((*at.split("."), "directory"), why)
            if file is not None and not Path(file).is_file():
                yield Violation((*at.split("."), "path"), f"no such file (got {file!r}){_from_here(file)}")
            elif file is not None and Path(file).stat().st_size == 0:
                yield Violation((*at.split("."), "path"), f"the file is empty (got {file!r})")


def _model(config: Section, weights: bool) -> Violations:
    path = getattr(getattr(config, "model", None), "path", None)
    if path is None:
        return
    directory = Path(path)
    if not directory.is_dir():
        yield Violation(_MODEL_PATH, f"no such directory (got {path!r}){_from_here(path)}")
        return
    if isinstance(config, EvalConfig) and is_megatron_checkpoint(path):
        return  # converted first, with checks of its own
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json)")
    missing += _missing_weights(directory) if weights else []
    if missing:
        yield Violation(_MODEL_PATH, f"the directory lacks {', '.join(missing)} (got {path!r})")
    if "config.json" in missing:
        return
    try:
        model_config = read_model_config(path)
    except (OSError, ValueError) as error:
        yield Violation(_MODEL_PATH, f"config.json cannot be read: {error} (got {path!r})")
        return
    yield from _lengths_fit(config, model_config)
    yield from _kv_cache_fits(config, model_config)


def _other_models(config: Section) -> Violations:
    for section in ("reference", "critic", "teacher"):
        path = getattr(getattr(config, section, None), "path", None)
        if path is None:
            continue
        directory, field = Path(path), (section, "path")
        if not directory.is_dir():
            yield Violation(field, f"no such directory (got {path!r}){_from_here(path)}")
            continue
        missing = [] if (directory / "config.json").is_file() else ["config.json"]
        if missing := missing + _missing_weights(directory):
            yield Violation(field, f"the directory lacks {', '.join(missing)} (got {path!r})")


def _missing_weights(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [] if any(directory.glob("*.safetensors")) else ["weights (*.safetensors)"]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError):
        return [f"a readable {index.name}"]
    return [shard for shard in shards if not (directory / shard).is_file()]


def _lengths_fit(config: Section, model_config: dict[str, Any]) -> Violations:
    positions = model_config.get("max_position_embeddings")
    if positions is None:
        return
    longest = getattr(getattr(config, "packing", None), "max_sequence_length", None)
    if longest is not None and longest > positions:
        yield Violation(
            ("packing", "max_sequence_length"),
            f"the model has max_position_embeddings = {positions} (got {longest})",
        )
    for path in (("rollout", "max_new_tokens"), ("evaluation", "max_new_tokens")):
        length = getattr(getattr(config, path[0], None), path[1], None)
        # With an explicit max_sequence_length, a rule of the root has compared the two already.
        if length is not None and length >= positions and (longest is None or isinstance(config, EvalConfig)):
            yield Violation(
                path,
                f"leaves no room for a prompt within the model's max_position_embeddings = {positions}"
                f" (got {length})",
            )


def _kv_cache_fits(config: Section, model_config: dict[str, Any]) -> Violations:
    """The engine refuses to start unless its cache holds one sequence of full length."""
    cache = getattr(getattr(getattr(config, "rollout", None), "engine", None), "kv_cache_gib", None)
    needed = {"num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"}
    if not isinstance(config, Sampling) or cache is None or not needed <= model_config.keys():
        return
    try:
        longest = config.max_sequence_length(model_config)
        engine_type = config.rollout.engine.dtype
        number_bytes = {"float32": 4, "bfloat16": 2}[
            config.model.dtype if engine_type == "auto" else engine_type
        ]
    except AttributeError:  # a field that failed the schema, reported already
        return
    heads = model_config["num_attention_heads"]
    head_size = model_config.get("head_dim") or model_config["hidden_size"] // heads
    numbers = (
        2 * model_config["num_hidden_layers"] * model_config.get("num_key_value_heads", heads) * head_size
    )
    gib = numbers * number_bytes * longest / 2**30
    if gib > cache:
        yield Violation(
            ("rollout", "engine", "kv_cache_gib"),
            f"one sequence of {longest} tokens takes {gib:.2f} GiB; raise it, or lower"
            f" packing.max_sequence_length (got {cache})",
            (("packing", "max_sequence_length"), _MODEL_PATH),
        )


def _from_here(path: str) -> str:
    return "" if Path(path).is_absolute() else f", relative to {Path.cwd()}"
