"""The converter as a process: memory stays bounded, and kill -9 costs one file at most."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megarl.models import load_architecture
from tests.convert.test_convert import assert_same_model

pytestmark = pytest.mark.slow

MIB = 2**20
RUN = """
import resource, sys
from megarl.cli import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def make_model(directory: Path, *, layers: int, hidden: int) -> int:
    """Random weights in shards, written without ever building the model; returns their bytes."""
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    shapes = load_architecture(directory).hf_shapes()
    weight_map, total = {}, 0
    for number, (name, shape) in enumerate(shapes.items()):
        file = f"part-{number:03}.safetensors"
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        save_file({name: tensor}, directory / file, metadata={"format": "pt"})
        weight_map[name], total = file, total + tensor.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak_of(*arguments: str) -> int:
    result = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split("peak ")[1])


def test_memory_is_bounded_by_the_shard_size(tmp_path: Path) -> None:
    tiny = make_model(tmp_path / "tiny", layers=1, hidden=64)
    large = make_model(tmp_path / "large", layers=12, hidden=1024)
    assert large > 700 * MIB > 100 * tiny
    shard = 32 * MIB
    for kind, source, target in (
        ("hf-to-megatron", "", "-megatron"),
        ("megatron-to-hf", "-megatron", "-back"),
    ):
        peaks = [
            peak_of(
                "convert",
                kind,
                str(tmp_path / f"{name}{source}"),
                str(tmp_path / f"{name}{target}"),
                "--max-shard-size",
                str(shard),
            )
            for name in ("tiny", "large")
        ]
        # Both hold imports; pages of mapped input files count as resident while they are read.
        assert peaks[1] - peaks[0] < 6 * shard, (kind, peaks)
    assert_same_model(tmp_path / "large", tmp_path / "large-back")


def test_killed_conversions_go_on(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", layers=4, hidden=512)
    steps = (("hf-to-megatron", "hf", "megatron"), ("megatron-to-hf", "megatron", "back"))
    chance = random.Random(0)
    for kind, source, target in steps:
        command = [sys.executable, "-m", "megarl", "convert", kind]
        command += [str(tmp_path / source), str(tmp_path / target), "--max-shard-size", "2MiB"]
        killed = 0
        while killed < 4:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            partial = tmp_path / f"{target}.partial"
            before = _files(partial)
            while process.poll() is None and _files(partial) == before:
                time.sleep(0.005)  # imports are over once a file is there
            time.sleep(chance.uniform(0, 0.08))
            if process.poll() is None:
                os.kill(process.pid, 9)
                killed += 1
            process.communicate()
            if (tmp_path / target).exists():
                break
            assert _files(partial) > before, "a rerun starts from what is there"
        assert killed, "it was never caught at work"
        result = subprocess.run(command, capture_output=True, text=True)
        assert (tmp_path / target).exists(), result.stderr
    assert_same_model(tmp_path / "hf", tmp_path / "back")


def _files(partial: Path) -> int:
    return sum(1 for path in partial.rglob("*") if path.suffix in (".distcp", ".safetensors"))
