"""Every configuration in configs/ is valid, and the quickstart's parts fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.config.data import ReasoningGymSource
from megarl.config.evaluate import EvalConfig
from megarl.config.grpo import GrpoConfig
from megarl.config.load import dump_config, load_config
from megarl.config.sft import SftConfig
from megarl.jobs import roots

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_parses_and_round_trips(file: Path, tmp_path: Path) -> None:
    kinds = [kind for name, kind in roots().items() if name in file.stem.split("_")]
    assert len(kinds) == 1, "a configuration's name says its command: quickstart_grpo, sft_jsonl"
    config = load_config(kinds[0], file, check_files=False)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(kinds[0], tmp_path / "config.yaml", check_files=False) == config


def test_quickstart_parts_fit_together() -> None:
    sft = load_config(SftConfig, CONFIGS / "quickstart_sft.yaml", check_files=False)
    grpo = load_config(GrpoConfig, CONFIGS / "quickstart_grpo.yaml", check_files=False)
    final = load_config(EvalConfig, CONFIGS / "quickstart_eval.yaml", check_files=False)
    assert sft.checkpoint.export_hf
    assert grpo.model.path == f"{sft.run.dir}/hf"
    assert final.model.path == f"{grpo.run.dir}/hf"
    assert final.data.held_out == grpo.data.held_out
    assert sft.data.format == grpo.data.format == final.data.format
    # The problems GRPO is judged by were in neither training set.
    judged = grpo.data.held_out
    assert isinstance(judged, ReasoningGymSource)
    for train in (sft.data.train, grpo.data.train):
        assert isinstance(train, ReasoningGymSource)
        assert train.seed + train.size <= judged.seed
