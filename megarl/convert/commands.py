"""Convert checkpoints in both directions, resumable and in bounded memory."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megarl.config import hub
from megarl.convert import distcp, hf_side
from megarl.convert.adapters import AdapterCheckpoint, has_adapters
from megarl.convert.pieces import Dialect, Piece, extra_states, pieces_of
from megarl.convert.sources import check_target
from megarl.errors import UserError
from megarl.files import disk_is_full
from megarl.models import load_architecture
from megarl.models.spec import ModelSpec, MoeSpec
from megarl.models.table import Architecture

RELEASE = "release"
"""Megatron-LM's name for the directory of a checkpoint without an iteration."""
HF_FILES = "hf"
"""Folder of a converted checkpoint with config.json and the tokenizer, for the conversion back."""


def hf_to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: str | None,
    max_bytes: int,
    overwrite: bool = False,
    keep_mtp: bool = False,
) -> None:
    """Convert a Hugging Face directory to a Megatron-LM distributed checkpoint.

    Tensors keep their dtypes unless ``dtype`` is given. ``keep_mtp`` stores the tensors of multi-token
    prediction next to the checkpoint, for the conversion back. ``max_bytes`` limits the size of a file.

    Raises UserError before anything is written, with every tensor that is missing, unexpected or has the
    wrong shape. An interrupted conversion resumes; ``target`` appears when it is complete.
    """
    architecture = load_architecture(source)
    reader = hf_side.HfReader(source, architecture)
    wanted = getattr(torch, dtype) if dtype else None

    def dtype_of(piece: Piece) -> torch.dtype:
        types = [reader.dtype_of(name) for name, _ in piece.parts]
        return wanted or reduce(torch.promote_types, types)

    def num_bytes(piece: Piece) -> int:
        return piece.num_elements * dtype_of(piece).itemsize

    files = distcp.assign_files(pieces_of(architecture, "megatron"), num_bytes, max_bytes)
    request = {"source": str(source.resolve()), "dtype": str(wanted), "max_bytes": max_bytes}
    request["keep_mtp"] = keep_mtp
    with output_directory(target, request, overwrite) as partial:
        directory = partial / RELEASE
        directory.mkdir(exist_ok=True)

        def tensors(file: distcp.ShardFile) -> Iterator[torch.Tensor]:
            for piece in file.pieces:
                yield piece.join([reader.read(name).to(dtype_of(piece)) for name, _ in piece.parts])

        with progress_bar() as progress:
            for file in progress.track(files, description="writing .distcp files"):
                if not distcp.is_finished(directory, file):
                    distcp.write_file(directory, file, tensors(file))
        arguments = megatron_arguments(architecture, wanted or reader.dtype)
        if architecture.spec.output_bias != architecture.spec.mlp_bias:
            print(
                "only one of attention and MLP has biases in this model; Megatron-LM's --add-bias-linear "
                "means both, so that its own models cannot load this checkpoint (MegaRL can)"
            )
        common = {"iteration": 0, "checkpoint_version": 3.0, "args": arguments}
        distcp.finish(directory, files, extra_states(architecture), common)
        hf_side.carry_over(source, partial / HF_FILES)
        hf_side.keep_or_name_ignored(reader, partial / HF_FILES, wanted, max_bytes, keep=keep_mtp)
        (partial / "latest_checkpointed_iteration.txt").write_text(RELEASE)


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    hf_config: Path | None,
    dtype: str | None,
    max_bytes: int,
    overwrite: bool = False,
) -> None:
    """Convert a Megatron-LM or MegaRL checkpoint to a Hugging Face directory, as :func:`hf_to_megatron`."""
    checkpoint = Checkpoint.open(source, hf_config)
    wanted = getattr(torch, dtype) if dtype else None
    kept = hf_side.IgnoredTensors(checkpoint.hf_files, wanted)

    def read(name: str) -> torch.Tensor:
        if name in kept.sizes:
            return kept.read(name)
        return checkpoint.read(name).to(wanted or checkpoint.dtype_of(name))

    sizes = {
        name: math.prod(shape) * (wanted or checkpoint.dtype_of(name)).itemsize
        for name, shape in checkpoint.architecture.hf_shapes().items()
    } | kept.sizes
    shards = hf_side.plan_shards(sizes, max_bytes)
    request = {"source": str(source.resolve()), "dtype": str(wanted), "max_bytes": max_bytes}
    with output_directory(target, request, overwrite) as partial:
        with progress_bar() as progress:
            task = progress.add_task("writing safetensors files", total=len(shards))
            for _ in hf_side.write_shards(partial, shards, read):
                progress.advance(task)
        hf_side.write_index(partial, shards, sizes)
        hf_side.carry_over(checkpoint.hf_files, partial, wanted or checkpoint.dtype)


class Checkpoint:
    """A distributed checkpoint whose keys and shapes match an architecture."""

    def __init__(
        self,
        reader: distcp.DistcpReader,
        architecture: Architecture,
        pieces: list[Piece],
        dialect: Dialect,
        hf_files: Path,
    ) -> None:
        self.reader, self.architecture, self.dialect, self.hf_files = reader, architecture, dialect, hf_files
        self._piece_of = {name: (piece, n) for piece in pieces for n, (name, _) in enumerate(piece.parts)}
        self._last: tuple[Piece, list[torch.Tensor]] | None = None
        key = reader.key_of(pieces[0])
        assert key is not None
        self.dtype = reader.dtypes[key]

    @classmethod
    def open(cls, path: Path, hf_config: Path | None) -> Checkpoint | AdapterCheckpoint:
        """Find the iteration, the dialect and config.json; UserError lists all mismatches."""
        directory = find_iteration(path)
        hf_files = hf_config or next((d for d in config_places(path, directory) if d), None)
        if hf_files is None:
            raise UserError(f"{path}: no config.json found; give a directory that has one (--hf-config)")
        architecture = load_architecture(hf_files)
        reader = distcp.DistcpReader(directory)
        if has_adapters(reader.shapes):
            return AdapterCheckpoint(reader, directory, architecture, hf_files)
        dialect = dialect_of(reader)
        pieces = pieces_of(architecture, dialect)
        wrong = _disagreements(directory, reader, pieces)
        if wrong:
            raise UserError("\n".join(wrong))
        return cls(reader, architecture, pieces, dialect, hf_files)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the stored dtype of a Hugging Face tensor."""
        key = self.reader.key_of(self._piece_of[name][0])
        assert key is not None
        return self.reader.dtypes[key]

    def read(self, name: str) -> torch.Tensor:
        """Return one full Hugging Face tensor."""
        piece, number = self._piece_of[name]
        if self._last is None or self._last[0] != piece:
            self._last = (piece, piece.split(self.reader.read(piece)))
        return self._last[1][number].contiguous()


def find_iteration(path: Path) -> Path:
    """Return the directory with .metadata: ``path``, or the iteration named by its tracker file."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        raise UserError(
            f"{path}: neither a Megatron checkpoint (.metadata) nor a directory of them ({tracker.name})"
        )
    text = tracker.read_text(errors="replace").strip()
    if text != RELEASE and not re.fullmatch("[0-9]{1,12}", text):
        raise UserError(f"{tracker}: names no iteration (got {text[:40]!r})")
    directory = path / (text if text == RELEASE else f"iter_{int(text):07}")
    if not (directory / ".metadata").is_file():
        raise UserError(f"{tracker} names {text}, but {directory} is not a distributed checkpoint")
    return directory


def config_places(path: Path, directory: Path) -> list[Path | None]:
    """Return candidates with config.json: folders of a converted checkpoint, or the model of a MegaRL run."""
    places: list[Path | None] = [
        place
        for place in (path / HF_FILES, directory.parent / HF_FILES, directory / HF_FILES)
        if (place / "config.json").is_file()
    ]
    run_config = directory.parent.parent / "config.yaml"
    if not places and run_config.is_file():
        import yaml

        named = hub.directory_of(yaml.safe_load(run_config.read_text())["model"]["path"])
        if isinstance(named, hub.HubDirectory):
            hub.fetch(named)  # the run has it in the cache
        places.append(Path(named) if (Path(named) / "config.json").is_file() else None)
    return places


def dialect_of(reader: distcp.DistcpReader) -> Dialect:
    """Return the dialect: MegaRL stores q, k and v separately, and adapters."""
    own = has_adapters(reader.shapes) or any(key.endswith("linear_qkv.weight.q") for key in reader.shapes)
    return "megarl" if own else "megatron"


def _disagreements(directory: Path, reader: distcp.DistcpReader, pieces: list[Piece]) -> list[str]:
    wrong: dict[str, None] = {}
    used = {"output_layer.weight"} if not any(p.key == "output_layer.weight" for p in pieces) else set()
    for piece in pieces:
        key = reader.key_of(piece)
        if key is None:
            wrong[f"{directory}: missing tensor {piece.key} (for {piece.parts[0][0]})"] = None
            continue
        used |= {piece.key, *piece.twins}
        found, expected = reader.shapes[key], piece.global_shape
        depth = len(piece.axes)
        padded = piece.rows and len(found) == len(expected) and found[depth] >= piece.parts[0][1][0]
        if found != expected and not (padded and found[depth + 1 :] == expected[depth + 1 :]):
            wrong[f"{directory}: tensor {key} has shape {list(found)}, expected {list(expected)}"] = None
    for key in sorted(set(reader.shapes) - used):
        if key.startswith(("decoder.", "embedding.", "output_layer.")) and "_extra_state" not in key:
            wrong[f"{directory}: no rule maps tensor {key}"] = None
    return list(wrong)


def megatron_arguments(architecture: Architecture, dtype: torch.dtype) -> argparse.Namespace:
    """Return the arguments that Megatron-LM reads from a checkpoint with --use-checkpoint-args."""
    spec: ModelSpec = architecture.spec
    moe = spec.moe
    return argparse.Namespace(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads,
        group_query_attention=spec.num_kv_heads != spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        seq_length=spec.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rope.theta,
        rotary_percent=1.0,
        no_rope_freq=_unrotated(spec),
        normalization="RMSNorm",
        norm_epsilon=spec.norm_eps,
        swiglu=True,
        add_bias_linear=spec.output_bias or spec.mlp_bias,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        untie_embeddings_and_output_weights=not spec.tied_embeddings,
        vocab_size=spec.vocab_size,
        padded_vocab_size=next(p.rows for p in pieces_of(architecture, "megatron") if p.rows),
        num_experts=moe.num_experts if moe else None,
        moe_ffn_hidden_size=moe.intermediate_size if moe else None,
        **(_moe_arguments(spec, moe) if moe else {}),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        use_dist_ckpt=True,
        dist_ckpt_format="torch_dist",
        iteration=0,
    )


def _unrotated(spec: ModelSpec) -> list[int] | None:
    """Megatron's no_rope_freq: 1 for each layer without rotary embedding."""
    return (
        [int(n in spec.unrotated_layers) for n in range(spec.num_layers)] if spec.unrotated_layers else None
    )


def _moe_arguments(spec: ModelSpec, moe: MoeSpec) -> dict[str, Any]:
    """Return the router's options, which Megatron-LM would set to its own defaults."""
    return {
        "moe_router_topk": moe.experts_per_token,
        # With sigmoid scores Megatron normalises the chosen ones in any case.
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalize_top_k,
        "moe_router_score_function": moe.score,
        "moe_router_enable_expert_bias": moe.router_bias,
        "moe_router_topk_scaling_factor": moe.scaling_factor if moe.scaling_factor != 1 else None,
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.top_groups if moe.num_groups > 1 else None,
        "moe_shared_expert_intermediate_size": moe.shared_intermediate_size or None,
        # A list, even of ones, gives megatron-core's tensors a name per layer.
        "moe_layer_freq": [int(n in moe.layers) for n in range(spec.num_layers)] if spec.dense_layers else 1,
        "moe_aux_loss_coeff": moe.aux_loss_coef,
    }


@contextmanager
def output_directory(target: Path, request: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """A directory that becomes ``target`` when the block ends well, and waits for a rerun otherwise."""
    check_target(target, overwrite)
    partial = target.with_name(target.name + ".partial")
    note = partial / "conversion.json"
    if partial.exists() and (not note.is_file() or json.loads(note.read_text()) != request):
        shutil.rmtree(partial)  # of another conversion
    partial.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(request))
    try:
        yield partial
    except UserError:
        raise
    except Exception as error:  # torch's and safetensors' writers raise types of their own
        if (full := disk_is_full(partial, error)) is not None:
            raise full from error
        if isinstance(error, OSError):
            raise UserError(
                f"{partial}: {error.strerror or error}; run the same command again to resume"
            ) from error
        raise
    note.unlink()
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def progress_bar() -> Progress:
    """Return the bar of a conversion; it disappears at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
    )
