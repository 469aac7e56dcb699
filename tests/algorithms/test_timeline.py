"""A rank that is slow in one phase, as its timeline shows it: two real ranks of GRPO."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.metrics.timeline import read_timeline
from megarl.platform import spans
from tests.algorithms import learner_ranks
from tests.trainer.world import world

pytestmark = pytest.mark.slow


def test_the_straggler_works_while_the_other_rank_waits_for_its_gradients(
    model_dirs: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "timeline").mkdir()
    parallel = {"num_processes": 2}
    arguments = (model_dirs["qwen3-tied"], parallel, tmp_path / "timeline")
    none, slept = world(2).run(learner_ranks.timeline, *arguments, parallel=parallel)
    assert none == 0 < slept
    lines = read_timeline(tmp_path, [2], 2**20)[2]

    def seconds(rank: int, name: str) -> float:
        return sum(end - begin for _, found, begin, end in lines[rank]["spans"] if found == name)

    # Half of it: the exchange itself takes long where the machine is busy.
    assert seconds(0, spans.REDUCTION) - seconds(1, spans.REDUCTION) > 0.5 * slept
    assert seconds(1, "forward_backward") - seconds(1, spans.REDUCTION) > slept
    assert abs(seconds(0, "train") - seconds(1, "train")) < 0.5 * slept, "phases alone hide the straggler"
    for line in lines.values():
        names = {name for depth, name, _, _ in line["spans"] if depth == 0}
        assert "train" in names
