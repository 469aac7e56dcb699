"""Reference logprobs on disk: one file per model, named by its content, keyed by sequence content.

Each is a safetensors file: ``digests`` [n, 16] uint8 (of token ids and loss mask), ``logps`` [n] float64 (the
summed logprobs of the targets), and as metadata the model's digest, the format and a checksum of both
tensors. A file that differs in any of these is never used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megarl.records import TokenSequence
from megarl.weights.hf import safetensors_files

# Part of every model digest: increase it when the same weights and tokens give other numbers.
_FORMAT = "megarl reference logprobs 1"
_DIGEST_BYTES = 16


class CacheError(Exception):
    """The reason why a cache file cannot be used, in a few words."""


def model_digest(model_dir: str | Path, dtype: str) -> str:
    """Return the SHA-256 of what the logprobs depend on: configuration, weights and compute dtype."""
    model_dir = Path(model_dir)
    files = [model_dir / "config.json", *sorted(set(safetensors_files(model_dir).values()))]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_file_digest, files))
    lines = [_FORMAT, dtype, *(f"{path.name} {digest}" for path, digest in zip(files, digests, strict=True))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sequence_digest(sequence: TokenSequence) -> bytes:
    """Return the BLAKE2b of token ids and loss mask."""
    digest = hashlib.blake2b(sequence.token_ids.astype(np.int64).tobytes(), digest_size=_DIGEST_BYTES)
    digest.update(sequence.loss_mask.tobytes())
    return digest.digest()


class ReferenceCache:
    """The cache file of one model in a directory."""

    def __init__(self, directory: Path, model: str) -> None:
        self._model = model
        self.path = directory / f"{model[:16]}.safetensors"

    def read(self) -> dict[bytes, float]:
        """Return summed logprobs by sequence digest; empty without a file.

        Raises:
            CacheError: the file is damaged, or of another model or format.
        """
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, framework="np") as file:
                metadata = file.metadata() or {}
                digests, logps = file.get_tensor("digests"), file.get_tensor("logps")
        except (SafetensorError, OSError, ValueError) as error:
            raise CacheError(f"it cannot be read ({str(error) or type(error).__name__})") from error
        if metadata.get("format") != _FORMAT:
            raise CacheError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
        if metadata.get("model") != self._model:
            raise CacheError("it was made with another model")
        if metadata.get("checksum") != _checksum(digests, logps):
            raise CacheError("its checksum does not fit its content")
        return dict(zip(map(bytes, digests), logps.tolist(), strict=True))

    def write(self, logps: Mapping[bytes, float]) -> None:
        """Replace the file atomically."""
        digests = np.frombuffer(b"".join(logps), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)
        values = np.fromiter(logps.values(), dtype=np.float64, count=len(logps))
        metadata = {"format": _FORMAT, "model": self._model, "checksum": _checksum(digests, values)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        save_file({"digests": digests, "logps": values}, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.path)


def _checksum(digests: np.ndarray, logps: np.ndarray) -> str:
    return hashlib.sha256(digests.tobytes() + logps.tobytes()).hexdigest()
