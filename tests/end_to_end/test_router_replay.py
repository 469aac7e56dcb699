"""`megarl grpo` on a MoE model: trains with the engine's experts; the log counts rerouted tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.harness import GRPO, Command, column, make_model, run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def experts(workspace: Path) -> Path:
    """As the tests' other model, with four experts in every layer."""
    return make_model(workspace / "experts", intermediate=64, num_experts=4)


def test_grpo_trains_on_the_engines_choices(workspace: Path, experts: Path) -> None:
    directory = workspace / "replay"
    config = write_config(
        workspace / "replay.yaml",
        GRPO,
        run_dir=directory,
        model=experts,
        rollout={"router_replay": True},
        router={"aux_loss_coef": 0.01},
        training={"num_steps": 3},
        parallel={"num_processes": 2, "expert_parallel_size": 2},
    )
    run("grpo", "--config", config, output=workspace / "replay.log")
    assert "experts: torch (one expert after another)" in (directory / "console.log").read_text()
    rerouted = column(directory, "router_replay_rerouted")
    assert len(rerouted) == 3
    assert max(rerouted) < 0.01, "both sides compute in fp32: only near ties differ"
    assert max(column(directory, "logprob_abs_diff_max")) < 1e-3
    assert min(column(directory, "router_aux_loss")) > 1.9, "equal loads would give the experts per token"
    assert min(column(directory, "expert_load_max")) >= 1.0


def test_a_dense_model_has_no_choices_to_replay(workspace: Path, model: Path) -> None:
    config = write_config(
        workspace / "dense_replay.yaml",
        GRPO,
        run_dir=workspace / "dense_replay",
        model=model,
        rollout={"router_replay": True},
    )
    command = Command("grpo", "--config", config, output=workspace / "dense_replay.log")
    assert command.wait(300) == 2
    assert "rollout.router_replay: qwen3 has no experts" in command.output
