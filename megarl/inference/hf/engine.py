"""The Hugging Face engine, as the trainer calls it."""

from __future__ import annotations

from megarl.inference.actor.engine import ActorEngine
from megarl.inference.hf.worker import HfEngineActor


class HfEngine(ActorEngine):
    """A model of transformers in a Ray actor."""

    name = "Hugging Face"

    @staticmethod
    def actor_class() -> type:
        """See ActorEngine.actor_class."""
        return HfEngineActor
