"""Load Hugging Face directories into local parameters and export them, region by region.

Both directions follow the architecture table alone. Names, shapes and coverage are checked before the first
byte is written; one error lists every mismatch.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megarl.errors import UserError
from megarl.files import read_index, read_json_object, stand_in, writing
from megarl.models.quantization import SCALE, fp8_block
from megarl.models.score import SCORE, score_config
from megarl.models.table import Architecture, Region, name_problems
from megarl.weights.fp8 import STORED, BlockScaled, pair_problem

_MAX_SHARD_BYTES = 5 * 2**30
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
CARRIED_OVER = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def region_index(index: tuple[int | tuple[int, int], ...]) -> tuple[int | slice, ...]:
    """Convert a region's index to Python indexing of a tensor."""
    return tuple(i if isinstance(i, int) else slice(*i) for i in index)


def has_score(model_dir: str | Path) -> bool:
    """Return True if a Hugging Face directory has a score head."""
    return SCORE in safetensors_files(Path(model_dir))


def safetensors_files(model_dir: Path) -> dict[str, Path]:
    """Return the file of each tensor name, for sharded and single-file checkpoints."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        files = {name: model_dir / file for name, file in read_index(index).items()}
        missing = sorted({str(path) for path in files.values() if not path.is_file()})
        if missing:
            raise UserError("\n".join(f"{index}: shard {path} does not exist" for path in missing))
        return files
    single = model_dir / "model.safetensors"
    if not single.is_file():
        raise UserError(f"model.path: {model_dir} has neither model.safetensors nor its index")
    with open_weights(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_weights(path: Path) -> Any:
    """Open a safetensors file for reading tensors; a context manager.

    Raises:
        UserError: the file is damaged, truncated, or a placeholder of one that was not downloaded.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        reason = stand_in(path) or f"not a whole safetensors file ({error})"
        raise UserError(f"{path}: {reason}") from error


def fingerprint(model_dir: str | Path) -> str:
    """Return the SHA-256 of config.json and of every tensor's name, shape, dtype and first row.

    It distinguishes models with different weights in a moment, at any size; it is no proof of equality.
    """
    model_dir = Path(model_dir)
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    with ExitStack() as stack:
        files = safetensors_files(model_dir)
        handles = {path: stack.enter_context(open_weights(path)) for path in set(files.values())}
        for name, path in sorted(files.items()):
            part = handles[path].get_slice(name)
            first = part[:1].contiguous()
            digest.update(f"{name} {part.get_shape()} {part.get_dtype()}".encode())
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_FREQUENCIES = ".rotary_emb.inv_freq"


class WeightFiles:
    """The tensors of a Hugging Face directory as an architecture reads them, for loading and conversion.

    Args:
        model_dir: the directory.
        architecture: defines the tensors.
        initial: whole tensors for names that the directory may lack.
    """

    def __init__(
        self, model_dir: Path, architecture: Architecture, initial: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        files = safetensors_files(model_dir)
        config = read_json_object(model_dir / "config.json")
        # Llama 2's files have them; they follow from config.json, and transformers drops them too.
        self._files = {name: file for name, file in files.items() if not name.endswith(_FREQUENCIES)}
        self._block = fp8_block(config)
        self._scales: dict[str, Path] = {}  # of weights in FP8, by the weight's name
        for name in [name for name in self._files if name.endswith(SCALE)] if self._block else ():
            self._scales[name.removesuffix(SCALE)] = self._files.pop(name)
        self._initial = {name: part for name, part in (initial or {}).items() if name not in self._files}
        self._handles: dict[Path, Any] = {}
        self.ignored = sorted(name for name in self._files if architecture.ignores(name))
        """Tensors that no layer reads."""
        self.problems = self._find_problems(model_dir, architecture)
        """Mismatches, one line each."""

    def _find_problems(self, model_dir: Path, architecture: Architecture) -> list[str]:
        expected, found = architecture.hf_shapes(), []
        if architecture.spec.tied_embeddings and HEAD in self._files:  # the file may repeat the embedding
            if EMBEDDING in self._files and not torch.equal(self.slice(HEAD)[:], self.slice(EMBEDDING)[:]):
                found.append(
                    f"{model_dir}: {HEAD} differs from {EMBEDDING} though they are tied (tie_word_embeddings)"
                )
            del self._files[HEAD]
        found += self._fp8_problems(model_dir, expected)
        used = [name for name in self._files if name not in set(self.ignored)]
        found += name_problems(expected, [*used, *self._initial], str(model_dir))
        for name, shape in expected.items():
            if name in self._files and (actual := tuple(self._stored(name).get_shape())) != shape:
                found.append(f"{model_dir}: tensor {name} has shape {list(actual)}, expected {list(shape)}")
        return found

    def _fp8_problems(self, model_dir: Path, expected: Iterable[str]) -> Iterator[str]:
        """Yield what keeps weights in FP8 from being dequantised."""
        for name in sorted(self._scales.keys() - self._files.keys()):
            yield f"{model_dir}: tensor {name}{SCALE} scales {name}, which is not there"
        for name in sorted(self._files.keys() & set(expected)):
            stored = self._stored(name)
            in_fp8 = stored.get_dtype().startswith("F8_")
            if in_fp8 and (self._block is None or name not in self._scales or stored.get_dtype() != STORED):
                kind = stored.get_dtype()
                why = "has no scales" if kind == STORED else f"only {STORED} is supported"
                if self._block is None:
                    why = "config.json has no quantization_config with a weight_block_size"
                yield f"{model_dir}: tensor {name} is stored as {kind}, and {why}"
            elif not in_fp8 and name in self._scales:
                yield f"{model_dir}: tensor {name} has scales, but is stored as {stored.get_dtype()}"
            elif (
                in_fp8
                and self._block is not None
                and (problem := pair_problem(stored, self._scales_of(name), self._block)) is not None
            ):
                yield f"{model_dir}: tensor {name}: {problem}"

    def slice(self, name: str) -> Any:
        """Return a tensor whose parts can be read by indexing; what is stored in FP8 is float32 then."""
        if name in self._initial:
            return self._initial[name]
        if name not in self._scales:
            return self._stored(name)
        assert self._block is not None
        return BlockScaled(self._stored(name), self._scales_of(name), self._block)

    def _stored(self, name: str) -> Any:
        return self._slice_of(self._files[name], name)

    def _scales_of(self, name: str) -> Any:
        return self._slice_of(self._scales[name], f"{name}{SCALE}")

    def _slice_of(self, path: Path, name: str) -> Any:
        try:
            return self._open(path).get_slice(name)
        except SafetensorError as error:  # an index may say anything
            raise UserError(f"{path}: no tensor {name}, which the index places there") from error

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = open_weights(path)
        return self._handles[path]

    def unmap(self) -> None:
        """Close the files until the next read: file pages that were read count as memory."""
        self._handles.clear()


def load_hf(
    model_dir: str | Path,
    architecture: Architecture,
    regions: list[Region],
    params: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Fill this rank's parameters from a Hugging Face directory, reading only the bytes it needs.

    ``initial`` has whole tensors for names that the directory may lack. Vocabulary padding rows become zero.

    Raises:
        UserError: lists missing, left-over and misshapen tensors, and parameters that no region fills; or
            names a tensor with a NaN or an infinity.
    """
    files = WeightFiles(Path(model_dir), architecture, initial)
    if wrong := [*files.problems, *uncovered(architecture, regions, params)]:
        raise UserError("\n".join(wrong))
    with torch.no_grad():
        for param in params.values():
            param.zero_()
        for region in regions:
            part = files.slice(region.hf)[tuple(slice(*span) for span in region.box)]
            _check_finite(region.hf, part, Path(model_dir))
            params[region.param][region_index(region.index)].copy_(part)


def _check_finite(name: str, part: torch.Tensor, model_dir: Path) -> None:
    if part.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(part)):  # one pass
        at = (~torch.isfinite(part)).nonzero()[0].tolist()
        raise UserError(
            f"{model_dir}: tensor {name} has the value {float(part[tuple(at)])}: its file is damaged"
        )


def uncovered(
    architecture: Architecture, regions: list[Region], params: Mapping[str, torch.Tensor]
) -> list[str]:
    """Return parameters whose elements are not each in exactly one region (padding rows excepted)."""
    problems = []
    counts: dict[str, int] = dict.fromkeys(params, 0)
    for region in regions:
        if region.param not in counts:
            problems.append(
                f"table: tensor {region.hf} belongs in parameter {region.param}, which does not exist"
            )
            continue
        counts[region.param] += math.prod(stop - start for start, stop in region.box)
    for name, count in counts.items():
        missing = params[name].numel() - count
        if missing and not (missing > 0 and _is_padding(name, architecture.spec.vocab_size, regions)):
            problems.append(
                f"table: {missing} of {params[name].numel()} elements of parameter {name} have no tensor"
            )
    return problems


def _is_padding(param: str, vocab_size: int, regions: list[Region]) -> bool:
    """Return True if rows of ``param`` without a tensor are vocabulary padding, after its end."""
    if not param.endswith(("word_embeddings.weight", "output_layer.weight")):
        return False
    return all(region.box[0][1] == vocab_size for region in regions if region.param == param)


def export_hf(
    directory: str | Path,
    source_dir: str | Path,
    architecture: Architecture,
    tensors: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """Write a Hugging Face directory: safetensors (sharded above 5 GiB), and the configuration and tokenizer
    files of ``source_dir``. The directory appears atomically, complete or not at all."""
    directory, source_dir = Path(directory), Path(source_dir)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    dtype = None
    for name, tensor in tensors:
        if name == EMBEDDING:  # a router's bias may have another dtype than the weights
            dtype = tensor.dtype
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + num_bytes > _MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += num_bytes
    problems = name_problems(
        architecture.hf_shapes(), (name for shard in shards for name in shard), str(directory)
    )
    if problems:
        raise UserError("\n".join(problems))
    weight_map = {}
    for number, shard in enumerate(shards):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        )
        with writing(partial):
            save_file(shard, partial / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in CARRIED_OVER:
        if (source_dir / name).is_file():
            shutil.copy(source_dir / name, partial / name)
    config = json.loads((partial / "config.json").read_text())
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)  # of the source's files
    config["dtype"] = str(dtype).removeprefix("torch.")
    if architecture.spec.score_head:
        config = score_config(config)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)
