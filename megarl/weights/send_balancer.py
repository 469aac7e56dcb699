"""Balance the bytes that trainer ranks send in the plans made so far, to avoid hot spots."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from megarl.weights.shard_index import ReplicaSet


class SendBalancer:
    """Bytes sent by owner id, within the host and to other hosts."""

    def __init__(self, num_owners: int) -> None:
        self._sent = [[0] * num_owners, [0] * num_owners]  # to other hosts, within the host
        self._queues: dict[tuple[ReplicaSet, bool], list[tuple[int, int]]] = {}

    def least(self, candidates: ReplicaSet, within_host: bool) -> int:
        """Return the owner id that has sent least; call :meth:`add` for it next.

        Loads only grow, so a heap whose stale entries are fixed when they reach the top finds it quickly.
        """
        load, key = self._sent[within_host], (candidates, within_host)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = [(load[owner_id], owner_id) for owner_id in candidates.owner_ids]
            heapq.heapify(queue)
        while load[queue[0][1]] != queue[0][0]:
            owner_id = queue[0][1]
            heapq.heapreplace(queue, (load[owner_id], owner_id))
        return queue[0][1]

    def add(self, owner_id: int, within_host: bool, num_bytes: int) -> None:
        """Add to the bytes that ``owner_id`` sends."""
        self._sent[within_host][owner_id] += num_bytes

    def add_remote(self, sent: Mapping[int, int]) -> None:
        """Add to the bytes that these owners send to other hosts."""
        load = self._sent[False]
        for owner_id, num_bytes in sent.items():
            load[owner_id] += num_bytes
