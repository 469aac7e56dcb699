"""The full-size recipes: valid, possible for their models, and with the stated free memory."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest
import torch

from megarl.cli import main
from megarl.config.grpo import GrpoConfig
from megarl.config.load import dump_config, load_config
from megarl.config.plan import PlanConfig
from megarl.config.training import TrainingRoot
from megarl.jobs import roots
from megarl.models import load_architecture
from megarl.models.layout_checks import engine_problems, layout_problems
from megarl.simulate.run import _notes, simulate
from megarl.trainer.torch.model import build_decoder
from megarl.trainer.torch.tensor_parallel import check_plan

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "recipes"
RECIPES = sorted(file for file in FOLDER.glob("*.yaml") if not file.stem.startswith("plan_"))
QUICK = ("grpo_qwen3_8b_8xh100",)


def load(file: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingRoot:
    monkeypatch.chdir(FOLDER.parents[1])  # their models are relative to the repository
    config = load_config(roots()[file.stem.split("_")[0]], file, check_files=False)
    assert isinstance(config, TrainingRoot)
    return config


def plan_of(file: Path) -> PlanConfig:
    kind, name = file.stem.split("_", 1)
    name = name if kind == "grpo" else file.stem
    return load_config(PlanConfig, FOLDER / f"plan_{name}.yaml", check_files=False)


def test_every_plan_has_its_recipe() -> None:
    plans = {file.stem.removeprefix("plan_") for file in FOLDER.glob("plan_*.yaml")}
    assert plans == {recipe.stem.removeprefix("grpo_") for recipe in RECIPES}
    assert len(RECIPES) >= 8


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_is_valid_and_its_layout_possible(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(file, monkeypatch)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(type(config), tmp_path / "config.yaml", check_files=False) == config
    assert f"{config.parallel.num_processes}xh100" in file.stem
    if config.trainer.backend == "torch":  # by the plan that transformers has for the model
        decoder = build_decoder(config.model, torch.bfloat16)
        if (size := config.parallel.tensor_parallel_size) > 1:
            check_plan(decoder, size)
    else:
        assert list(layout_problems(load_architecture(config.model.path), config.parallel)) == []


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_plan_is_of_the_same_layout(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, plan = load(file, monkeypatch), plan_of(file)
    assert plan.model.path == config.model.path
    for name in type(plan.trainer).model_fields:
        if name in type(config.parallel).model_fields:
            assert getattr(plan.trainer, name) == getattr(config.parallel, name), name
    for name in type(config.trainer).model_fields:
        assert getattr(plan.trainer, name) == getattr(config.trainer, name), name
    if config.trainer.backend == "megatron":
        assert plan.trainer.distributed_optimizer == config.optimizer.distributed
    assert plan.dtypes.parameters == config.model.dtype
    assert plan.workload.tokens_per_microbatch == config.packing.max_tokens_per_microbatch
    assert plan.workload.sequence_length == config.packing.max_sequence_length
    if isinstance(config, GrpoConfig):
        engine = config.rollout.engine
        assert plan.engine.tensor_parallel_size == engine.tensor_parallel_size
        assert plan.engine.expert_parallel == engine.expert_parallel
        assert list(engine_problems(load_architecture(config.model.path), engine)) == []
        assert plan.engine.kv_cache_gib == engine.kv_cache_gib
        assert plan.weights.offload == config.weights.offload
        if plan.engine.data_parallel_size == 1:  # the plan's engines are on every GPU, and so are the run's
            ranks = engine.tensor_parallel_size * engine.data_parallel_size
            assert ranks == config.parallel.num_processes
            assert config.parallel.num_processes == 8 or config.launcher == "ray"
        else:
            assert "are not there yet" in file.read_text()
            notes = _notes(plan, load_architecture(config.model.path).spec)
            assert any("no data_parallel_size that splits experts" in note for note in notes)


@pytest.mark.parametrize("file", [f for f in RECIPES if "qwen3_8b" in f.stem], ids=lambda file: file.stem)
def test_a_plan_of_the_run_itself_has_the_same_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`megarl plan` of the run's YAML, and of the plan written for it by hand."""
    count = str(load(file, monkeypatch).parallel.num_processes)
    kind, name = file.stem.split("_", 1)
    by_hand = FOLDER / f"plan_{name if kind == 'grpo' else file.stem}.yaml"
    found = {}
    for each, gpus in ((file, []), (by_hand, ["--gpus", count])):
        output = tmp_path / "plan.json"
        assert main(["plan", str(each), *gpus, "--json", str(output), "gpu.memory_gib=141"]) == 0
        found[each] = json.loads(output.read_text())
        assert found[each]["config"]["gpu"]["memory_gib"] == 141
    assert found[file]["memory"] == found[by_hand]["memory"]
    assert found[file]["free_bytes"] == found[by_hand]["free_bytes"]
    assert ("transfer" in found[file]) == (kind == "grpo")


def test_a_plan_without_a_number_of_gpus_and_of_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(FOLDER / "plan_qwen3_8b_8xh100.yaml")]) == 2
    assert "--gpus: required" in capsys.readouterr().err
    assert main(["plan", str(FOLDER.parent / "quickstart_eval.yaml")]) == 2
    assert "training: required but missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[] if f.stem in QUICK else [pytest.mark.slow], id=f.stem) for f in RECIPES],
)
def test_it_fits_with_what_the_comment_says_is_left(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(file, monkeypatch)
    gc.disable()
    try:
        simulation = simulate(plan_of(file), config.parallel.num_processes)
    finally:
        gc.enable()
    trainer = simulation.gpus[: config.parallel.num_processes]
    peak = max(simulation.peak(gpu) for gpu in trainer) / 2**30
    [said] = re.findall(r"([\d.]+) (?:are )?(?:left )?of 80 less 6 reserved", file.read_text())
    assert 80 - 6 - peak == pytest.approx(float(said), abs=0.051)
    assert peak < 74
