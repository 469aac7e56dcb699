"""Former home of the sections, for imports that are still on their way to the new ones."""

from __future__ import annotations

from megarl.config.data import PromptDataConfig as PromptDataConfig
from megarl.config.evaluate import EvalConfig as EvalConfig
from megarl.config.grpo import GrpoAlgorithmConfig as GrpoAlgorithmConfig
from megarl.config.grpo import GrpoConfig as GrpoConfig
from megarl.config.logging import LoggingConfig as LoggingConfig
from megarl.config.model import ModelConfig as ModelConfig
from megarl.config.online import OnlineConfig as OnlineConfig
from megarl.config.online import WeightsConfig as WeightsConfig
from megarl.config.optimizer import OptimizerConfig as OptimizerConfig
from megarl.config.packing import PackingConfig as PackingConfig
from megarl.config.parallel import ParallelConfig as ParallelConfig
from megarl.config.rollout import EngineConfig as EngineConfig
from megarl.config.rollout import GenerationConfig as GenerationConfig
from megarl.config.rollout import RolloutConfig as RolloutConfig
from megarl.config.section import Section as Section
from megarl.config.sft import SftConfig as SftConfig
from megarl.config.training import TrainingRoot as TrainingRoot
