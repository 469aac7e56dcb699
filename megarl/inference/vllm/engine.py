"""The vLLM engine, as the trainer calls it."""

from __future__ import annotations

from megarl.inference.actor.engine import ActorEngine
from megarl.inference.vllm.worker import VllmEngineActor


class VllmEngine(ActorEngine):
    """vLLM in a Ray actor, with a worker process per tensor-parallel rank where there are several."""

    name = "vLLM"

    @staticmethod
    def actor_class() -> type:
        """See ActorEngine.actor_class."""
        return VllmEngineActor
