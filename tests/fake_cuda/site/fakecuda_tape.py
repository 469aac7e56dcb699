"""Record one run's rollouts on the fake GPU, and replay them on a CPU.

Two devices draw different random numbers, so two runs' samples, and everything learned from them, would
differ. With FAKECUDA_TAPE=record:FILE a run writes its engine's answers; with replay:FILE a run has no engine
and gets those answers, so losses, gradients and the logprobs of engine and trainer can be compared step by
step.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODE, _, PATH = os.environ.get("FAKECUDA_TAPE", "").partition(":")


class _NoEngine:
    """Takes every call, as an engine would that has nothing to do."""

    def __getattr__(self, name: str) -> Any:
        from megarl.inference.interface import SyncReport  # this module is loaded before megarl

        return lambda *args, **kwargs: SyncReport(0, 0.0)


def tape_rollouts(module: Any) -> None:
    """Patch megarl.sampling.rollout_manager."""
    rollouts = module.RolloutManager
    original = rollouts.generate

    async def record(self: Any, prompts: list[Any], **settings: Any) -> Any:
        played = await original(self, prompts, **settings)
        with Path(PATH).open("ab") as file:
            pickle.dump((_key(prompts, settings), played), file)
        return played

    async def replay(self: Any, prompts: list[Any], **settings: Any) -> Any:
        key, played = next(tape)
        assert key == _key(prompts, settings), f"the tape has {key}, asked for {_key(prompts, settings)}"
        return played

    tape = _read(Path(PATH))
    rollouts.generate = record if MODE == "record" else replay


def leave_out_the_engine(module: Any) -> None:
    """Patch megarl.loops.online, for a replay."""
    if MODE == "replay":
        module.start_engine = lambda *args, **kwargs: _NoEngine()
        module.attach_weights = lambda *args, **kwargs: []


def _key(prompts: list[Any], settings: dict[str, Any]) -> tuple[Any, ...]:
    ids = [prompt.token_ids.tolist() for prompt in prompts]
    return settings["step"], settings["generations"], settings["temperature"], ids


def _read(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        while True:
            yield pickle.load(file)
