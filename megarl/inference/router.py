"""Route requests among several engines: shared prefixes together, loads balanced otherwise."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from megarl.inference.interface import GenerateRequest


class RequestRouter:
    """Assign the requests of one session; an engine's load is its number of unfinished requests.

    - A request that continues an episode goes to the episode's engine, which has the keys and values of its
      prefix cached.
    - Requests of one prompt submitted together go to one engine, which computes the prompt once, for the
    largest
      number of prompts that is a multiple of the number of engines.
    - The remaining requests go one by one to the least loaded engine: their prompts are computed several
    times,
      but no engine idles.
    """

    def __init__(self, num_engines: int) -> None:
        self.loads = [0] * num_engines
        self._engine_of_request: dict[str, int] = {}  # unfinished requests
        self._engine_of_lineage: dict[Hashable, int] = {}  # episodes, and prompts assigned whole

    def route(self, requests: Sequence[GenerateRequest]) -> list[list[GenerateRequest]]:
        """Return each engine's requests, in the order of ``requests``; ValueError for an id in use."""
        for request in requests:
            if request.request_id in self._engine_of_request:
                raise ValueError(f"request {request.request_id}: the id occurs twice")
        chosen: dict[str, int] = {}
        fresh: dict[Hashable, list[GenerateRequest]] = {}
        for request in requests:
            prompt = _prompt(request)
            home = self._engine_of_lineage.get(
                ("episode", request.lineage), self._engine_of_lineage.get(prompt)
            )
            if home is None:
                fresh.setdefault(prompt, []).append(request)
            else:
                self._assign(request, home, chosen)
        num_whole = len(fresh) - len(fresh) % len(self.loads)
        for number, (prompt, group) in enumerate(fresh.items()):
            if number < num_whole:
                self._engine_of_lineage[prompt] = self._least_loaded()
            for request in group:
                self._assign(request, self._engine_of_lineage.get(prompt, self._least_loaded()), chosen)
        shares: list[list[GenerateRequest]] = [[] for _ in self.loads]
        for request in requests:
            shares[chosen[request.request_id]].append(request)
        return shares

    def finish(self, request_id: str) -> None:
        """Record that the request's response has arrived."""
        self.loads[self._engine_of_request.pop(request_id)] -= 1

    def _assign(self, request: GenerateRequest, engine: int, chosen: dict[str, int]) -> None:
        chosen[request.request_id] = self._engine_of_request[request.request_id] = engine
        self.loads[engine] += 1
        if request.lineage is not None:
            self._engine_of_lineage["episode", request.lineage] = engine

    def _least_loaded(self) -> int:
        return min(range(len(self.loads)), key=self.loads.__getitem__)


def _prompt(request: GenerateRequest) -> Hashable:
    return ("prompt", request.prompt_ids.tobytes() if request.lineage is None else request.lineage[0])
