"""A checkpoint's .metadata runs nothing: every way to name a function, with a file as the marker."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megarl.cli import main
from megarl.errors import UserError
from megarl.trainer.checkpoint_metadata import read_metadata


class Runs:
    """Unpickled by pickle, it calls ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def metadata(**more: Any) -> Metadata:
    size = torch.Size([2, 3])
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)]
    )
    index = MetadataIndex("decoder.x", torch.Size([0, 0]))
    return Metadata({"decoder.x": entry}, storage_data={index: _StorageInfo("__0_0.distcp", 0, 9)}, **more)


def attacks(marker: Path) -> dict[str, bytes]:
    touch = f"open({str(marker)!r}, 'w')"
    name = str(marker).encode()
    return {
        "exec": pickle.dumps(Runs(exec, touch)),
        "eval": pickle.dumps(Runs(eval, touch)),
        "os.system": pickle.dumps(Runs(__import__("os").system, f"touch {marker}")),
        "Path.touch": pickle.dumps(Runs(Path.touch, marker)),
        "torch.save": pickle.dumps(Runs(torch.save, 1, str(marker))),
        "within metadata": pickle.dumps(metadata(planner_data=Runs(exec, touch))),
        "getattr": pickle.dumps(Runs(getattr, Runs(__import__, "os"), "system")),
        "by the stack": b"\x80\x04\x8c\x05torch\x8c\x04save\x93" + b"K\x01X"
        + struct.pack("<I", len(name)) + name + b"\x86R.",
        "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x13serialization.save\x93K\x01X"
        + struct.pack("<I", len(name)) + name + b"\x86R.",
        "by protocol 0": b"cbuiltins\nexec\n(S" + repr(touch).encode() + b"\ntR.",
        "an instance": b"(ibuiltins\nexec\n.",
        "an extension": b"\x80\x02\x82\x01.",
    }  # fmt: skip


@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_nothing_runs(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "release").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "release" / ".metadata").write_bytes(attacks(marker)[name])
    with pytest.raises(UserError, match=r"\.metadata: "):
        read_metadata(tmp_path / "release")
    for command in (["inspect", str(tmp_path)], ["megatron-to-hf", str(tmp_path), str(tmp_path / "out")]):
        assert main(["convert", *command]) == 2
    assert sum(line.startswith("error: ") for line in capsys.readouterr().err.splitlines()) == 2
    assert not marker.exists()


def test_control_the_attacks_do_run(tmp_path: Path) -> None:
    """pickle itself falls for them: the marker is one."""
    for name in ("exec", "Path.touch", "within metadata", "by protocol 0"):
        pickle.loads(attacks(tmp_path / name)[name])
        assert (tmp_path / name).exists()


def test_what_torch_and_megatron_write_is_read(tmp_path: Path) -> None:
    """With the plan by which it was written, of which nothing is looked up."""
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

    plan = SavePlan([WriteItem(MetadataIndex("decoder.x"), WriteItemType.BYTE_IO)])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata(planner_data=[plan])))
    found = read_metadata(tmp_path)
    assert found.state_dict_metadata == metadata().state_dict_metadata
    assert found.storage_data == metadata().storage_data


def test_files_lie_in_the_checkpoints_directory(tmp_path: Path) -> None:
    from megarl.convert.distcp import DistcpReader

    for path in ("../out.distcp", "/etc/hostname", ".."):
        whole = metadata()
        whole.storage_data = {next(iter(whole.storage_data)): _StorageInfo(path, 0, 9)}
        (tmp_path / ".metadata").write_bytes(pickle.dumps(whole))
        with pytest.raises(UserError, match=r"sends decoder\.x to"):
            DistcpReader(tmp_path)
