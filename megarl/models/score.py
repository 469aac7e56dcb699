"""A model that gives each token a number: the body of a language model with a row of weights for a head.

It is what transformers calls ``AutoModelForSequenceClassification`` with one label: ``score.weight`` [1, H]
in the place of ``lm_head.weight``, applied to the hidden states after the final norm.
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
    """The table of ``architecture`` with a score head; no engine has such a model."""
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
    """The head of a model that has none yet: normal with the family's deviation, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, architecture.spec.hidden_size)
    return {SCORE: torch.empty(shape).normal_(0.0, architecture.spec.init_std, generator=generator)}


def score_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a language model as that of its sequence classification model with one label.

    transformers takes the score of the last token that is not ``pad_token_id``. Where that is the token
    that ends responses, it would take another token than training did; it is left out then, and transformers
    scores one sequence at a time.

    Raises:
        UserError: the configuration does not say of which class the model is.
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
