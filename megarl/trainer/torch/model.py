"""Any decoder of transformers, without its weights, ending in hidden states instead of logits.

The model is built on no device at all ("meta"); what this rank holds of it is allocated afterwards, when
tensor and data parallelism have cut it (:mod:`megarl.trainer.torch.tensor_parallel`, FSDP2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from megarl.config.model import ModelConfig
from megarl.errors import UserError
from megarl.losses.hidden import Head
from megarl.models.score import SCORE
from megarl.records import PackedBatch
from megarl.trainer.torch import attention
from megarl.trainer.torch.fused_layers import fuse

_PACKABLE = {"full_attention", "sliding_attention"}
"""Kinds of layers whose tokens see others by attention alone; all others carry a state along the row."""
PREFIX = "lm."
"""Prefix of parameter names in transformers' models."""


class Decoder(nn.Module):
    """A language model of transformers, or its body under a score head; called with a microbatch.

    ``rows``: whether its sequences lie in rows of their own, since its layers carry a state from token to
    token. They are padded at their ends, where a causal model does not look.
    """

    def __init__(self, lm: Any, score_head: bool) -> None:
        super().__init__()
        config = lm.config
        kinds = set(getattr(config, "layer_types", None) or _PACKABLE)
        self.rows = not kinds <= _PACKABLE or lm._is_stateful or not lm._supports_attention_backend
        self.lm = lm
        self.tied = score_head is False and lm.lm_head.weight is lm.get_input_embeddings().weight
        self.logit_scale = _logit_scale(config)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        if score_head:
            lm.lm_head = None
            self.score = nn.Linear(config.hidden_size, 1, bias=False, device="meta", dtype=lm.dtype)

    @property
    def body(self) -> Any:
        """Module that maps token ids to hidden states."""
        return self.lm.base_model

    @property
    def family(self) -> str:
        """The model_type of config.json."""
        return str(self.lm.config.model_type)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states [T, H] after the final norm, or [1, T, H]: FSDP wants no view of what is computed."""
        ids, positions = batch.token_ids, batch.position_ids
        if not self.rows:
            return self._hidden(ids[None], positions[None])
        index, back = _as_rows(batch.cu_seqlens)
        count = torch.arange(index.shape[1], device=ids.device).expand(index.shape)
        return self._hidden(ids[index], count).flatten(0, 1).index_select(0, back)

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self.body(input_ids=ids, position_ids=positions, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def head_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, H] and bias [V] of the head, as they are now: whole, or this rank's rows."""
        head = self.lm.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return layers_of(self.body)


def layers_of(body: nn.Module) -> nn.ModuleList:
    """The list of blocks in a decoder; UserError where there is none, or not one alone."""
    found = [each for each in body.children() if isinstance(each, nn.ModuleList)]
    if len(found) != 1:
        raise UserError(
            f"model.path: {type(body).__name__} has {len(found)} lists of layers, not one: the torch backend "
            "does not know its blocks"
        )
    return found[0]


def at_head(
    hidden: torch.Tensor, head: Head, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, Head]:
    """Hidden states [N, H] and head so that their product alone is the logits: scale and bias are in them."""
    if scale != 1.0:
        hidden = hidden * scale
    if bias is None:
        return hidden, head
    hidden = torch.cat((hidden, hidden.new_full((hidden.shape[0], 1), 1.0)), dim=1)
    return hidden, Head(torch.cat((head.weight, bias[:, None]), dim=1), head.vocab_start, head.group)


def build_decoder(
    model: ModelConfig,
    dtype: torch.dtype,
    *,
    score_head: bool = False,
    recompute: Literal["off", "selective", "full"] = "off",
) -> Decoder:
    """The model of ``model.path`` on device "meta", its buffers on the host.

    Raises:
        UserError: transformers cannot build it, or this backend cannot train it.
    """
    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        name = attention.RECOMPUTED if recompute == "selective" else attention.NAME
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=name, trust_remote_code=model.trust_remote_code
            )
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"model.path: {model.path}: {str(error).splitlines()[0]}") from error
    check_decoder(lm, model.path)
    decoder = Decoder(lm, score_head)
    if decoder.rows:
        lm.set_attn_implementation("sdpa" if lm._supports_sdpa else "eager")
    lm.eval()  # no dropout, as with the other backend
    if not torch.cuda.is_available() and lm._can_set_experts_implementation():
        lm.set_experts_implementation("eager")  # grouped products are for a GPU
    for embedding in (each for each in lm.modules() if isinstance(each, nn.Embedding)):
        embedding.padding_idx = None  # a padding token in a response is learned like any other
    _fill_buffers(lm)
    fuse(lm)
    if recompute == "full":
        for layer in decoder.layers():
            layer.forward = _recomputed(layer.forward)
    return decoder


def check_decoder(lm: Any, path: str) -> None:
    """Refuse, by a UserError, what would be computed otherwise than transformers computes it."""
    name = type(lm).__name__
    if not hasattr(lm, "lm_head"):
        raise UserError(f"model.path: {path}: {name} has no lm_head, which the torch backend needs")
    if any(rope.get("rope_type") == "dynamic" for rope in _ropes(lm.config)):
        raise UserError(
            f"model.path: {path}: rope_type dynamic depends on the longest sequence of a microbatch"
        )


def check_longest(decoder: Decoder, longest: int) -> None:
    """Raise UserError if a sequence may change the rotary frequencies of its whole microbatch (LongRoPE)."""
    for rope in _ropes(decoder.lm.config):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and original is not None and longest > original:
            why = (
                f"the frequencies of {decoder.family} change beyond {original} tokens, for its neighbours too"
            )
            raise UserError(f"packing.max_sequence_length: {why} (got {longest})")


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary embedding's parameters; some models have them by kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    return [given, *(each for each in given.values() if isinstance(each, dict))]


def _logit_scale(config: Any) -> float:
    """Return the factor of the logits: multiplied (Cohere) or divided (Granite)."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        return float(scale)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / float(divisor)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False)


def _fill_buffers(lm: Any) -> None:
    """Compute the buffers that no checkpoint has (rotary frequencies, scales), on the host."""
    with torch.no_grad():
        for module in lm.modules():
            own = dict(module.named_buffers(recurse=False))
            for name, buffer in own.items():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            if set(own) & module._non_persistent_buffers_set:
                lm._init_weights(module)


def _as_rows(cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token indices [S, longest] of sequences in rows, ends repeated, and where in them tokens are [T]."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    steps = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    index = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    return index, (steps < lengths[:, None]).flatten().nonzero().flatten()


def named_tensors(decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and the buffers that checkpoints have, by transformers' names; tied ones once."""
    persistent = set(decoder.state_dict(keep_vars=True))
    for name, param in decoder.named_parameters():
        yield name.removeprefix(PREFIX), param
    for name, buffer in decoder.named_buffers():
        if name in persistent:
            yield name.removeprefix(PREFIX), buffer


assert SCORE == "score.weight", "the name that Decoder gives it"
