"""Paged storage of keys and values: a pool of pages, each PAGE tokens of one request.

Pages in use are always the first ones of the pool, so that attention over all of them reads one slice and
nothing is gathered: a page that is given up is filled with the last one. From the pool's other end come
pages of finished requests, kept for prompts that begin alike. They are found by a digest of all tokens up to
a page's end, and those unused longest are given up when room is needed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

PAGE = 32
"""Tokens of a page; prefixes are shared in whole pages."""

Move = Callable[[list[int], list[int]], None]
"""``move(sources, targets)`` copies pages, of all layers; no page is in both lists."""
_NO_SLOT = -1


def digests(token_ids: np.ndarray, known: Sequence[bytes] = ()) -> list[bytes]:
    """One per whole page of token_ids [N] int32: of all tokens up to its end. ``known``: the first ones."""
    found = list(known)
    for page in range(len(found), len(token_ids) // PAGE):
        hasher = hashlib.blake2b(found[-1] if found else b"", digest_size=16)
        hasher.update(np.ascontiguousarray(token_ids[page * PAGE : (page + 1) * PAGE]).tobytes())
        found.append(hasher.digest())
    return found


class PageTable:
    """Table of pages and their contents. ``move`` is called for every page whose contents must go elsewhere.

    A request is known by its slot, a small number. ``owner[:used]`` and ``start[:used]`` are, of every page
    in use, the slot and the position of its first token.
    """

    def __init__(self, num_pages: int, move: Move) -> None:
        self.num_pages, self._move = num_pages, move
        self.clear()

    def clear(self) -> None:
        """Nothing is in use, kept or known."""
        num_pages, self.used = self.num_pages, 0
        self.owner = np.full(num_pages, _NO_SLOT, np.int64)
        self.start = np.zeros(num_pages, np.int64)
        self.pages: dict[int, list[int]] = {}  # slot -> its pages, in order
        self._digest: list[bytes | None] = [None] * num_pages
        self._found: dict[bytes, int] = {}  # digest -> a page with these tokens, in use or kept
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # the kept ones, unused longest first

    @property
    def room(self) -> int:
        """Pages that :meth:`extend` can give."""
        return self.num_pages - self.used

    @property
    def num_kept(self) -> int:
        """Pages kept of finished requests."""
        return len(self._kept)

    def extend(self, slot: int, count: int) -> None:
        """Give a slot ``count`` more pages; there must be :attr:`room`."""
        assert count <= self.room
        pages = self.pages.setdefault(slot, [])
        while self.used + count > self.num_pages - len(self._kept):
            self._forget_oldest()
        for page in range(self.used, self.used + count):
            self.owner[page], self.start[page] = slot, len(pages) * PAGE
            pages.append(page)
        self.used += count

    def find(self, wanted: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix."""
        pages = []
        for digest in wanted:
            if (page := self._found.get(digest)) is None:
                break
            if digest in self._kept:
                self._kept.move_to_end(digest)
            pages.append(page)
        return pages

    def know(self, slot: int, wanted: Sequence[bytes]) -> None:
        """The first pages of a slot are whole and hold the tokens of these digests: others may find them."""
        for digest, page in zip(wanted, self.pages[slot], strict=False):
            if self._digest[page] is None:
                self._digest[page] = digest
                self._found.setdefault(digest, page)

    def release(self, slots: Sequence[int], *, keep: bool) -> None:
        """Take the pages of these slots; with ``keep`` those that are known stay findable as room allows."""
        freed = [page for slot in slots for page in self.pages.pop(slot, [])]
        if keep:
            self._keep(freed)
        for page in freed:
            self._unknow(page)
            self.owner[page] = _NO_SLOT
        used = self.used - len(freed)
        holes = sorted(page for page in freed if page < used)
        gone = set(freed)
        movers = [page for page in range(used, self.used) if page not in gone]
        if movers:
            self._move(movers, holes)
        for source, target in zip(movers, holes, strict=True):
            slot = int(self.owner[source])
            self.owner[target], self.start[target] = slot, self.start[source]
            self.owner[source] = _NO_SLOT
            self.pages[slot][int(self.start[target]) // PAGE] = target
            self._rename(source, target)
        self.used = used

    def _keep(self, freed: list[int]) -> None:
        """Copy what is worth it to the pool's end; pages of one request from the last to the first.

        A prefix is found from its first page on, so that the first should be given up last.
        """
        sources, targets = [], []
        room = self.num_pages - self.used
        wanted = [page for page in freed if self._found.get(self._digest[page] or b"") == page][:room]
        while len(self._kept) + len(wanted) > room:
            self._forget_oldest()
        for page in reversed(wanted):
            digest = self._digest[page]
            assert digest is not None
            target = self.num_pages - 1 - len(self._kept)
            sources.append(page)
            targets.append(target)
            self._kept[digest] = self._found[digest] = target
            self._digest[page], self._digest[target] = None, digest
        if sources:
            self._move(sources, targets)

    def _forget_oldest(self) -> None:
        """Give up one kept page; the outermost one takes its place."""
        _, hole = self._kept.popitem(last=False)
        outermost = self.num_pages - 1 - len(self._kept)
        self._unknow(hole)
        if outermost != hole:
            self._move([outermost], [hole])
            moved = self._digest[outermost]
            assert moved is not None
            self._kept[moved] = hole
            self._rename(outermost, hole)

    def _unknow(self, page: int) -> None:
        digest = self._digest[page]
        self._digest[page] = None
        if digest is not None and self._found.get(digest) == page:
            del self._found[digest]

    def _rename(self, source: int, target: int) -> None:
        digest = self._digest[source]
        self._digest[source], self._digest[target] = None, digest
        if digest is not None and self._found.get(digest) == source:
            self._found[digest] = target
