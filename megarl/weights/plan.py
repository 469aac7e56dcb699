"""Plan the weight sync: alias, local copy or peer copy for each engine parameter, from region ownership.

Pure planning: no process groups, no tensors. The regions of all trainer ranks are intersected with an engine
rank's in the index space of the Hugging Face tensors. What many engine ranks share (a parameter's pieces and
their holders) is computed once per list of readers; the choice of the sender among several holders is made
per engine rank. Every plan is proved: the pieces of each engine parameter tile it, vocabulary padding
excepted, and the plan writes each piece once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megarl.errors import UserError
from megarl.models.table import Region
from megarl.weights.alias import ITEM_BYTES, alias_of
from megarl.weights.send_balancer import SendBalancer
from megarl.weights.shard_index import ParamPieces, Piece, PieceSenders, ReaderPieces, ReplicaSet, ShardIndex
from megarl.weights.sync_plan import Alias, Copy, ParamInfo, PeerCopy, SourceView, Storage, WeightPlan


@dataclass(frozen=True, slots=True)
class Owner:
    """One trainer rank: its regions, the memory of its parameters, and its shared storages.

    ``rank`` -1 stands for the owner's index in the list of owners (its owner id). Memory can be mapped within
    a ``host`` and aliased within a ``device`` of it (on a CPU, all ranks of a host share one); other hosts
    connect to its server at ``address``.
    """

    regions: list[Region]
    params: dict[str, SourceView]
    storages: list[Storage]
    rank: int = -1
    host: str = ""
    device: str = "cpu"
    address: str = ""


@dataclass(frozen=True, slots=True)
class Reader:
    """One engine rank: the regions and shapes of its parameters, and where it runs.

    ``prefer_rank`` is the trainer rank on the same device: preferred if it has the bytes. Pass the same
    objects for ranks with equal regions and parameters; they are then planned once.
    """

    regions: list[Region]
    params: Mapping[str, ParamInfo]
    host: str = ""
    device: str = "cpu"
    prefer_rank: int | None = None


class Planner:
    """Plan any number of engine ranks against the same owners.

    If several trainer ranks hold the same bytes, the order of preference is: one whose memory the whole
    parameter can alias; ``prefer_rank``; one on the engine's host; any. Among equals, all pieces of a
    parameter come from as few ranks as possible, and the ranks that have sent the fewest bytes so far (in the
    plans made by this object) send next, to avoid hot spots. Deterministic: equal owners and the same
    sequence of engine ranks give equal plans.
    """

    def __init__(self, owners: Sequence[Owner], *, peers_only: bool = False) -> None:
        self.owners = owners
        self.ranks = [owner_id if owner.rank < 0 else owner.rank for owner_id, owner in enumerate(owners)]
        assert len(set(self.ranks)) == len(owners), "two owners with one rank"
        self.owner_id_of_rank = {rank: owner_id for owner_id, rank in enumerate(self.ranks)}
        self.hosts = [owner.host for owner in owners]
        self.peers_only = peers_only
        self._index = ShardIndex([(owner.regions, owner.host) for owner in owners])
        self._reader_pieces: dict[tuple[int, int], tuple[Reader, ReaderPieces]] = {}
        self._views: dict[tuple[SourceView, object], SourceView] = {}
        self.on_device: dict[tuple[str, str], list[int]] = {}
        for owner_id, owner in enumerate(owners):
            self.on_device.setdefault((owner.host, owner.device), []).append(owner_id)
        self.loads = SendBalancer(len(owners))
        self.fixed_counted = False  # whether plan_all has added the remote loads of single holders already
        self._fixed: dict[ParamPieces, _SingleHolder | None] = {}
        self._holders_keys: dict[tuple[ReplicaSet, ...], int] = {}
        self._key_of_param: dict[ParamPieces, int] = {}

    def plan(self, reader: Reader) -> WeightPlan:
        """Plan one engine rank; UserError lists every violation."""
        found = self._pieces_of(reader)
        decisions = _ReaderPlanner(self, reader, found.padding)
        if found.problems:
            raise UserError("\n".join(found.problems))
        for name, param in found.params.items():
            decisions.decide(name, reader.params[name], param)
        plan = decisions.result
        # The pieces tile their parameters (else there were problems), so writing each once proves the plan.
        pieces_of_aliases = sum(len(found.params[alias.param].pieces) for alias in plan.aliases)
        assert len(plan.copies) + len(plan.peers) + pieces_of_aliases == found.num_pieces
        return plan

    def plan_all(self, readers: Sequence[Reader]) -> Iterator[WeightPlan]:
        """Plan these engine ranks, one after another.

        Balances better than :meth:`plan` for each: loads that only one owner can carry, for any rank, are
        counted before the first choice among several.
        """
        for reader in readers:
            found = self._pieces_of(reader)
            for name, param in found.params.items():
                fixed = self.fixed(name, reader.params[name], param)
                if fixed is not None:
                    self.loads.add_remote(self.remote_loads(fixed, reader.host))
        self.fixed_counted = True
        try:
            for reader in readers:
                yield self.plan(reader)
        finally:
            self.fixed_counted = False

    def _pieces_of(self, reader: Reader) -> ReaderPieces:
        key = (id(reader.regions), id(reader.params))
        if key not in self._reader_pieces:
            # Keeping the reader keeps its lists alive, so their ids stay unique.
            self._reader_pieces[key] = (reader, self._index.reader_pieces(reader.regions, reader.params))
        return self._reader_pieces[key][1]

    def fixed(self, name: str, info: ParamInfo, param: ParamPieces) -> _SingleHolder | None:
        """Return the copies of a parameter with one holder per piece, shared by ranks on other hosts."""
        if param not in self._fixed:
            self._fixed[param] = None
            pieces = param.pieces
            if pieces and all(len(piece.holders) == 1 for piece in pieces):
                owner_ids = [piece.holders.owner_ids[0] for piece in pieces]
                sent: dict[int, int] = {}
                for owner_id, piece in zip(owner_ids, pieces, strict=True):
                    sent[owner_id] = sent.get(owner_id, 0) + piece.size * ITEM_BYTES[info.dtype]
                peers = [self.peer(name, *pair) for pair in zip(pieces, owner_ids, strict=True)]
                hosts = frozenset(self.hosts[owner_id] for owner_id in owner_ids)
                addresses = {self.ranks[owner_id]: self.owners[owner_id].address for owner_id in owner_ids}
                self._fixed[param] = _SingleHolder(peers, owner_ids, hosts, sent, addresses)
        return self._fixed[param]

    def holders_key(self, param: ParamPieces) -> int:
        """Return a number equal for parameters whose pieces have the same holders, as in most layers."""
        if param not in self._key_of_param:
            holders = tuple([piece.holders for piece in param.pieces])
            self._key_of_param[param] = self._holders_keys.setdefault(holders, len(self._holders_keys))
        return self._key_of_param[param]

    def remote_loads(self, fixed: _SingleHolder, host: str) -> Mapping[int, int]:
        """Return bytes by owner id sent to an engine rank on ``host`` over the network."""
        if host not in fixed.hosts or self.peers_only:
            return fixed.sent
        return {owner_id: size for owner_id, size in fixed.sent.items() if self.hosts[owner_id] != host}

    def peer(self, name: str, piece: Piece, owner_id: int) -> PeerCopy:
        """Return the copy of ``piece`` from ``owner_id``: one object for all engine ranks that get it."""
        peer = piece.peer_copies.get(owner_id)
        if peer is None:
            view = self.view(owner_id, piece)
            peer = piece.peer_copies[owner_id] = PeerCopy(
                name, piece.index, self.ranks[owner_id], view, piece.size
            )
        return peer

    def view(self, owner_id: int, piece: Piece) -> SourceView:
        """Return the view of ``piece`` in the owner's memory, numbering the owner's own storages."""
        param, index = piece.source_of(owner_id)
        whole = self.owners[owner_id].params[param]
        key = (whole, index)
        view = self._views.get(key)
        if view is None:
            offset, shape, stride = whole.offset, [], []
            assert len(index) == len(whole.shape), (param, index, whole.shape)
            for entry, step, size in zip(index, whole.stride, whole.shape, strict=True):
                start, stop = (entry, entry + 1) if isinstance(entry, int) else entry
                assert 0 <= start < stop <= size, f"{param}: region {index} of shape {whole.shape}"
                offset += start * step
                if not isinstance(entry, int):
                    shape.append(stop - start)
                    stride.append(step)
            view = SourceView(whole.storage, whole.dtype, offset, tuple(shape), tuple(stride))
            self._views[key] = view
        return view


class _SingleHolder(NamedTuple):
    """A parameter whose pieces have one holder each: no sender to choose."""

    peers: list[PeerCopy]
    owner_ids: list[int]  # of the holders
    hosts: frozenset[str]
    sent: dict[int, int]  # owner_id -> bytes
    addresses: dict[int, str]  # rank -> address of its server


class _ReaderPlanner:
    """The plan of one engine rank, built parameter by parameter."""

    def __init__(self, planner: Planner, reader: Reader, padding: dict[str, int]) -> None:
        self._planner, self._reader = planner, reader
        self._numbers: dict[tuple[int, int], int] = {}  # (owner_id, its storage) -> storage of the plan
        self.result = WeightPlan([], [], [])
        self._padding = padding
        self._known: dict[int, list[PieceSenders]] = {}
        self._prefer: int | None = None
        if reader.prefer_rank is not None:
            self._prefer = planner.owner_id_of_rank.get(reader.prefer_rank)
            if self._prefer is not None and planner.hosts[self._prefer] != reader.host:
                self._prefer = None  # its memory cannot be mapped
        self._same_device = planner.on_device.get((reader.host, reader.device), [])
        if planner.peers_only:
            self._prefer, self._same_device = None, []

    def decide(self, name: str, info: ParamInfo, param: ParamPieces) -> None:
        """Alias ``name`` if possible, else copy each of its pieces."""
        pieces, common = param.pieces, param.common
        reason = "" if common else "its parts lie with several trainer ranks or parameters"
        same_device = [owner_id for owner_id in self._same_device if owner_id in common]
        if self._prefer in same_device:
            same_device.sort(key=lambda owner_id: owner_id != self._prefer)
        for owner_id in same_device:
            answer = self._as_alias(name, info, pieces, owner_id)
            if isinstance(answer, Alias):
                self.result.aliases.append(answer)
                return
            reason = reason or answer
        if name in self._padding:
            self.result.padding[name] = self._padding[name]
        self.result.copy_reasons[name] = reason or "no trainer rank has it in memory the engine could alias"
        fixed = self._planner.fixed(name, info, param)
        if fixed is not None:
            self._copy_fixed(name, info, pieces, fixed)
            return
        if len(pieces) == 1:
            candidates, mapped = self._candidates(pieces[0])
            self._copy(name, info, pieces[0], self._planner.loads.least(candidates, mapped), mapped)
            return
        self._copy_pieces(name, info, param)

    def _copy_pieces(self, name: str, info: ParamInfo, param: ParamPieces) -> None:
        """Copy each piece from one of its holders, from few in all. The inner loop of a large plan."""
        planner, item, peers = self._planner, ITEM_BYTES[info.dtype], self.result.peers
        chosen: dict[int, int] = {}  # owner_id -> order of choice
        remote = set()
        for sender in self._senders(param):
            again = [owner_id for owner_id in sender.candidates.owner_ids if owner_id in chosen]
            if again:
                owner_id = again[0] if len(again) == 1 else min(again, key=chosen.__getitem__)
            else:
                owner_id = planner.loads.least(sender.narrowed, sender.mapped)
                chosen[owner_id] = len(chosen)
            piece = param.pieces[sender.number]
            if sender.mapped:
                self._copy(name, info, piece, owner_id, True)
                continue
            planner.loads.add(owner_id, False, piece.size * item)
            peers.append(piece.peer_copies.get(owner_id) or planner.peer(name, piece, owner_id))
            remote.add(owner_id)
        for owner_id in remote:
            self.result.addresses[planner.ranks[owner_id]] = planner.owners[owner_id].address

    def _senders(self, param: ParamPieces) -> list[PieceSenders]:
        """Return the candidates of each piece, those without a choice first: the others follow them."""
        key = self._planner.holders_key(param)
        if key not in self._known:
            found = [(*self._candidates(piece), number) for number, piece in enumerate(param.pieces)]
            found.sort(key=lambda item: len(item[0]))
            others = {
                side: tuple(dict.fromkeys(candidates for candidates, mapped, _ in found if mapped == side))
                for side in (False, True)
            }
            self._known[key] = [
                PieceSenders(number, candidates, candidates.narrowed(others[mapped]), mapped)
                for candidates, mapped, number in found
            ]
        return self._known[key]

    def _copy_fixed(self, name: str, info: ParamInfo, pieces: list[Piece], fixed: _SingleHolder) -> None:
        planner, host = self._planner, self._reader.host
        if not planner.fixed_counted:
            planner.loads.add_remote(planner.remote_loads(fixed, host))
        if planner.peers_only or host not in fixed.hosts:
            self.result.peers.extend(fixed.peers)
            self.result.addresses.update(fixed.addresses)
            return
        for piece, peer, owner_id in zip(pieces, fixed.peers, fixed.owner_ids, strict=True):
            if planner.hosts[owner_id] == host:
                self._copy(name, info, piece, owner_id, True)
            else:
                self._receive(peer, owner_id)

    def _candidates(self, piece: Piece) -> tuple[ReplicaSet, bool]:
        """Return the piece's possible senders, and True if the engine maps their memory."""
        holders = piece.holders
        if self._planner.peers_only:
            return holders, False
        if self._prefer is not None and self._prefer in holders.members:
            return holders.only(self._prefer), True
        local = holders.on_host(self._reader.host)
        return (local, True) if local else (holders, False)

    def _copy(self, name: str, info: ParamInfo, piece: Piece, owner_id: int, mapped: bool) -> None:
        planner = self._planner
        planner.loads.add(owner_id, mapped, piece.size * ITEM_BYTES[info.dtype])
        if mapped:
            source = self._mapped(owner_id, planner.view(owner_id, piece))
            self.result.copies.append(Copy(name, piece.index, source))
        else:
            self._receive(planner.peer(name, piece, owner_id), owner_id)

    def _receive(self, peer: PeerCopy, owner_id: int) -> None:
        self.result.peers.append(peer)
        self.result.addresses[peer.rank] = self._planner.owners[owner_id].address

    def _mapped(self, owner_id: int, view: SourceView) -> SourceView:
        key = (owner_id, view.storage)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.result.storages)
            self.result.storages.append(self._planner.owners[owner_id].storages[view.storage])
        if number == view.storage:
            return view
        return SourceView(number, view.dtype, view.offset, view.shape, view.stride)

    def _as_alias(self, name: str, info: ParamInfo, pieces: list[Piece], owner_id: int) -> Alias | str:
        """Return the alias of the whole parameter in this owner's memory, or why there is none."""
        views = [self._planner.view(owner_id, piece) for piece in pieces]
        storages = self._planner.owners[owner_id].storages
        answer = alias_of(info, [(p.index, v) for p, v in zip(pieces, views, strict=True)], storages)
        return answer if isinstance(answer, str) else Alias(name, self._mapped(owner_id, answer))
