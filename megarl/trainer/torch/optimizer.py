"""AdamW over a rank's local tensors, its schedule, and the norm that gradients are clipped to.

Decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101. Parameters in 16 bits have a master
copy in fp32, which the step changes and rounds back.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megarl.config.optimizer import OptimizerConfig
from megarl.platform import spans
from megarl.trainer.host_copies import Put
from megarl.trainer.torch.shards import Part

_TINY = 1e-6  # beside a norm that gradients are divided by


class Optimizer:
    """AdamW on ``tensors`` (by name, this rank's parts), stepped with gradients by name."""

    def __init__(
        self,
        config: OptimizerConfig,
        tensors: Mapping[str, torch.Tensor],
        parts: Mapping[str, Part],
        total_steps: int,
        device: torch.device,
    ) -> None:
        """``device`` is the ranks' own, on which they exchange numbers; ``tensors`` may be on the host."""
        self._device = device
        self.config, self._tensors, self._parts = config, tensors, parts
        self.num_steps = 0
        self.decay_steps = max(total_steps, config.lr_warmup_steps + 1)
        self.masters = {
            name: torch.nn.Parameter(tensor if tensor.dtype == torch.float32 else tensor.float())
            for name, tensor in tensors.items()
        }
        groups: list[dict[str, Any]] = [
            {
                "params": [self.masters[n] for n in tensors if self._decays(n)],
                "weight_decay": config.weight_decay,
            },
            {"params": [self.masters[n] for n in tensors if not self._decays(n)], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,  # on a CPU a seventh of the time, too
        )

    def _decays(self, name: str) -> bool:
        return len(self._parts[name].whole) > 1 and not name.endswith("bias")

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.config, self.num_steps, self.decay_steps)

    def norm(self, gradients: Mapping[str, torch.Tensor]) -> float:
        """Of the gradients of all ranks, each element counted once."""
        squares = [grad.square().sum() / self._parts[name].copies for name, grad in gradients.items()]
        total = torch.stack(squares).sum().to(self._device)
        with spans.span(spans.REDUCTION):
            dist.all_reduce(total)
        return math.sqrt(float(total))

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor], norm: float) -> None:
        """Clip by ``norm``, update, and go on in the schedule. ``gradients`` (fp32) are changed."""
        bound = self.config.max_grad_norm
        if bound and (scale := bound / (norm + _TINY)) < 1.0:
            torch._foreach_mul_(list(gradients.values()), scale)
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate
        for name, master in self.masters.items():
            master.grad = gradients[name]
        self.adam.step()
        for name, master in self.masters.items():
            master.grad = None
            if (tensor := self._tensors[name]).dtype != torch.float32:
                tensor.copy_(master)
        self.num_steps += 1

    # --- state --------------------------------------------------------------------------------

    def initialize_state(self) -> None:
        """Have the state that AdamW makes in its first step, as it is before it."""
        for master in self.masters.values():
            if not self.adam.state[master]:
                self.adam.state[master] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                }

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(parameter, kind, tensor) of what has the parameter's shape: moments, and masters if there are."""
        for name, master in self.masters.items():
            if self._tensors[name].dtype != torch.float32:
                yield name, "master", master.detach()
            state = self.adam.state[master]
            for kind in ("exp_avg", "exp_avg_sq"):
                yield name, kind, state[kind]

    def movable(self) -> Iterator[tuple[Hashable, torch.Tensor, Put]]:
        """Masters and moments for HostCopies: a lasting name, the tensor, and what replaces it."""
        for name, master in self.masters.items():
            if self._tensors[name].dtype != torch.float32:
                yield (name, "master"), master.data, partial(setattr, master, "data")
            for kind, value in self.adam.state[master].items():
                yield (name, kind), value, partial(self.adam.state[master].__setitem__, kind)

    @torch.no_grad()
    def read_masters(self) -> None:
        """Have the masters of weights that were changed otherwise than by a step."""
        for name, master in self.masters.items():
            if (tensor := self._tensors[name]).dtype != torch.float32:
                master.copy_(tensor)

    def go_on_after(self, count: int) -> None:
        """Of the schedule and of AdamW's corrections of its moments, ``count`` steps were taken."""
        self.num_steps = count
        for state in self.adam.state.values():
            state["step"].fill_(count)


def learning_rate(config: OptimizerConfig, step: int, decay_steps: int) -> float:
    """After ``step`` optimizer steps: linear warm-up from 0, then constant, linear or cosine to min_lr."""
    warmup = config.lr_warmup_steps
    if warmup and step <= warmup:
        return config.lr * step / warmup
    if config.lr_schedule == "constant":
        return config.lr
    if step > decay_steps:
        return config.min_lr
    ratio = (step - warmup) / (decay_steps - warmup)
    left = 1.0 - ratio if config.lr_schedule == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1.0)
    return config.min_lr + left * (config.lr - config.min_lr)
