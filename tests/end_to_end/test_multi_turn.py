"""`megarl grpo` on a game of several turns: real engines and trainer, one policy on every sampled token."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.harness import GRPO, column, read_lines, read_steps, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GAME = {
    "source": "environment",
    "environment": {"kind": "number_guessing", "low": 1, "high": 9, "max_guesses": 4, "turn_penalty": 0.1},
    "size": 64,
}


@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_grpo_on_number_guessing(tmp_path: Path, model: Path, backend: str) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        GRPO,
        run_dir=tmp_path / "run",
        model=model,
        data={
            "train": {**GAME, "seed": 1},
            "held_out": {**GAME, "seed": 1000},
            "format": {"chat_template": True},
        },
        rollout={
            "max_new_tokens": 64,
            "environments": {"max_new_tokens_per_turn": 6},
            "engine": {"backend": backend},
        },
        packing={"max_tokens_per_microbatch": 512, "max_sequence_length": 256},
        logging={"samples_per_step": 16},
        training={"num_steps": 2},
    )
    output = run("grpo", "--config", config, output=tmp_path / "log")
    steps = read_steps(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2]
    # Engine and trainer agree on every sampled token, those after observations included.
    assert max(column(tmp_path / "run", "logprob_abs_diff_max")) < 1e-4, output
    assert min(column(tmp_path / "run", "turns_mean")) > 1
    for step in steps:
        assert step["episodes_dropped"] == step["groups_dropped"] == 0
        samples = read_lines(tmp_path / "run" / "samples" / f"step_{step['step']}.jsonl")
        assert len(samples) == 16
        for sample in samples:
            tokens, logprobs = sample["response_tokens"], sample["rollout_logprobs"]
            assert len(tokens) == len(logprobs)
            turns = sample["turns"]
            assert sum(turn["sampled"] + turn["observed"] for turn in turns) == len(tokens)
            assert sum(turn["sampled"] for turn in turns) == sample["num_response_tokens"]
            assert sum(turn["reward"] for turn in turns) == pytest.approx(sample["reward"])
            assert len(turns) <= 4
            start = 0
            for turn in turns:
                end = start + turn["sampled"]
                assert all(value != 0 for value in logprobs[start:end])
                assert all(value == 0 for value in logprobs[end : end + turn["observed"]])
                start = end + turn["observed"]
        lengths = [sample["num_response_tokens"] for sample in samples]
        assert step["response_length_mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert any(len(sample["turns"]) > 1 for sample in samples)
