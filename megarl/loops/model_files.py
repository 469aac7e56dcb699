"""Read and check a model directory before any process is started."""

from __future__ import annotations

import math
from dataclasses import asdict

from transformers import PreTrainedTokenizerBase

from megarl.cluster.collectives import from_first_rank, gather
from megarl.config.evaluate import EvalConfig
from megarl.config.lora import LoraConfig
from megarl.config.model import read_model_config
from megarl.config.training import TrainingRoot
from megarl.data.tokenizer import apply_format, check_tokenizer, load_tokenizer
from megarl.errors import UserError
from megarl.models import load_architecture
from megarl.models.lora import adapted_modules, num_adapter_parameters, targets_of
from megarl.models.table import Architecture
from megarl.platform.layers import layer_implementations
from megarl.simulate.fit import free_bytes, least_memory, too_small
from megarl.trainer.interface import RankContext


def read_model(config: TrainingRoot | EvalConfig) -> tuple[Architecture, PreTrainedTokenizerBase, int]:
    """Return the architecture, a tokenizer that fits it, and the longest sequence in tokens."""
    path = config.model.path
    any_family = config.trainer.any_family if isinstance(config, TrainingRoot) else True
    architecture = load_architecture(path, any_family=any_family)
    tokenizer = load_tokenizer(path)
    apply_format(tokenizer, config.data.format)
    check_tokenizer(tokenizer, architecture.spec.vocab_size, config.data.format)
    return architecture, tokenizer, config.max_sequence_length(read_model_config(path))


def check_fits(config: TrainingRoot, architecture: Architecture, context: RankContext) -> None:
    """Check that the model fits into GPU memory before it is built; every rank calls it.

    Raises:
        UserError: the first violation of the first rank that has one.
    """
    device = context.platform.device
    if device.type == "cpu":
        return
    memory = least_memory(config, architecture, context.layout, context.at, context.rank)
    place = f"rank {context.rank}'s GPU {device.index}"
    problem = too_small(memory, config.offloads, free_bytes(device), place, config.trainer.backend)
    problems = [each for each in gather(problem) if each is not None]

    def check() -> None:
        if problems:
            raise UserError(problems[0])

    from_first_rank(check)


def memory_parts(config: TrainingRoot, architecture: Architecture, context: RankContext) -> dict[str, int]:
    """Return the bytes of this rank's weights, gradients, optimizer state etc., as `megarl plan` counts them.

    Empty for the torch backend, of whose shards there is no figure yet.
    """
    if config.trainer.backend == "torch":
        return {}
    memory = least_memory(config, architecture, context.layout, context.at, context.rank)
    return {name: size for name, size in asdict(memory).items() if size}


def describe_model(device: str, config: TrainingRoot, architecture: Architecture) -> list[str]:
    """Return log lines: the implementation of each kind of trainer layer, and the trained adapters."""
    ring, experts = config.parallel.context_attention == "ring", architecture.spec.moe is not None
    found = {
        "attention": "MegaRL's, over packed rows",
        "gated MLPs and fp32 RMS norms": "MegaRL's, as single steps",
        "head and loss": "MegaRL's kernels",
        "Adam": "torch, fused",
        "all else": "transformers",
    }
    if config.trainer.backend == "megatron":
        found = layer_implementations(device, config.model.dtype, experts=experts, ring=ring)
    layers = "layers: " + "; ".join(f"{kind}: {who}" for kind, who in found.items())
    return [layers] if config.lora is None else [layers, describe_lora(architecture, config.lora)]


def describe_lora(architecture: Architecture, lora: LoraConfig) -> str:
    """Return a line on the adapters: rank, layers, and their share of the model's parameters."""
    trained = num_adapter_parameters(adapted_modules(architecture, lora), lora.rank)
    whole = sum(math.prod(shape) for shape in architecture.hf_shapes().values())
    return (
        f"LoRA: rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(targets_of(architecture, lora))}: "
        f"{trained:,} parameters are trained, {trained / whole:.2%} of the model's {whole:,}"
    )
