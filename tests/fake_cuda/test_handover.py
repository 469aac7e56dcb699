"""The hand-over of memory: without a barrier an engine takes what another rank still holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_cuda.conftest import FakeGpu

PROGRAM = "programs/handover.py"


@pytest.mark.parametrize(("means", "fits"), [("barrier", True), ("broadcast", False)])
def test_memory_is_free_on_all_ranks_before_an_engine_takes_it(
    fake_gpu: FakeGpu, tmp_path: Path, means: str, fits: bool
) -> None:
    results = fake_gpu.run(PROGRAM, "give_memory", means, ranks=2, memory_gb=0.25, FOLDER=tmp_path)
    assert results == [[fits], [True]]
