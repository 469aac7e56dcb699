"""Score models: a language model with a score head, which gives one number per token.

This is transformers' ``AutoModelForSequenceClassification`` with one label: ``score.weight`` [1, H] instead
of ``lm_head.weight``, applied to the hidden states after the final norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megarl.errors import UserError
from megarl.models.table import Architecture, Place, Rule

SCORE = "score.weight"
_HEADS = ("lm_head.",)


def score_architecture(architecture: Architecture) -> Architecture:
    """Return the table of ``architecture`` with a score head, without engine parameters."""
    spec = replace(architecture.spec, tied_embeddings=False, score_head=True)
    rules = []
    for rule in architecture.rules:
        if rule.hf.startswith(_HEADS):
            continue
        trainer = tuple(place for place in rule.trainer if place.param != "output_layer.weight")
        rules.append(replace(rule, trainer=trainer, engine=()))
    rules.append(Rule(SCORE, (1, spec.hidden_size), (Place(SCORE, "last"),), ()))
    return Architecture(spec, tuple(rules), (*architecture.ignored, *_HEADS))


def initial_score(architecture: Architecture, seed: int) -> dict[str, torch.Tensor]:
    """Initialise a score head: normal with the family's standard deviation, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, architecture.spec.hidden_size)
    return {SCORE: torch.empty(shape).normal_(0.0, architecture.spec.init_std, generator=generator)}


def score_config(config: dict[str, Any]) -> dict[str, Any]:
    """Convert a language model's config.json to that of a sequence classifier with one label.

    transformers scores the last token that is not ``pad_token_id``. If the pad token is the EOS token, it
    would score another token than training did; then ``pad_token_id`` is removed, and transformers supports
    batch size 1 only.

    Raises:
        UserError: the configuration does not name the model class.
    """
    names = config.get("architectures") or []
    if len(names) != 1 or not str(names[0]).endswith(("ForCausalLM", "ForSequenceClassification")):
        raise UserError(f"config.json: architectures {names} names no language model to put a score head on")
    base = str(names[0]).removesuffix("ForCausalLM").removesuffix("ForSequenceClassification")
    changed = dict(config) | {
        "architectures": [f"{base}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    ends = config.get("eos_token_id")
    if config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
        changed["pad_token_id"] = None
    return changed
