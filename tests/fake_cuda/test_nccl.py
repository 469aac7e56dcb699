"""The fake NCCL against gloo, and its errors where real NCCL raises them."""

from __future__ import annotations

import pytest

from tests.fake_cuda.conftest import FakeGpu

PROGRAM = "programs/collectives.py"


@pytest.mark.parametrize(("ranks", "lazy"), [(2, False), (4, False), (2, True)])
def test_collectives_give_what_gloo_gives(fake_gpu: FakeGpu, ranks: int, lazy: bool) -> None:
    for result in fake_gpu.run(PROGRAM, "against_gloo", ranks=ranks, devices=ranks, lazy=lazy):
        assert result["wrong"] == []
        assert result["compared"] > 50
    assert not list(fake_gpu.session.path.glob("nccl-*/c[0-9]*"))  # every message was read by all


@pytest.mark.parametrize("lazy", [False, True])
def test_sends_and_receives(fake_gpu: FakeGpu, lazy: bool) -> None:
    ranks = 3
    results = fake_gpu.run(PROGRAM, "between_pairs", ranks=ranks, devices=ranks, lazy=lazy)
    for rank, result in enumerate(results):
        assert result["ring"] == [(rank - 1) % ranks, 10 * ((rank + 1) % ranks)]
        assert result["objects"] == [{"rank": r} for r in range(ranks)]
    assert results[1]["in order"] == [0, 1, 2]


def test_subgroups(fake_gpu: FakeGpu) -> None:
    results = fake_gpu.run(PROGRAM, "subgroups", ranks=4, devices=4)
    assert results == [[3, 4, 10], [3, 6, 10], [7, 4, 10], [7, 6, 10]]


@pytest.mark.parametrize("lazy", [False, True])
def test_collectives_in_a_graph(fake_gpu: FakeGpu, lazy: bool) -> None:
    assert fake_gpu.run(PROGRAM, "captured", ranks=2, lazy=lazy) == [[6, 18], [6, 18]]


def test_one_gpu_in_two_ranks_is_refused(fake_gpu: FakeGpu) -> None:
    for message in fake_gpu.run(PROGRAM, "one_gpu_twice", ranks=2):
        assert "Duplicate GPU detected" in message


@pytest.mark.parametrize(
    ("kind", "named"),
    [("size", "ncclAllReduce of 6 elements"), ("type", "type 2"), ("call", "ncclAllReduce")],
)
def test_calls_that_do_not_match_abort(fake_gpu: FakeGpu, kind: str, named: str) -> None:
    processes = [
        fake_gpu.start(
            PROGRAM, "mismatch", kind, RANK=rank, WORLD_SIZE=2, STORE=fake_gpu.session.path / "store"
        )
        for rank in range(2)
    ]
    # The first to see it aborts; the other one may wait for ever, as with the real one, and is ended.
    ended = fake_gpu.finish(processes)
    aborted = [process for process in ended if process.code == -6]
    assert aborted
    assert all("mismatched collective" in process.errors for process in aborted)
    assert any(named in process.errors for process in aborted)


def test_broadcast_is_no_barrier(fake_gpu: FakeGpu) -> None:
    """Its source goes on while the others are not there yet: a barrier of the host is another thing."""
    source, other = fake_gpu.run(PROGRAM, "returns_early", ranks=2)
    assert source[0] < 2 < 3 <= other[0]
    assert source[1] >= 3


def test_a_collective_is_delayed_until_a_rank_asks(fake_gpu: FakeGpu) -> None:
    results = fake_gpu.run(PROGRAM, "delayed_until_asked", ranks=2, lazy=True, FAKECUDA_STREAM_DELAY=30)
    assert results == [[1, 2, 2, 4, 4, 8]] * 2


@pytest.mark.parametrize("waits", ["stream", "no"])
def test_reduction_of_what_is_not_written_yet(fake_gpu: FakeGpu, waits: str) -> None:
    results = fake_gpu.run(PROGRAM, "ordered_by_streams", waits, ranks=2, lazy=True, FAKECUDA_STREAM_DELAY=30)
    assert (results == [[3], [3]]) == (waits == "stream")
