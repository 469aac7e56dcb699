"""Test whether a model's requests can be packed into one row, with its own weights.

A model can mix tokens where no configuration says so (a convolution, positions that it counts itself). So the
same tokens are computed packed, with what the engine does in a step, and alone, as transformers does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megarl.inference.hf.attention import NAME
from megarl.inference.hf.runner import Decoding, PagedRunner, Runner
from megarl.inference.interface import GenerateRequest, SamplingConfig
from megarl.records import token_ids

_LENGTHS = (7, 4, 11)
_MORE = 3  # tokens decoded after the first pass
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}  # of the largest logit: rounding stays far below


@torch.inference_mode()
def packing_error(model: Any, runner: Runner) -> str | None:
    """Return what goes wrong when requests share a forward pass, None if nothing; empties the runner."""
    if not isinstance(runner, PagedRunner):
        return None
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draws = np.random.default_rng(0).integers(0, vocabulary, (len(_LENGTHS), max(_LENGTHS) + _MORE))
    packed = list(_packed(runner, draws))
    runner.clear()
    try:
        model.set_attn_implementation("eager")
        alone = _alone(model, draws)
    finally:
        model.set_attn_implementation(NAME)
    largest = max(float(row.abs().max()) for row in alone)
    worst = max(float((one - other).abs().max()) for one, other in zip(packed, alone, strict=True))
    if worst <= _TOLERANCE.get(alone[0].dtype, 6e-2) * max(largest, 1e-6):
        return None
    return f"logits of {type(model).__name__} differ by {worst:.2g} when requests share a forward pass"


def _packed(runner: PagedRunner, draws: np.ndarray) -> Iterator[torch.Tensor]:
    sampling = SamplingConfig(1.0, (), False)
    those = []
    for number, length in enumerate(_LENGTHS):
        tokens = token_ids(draws[number, :length])
        request = GenerateRequest(f"check-{number}", tokens, _MORE, seed=0)
        those.append(Decoding(request, sampling, 0, tokens.tolist(), length + _MORE))
    first, rest = those[:1], those[1:]  # one is decoded beside the prompts of the others
    runner.admit(first[0])
    yield from runner.compute([], first)
    for one in rest:
        runner.admit(one)
    _extend(runner, first, draws)
    yield from runner.compute(first, rest)
    for _ in range(_MORE - 1):
        _extend(runner, those, draws)
        yield from runner.compute(those, [])
    runner.release(those, keep=False)


def _extend(runner: PagedRunner, those: list[Decoding], draws: np.ndarray) -> None:
    for one in those:
        number = int(one.request.request_id.removeprefix("check-"))
        one.tokens.append(int(draws[number, len(one.tokens)]))
        runner.extend(one)


def _alone(model: Any, draws: np.ndarray) -> list[torch.Tensor]:
    """Logits in the order of :func:`_packed`."""
    device = model.get_input_embeddings().weight.device
    logits = []
    for row, length in zip(draws, _LENGTHS, strict=True):
        ids = torch.as_tensor(row[None, : length + _MORE], device=device)
        logits.append(model(input_ids=ids, use_cache=False).logits[0])
    places = [(0, 0), (0, 1), (1, 0), (2, 0)]
    places += [(number, more + (number == 0)) for more in range(1, _MORE) for number in range(len(_LENGTHS))]
    return [logits[number][_LENGTHS[number] - 1 + more] for number, more in places]
