"""From "who owns which region" to "what each engine parameter does": alias, local copy or peer copy.

Pure planning: no process groups, no tensors. The regions of all trainer ranks are intersected with an
engine rank's in the index space of the Hugging Face tensors. What is the same for many engine ranks
(which pieces a parameter has, and who holds each) is computed once per list of readers; what differs
(which of several holders sends) is decided per engine rank. Every plan is proved: the pieces of each
engine parameter tile it, vocabulary padding excepted, and the plan writes each piece once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megarl.errors import UserError
from megarl.models.table import Region
from megarl.weights.alias import ITEM_BYTES, alias_of
from megarl.weights.send_balancer import SendBalancer
from megarl.weights.shard_index import ParamPieces, Pattern, Piece, ReplicaSet, Sender, ShardIndex
from megarl.weights.sync_plan import Alias, Copy, ParamInfo, PeerCopy, SourceView, Storage, WeightPlan


@dataclass(frozen=True, slots=True)
class Owner:
    """One trainer rank's offer: its regions, where its parameters lie, and its shared storages.

    ``rank`` -1 stands for the owner's place in the list of owners. Memory can be mapped within a
    ``host`` and aliased within a ``device`` of it (on a CPU, all ranks of a host share one); other hosts
    ask its server at ``address``.
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
    """One engine rank: what its parameters hold, their shapes, and where it runs.

    ``prefer_rank`` is the trainer rank that shares its device: read first where it has the bytes.
    Ranks with equal regions and parameters should be given the very same objects, which are then
    planned once.
    """

    regions: list[Region]
    params: Mapping[str, ParamInfo]
    host: str = ""
    device: str = "cpu"
    prefer_rank: int | None = None


class Planner:
    """Plans any number of engine ranks against the same owners.

    Where several trainer ranks hold the same bytes, in this order: one whose memory the whole
    parameter can alias; ``prefer_rank``; one on the engine's host; any. Among equals, all pieces of a
    parameter come from as few ranks as possible, and those that have sent the fewest bytes so far (in
    the plans made by this object) send next, so that no source becomes a hot spot. Deterministic: equal
    owners and the same sequence of engine ranks give equal plans.
    """

    def __init__(self, owners: Sequence[Owner], *, peers_only: bool = False) -> None:
        self.owners = owners
        self.ranks = [place if owner.rank < 0 else owner.rank for place, owner in enumerate(owners)]
        assert len(set(self.ranks)) == len(owners), "two owners with one rank"
        self.place_of_rank = {rank: place for place, rank in enumerate(self.ranks)}
        self.hosts = [owner.host for owner in owners]
        self.peers_only = peers_only
        self._index = ShardIndex([(owner.regions, owner.host) for owner in owners])
        self._patterns: dict[tuple[int, int], tuple[Reader, Pattern]] = {}
        self._views: dict[tuple[SourceView, object], SourceView] = {}
        self.on_device: dict[tuple[str, str], list[int]] = {}
        for place, owner in enumerate(owners):
            self.on_device.setdefault((owner.host, owner.device), []).append(place)
        self.loads = SendBalancer(len(owners))
        self.counted = False  # whether far loads without a choice were added beforehand
        self._fixed: dict[ParamPieces, _Fixed | None] = {}
        self._alike: dict[tuple[ReplicaSet, ...], int] = {}
        self._kinds: dict[ParamPieces, int] = {}

    def plan(self, reader: Reader) -> WeightPlan:
        """Plan one engine rank; raises UserError with every violation."""
        pattern = self._pattern(reader)
        choice = _Choice(self, reader, pattern.padding)
        if pattern.problems:
            raise UserError("\n".join(pattern.problems))
        for name, param in pattern.params.items():
            choice.decide(name, reader.params[name], param)
        plan = choice.result
        # The pieces tile their parameters (else there were problems): written once each, they prove the plan.
        pieces_of_aliases = sum(len(pattern.params[alias.param].pieces) for alias in plan.aliases)
        assert len(plan.copies) + len(plan.peers) + pieces_of_aliases == pattern.num_pieces
        return plan

    def plan_all(self, readers: Sequence[Reader]) -> Iterator[WeightPlan]:
        """Plan these engine ranks, one after another.

        Sends more evenly than :meth:`plan` for each: what only one owner has, for any of them, is counted
        before the first choice among several.
        """
        for reader in readers:
            pattern = self._pattern(reader)
            for name, param in pattern.params.items():
                fixed = self.fixed(name, reader.params[name], param)
                if fixed is not None:
                    self.loads.add_far(self.far_loads(fixed, reader.host))
        self.counted = True
        try:
            for reader in readers:
                yield self.plan(reader)
        finally:
            self.counted = False

    def _pattern(self, reader: Reader) -> Pattern:
        key = (id(reader.regions), id(reader.params))
        if key not in self._patterns:
            # Keeping the reader keeps its lists alive, and with them the meaning of their ids.
            self._patterns[key] = (reader, self._index.pattern(reader.regions, reader.params))
        return self._patterns[key][1]

    def fixed(self, name: str, info: ParamInfo, param: ParamPieces) -> _Fixed | None:
        """The copies of a parameter whose pieces have one holder each, equal for all ranks on other hosts."""
        if param not in self._fixed:
            self._fixed[param] = None
            pieces = param.pieces
            if pieces and all(len(piece.holders) == 1 for piece in pieces):
                places = [piece.holders.places[0] for piece in pieces]
                sent: dict[int, int] = {}
                for place, piece in zip(places, pieces, strict=True):
                    sent[place] = sent.get(place, 0) + piece.size * ITEM_BYTES[info.dtype]
                peers = [self.peer(name, *pair) for pair in zip(pieces, places, strict=True)]
                hosts = frozenset(self.hosts[place] for place in places)
                addresses = {self.ranks[place]: self.owners[place].address for place in places}
                self._fixed[param] = _Fixed(peers, places, hosts, sent, addresses)
        return self._fixed[param]

    def alike(self, param: ParamPieces) -> int:
        """A number that parameters share whose pieces have the same holders, as those of most layers do."""
        if param not in self._kinds:
            holders = tuple([piece.holders for piece in param.pieces])
            self._kinds[param] = self._alike.setdefault(holders, len(self._alike))
        return self._kinds[param]

    def far_loads(self, fixed: _Fixed, host: str) -> Mapping[int, int]:
        """Place -> bytes that it sends to an engine rank on ``host`` over the network."""
        if host not in fixed.hosts or self.peers_only:
            return fixed.sent
        return {place: size for place, size in fixed.sent.items() if self.hosts[place] != host}

    def peer(self, name: str, piece: Piece, place: int) -> PeerCopy:
        """``piece`` sent by the owner at ``place``: one object for all engine ranks that get it."""
        peer = piece.made.get(place)
        if peer is None:
            view = self.view(place, piece)
            peer = piece.made[place] = PeerCopy(name, piece.index, self.ranks[place], view, piece.size)
        return peer

    def view(self, place: int, piece: Piece) -> SourceView:
        """The bytes of ``piece`` in the memory of the owner at ``place``; storages count that owner's own."""
        param, index = piece.source(place)
        whole = self.owners[place].params[param]
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


class _Fixed(NamedTuple):
    """A parameter whose every piece has one holder: nothing is to be chosen."""

    peers: list[PeerCopy]
    places: list[int]  # of the holders
    hosts: frozenset[str]
    sent: dict[int, int]  # place -> bytes
    addresses: dict[int, str]  # rank -> where its server listens


class _Choice:
    """The decisions for one engine rank, parameter by parameter."""

    def __init__(self, planner: Planner, reader: Reader, padding: dict[str, int]) -> None:
        self._planner, self._reader = planner, reader
        self._numbers: dict[tuple[int, int], int] = {}  # (place, its storage) -> storage of the plan
        self.result = WeightPlan([], [], [])
        self._padding = padding
        self._known: dict[int, list[Sender]] = {}
        self._prefer: int | None = None
        if reader.prefer_rank is not None:
            self._prefer = planner.place_of_rank.get(reader.prefer_rank)
            if self._prefer is not None and planner.hosts[self._prefer] != reader.host:
                self._prefer = None  # its memory cannot be mapped
        self._beside = planner.on_device.get((reader.host, reader.device), [])
        if planner.peers_only:
            self._prefer, self._beside = None, []

    def decide(self, name: str, info: ParamInfo, param: ParamPieces) -> None:
        """Alias ``name`` where that is possible, else copy each of its pieces."""
        pieces, common = param.pieces, param.common
        reason = "" if common else "its parts lie with several trainer ranks or parameters"
        beside = [place for place in self._beside if place in common]
        if self._prefer in beside:
            beside.sort(key=lambda place: place != self._prefer)
        for place in beside:
            answer = self._as_alias(name, info, pieces, place)
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
        """Copy each from one of its holders, from few of them in all. The loop of a large plan."""
        planner, item, peers = self._planner, ITEM_BYTES[info.dtype], self.result.peers
        chosen: dict[int, int] = {}  # place -> how many were chosen before it
        far = set()
        for sender in self._senders(param):
            again = [place for place in sender.candidates.places if place in chosen]
            if again:
                place = again[0] if len(again) == 1 else min(again, key=chosen.__getitem__)
            else:
                place = planner.loads.least(sender.narrowed, sender.mapped)
                chosen[place] = len(chosen)
            piece = param.pieces[sender.number]
            if sender.mapped:
                self._copy(name, info, piece, place, True)
                continue
            planner.loads.add(place, False, piece.size * item)
            peers.append(piece.made.get(place) or planner.peer(name, piece, place))
            far.add(place)
        for place in far:
            self.result.addresses[planner.ranks[place]] = planner.owners[place].address

    def _senders(self, param: ParamPieces) -> list[Sender]:
        """Who may send each piece, those without a choice first: the others follow them."""
        key = self._planner.alike(param)
        if key not in self._known:
            found = [(*self._candidates(piece), number) for number, piece in enumerate(param.pieces)]
            found.sort(key=lambda item: len(item[0]))
            others = {
                side: tuple(dict.fromkeys(candidates for candidates, mapped, _ in found if mapped == side))
                for side in (False, True)
            }
            self._known[key] = [
                Sender(number, candidates, candidates.narrowed(others[mapped]), mapped)
                for candidates, mapped, number in found
            ]
        return self._known[key]

    def _copy_fixed(self, name: str, info: ParamInfo, pieces: list[Piece], fixed: _Fixed) -> None:
        planner, host = self._planner, self._reader.host
        if not planner.counted:
            planner.loads.add_far(planner.far_loads(fixed, host))
        if planner.peers_only or host not in fixed.hosts:
            self.result.peers.extend(fixed.peers)
            self.result.addresses.update(fixed.addresses)
            return
        for piece, peer, place in zip(pieces, fixed.peers, fixed.places, strict=True):
            if planner.hosts[place] == host:
                self._copy(name, info, piece, place, True)
            else:
                self._receive(peer, place)

    def _candidates(self, piece: Piece) -> tuple[ReplicaSet, bool]:
        """Who may send the piece, and whether by memory that the engine maps."""
        holders = piece.holders
        if self._planner.peers_only:
            return holders, False
        if self._prefer is not None and self._prefer in holders.members:
            return holders.only(self._prefer), True
        local = holders.on_host(self._reader.host)
        return (local, True) if local else (holders, False)

    def _copy(self, name: str, info: ParamInfo, piece: Piece, place: int, mapped: bool) -> None:
        planner = self._planner
        planner.loads.add(place, mapped, piece.size * ITEM_BYTES[info.dtype])
        if mapped:
            source = self._mapped(place, planner.view(place, piece))
            self.result.copies.append(Copy(name, piece.index, source))
        else:
            self._receive(planner.peer(name, piece, place), place)

    def _receive(self, peer: PeerCopy, place: int) -> None:
        self.result.peers.append(peer)
        self.result.addresses[peer.rank] = self._planner.owners[place].address

    def _mapped(self, place: int, view: SourceView) -> SourceView:
        key = (place, view.storage)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.result.storages)
            self.result.storages.append(self._planner.owners[place].storages[view.storage])
        if number == view.storage:
            return view
        return SourceView(number, view.dtype, view.offset, view.shape, view.stride)

    def _as_alias(self, name: str, info: ParamInfo, pieces: list[Piece], place: int) -> Alias | str:
        """The alias of the whole parameter in this owner's memory, or the reason why there is none."""
        views = [self._planner.view(place, piece) for piece in pieces]
        storages = self._planner.owners[place].storages
        answer = alias_of(info, [(p.index, v) for p, v in zip(pieces, views, strict=True)], storages)
        return answer if isinstance(answer, str) else Alias(name, self._mapped(place, answer))
