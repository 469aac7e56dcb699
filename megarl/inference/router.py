"""Which of several engines samples which request: like beginnings together, equal loads otherwise."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from megarl.inference.interface import GenerateRequest


class RequestRouter:
    """Deals the requests of one session; a load is a number of unfinished requests.

    - A request that continues an episode goes where the episode is: its engine has the keys and values of
      what came before.
    - Requests of one prompt that come together go to one engine, which computes the prompt once, for as many
      prompts as divide by the engines.
    - The requests of what is left over, and of fewer prompts than engines, go one by one to the engine with
      the least to do: the prompts are computed again there, but no engine stands idle.
    """

    def __init__(self, num_engines: int) -> None:
        self.loads = [0] * num_engines
        self._owners: dict[str, int] = {}  # of unfinished requests
        self._homes: dict[Hashable, int] = {}  # of episodes, and of prompts that were dealt whole

    def route(self, requests: Sequence[GenerateRequest]) -> list[list[GenerateRequest]]:
        """A share for each engine, in the order of ``requests``; raises ValueError for an id in use."""
        for request in requests:
            if request.request_id in self._owners:
                raise ValueError(f"request {request.request_id}: the id occurs twice")
        chosen: dict[str, int] = {}
        fresh: dict[Hashable, list[GenerateRequest]] = {}
        for request in requests:
            prompt = _prompt(request)
            home = self._homes.get(("episode", request.lineage), self._homes.get(prompt))
            if home is None:
                fresh.setdefault(prompt, []).append(request)
            else:
                self._give(request, home, chosen)
        num_whole = len(fresh) - len(fresh) % len(self.loads)
        for number, (prompt, group) in enumerate(fresh.items()):
            if number < num_whole:
                self._homes[prompt] = self._least_loaded()
            for request in group:
                self._give(request, self._homes.get(prompt, self._least_loaded()), chosen)
        shares: list[list[GenerateRequest]] = [[] for _ in self.loads]
        for request in requests:
            shares[chosen[request.request_id]].append(request)
        return shares

    def finish(self, request_id: str) -> None:
        """Its response has come."""
        self.loads[self._owners.pop(request_id)] -= 1

    def _give(self, request: GenerateRequest, engine: int, chosen: dict[str, int]) -> None:
        chosen[request.request_id] = self._owners[request.request_id] = engine
        self.loads[engine] += 1
        if request.lineage is not None:
            self._homes["episode", request.lineage] = engine

    def _least_loaded(self) -> int:
        return min(range(len(self.loads)), key=self.loads.__getitem__)


def _prompt(request: GenerateRequest) -> Hashable:
    return ("prompt", request.prompt_ids.tobytes() if request.lineage is None else request.lineage[0])
