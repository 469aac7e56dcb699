"""The only module that names the engine backends."""

from __future__ import annotations

from typing import Literal

from megarl.inference.actor.engine import ActorEngine


def engine_class(backend: Literal["vllm", "hf"]) -> type[ActorEngine]:
    """Return the engine class of rollout.engine.backend."""
    if backend == "hf":
        from megarl.inference.hf.engine import HfEngine

        return HfEngine
    from megarl.inference.vllm.engine import VllmEngine

    return VllmEngine
