"""Execute a weight plan inside an engine process: check it, map the trainer's memory, alias, copy."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from megarl.inference.interface import AttachReport
from megarl.weights.peer import PieceReader
from megarl.weights.shared_storage import open_storage
from megarl.weights.sync_plan import Alias, Copy, PeerCopy, SourceView, WeightPlan

ParamIndex = tuple["int | tuple[int, int]", ...]
Box = tuple[tuple[int, int], ...]  # one (start, stop) per dimension of a parameter


def check_plan(plan: WeightPlan, params: Mapping[str, torch.Tensor]) -> list[str]:
    """Return a sentence for each violation of ``plan`` against ``params``; empty if it fits.

    A plan fits if each element of each parameter is written exactly once, by a source of its shape inside its
    storage, and aliases have the parameter's dtype. Rows that the plan marks as padding must not be written.
    """
    written: list[Copy | PeerCopy] = [*plan.copies, *plan.peers]
    named = {alias.param for alias in plan.aliases} | {copy.param for copy in written}
    violations = [f"{name}: no such parameter in the engine" for name in sorted(named - params.keys())]
    boxes: dict[str, list[Box]] = defaultdict(list)
    for alias in plan.aliases:
        violations += _check_source(alias.param, alias.source, plan)
        if (param := params.get(alias.param)) is None:
            continue
        boxes[alias.param].append(tuple((0, size) for size in param.shape))
        if alias.source.shape != tuple(param.shape):
            violations.append(
                f"{alias.param}: alias has shape {alias.source.shape}, the engine wants {tuple(param.shape)}"
            )
        if alias.source.dtype != dtype_name(param):
            violations.append(
                f"{alias.param}: alias has dtype {alias.source.dtype}, the engine wants {dtype_name(param)}"
            )
    for copy in written:
        if isinstance(copy, Copy):
            violations += _check_source(copy.param, copy.source, plan)
        elif not plan.addresses.get(copy.rank):
            violations.append(
                f"{copy.param}: trainer rank {copy.rank} has it on another host and serves no weights "
                "(weights.transport)"
            )
        if (param := params.get(copy.param)) is not None:
            box, problems = _copy_box(copy, tuple(param.shape))
            violations += problems
            if box is not None:
                boxes[copy.param].append(box)
    for name, rows in plan.padding.items():
        if (param := params.get(name)) is not None:
            whole = tuple((0, size) for size in param.shape)
            boxes[name].append(((param.shape[0] - rows, param.shape[0]), *whole[1:]))
    for name, param in params.items():
        violations += _check_coverage(name, tuple(param.shape), boxes[name])
    return violations


class AttachedWeights:
    """A plan bound to an engine's parameters: the mapped storages, and the copies to do at each sync.

    Aliased parameters point into the trainer's memory from construction on. The plan must have passed
    :func:`check_plan`.
    """

    def __init__(
        self, plan: WeightPlan, params: Mapping[str, torch.Tensor], before: AttachedWeights | None = None
    ) -> None:
        # Parameters that are copied now must not be written into the previous trainer's memory.
        aliased = {alias.param for alias in before.aliases} if before is not None else set()
        written = {copy.param for copy in plan.copies} | {peer.param for peer in plan.peers}
        for name in aliased & written:
            params[name].data = params[name].detach().clone()
        self._storages = [open_storage(storage) for storage in plan.storages]
        self._params = params
        self.aliases: list[Alias] = plan.aliases
        self._plan = plan
        for alias in plan.aliases:
            params[alias.param].data = view_of(self._storages, alias.source)
        self._copies = [
            (params[c.param].detach()[as_slices(c)], view_of(self._storages, c.source)) for c in plan.copies
        ]
        sent: dict[int, list[tuple[torch.Tensor, SourceView]]] = defaultdict(list)
        for peer in plan.peers:
            sent[peer.rank].append((params[peer.param].detach()[as_slices(peer)], peer.source))
        self._readers = [PieceReader(plan.addresses[rank], pieces) for rank, pieces in sent.items()]

    def copy_(self) -> int:
        """Write all copied regions (converting dtypes); return the bytes written."""
        with torch.inference_mode():
            for reader in self._readers:
                reader.start()
            for destination, source in self._copies:
                destination.copy_(source)
            for reader in self._readers:
                reader.receive()
        return self.copied_bytes + self.received_bytes

    @property
    def copied_bytes(self) -> int:
        """Bytes that one :meth:`copy_` writes from mapped memory."""
        return sum(destination.nbytes for destination, _ in self._copies)

    @property
    def received_bytes(self) -> int:
        """Bytes that one :meth:`copy_` writes from other hosts."""
        return sum(reader.num_bytes for reader in self._readers)

    def regions(self) -> Iterator[tuple[str, ParamIndex, torch.Tensor]]:
        """Yield every region of the plan (aliases, copies, peers): parameter, index, the engine's values."""
        for alias in self.aliases:
            yield alias.param, tuple((0, n) for n in alias.source.shape), self._params[alias.param]
        written: list[Copy | PeerCopy] = [*self._plan.copies, *self._plan.peers]
        for copy in written:
            yield copy.param, copy.index, self._params[copy.param].detach()[as_slices(copy)]

    def report(self) -> AttachReport:
        """Report what is aliased, from the parameters' addresses rather than from the plan."""
        ranges = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in self._storages]
        aliased = [
            name
            for name, param in self._params.items()
            if any(
                start <= param.data_ptr() and param.data_ptr() + param.nbytes <= stop
                for start, stop in ranges
            )
        ]
        return AttachReport(
            aliased=aliased,
            copied=[name for name in self._params if name not in set(aliased)],
            aliased_bytes=sum(self._params[name].nbytes for name in aliased),
            copied_bytes=self.copied_bytes,
            received_bytes=self.received_bytes,
        )


def view_of(storages: Sequence[torch.UntypedStorage], source: SourceView) -> torch.Tensor:
    """Return the view of mapped memory that ``source`` describes."""
    storage = storages[source.storage]
    empty = torch.empty(0, dtype=getattr(torch, source.dtype), device=storage.device)
    return empty.set_(storage, source.offset, source.shape, source.stride)


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the dtype as in plans, e.g. "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def as_slices(copy: Copy | PeerCopy) -> tuple[int | slice, ...]:
    """Return the index of a copy as torch takes it."""
    return tuple(i if isinstance(i, int) else slice(*i) for i in copy.index)


def _check_source(param: str, source: SourceView, plan: WeightPlan) -> list[str]:
    """Check that the view is inside its storage; past the end it would read foreign memory or crash."""
    if not 0 <= source.storage < len(plan.storages):
        return [f"{param}: source names storage {source.storage}, the plan has {len(plan.storages)}"]
    dtype = getattr(torch, source.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return [f"{param}: source has unknown dtype {source.dtype!r}"]
    if len(source.shape) != len(source.stride) or min((source.offset, *source.shape, *source.stride)) < 0:
        return [f"{param}: source has shape {source.shape}, stride {source.stride}, offset {source.offset}"]
    last = source.offset + sum(
        (size - 1) * step for size, step in zip(source.shape, source.stride, strict=True)
    )
    needed = (last + 1) * dtype.itemsize
    held = plan.storages[source.storage].num_bytes
    if needed > held:
        return [f"{param}: source ends at byte {needed} of storage {source.storage}, which has {held}"]
    return []


def _copy_box(copy: Copy | PeerCopy, shape: tuple[int, ...]) -> tuple[Box | None, list[str]]:
    """Return the region of the parameter that ``copy`` writes, or a violation."""
    if len(copy.index) != len(shape):
        return None, [
            f"{copy.param}: copy index {copy.index} has {len(copy.index)} dimensions, the engine {len(shape)}"
        ]
    box = tuple((i, i + 1) if isinstance(i, int) else i for i in copy.index)
    if any(not 0 <= start < stop <= size for (start, stop), size in zip(box, shape, strict=True)):
        return None, [f"{copy.param}: copy index {copy.index} lies outside the engine's shape {shape}"]
    region = tuple(i[1] - i[0] for i in copy.index if not isinstance(i, int))
    if region != copy.source.shape:
        return box, [
            f"{copy.param}: copy source has shape {copy.source.shape}, its region {copy.index} has {region}"
        ]
    return box, []


def _check_coverage(name: str, shape: tuple[int, ...], boxes: list[Box]) -> list[str]:
    """Check coverage: disjoint boxes with the parameter's total volume cover it exactly."""
    violations = [f"{name}: written twice" for _, count in Counter(boxes).items() if count > 1]
    ordered = sorted(set(boxes))
    for i, one in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if one and other[0][0] >= one[0][1]:
                break  # sorted by start on dimension 0: no later box meets ``one``
            if all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(one, other, strict=True)):
                violations.append(f"{name}: regions {one} and {other} overlap")
    covered = sum(math.prod(stop - start for start, stop in box) for box in boxes)
    if covered < math.prod(shape):
        violations.append(f"{name}: {covered} of {math.prod(shape)} elements are covered")
    return violations
