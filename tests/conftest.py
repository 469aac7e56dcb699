"""Settings every test runs under: no hub, no telemetry, one thread; tests for a GPU skipped without one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

import pytest

# Set before torch, transformers, vllm or ray are imported by a test, and inherited by what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["WANDB_MODE"] = "offline"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where torch sees no CUDA device; refuse test files that patch torch."""
    if _installed() is not None:
        raise pytest.UsageError("a test file installs the platform as it is imported; use a process for it")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _installed() -> object:
    return getattr(sys.modules.get("megarl.platform"), "_installed", None)


@pytest.fixture(autouse=True)
def _torch_is_unpatched() -> Iterator[None]:
    """No test installs the platform in the tests' own process: it would change torch for all others."""
    before = _installed()
    yield
    if before is None and _installed() is not None:
        pytest.fail("the platform was installed in the tests' own process; use a process for it")


# What decides how a terminal is written to, where modules and files are found, and which machine is played.
_WATCHED = re.compile(
    r"COLUMNS|LINES|TERM|NO_COLOR|FORCE_COLOR|PYTHON.*|LANG|LC_.*|HOME|TMPDIR|MEGARL_.*|(LOCAL_)?RANK|WORLD_SIZE|"
    r"MASTER_.*|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS"
)


def _watched() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _WATCHED.fullmatch(name)}


@pytest.fixture(autouse=True)
def _environment_is_as_found() -> Iterator[None]:
    """No test leaves a variable behind that changes what the tests after it see."""
    before = _watched()
    yield
    if (after := _watched()) != before:
        pytest.fail(f"environment variables were left changed: {sorted(before.items() ^ after.items())}")
