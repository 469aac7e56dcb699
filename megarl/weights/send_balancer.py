"""How much each trainer rank sends in the plans made so far, so that no source becomes a hot spot."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from megarl.weights.shard_index import ReplicaSet


class SendBalancer:
    """Bytes sent by owner (its place in the list of owners), within the host and to other hosts."""

    def __init__(self, num_owners: int) -> None:
        self._sent = [[0] * num_owners, [0] * num_owners]  # to other hosts, within the host
        self._queues: dict[tuple[ReplicaSet, bool], list[tuple[int, int]]] = {}

    def least(self, candidates: ReplicaSet, near: bool) -> int:
        """The place that has sent least; its load must then be raised with :meth:`add`.

        Loads only grow, so that a heap whose entries are mended when they come up finds it quickly.
        """
        load, key = self._sent[near], (candidates, near)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = [(load[place], place) for place in candidates.places]
            heapq.heapify(queue)
        while load[queue[0][1]] != queue[0][0]:
            place = queue[0][1]
            heapq.heapreplace(queue, (load[place], place))
        return queue[0][1]

    def add(self, place: int, near: bool, num_bytes: int) -> None:
        """``place`` sends this much more."""
        self._sent[near][place] += num_bytes

    def add_far(self, sent: Mapping[int, int]) -> None:
        """These places send this much more to other hosts."""
        load = self._sent[False]
        for place, num_bytes in sent.items():
            load[place] += num_bytes
