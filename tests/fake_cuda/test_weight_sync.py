"""The weight sync on devices with delayed work: without its waits an engine reads old weights."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.fake_cuda.conftest import FakeGpu, describe, megarl_extension
from tests.models.tiny import save_model

PROGRAM = "programs/weight_sync.py"


@pytest.mark.skipif(megarl_extension() is None, reason="megarl._C is not built for the CUDA environment")
@pytest.mark.parametrize("synchronize", ["yes", "no"])
def test_engine_reads_merged_adapters_when_they_are_complete(
    fake_gpu: FakeGpu, tmp_path: Path, synchronize: str
) -> None:
    save_model("qwen3-tied", tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"FOLDER": tmp_path, "MODEL": tmp_path / "model", "lazy": True}
    common["FAKECUDA_STREAM_DELAY"] = 15  # longer than the engine takes to read
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    ranks = [
        fake_gpu.start(PROGRAM, "publish", synchronize, RANK=rank, LOCAL_RANK=rank, **place, **common)
        for rank in range(2)
    ]
    engine = fake_gpu.start(PROGRAM, "attach", **common)
    ended = fake_gpu.finish([*ranks, engine])
    assert all(process.code == 0 for process in ended), describe(ended)
    written = {name: value for process in ended[:2] for name, value in process.result[0].items()}
    read = ended[2].result
    assert len(written) >= 4
    assert (written == read) == (synchronize == "yes")


@pytest.mark.parametrize(("means", "fits"), [("barrier", True), ("broadcast", False)])
def test_memory_is_free_on_all_ranks_before_an_engine_takes_it(
    fake_gpu: FakeGpu, tmp_path: Path, means: str, fits: bool
) -> None:
    results = fake_gpu.run(PROGRAM, "give_memory", means, ranks=2, memory_gb=0.25, FOLDER=tmp_path)
    assert results == [[fits], [True]]
