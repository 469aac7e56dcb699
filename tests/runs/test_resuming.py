"""Damaged checkpoints: each kind is detected by file name, and the previous checkpoint is used."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.runs import resuming
from megarl.runs.resuming import load, newest_whole
from megarl.config.checkpoint import CheckpointConfig
from megarl.errors import UserError
from megarl.metrics.console import Console
from megarl.run_directory import RunDirectory
from megarl.runs import checkpoint_manager
from megarl.runs.checkpoint_manager import CheckpointManager
from megarl.trainer.checksums import CHECKSUMS_FILE, checksums_of, damage

DATA = bytes(range(256)) * 4096  # 1 MiB


class Trainer:
    """Two models with files as Megatron's; ``loads`` is what load was called with."""

    def __init__(self) -> None:
        self.loads: list[dict[str, Any]] = []

    def save(self, directory: Path, *, optimizer: bool) -> None:
        for folder in (directory, directory / "critic"):
            folder.mkdir(exist_ok=True)
            for name in ("__0_0.distcp", ".metadata", "common.pt", "rng_00000.pt"):
                (folder / name).write_bytes(DATA + name.encode())
            (folder / "metadata.json").write_text("{}")

    def load(self, directory: Path, **options: Any) -> bool:
        self.loads.append(options)
        return True


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_manager, "barrier", lambda: None)
    for module in (checkpoint_manager, resuming):
        monkeypatch.setattr(module, "gather", lambda value: [value])
    for name in ("from_first_rank", "on_first_rank"):
        monkeypatch.setattr(resuming, name, lambda make: make())
    monkeypatch.setattr(resuming.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(resuming.dist, "get_world_size", lambda: 1)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Checkpoints of steps 1, 2 and 3."""
    directory = RunDirectory(tmp_path / "run")
    directory.open({})
    saver = CheckpointManager(
        CheckpointConfig(keep=3), directory, Console("sft", enabled=False), is_first=True
    )
    trainer: Any = Trainer()
    for step in (1, 2, 3):
        saver.save(step, trainer, {"position": 10 * step}, {})
    return directory


def resumed(directory: RunDirectory) -> tuple[int | None, str]:
    """The step resumed from, and the messages."""
    said = io.StringIO()
    found = newest_whole(directory, Console("sft", stream=said))
    return (None if found is None else found[1]["step"]), said.getvalue()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    content[70_000] ^= 128
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data half": ("__0_0.distcp", lambda p: (p / "__0_0.distcp").write_bytes(DATA[: len(DATA) // 2])),
    "data missing": ("__0_0.distcp", lambda p: (p / "__0_0.distcp").unlink()),
    "data empty": ("__0_0.distcp", lambda p: (p / "__0_0.distcp").write_bytes(b"")),
    "data longer": ("__0_0.distcp", lambda p: (p / "__0_0.distcp").write_bytes(DATA * 2)),
    "two bytes": ("__0_0.distcp", lambda p: flip(p / "__0_0.distcp")),
    "two bytes of the critic": ("critic/__0_0.distcp", lambda p: flip(p / "critic" / "__0_0.distcp")),
    "no critic": ("critic/", lambda p: shutil.rmtree(p / "critic")),
    ".metadata missing": (".metadata", lambda p: (p / ".metadata").unlink()),
    ".metadata empty": (".metadata", lambda p: (p / ".metadata").write_bytes(b"")),
    "common.pt missing": ("common.pt", lambda p: (p / "common.pt").unlink()),
    "common.pt empty": ("common.pt", lambda p: (p / "common.pt").write_bytes(b"")),
    "metadata.json missing": ("metadata.json", lambda p: (p / "metadata.json").unlink()),
    "metadata.json empty": ("metadata.json", lambda p: (p / "metadata.json").write_text("")),
    "state missing": ("run_state.json", lambda p: (p / "run_state.json").unlink()),
    "state broken": ("run_state.json", lambda p: (p / "run_state.json").write_text("{")),
    "state of another step": ("run_state.json", lambda p: (p / "run_state.json").write_text('{"step": 2}')),
    "random state random": ("rng_00000.pt", lambda p: (p / "rng_00000.pt").write_bytes(DATA[::-1])),
    "a file became a folder": (
        "common.pt",
        lambda p: ((p / "common.pt").unlink(), (p / "common.pt").mkdir()),
    ),
    "checksums broken": (CHECKSUMS_FILE, lambda p: (p / CHECKSUMS_FILE).write_text("[1]")),
    "checksums of another kind": (CHECKSUMS_FILE, lambda p: (p / CHECKSUMS_FILE).write_text('{"a": 3}')),
    "empty folder": ("run_state.json", lambda p: (shutil.rmtree(p), p.mkdir())),
    "a file": ("it is no directory", lambda p: (shutil.rmtree(p), p.write_text("x"))),
    "before checksums, state missing": (
        "run_state.json",
        lambda p: ((p / CHECKSUMS_FILE).unlink(), (p / "run_state.json").unlink()),
    ),
}


def test_whole_ones_are_taken_in_silence(run: RunDirectory) -> None:
    assert resumed(run) == (3, "")
    listed = json.loads((run.checkpoint_path(3) / CHECKSUMS_FILE).read_text())
    files = {
        str(p.relative_to(run.checkpoint_path(3))) for p in run.checkpoint_path(3).rglob("*") if p.is_file()
    }
    assert listed.keys() == files - {CHECKSUMS_FILE}
    assert not (run.checkpoint_path(3) / "critic" / CHECKSUMS_FILE).exists()


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_one_before_a_damaged_one_is_taken(run: RunDirectory, kind: str) -> None:
    what, do = DAMAGE[kind]
    do(run.checkpoint_path(3))
    step, said = resumed(run)
    assert step == 2
    [line] = said.splitlines()
    assert line.startswith("WARNING: checkpoint step_3 is damaged (")
    assert what in line
    assert line.endswith("kept as step_3.damaged, going on from step_2")
    assert run.checkpoint_steps() == [1, 2]
    assert (run.checkpoints_path / "step_3.damaged").exists()
    assert resumed(run) == (2, "")  # and the next start says no more of it
    assert run.begin_checkpoint(3)  # step 3 can be saved again


def test_several_damaged_ones(run: RunDirectory) -> None:
    for step in (3, 2):
        flip(run.checkpoint_path(step) / "common.pt")
    step, said = resumed(run)
    assert step == 1
    assert said.count("WARNING") == 2


def test_none_whole_ends_the_run_and_touches_nothing(run: RunDirectory) -> None:
    for step in (1, 2, 3):
        flip(run.checkpoint_path(step) / "common.pt")
    with pytest.raises(
        UserError, match=r"^run\.dir: no checkpoint in .* is whole \(step_3: common\.pt ha"
    ) as told:
        resumed(run)
    assert "\n" not in str(told.value)
    assert run.checkpoint_steps() == [1, 2, 3]


def test_no_checkpoint_is_a_fresh_run(tmp_path: Path) -> None:
    assert resumed(RunDirectory(tmp_path)) == (None, "")


def test_without_an_optimizer_only_a_finished_run_goes_on(run: RunDirectory) -> None:
    path, trainer = run.checkpoint_path(3), Trainer()
    policy: Any = trainer
    state = json.loads((path / "run_state.json").read_text())
    assert state["optimizer"] is True
    assert load(policy, path, state, 9)
    state["optimizer"] = False
    assert load(policy, path, state, 3)
    assert trainer.loads == [{}, {"optimizer": False}]
    with pytest.raises(UserError, match=r"step_3 was saved without its optimizer .*save_optimizer: false"):
        load(policy, path, state, 4)


def test_what_cannot_be_read_without_checksums_is_a_line(run: RunDirectory) -> None:
    path = run.checkpoint_path(3)
    (path / CHECKSUMS_FILE).unlink()

    class Broken(Trainer):
        def load(self, directory: Path, **options: Any) -> bool:
            raise EOFError("Ran out of input\nmore")

    policy: Any = Broken()
    with pytest.raises(UserError, match=r"step_3 is damaged \(EOFError: Ran out of input\); delete it"):
        load(policy, path, {"step": 3}, 9)


def test_ranks_share_the_work_and_blocks_are_summed_apart(tmp_path: Path, run: RunDirectory) -> None:
    path = run.checkpoint_path(3)
    for name in ("common.pt", ".metadata", "critic/common.pt"):
        flip(path / name)
    shares = [damage(path, rank, 3) for rank in range(3)]
    assert sorted(each for share in shares for each in share) == sorted(damage(path))
    assert len(damage(path)) == 3
    block = 64 * 2**20
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2 * block + 5)
    one = checksums_of(tmp_path, ["large"])["large"]
    assert one["size"] == 2 * block + 5
    assert len(one["crc32"]) == 3
    with large.open("r+b") as file:
        file.seek(block + 3)
        file.write(b"x")
    other = checksums_of(tmp_path, ["large"])["large"]
    assert [a == b for a, b in zip(one["crc32"], other["crc32"], strict=True)] == [True, False, True]
