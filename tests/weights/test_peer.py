"""Point to point within one process: a server's storages against a reader's tensors."""

from __future__ import annotations

import pytest
import torch

from megarl.errors import UserError
from megarl.weights import peer
from megarl.weights.peer import PieceReader, PieceServer
from megarl.weights.sync_plan import SourceView


@pytest.fixture(scope="module")
def memory() -> torch.Tensor:
    return torch.randn(64, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def server(memory: torch.Tensor) -> PieceServer:
    return PieceServer([memory.untyped_storage()], memory.device, "127.0.0.1")


def view(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> SourceView:
    return SourceView(0, "float32", offset, shape, stride)


@pytest.mark.parametrize("message_bytes", [2**20, 1000])
def test_pieces_arrive_in_place_again_and_again(
    server: PieceServer, memory: torch.Tensor, message_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "MESSAGE_BYTES", message_bytes)
    rows, columns = torch.zeros(20, 48), torch.zeros(64, 10)
    half, whole = torch.zeros(8, 48, dtype=torch.bfloat16), torch.zeros(100, 48)
    reader = PieceReader(
        server.address,
        [
            (rows, view(3 * 48, (20, 48), (48, 1))),  # contiguous on both sides
            (columns.t()[2:6], view(7, (4, 64), (1, 48))),  # on neither
            (half, view(0, (8, 48), (48, 1))),  # another type: converted before it travels
            (whole[10:74, 5:20], view(5, (64, 15), (48, 1))),
        ],
    )
    for _ in range(3):
        memory.add_(1.0)
        reader.start()
        assert reader.receive() == reader.num_bytes == 20 * 48 * 4 + 4 * 64 * 4 + 8 * 48 * 2 + 64 * 15 * 4
        assert torch.equal(rows, memory[3:23])
        assert torch.equal(columns[:, 2:6], memory[:, 7:11])
        assert torch.equal(half, memory[:8].to(torch.bfloat16))
        assert torch.equal(whole[10:74, 5:20], memory[:, 5:20])
    assert not whole[:10].any() and not whole[:, :5].any() and not columns[:, :2].any()


def test_readers_come_and_go(server: PieceServer, memory: torch.Tensor) -> None:
    """As when an engine dies between two weight syncs, and its successor asks anew."""
    for _ in range(3):
        target = torch.zeros(64, 48)
        reader = PieceReader(server.address, [(target, view(0, (64, 48), (48, 1)))])
        reader.start()
        reader.receive()
        assert torch.equal(target, memory)
        del reader


def test_what_the_server_does_not_have_is_refused(server: PieceServer) -> None:
    target = torch.zeros(64, 48)
    pieces = [
        (target, view(48, (64, 48), (48, 1))),
        (target, SourceView(3, "float32", 0, (64, 48), (48, 1))),
    ]
    with pytest.raises(UserError) as error:
        PieceReader(server.address, pieces)
    first, second = str(error.value).splitlines()
    assert "storage 0 ends before" in first and "storage 3 of 1" in second


@pytest.mark.parametrize(
    ("mine", "theirs", "nccl"),
    [
        ("cpu", "cpu", False),
        ("cpu", "a GPU-1", False),
        ("a GPU-1", "a GPU-1", False),
        ("a GPU-1", "a GPU-2", True),
        ("a GPU-1", "b GPU-1", True),
    ],
)
def test_nccl_joins_two_gpus_only(mine: str, theirs: str, nccl: bool) -> None:
    assert peer._can_use_nccl(mine, theirs) == peer._can_use_nccl(theirs, mine) == nccl


def test_trainer_and_engine_on_one_gpu_go_through_the_host(
    memory: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU in name alone: NCCL would refuse its two ranks, and is not here at all."""
    set_to = []
    monkeypatch.setattr(peer, "_device_key", lambda device: "host GPU-1")
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    monkeypatch.setattr(peer.dist, "ProcessGroupNCCL", None, raising=False)
    server = PieceServer([memory.untyped_storage()], torch.device("cuda", 3), "127.0.0.1")
    target = torch.zeros(64, 48)
    reader = PieceReader(server.address, [(target, view(0, (64, 48), (48, 1)))])
    reader.start()
    reader.receive()
    assert torch.equal(target, memory)
    assert set_to == [torch.device("cuda", 3)], "in the thread that serves"
