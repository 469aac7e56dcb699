"""Records with arrays: compared by value, pickled as buffers."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from megarl.inference.interface import GeneratedResponse
from megarl.records import Prompt, Sample, token_ids
from tests.oracles.samples import response_mask


def response(length: int = 3, **changes: object) -> GeneratedResponse:
    ids, logprobs = np.arange(length, dtype=np.int32), np.full(length, -0.5, np.float32)
    made = GeneratedResponse("r", ids, logprobs, "stop", 4, version_spans=[(4, 1), (5, length - 1)])
    return replace(made, **changes)  # type: ignore[arg-type]


def test_records_are_equal_where_their_values_are() -> None:
    assert response() == response()
    assert response() != response(token_ids=token_ids([0, 1, 3]))
    assert response() != response(token_ids=token_ids([0, 1]))
    assert response() != response(logprobs=np.float32([-0.5, -0.5, -0.25]))
    assert response() != response(version_spans=[(4, 3)])
    assert response() == response(experts=np.zeros((1, 1, 1), np.int16)), "not compared"
    assert response() != "r"
    prompt = Prompt(1, "p", token_ids([1, 2]), {"answer": "3"})
    assert prompt == Prompt(1, "p", token_ids([1, 2]), {"answer": "3"})
    assert prompt != Prompt(1, "p", token_ids([1, 2]), {"answer": "4"})
    assert [prompt] == [replace(prompt)]


def test_a_token_costs_its_bytes_when_it_crosses_processes() -> None:
    sizes = []
    for length in (1000, 11_000):
        data = pickle.dumps(response(length))
        sizes.append(len(data))
        back = pickle.loads(data)
        assert back == response(length)
        assert (back.token_ids.dtype, back.logprobs.dtype) == (np.int32, np.float32)
    assert sizes[1] - sizes[0] == pytest.approx(10_000 * (4 + 4), abs=32)  # and a longer number or two


def test_samples_of_one_prompt_share_its_ids_after_pickling() -> None:
    prompt = Prompt(0, "p", token_ids(range(1000)))
    samples = [
        Sample(0, prompt.token_ids, token_ids([1]), np.float32([-1.0]), 0, "stop", reward=float(i))
        for i in range(10)
    ]
    data = pickle.dumps((prompt, samples))
    assert len(data) < 2 * 4 * 1000
    prompt, samples = pickle.loads(data)
    assert all(sample.prompt_ids is prompt.token_ids for sample in samples)
    assert samples[3].num_tokens == 1001 and response_mask(samples[3]) == [1]
