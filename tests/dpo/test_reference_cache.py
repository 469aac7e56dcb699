"""The cache of reference logprobs: reads return what was written, and anything else is rejected."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megarl.loops.reference_cache import (
    CacheError,
    ReferenceCache,
    model_digest,
    sequence_digest,
)
from megarl.records import TokenSequence
from tests.models.tiny import save_model

VALUES = {sequence_digest(TokenSequence([1, n], [0, 1])): -1.5 * n - 1e-9 for n in range(1, 6)}


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    cache = ReferenceCache(tmp_path / "reference", "ab" * 32)
    assert cache.read() == {}
    cache.write(VALUES)
    return cache


def test_round_trip_in_order_and_replacement(cache: ReferenceCache) -> None:
    assert list(cache.read().items()) == list(VALUES.items())
    cache.write({b"x" * 16: -2.0})
    assert cache.read() == {b"x" * 16: -2.0}
    assert [path.name for path in cache.path.parent.iterdir()] == [cache.path.name]


def test_a_sequence_s_digest_covers_tokens_and_mask() -> None:
    a = TokenSequence([1, 2, 3], [0, 1, 1])
    assert sequence_digest(a) == sequence_digest(TokenSequence([1, 2, 3], [0, 1, 1], num_prompt_tokens=1))
    # What caches of earlier versions hold: BLAKE2b of int64 token ids and the mask's bytes.
    of_bytes = hashlib.blake2b(np.array([1, 2, 3], dtype="<i8").tobytes() + bytes([0, 1, 1]), digest_size=16)
    assert sequence_digest(a) == of_bytes.digest()
    others = [
        TokenSequence([1, 2, 4], [0, 1, 1]),
        TokenSequence([1, 2, 3], [0, 0, 1]),
        TokenSequence([1, 2], [0, 1]),
    ]
    assert len({sequence_digest(s) for s in [a, *others]}) == 4


@pytest.mark.parametrize("position", ["start", "middle", "last"])
def test_a_changed_byte_is_found(cache: ReferenceCache, position: str) -> None:
    content = bytearray(cache.path.read_bytes())
    at = {"start": 3, "middle": len(content) - 30, "last": -1}[position]
    content[at] ^= 1
    cache.path.write_bytes(content)
    with pytest.raises(CacheError):
        cache.read()


def test_half_a_file_and_no_file_of_this_kind(cache: ReferenceCache) -> None:
    content = cache.path.read_bytes()
    for wrong in (content[: len(content) // 2], b"", b"no safetensors at all"):
        cache.path.write_bytes(wrong)
        with pytest.raises(CacheError, match="cannot be read"):
            cache.read()
    save_file({"other": np.zeros(2)}, cache.path)
    with pytest.raises(CacheError, match="cannot be read"):
        cache.read()


def test_another_model_s_or_format_s_file_is_refused(cache: ReferenceCache, tmp_path: Path) -> None:
    other = ReferenceCache(tmp_path / "reference", "cd" * 32)
    shutil.copy(cache.path, other.path)
    with pytest.raises(CacheError, match="another model"):
        other.read()
    save_file(load_file(cache.path), cache.path, metadata={"format": "megarl reference logprobs 0"})
    with pytest.raises(CacheError, match="its format is"):
        cache.read()


def test_a_model_s_digest_covers_weights_configuration_and_type(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "a")
    digest = model_digest(tmp_path / "a", "float32")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert model_digest(tmp_path / "b", "float32") == digest, "wherever it lies"
    assert model_digest(tmp_path / "b", "bfloat16") != digest
    config = tmp_path / "b" / "config.json"
    config.write_text(config.read_text().replace("256", "512"))
    assert model_digest(tmp_path / "b", "float32") != digest
    next(iter(model.parameters())).data[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "c")
    assert model_digest(tmp_path / "c", "float32") != digest
