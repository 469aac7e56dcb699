"""The state after the driver is killed, and the error message if the engine cannot start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import transformers

DRIVER = """
import sys, time
from pathlib import Path
import psutil, torch
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.records import token_ids
from megarl.inference.interface import EngineError, GenerateRequest, SamplingConfig
from megarl.inference.vllm.engine import VllmEngine
from megarl.weights.sync_plan import Alias, SharedStorage, SourceView, WeightPlan
from tests.inference.driving import generate

model_dir, max_model_len = Path(sys.argv[1]), int(sys.argv[2])
engine = VllmEngine.start(
    model_dir, EngineConfig(kv_cache_gib=0.05), dtype="float32", max_model_len=max_model_len, seed=1
)
try:
    engine.wait_ready()
except (EngineError, UserError) as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(2)
[params] = engine.describe_parameters()
storages, aliases, keep = [], [], []
for index, (name, info) in enumerate(params.items()):
    weight = torch.randn(info.shape)
    keep.append(weight)
    storages.append(SharedStorage(weight.untyped_storage()._share_filename_cpu_()))
    view = SourceView(index, "float32", 0, tuple(weight.shape), tuple(weight.stride()))
    aliases.append(Alias(name, view))
engine.attach([WeightPlan(storages, aliases, [])])
engine.sync(0)
requests = [GenerateRequest(str(i), token_ids([1, 2, i]), 400, i) for i in range(64)]
responses = generate(engine, requests, SamplingConfig(1.0, (), True))
print("GENERATING", *(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
for _ in range(1000):
    list(responses)
    responses = generate(engine, requests, SamplingConfig(1.0, (), True))
"""


def make_model(directory: Path, num_heads: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=num_heads,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def start_driver(model_dir: Path, max_model_len: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(model_dir), str(max_model_len)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind(tmp_path: Path) -> None:
    make_model(tmp_path, num_heads=2)
    driver = start_driver(tmp_path, 512)
    assert driver.stdout is not None
    pids: list[int] = []
    for line in driver.stdout:
        if line.startswith("GENERATING"):
            pids = [int(word) for word in line.split()[1:]]
            break
    names = [psutil.Process(pid).name() for pid in pids]
    assert any("EngineActor" in name for name in names)
    assert any("raylet" in name for name in names)
    segments = set(Path("/dev/shm").glob(f"torch_{driver.pid}_*"))
    assert segments
    time.sleep(1)  # well into the generation
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (
        any(map(psutil.pid_exists, pids)) or any(segment.exists() for segment in segments)
    ):
        time.sleep(0.2)
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert [segment for segment in segments if segment.exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_heads", "max_model_len", "message"),
    [
        (4, 512, r"UserError: .*does not take head size 16"),
        (2, 4096, r"EngineError: the vLLM engine failed: .*max_model_len[\s\S]*End of .*engine\.log"),
    ],
)
def test_a_start_that_fails_says_why(
    tmp_path: Path, num_heads: int, max_model_len: int, message: str
) -> None:
    make_model(tmp_path, num_heads)
    driver = start_driver(tmp_path, max_model_len)
    output, _ = driver.communicate(timeout=200)
    assert driver.returncode == 2, output
    assert re.search(message, output), output
