"""Load the data of every kind of job from its root configuration, for loops and `megarl data inspect`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from megarl.config.evaluate import EvalConfig
from megarl.config.online import OnlineConfig
from megarl.config.preference import DpoConfig, RmConfig
from megarl.config.sft import SftConfig
from megarl.data.preference import Pairs, load_pairs
from megarl.data.prompts import PromptDataset, Split, load_prompts
from megarl.data.sft import SftDataset, load_demonstrations

_Data = TypeVar("_Data")


def load_sequences(
    config: SftConfig, tokenizer: PreTrainedTokenizerBase, longest: int, split: Split
) -> SftDataset:
    """Load demonstrations of at most ``longest`` tokens."""
    return load_demonstrations(config.data, tokenizer, max_sequence_length=longest, split=split)


def load_preference_pairs(
    config: DpoConfig | RmConfig, tokenizer: PreTrainedTokenizerBase, longest: int, split: Split
) -> Pairs:
    """Load pairs whose sequences (prompt and response) have at most ``longest`` tokens each."""
    return load_pairs(config.data, tokenizer, max_sequence_length=longest, split=split)


def load_problems(
    config: OnlineConfig | EvalConfig, tokenizer: PreTrainedTokenizerBase, longest: int, split: Split
) -> PromptDataset:
    """Load problems that leave room for the longest response within ``longest`` tokens."""
    room = longest - config.longest_response
    return load_prompts(config.data, tokenizer, max_prompt_tokens=room, split=split)


def load_splits(
    load: Callable[[Any, PreTrainedTokenizerBase, int, Split], _Data],
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
) -> tuple[_Data, _Data | None]:
    """Load training and, if configured, held-out examples."""
    train = load(config, tokenizer, longest, "train")
    return train, None if config.data.held_out is None else load(config, tokenizer, longest, "held_out")
