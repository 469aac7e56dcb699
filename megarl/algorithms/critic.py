"""PPO's critic: a model with a score head, saved and offloaded together with the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarl.cluster.collectives import barrier
from megarl.config.ppo import PpoConfig
from megarl.errors import UserError
from megarl.models import load_architecture
from megarl.trainer.build import build_scorer
from megarl.trainer.interface import Checkpointable, PendingSave, Trainer


def make_critic(config: PpoConfig, policy: Trainer) -> Trainer:
    """Build the critic under ``policy``'s parallel layout.

    Raises:
        UserError: critic.path has a different vocabulary size than model.path.
    """
    path = config.critic.path or config.model.path
    architecture = load_architecture(path, any_family=config.trainer.any_family)
    if architecture.spec.vocab_size != policy.architecture.spec.vocab_size:
        raise UserError(f"critic.path: {path} has a different vocabulary size than {config.model.path}")
    return build_scorer(
        config,
        policy.context,
        architecture,
        config.model.model_copy(update={"path": path}),
        config.critic.optimizer or config.optimizer,
        config.num_critic_steps,
    )


@dataclass(frozen=True, slots=True)
class ActorCritic(Checkpointable):
    """Policy and critic as one unit for checkpoints and memory offloading."""

    policy: Trainer
    critic: Trainer

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """Save the policy to ``directory`` and the critic to its subdirectory ``critic``."""
        self.policy.save(directory, optimizer=optimizer)
        if self.critic.context.is_first:
            (directory / "critic").mkdir()
        barrier()  # the directory must exist before any rank writes to it
        self.critic.save(directory / "critic", optimizer=optimizer)

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """Not implemented for two models; validation rejects checkpoint.async_save."""
        raise NotImplementedError

    def sleep(self, parts: Sequence[str]) -> None:
        """See Checkpointable."""
        self.policy.sleep(parts)
        self.critic.sleep(parts)

    def wake(self) -> None:
        """See Checkpointable."""
        self.policy.wake()
        self.critic.wake()

    def memory_bytes(self) -> dict[str, int]:
        """See Checkpointable; all of the critic is one part."""
        return {**self.policy.memory_bytes(), "critic": sum(self.critic.memory_bytes().values())}

    def load(self, directory: Path, *, optimizer: bool = True) -> bool:
        """See Checkpointable. The policy loads last; both files hold the same random states."""
        critic = self.critic.load(directory / "critic", optimizer=optimizer)
        return self.policy.load(directory, optimizer=optimizer) and critic
