"""The engine's linear layer against float64, below and above the size from which oneDNN computes it."""

from __future__ import annotations

import pytest
import torch

from megarl.inference.cpu_linear import cpu_linear


@pytest.mark.parametrize("shape", [(64, 96), (1024, 512)])
@pytest.mark.parametrize("rows", [(1,), (37,), (2, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64_and_sees_what_is_written_into_the_weight(
    shape: tuple[int, int], rows: tuple[int, ...], with_bias: bool
) -> None:
    torch.manual_seed(1)
    memory = torch.randn(shape[0] * shape[1] + 7)
    weight = memory[7:].view(shape)  # inside a larger buffer, as a trainer's parameter is
    x, bias = torch.randn(*rows, shape[1]), torch.randn(shape[0]) if with_bias else None
    with torch.inference_mode():
        for _ in range(2):
            expected = torch.nn.functional.linear(
                x.double(), weight.double(), bias.double() if bias is not None else None
            )
            found = cpu_linear(x, weight, bias)
            assert found.shape == (*rows, shape[0])
            assert (found - expected).abs().max() < 2e-4
            memory.mul_(-1.5)  # the optimizer's step
