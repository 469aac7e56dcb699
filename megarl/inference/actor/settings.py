"""Settings passed to an engine's process."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.rollout import EngineConfig


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Everything an actor needs to build its engine."""

    model_dir: str
    config: EngineConfig
    dtype: str
    max_model_len: int
    seed: int
    temp_dir: str  # for temporary files, such as gloo's rendezvous
    keep_kv_cache: bool = False  # across syncs
    offload_kv_cache: bool = False  # lets sleep free it
    trust_remote_code: bool = False  # of the model's directory
    record_routing: bool = False  # responses include their tokens' experts
