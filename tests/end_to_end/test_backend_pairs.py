"""Trainer and engine backends in pairs: `megarl grpo` learns the same with either trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import GRPO, column, read_lines, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_the_same_with_either_trainer(tmp_path: Path, sft_run: FinishedRun, ranks: int) -> None:
    """The engine's noise depends on seeds and positions alone: equal weights draw equal tokens."""
    runs = {}
    for trainer in ("megatron", "torch"):
        config = write_config(
            tmp_path / f"{trainer}.yaml",
            GRPO,
            run_dir=tmp_path / trainer,
            model=sft_run.dir / "hf",
            trainer={"backend": trainer},
            rollout={"engine": {**GRPO["rollout"]["engine"], "backend": "hf"}},
            parallel={"num_processes": ranks},
            logging={"samples_per_step": 16},
        )
        output = run("grpo", "--config", config, output=tmp_path / f"{trainer}.log")
        runs[trainer] = tmp_path / trainer
        assert max(column(runs[trainer], "logprob_abs_diff_max")) < 1e-4, output
        moved = max(column(runs[trainer], "weights_bytes_moved"))
        assert (moved == 0) == (ranks == 1 or trainer == "megatron"), "whole parameters are aliased"
    for step in range(1, 5):
        one, other = (
            read_lines(runs[name] / "samples" / f"step_{step}.jsonl") for name in ("megatron", "torch")
        )
        assert len(one) == 16
        assert [s["response_tokens"] for s in one] == [s["response_tokens"] for s in other], step
    assert max(column(runs["torch"], "grad_norm")) > 0.01, "something was learned"
    for name in ("loss", "grad_norm", "reward_mean"):
        expected = column(runs["megatron"], name)
        assert column(runs["torch"], name) == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_the_torch_trainer_with_vllm(tmp_path: Path, sft_run: FinishedRun) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        GRPO,
        run_dir=tmp_path / "run",
        model=sft_run.dir / "hf",
        trainer={"backend": "torch"},
        training={"num_steps": 2},
    )
    output = run("grpo", "--config", config, output=tmp_path / "log")
    assert max(column(tmp_path / "run", "logprob_abs_diff_max")) < 1e-4, output
    assert max(column(tmp_path / "run", "weights_bytes_moved")) == 0, "aliased, fused as vLLM fuses them"
