"""Weight sync between hosts: point to point from the owning shard into the engine's parameter.

Every trainer rank runs a :class:`PieceServer`; an engine rank whose plan has pieces of it opens a
:class:`PieceReader` to it. The two form a process group (gloo; NCCL between two GPUs) apart from the
trainer's, so a restarted engine opens a new one without involving the trainer's ranks. The server reads the
live parameters in a thread, so it must not be asked while the optimizer writes; the loops sync between
training and rollout.

A request is JSON in the server's TCP store: nothing received over the network is unpickled.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from megarl.errors import UserError
from megarl.weights.memory_domain import address_towards, device_id, host_id
from megarl.weights.sync_plan import SourceView

dist: Any = distributed  # its type hints lack the stores and groups it exports
log = logging.getLogger(__name__)

MESSAGE_BYTES = 64 * 2**20
"""Largest message: bounds the memory of pieces that cannot be sent or received in place."""
_CONNECT = timedelta(seconds=60)
_TRANSFER = timedelta(minutes=10)
_IDLE = timedelta(days=30)  # a step of any length passes between two weight syncs
_SERVER, _READER = 0, 1


@dataclass(frozen=True, slots=True)
class WantedPiece:
    """A view of the server's storages and the dtype to send it in."""

    source: SourceView
    dtype: str


class PieceServer:
    """Send regions of this process's storages to clients of :attr:`address` ("host:port")."""

    def __init__(self, storages: Sequence[torch.UntypedStorage], device: torch.device, host: str) -> None:
        self._storages, self._device, self._host = storages, device, host
        listener = socket.socket()
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        self.address = f"{host}:{port}"
        self._store = dist.TCPStore(
            host, port, None, True, _CONNECT, False, master_listen_fd=listener.detach()
        )
        threading.Thread(target=self._accept, name="weights-server", daemon=True).start()

    def _accept(self) -> None:
        store = _connect(self.address)  # a waiting client blocks its other callers: one per thread
        store.set_timeout(_IDLE)
        while True:
            request = json.loads(store.queue_pop("requests"))
            name = f"weights-server-{request['id'][:8]}"
            threading.Thread(target=self._serve, args=(request,), name=name, daemon=True).start()

    def _serve(self, request: dict[str, Any]) -> None:
        if self._device.type == "cuda":  # a new thread's device is GPU 0, whichever GPU the process uses
            torch.cuda.set_device(self._device)
        store = _connect(self.address)
        pieces = [_decode(entry) for entry in request["pieces"]]
        problems = [problem for piece in pieces if (problem := self._problem(piece)) is not None]
        device_key = _device_key(self._device)
        store.set(f"answer/{request['id']}", json.dumps({"problems": problems, "device": device_key}))
        if problems:
            return
        try:
            nccl = _can_use_nccl(device_key, request["device"])
            pair = _Connection(store, request["id"], _SERVER, self._host, nccl=nccl)
            while pair.wait_for_start():
                for piece in pieces:
                    pair.send(self._view(piece.source), getattr(torch, piece.dtype))
        except RuntimeError as error:  # the engine is gone; its successor sends a new request
            log.debug("an engine rank left: %s", error)

    def _problem(self, piece: WantedPiece) -> str | None:
        view = piece.source
        if not 0 <= view.storage < len(self._storages):
            return f"storage {view.storage} of {len(self._storages)}"
        last = sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
        end = (view.offset + last + 1) * getattr(torch, view.dtype).itemsize
        if min((view.offset, *view.stride), default=0) < 0 or end > self._storages[view.storage].nbytes():
            return f"storage {view.storage} ends before {view}"
        return None

    def _view(self, view: SourceView) -> torch.Tensor:
        storage = self._storages[view.storage]
        empty = torch.empty(0, dtype=getattr(torch, view.dtype), device=storage.device)
        return empty.set_(storage, view.offset, view.shape, view.stride)


class PieceReader:
    """Receive the same pieces of one server repeatedly, each into its target tensor.

    Raises:
        UserError: the server rejects a piece.
    """

    def __init__(self, address: str, pieces: Sequence[tuple[torch.Tensor, SourceView]]) -> None:
        self._pieces = [(tensor, getattr(torch, _wire_dtype(tensor, view))) for tensor, view in pieces]
        store = _connect(address)
        name = uuid.uuid4().hex
        wanted = [_encode(WantedPiece(view, _wire_dtype(tensor, view))) for tensor, view in pieces]
        device_key = _device_key(pieces[0][0].device)
        store.queue_push("requests", json.dumps({"id": name, "pieces": wanted, "device": device_key}))
        answer = json.loads(store.get(f"answer/{name}"))
        if answer["problems"]:
            raise UserError("\n".join(f"weights: trainer rank at {address}: {p}" for p in answer["problems"]))
        host = address_towards(address.rsplit(":", 1)[0])
        self._pair = _Connection(store, name, _READER, host, nccl=_can_use_nccl(device_key, answer["device"]))

    @property
    def num_bytes(self) -> int:
        """Return the bytes that one :meth:`receive` writes into the parameters."""
        return sum(tensor.nbytes for tensor, _ in self._pieces)

    def start(self) -> None:
        """Let the server begin; several servers can send concurrently."""
        self._pair.start()

    def receive(self, first: int = 0, stop: int | None = None) -> int:
        """Write the pieces [first, stop), by default all, in their order; return the number of bytes."""
        pieces = self._pieces[first:stop]
        for tensor, dtype in pieces:
            self._pair.receive(tensor, dtype)
        return sum(tensor.nbytes for tensor, _ in pieces)


class _Connection:
    """One end of a connection: control messages by gloo, tensors by NCCL or gloo (on the host)."""

    def __init__(self, store: Any, name: str, rank: int, host: str, *, nccl: bool) -> None:
        self._other = 1 - rank
        self._control = _gloo(dist.PrefixStore(f"control/{name}", store), rank, host)
        self._data, self._nccl = self._control, nccl
        if nccl:
            options = dist.ProcessGroupNCCL.Options()
            self._data = dist.ProcessGroupNCCL(dist.PrefixStore(f"data/{name}", store), rank, 2, options)

    def start(self) -> None:
        self._control.send([torch.ones(1, dtype=torch.uint8)], self._other, 0).wait()

    def wait_for_start(self) -> bool:
        self._control.recv([torch.zeros(1, dtype=torch.uint8)], self._other, 0).wait(_IDLE)
        return True

    def send(self, source: torch.Tensor, dtype: torch.dtype) -> None:
        for part in _messages(source, dtype):
            message = part.detach().to(dtype).contiguous()
            self._data.send([message if self._nccl else message.cpu()], self._other, 1).wait(_TRANSFER)

    def receive(self, target: torch.Tensor, dtype: torch.dtype) -> None:
        for part in _messages(target, dtype):
            device = part.device if self._nccl else torch.device("cpu")
            direct = part.dtype == dtype and part.is_contiguous() and part.device == device
            buffer = part if direct else torch.empty(part.shape, dtype=dtype, device=device)
            self._data.recv([buffer], self._other, 1).wait(_TRANSFER)
            if not direct:
                part.copy_(buffer)


def _device_key(device: torch.device) -> str:
    """Return an id of the device that is unique among hosts."""
    return "cpu" if device.type == "cpu" else f"{host_id()} {device_id(device)}"


def _can_use_nccl(one: str, other: str) -> bool:
    """Return True for two different GPUs; NCCL rejects two ranks on one ("Duplicate GPU detected")."""
    return "cpu" not in (one, other) and one != other


def _gloo(store: Any, rank: int, host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = _IDLE
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _messages(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield parts along the first dimension, equal at both ends: at most MESSAGE_BYTES, or one row."""
    if tensor.dim() == 0:
        yield tensor
        return
    row_bytes = max(tensor[0].numel() * dtype.itemsize, 1)
    yield from tensor.split(max(MESSAGE_BYTES // row_bytes, 1))


def _wire_dtype(tensor: torch.Tensor, view: SourceView) -> str:
    """Return the narrower dtype, the trainer's if both are equally wide: fewer bytes to send."""
    own = str(tensor.dtype).removeprefix("torch.")
    return own if tensor.dtype.itemsize < getattr(torch, view.dtype).itemsize else view.dtype


def _connect(address: str) -> Any:
    host, port = address.rsplit(":", 1)
    return dist.TCPStore(host, int(port), None, False, _CONNECT, False)


def _encode(piece: WantedPiece) -> list[Any]:
    view = piece.source
    return [view.storage, view.dtype, view.offset, view.shape, view.stride, piece.dtype]


def _decode(entry: list[Any]) -> WantedPiece:
    storage, dtype, offset, shape, stride, wire = entry
    if not {dtype, wire} <= {"float32", "bfloat16", "float16"}:
        raise RuntimeError(f"unknown type {dtype} or {wire}")
    return WantedPiece(SourceView(int(storage), dtype, int(offset), tuple(shape), tuple(stride)), wire)
