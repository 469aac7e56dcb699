"""The critic of PPO, a model with a score head beside the policy; both are one to checkpoints and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarl.cluster.collectives import barrier
from megarl.config.model import ModelConfig
from megarl.config.ppo import PpoConfig
from megarl.errors import UserError
from megarl.models import load_architecture
from megarl.trainer.build import build_scorer
from megarl.trainer.interface import Checkpointable, PendingSave, Trainer


def make_critic(config: PpoConfig, policy: Trainer) -> Trainer:
    """The critic, beside ``policy`` and under its layout."""
    path = config.critic.path or config.model.path
    architecture = load_architecture(path)
    if architecture.spec.vocab_size != policy.architecture.spec.vocab_size:
        raise UserError(f"critic.path: {path} has another vocabulary than {config.model.path}")
    return build_scorer(
        config,
        policy.context,
        architecture,
        ModelConfig(path=path, dtype=config.model.dtype),
        config.critic.optimizer or config.optimizer,
        config.num_critic_steps,
    )


@dataclass(frozen=True, slots=True)
class ActorCritic(Checkpointable):
    """Both models as one to checkpoints and to the memory they take turns in."""

    policy: Trainer
    critic: Trainer

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """The critic's checkpoint lies in ``critic`` of the policy's."""
        self.policy.save(directory, optimizer=optimizer)
        if self.critic.context.is_first:
            (directory / "critic").mkdir()
        barrier()  # nobody writes before it is there
        self.critic.save(directory / "critic", optimizer=optimizer)

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """Not for two models (checkpoint.async_save is refused)."""
        raise NotImplementedError

    def sleep(self, parts: Sequence[str]) -> None:
        """See Trained."""
        self.policy.sleep(parts)
        self.critic.sleep(parts)

    def wake(self) -> None:
        """See Trained."""
        self.policy.wake()
        self.critic.wake()

    def load(self, directory: Path, *, optimizer: bool = True) -> bool:
        """See Trained. The policy comes last: both files of random states hold the same."""
        critic = self.critic.load(directory / "critic", optimizer=optimizer)
        return self.policy.load(directory, optimizer=optimizer) and critic
