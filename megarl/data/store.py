"""Tokenised rows in flat arrays, and their cache on disk.

The name of a cache file is a SHA-256 of everything its tokens depend on: the content of the data, the
tokenizer, the format, the columns, lengths and filters, and the version of the file format. If any of them
changes, so does the name, and a stale file is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megarl.data.report import LoadReport
from megarl.records import TokenSequence, TrainBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Increase this when the same settings give other tokens, masks or arrays.
_FORMAT = "megarl tokens 3"


class TokenStore(Sequence[TokenSequence]):
    """Training sequences as one TrainBatch, 5 bytes per token; a sequence is a view.

    ``arrays`` are stored on disk: ``token_ids`` [T] int32, ``loss_mask`` [T] uint8, ``offsets`` [S + 1]
    int64, ``prompts`` [S] int64 (num_prompt_tokens of the sequences).
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self._batch = TrainBatch(
            arrays["token_ids"], arrays["offsets"], arrays["loss_mask"], arrays["prompts"]
        )

    @classmethod
    def of(cls, sequences: Iterable[TokenSequence]) -> TokenStore:
        """Build a store from sequences, consumed one by one."""
        ids, mask, offsets, prompts = bytearray(), bytearray(), array("q", [0]), array("q")
        for sequence in sequences:
            ids += sequence.token_ids.tobytes()
            mask += sequence.loss_mask.tobytes()
            offsets.append(len(mask))
            prompts.append(sequence.num_prompt_tokens)
        return cls(
            {
                "token_ids": np.frombuffer(ids, dtype=np.int32),
                "loss_mask": np.frombuffer(mask, dtype=np.uint8),
                "offsets": np.array(offsets, dtype=np.int64),
                "prompts": np.array(prompts, dtype=np.int64),
            }
        )

    def __len__(self) -> int:
        return len(self._batch)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._batch[index]


class TokenCache:
    """One cache file."""

    def __init__(self, directory: str, depends_on: dict[str, Any]) -> None:
        """``depends_on``: what the tokens depend on, as plain data (module docstring)."""
        text = json.dumps([_FORMAT, depends_on], sort_keys=True, ensure_ascii=False)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.path = Path(directory) / f"tokens-{self.key[:24]}.safetensors"

    def read(self) -> tuple[TokenStore, LoadReport] | None:
        """Read the file; None if it is missing or damaged (it is then rewritten)."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError):
            return None
        if metadata.get("key") != self.key or metadata.get("checksum") != _checksum(arrays):
            return None
        report = LoadReport.from_json(json.loads(metadata["report"]))
        return TokenStore(arrays), report

    def write(self, store: TokenStore, report: LoadReport) -> None:
        """Write the file atomically: several ranks and runs may write the same one."""
        from safetensors.numpy import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        checksum = _checksum(store.arrays)
        metadata = {"key": self.key, "checksum": checksum, "report": json.dumps(report.to_json())}
        save_file(store.arrays, partial, metadata=metadata)
        partial.replace(self.path)


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of a tokenizer: library versions, model, special tokens and chat template."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        transformers.__version__,
        tokenizers.__version__,
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items())),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        json.dumps(tokenizer.chat_template, sort_keys=True),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
