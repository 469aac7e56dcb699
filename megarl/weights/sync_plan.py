"""The weight sync plan: which memory an engine maps, and what it aliases or copies from it.

A :class:`WeightPlan` is plain data (picklable, no tensors). On a CPU the trainer's storages are in shared
memory; the engine maps each once and then either *aliases* a parameter (it is the trainer's memory, nothing
is ever copied) or *copies* regions straight into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SharedStorage:
    """One shared memory block of the trainer: ``handle`` is the return value of torch's
    ``UntypedStorage._share_filename_cpu_()`` in the owning process."""

    handle: tuple[bytes, bytes, int]  # manager, name, bytes

    @property
    def num_bytes(self) -> int:
        """Size of the block."""
        return self.handle[2]


@dataclass(frozen=True, slots=True)
class CudaStorage:
    """One block of the trainer's GPU memory: the return value of torch's ``UntypedStorage._share_cuda_()`` in
    the owning process, without the device index, which is invalid elsewhere."""

    device_uuid: str
    ipc: tuple[object, ...]
    num_bytes: int


Storage = SharedStorage | CudaStorage


@dataclass(frozen=True, slots=True)
class SourceView:
    """A strided view of a shared storage. Offsets and strides count elements of ``dtype``."""

    storage: int  # index into WeightPlan.storages
    dtype: str  # torch name without the prefix, e.g. "float32"
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Alias:
    """The whole engine parameter ``param`` is this view of the trainer's memory."""

    param: str
    source: SourceView


@dataclass(frozen=True, slots=True)
class Copy:
    """Write ``param[index]`` of the engine from ``source`` (same shape; dtype converts).

    ``index`` has one entry per dimension of the parameter: (start, stop), or an int that selects one row and
    drops the dimension.
    """

    param: str
    index: tuple[int | tuple[int, int], ...]
    source: SourceView


@dataclass(frozen=True, slots=True)
class PeerCopy:
    """Receive ``param[index]`` of the engine from trainer rank ``rank``, whose memory it cannot map.

    ``source.storage`` indexes that rank's own storages. Sender and receiver follow the plan in the same
    order, so messages need no names.
    """

    param: str
    index: tuple[int | tuple[int, int], ...]
    rank: int
    source: SourceView
    size: int  # elements


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """Shape and dtype of one engine parameter, as its worker reports them."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """The plan of one engine rank; every element of every parameter is covered exactly once.

    The one exception is ``padding``: the last rows of a vocabulary parameter, which no tensor owns and no
    result reads; copies leave them unchanged.
    """

    storages: list[Storage]
    aliases: list[Alias]
    copies: list[Copy]
    copy_reasons: dict[str, str] = field(default_factory=dict)  # param -> why it is not aliased
    peers: list[PeerCopy] = field(default_factory=list)
    addresses: dict[int, str] = field(default_factory=dict)  # trainer rank -> address of its server
    padding: dict[str, int] = field(default_factory=dict)  # param -> number of its padding rows
    streamed: dict[str, ParamInfo] = field(default_factory=dict)
    """If not empty, the plan's "parameters" are these whole tensors of the checkpoint, which the engine's own
    loader makes its parameters of."""
