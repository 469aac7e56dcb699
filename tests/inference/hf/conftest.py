"""A trainer in miniature beside a real Hugging Face engine: its weights in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.backends import engine_class
from megarl.weights.sync_plan import Copy, WeightPlan
from tests.inference.hf.models import MAX_MODEL_LEN, make_model, parameters
from tests.inference.mini_trainer import MiniTrainer, SharedWeights


class NamedWeights(SharedWeights):
    """Every parameter under its own name."""

    def reader(self, model: torch.nn.Module) -> Callable[[str], torch.Tensor]:
        """As the engine names them."""
        return parameters(model).__getitem__

    def copy_plan(self) -> WeightPlan:
        """Every parameter whole: checksums are of what is copied at a time."""
        copies = [
            Copy(name, tuple((0, size) for size in info.shape), self.source(name))
            for name, info in self.params.items()
        ]
        return WeightPlan([self.storage], [], copies)


@pytest.fixture(scope="module")
def _trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniTrainer]:
    directory = tmp_path_factory.mktemp("qwen3")
    model = make_model("qwen3")
    model.config.save_pretrained(directory)
    engine = engine_class("hf").start(
        directory,
        EngineConfig(backend="hf", kv_cache_gib=0.05, num_threads=1),
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        seed=1,
        log_dir=directory / "logs",
    )
    engine.wait_ready()
    yield MiniTrainer(engine, model, NamedWeights)
    engine.shutdown()
    stop_ray()


@pytest.fixture
def trainer(_trainer: MiniTrainer) -> MiniTrainer:
    """With its first weights."""
    _trainer.reset()
    return _trainer
