"""MegaRL's kernels, launched by megarl._C on the fake device, give what the CPU's ops give."""

from __future__ import annotations

import pytest

from tests.fake_cuda.conftest import FakeGpu, megarl_extension

PROGRAM = "programs/kernels.py"
COMPARISONS = {
    "token_logprob": 40,
    "linear_token_logprob": 4,
    "vocab_kl": 48,
    "segments": 32,
    "policy_loss": 26,
    "packing": 40,
}

pytestmark = pytest.mark.skipif(
    megarl_extension() is None, reason="megarl._C is not built for the CUDA environment"
)


@pytest.mark.parametrize("family", COMPARISONS)
def test_kernels_agree_with_the_cpu(fake_gpu: FakeGpu, family: str) -> None:
    (result,) = fake_gpu.run(PROGRAM, family)
    assert result["wrong"] == {}
    assert result["compared"] >= COMPARISONS[family]
    counts = fake_gpu.session.counts()
    assert counts["launches run on the host"] >= COMPARISONS[family] // 4


def test_kernels_agree_where_work_is_delayed(fake_gpu: FakeGpu) -> None:
    (result,) = fake_gpu.run(PROGRAM, "segments", lazy=True)
    assert result["wrong"] == {}


def test_every_kernel_of_the_extension_has_a_host_implementation(fake_gpu: FakeGpu) -> None:
    (names,) = fake_gpu.run(PROGRAM, "registered")
    assert len(names["kernels"]) > 60
    assert names["kernels"] == names["implementations"]


def test_device_assert_reaches_the_host(fake_gpu: FakeGpu) -> None:
    (messages,) = fake_gpu.run(PROGRAM, "illegal_index", "none", "index", "none")
    assert messages[0] == "nothing"
    assert "device-side assert triggered" in messages[1]
    assert "device-side assert triggered" in messages[2]  # as on a device, for the rest of the process
