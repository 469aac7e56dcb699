"""Impossible layouts are rejected from config.json alone, and possible ones suggested."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from megarl.cli import main
from megarl.config.parallel import ParallelConfig
from megarl.config.rollout import EngineConfig
from megarl.config.router import RouterConfig
from megarl.config.sft import SftConfig
from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.models import load_architecture
from megarl.models.divisibility import division_problems
from megarl.models.layout_checks import (
    check_engine,
    check_layout,
    check_router,
    layout_problems,
    nearest_layouts,
)
from tests.models.test_families import EXPERTS, SIZES

SMOLLM2 = SIZES | {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}


def architecture(directory: Path, config: transformers.PretrainedConfig) -> Any:
    config.save_pretrained(directory)
    return load_architecture(directory)


def parallel(ranks: int, **sizes: Any) -> ParallelConfig:
    names = {
        f"{key}_parallel_size" if key not in ("sequence_parallel",) else key: v for key, v in sizes.items()
    }
    return ParallelConfig(num_processes=ranks, **names)


def test_all_violations_and_what_would_do(tmp_path: Path) -> None:
    table = architecture(tmp_path, transformers.LlamaConfig(**SMOLLM2))
    with pytest.raises(UserError) as error:
        check_layout(table, parallel(8, tensor=4, pipeline=2, expert=2))
    lines = str(error.value).splitlines()
    assert any("9 units of 8 do not divide by 4 tensor ranks" in line for line in lines), "query heads"
    assert any("4 tensor ranks do not divide by 3 units of 8" in line for line in lines), "key/value heads"
    assert any("3 layers do not divide by 2 stages" in line for line in lines)
    assert "parallel.expert_parallel_size: 2, but llama has no experts" in lines
    near = [line for line in lines if line.startswith("would do on 8 ranks: ")]
    assert near, "nine heads allow no tensor parallelism on a power of two; context and data do"
    assert all("tensor_parallel_size=1" in line and "pipeline_parallel_size=1" in line for line in near)


def test_nearest_layouts_really_work(tmp_path: Path) -> None:
    table = architecture(
        tmp_path, transformers.Qwen3MoeConfig(**(SIZES | EXPERTS | {"num_hidden_layers": 6}))
    )
    asked = parallel(24, tensor=8, pipeline=1, expert=3)
    assert list(layout_problems(table, asked))
    near = nearest_layouts(table, asked)
    assert len(near) == 3
    for layout in near:
        assert not list(layout_problems(table, layout))
        assert layout.num_processes == 24
        assert layout.tensor_parallel_size == 1 or layout.sequence_parallel


def test_fewer_key_value_heads_than_tensor_ranks(tmp_path: Path) -> None:
    """An engine replicates them; the trainer cannot, which is reported before its weights are read."""
    table = architecture(tmp_path, transformers.Qwen2Config(**(SIZES | {"num_key_value_heads": 1})))
    with pytest.raises(UserError) as error:
        check_layout(table, parallel(2, tensor=2))
    lines = str(error.value).splitlines()
    assert lines[0] == (
        "parallel.tensor_parallel_size: 2 tensor ranks need 2 units of 16 (got 1): the trainer repeats none "
        "(model.layers.*.self_attn.k_proj.weight, model.layers.*.self_attn.k_proj.bias and 2 more)"
    )
    assert all(line.startswith("would do on 2 ranks: parallel.tensor_parallel_size=1") for line in lines[1:])
    assert len(lines) > 1
    assert not list(division_problems(table, "engine", ParallelLayout(tensor=2), "engine"))


def test_nearest_layouts_change_how_experts_are_split(tmp_path: Path) -> None:
    """Experts of an odd width cannot be split: the suggested layouts keep them whole."""
    sizes = SIZES | EXPERTS | {"moe_intermediate_size": 7}
    table = architecture(tmp_path, transformers.Qwen3MoeConfig(**sizes))
    asked = parallel(4, expert_tensor=2)
    with pytest.raises(UserError) as error:
        check_layout(table, asked)
    assert "parallel.expert_tensor_parallel_size: 7 units of 1 do not divide by 2 tensor ranks" in str(
        error.value
    )
    assert "would do on 4 ranks: parallel.expert_tensor_parallel_size=1\n" in str(error.value)
    assert {layout.expert_tensor_parallel_size for layout in nearest_layouts(table, asked)} == {1}


def test_engine_that_cannot_share_the_model(tmp_path: Path) -> None:
    sizes = SIZES | EXPERTS | {"num_experts": 6, "moe_intermediate_size": 30}
    table = architecture(tmp_path, transformers.Qwen3MoeConfig(**sizes))
    check_engine(table, EngineConfig(tensor_parallel_size=2, expert_parallel=True))
    with pytest.raises(UserError) as error:
        check_engine(table, EngineConfig(tensor_parallel_size=4, expert_parallel=True))
    assert str(error.value).splitlines() == [
        "rollout.engine.expert_parallel: 6 experts do not divide by 4 tensor ranks",
        "would do: rollout.engine.tensor_parallel_size=2",
    ]
    with pytest.raises(UserError, match="30 units of 1 do not divide by 4 tensor ranks"):
        check_engine(table, EngineConfig(tensor_parallel_size=4))
    dense = architecture(tmp_path, transformers.Qwen3Config(**SIZES))
    with pytest.raises(UserError, match=r"^rollout\.engine\.expert_parallel: qwen3 has no experts$"):
        check_engine(dense, EngineConfig(tensor_parallel_size=2, expert_parallel=True))


def test_experts_over_tensor_ranks_need_sequence_parallelism(tmp_path: Path) -> None:
    table = architecture(tmp_path, transformers.Qwen3MoeConfig(**(SIZES | EXPERTS)))
    with pytest.raises(UserError, match="sequence_parallel: must be true for experts") as error:
        check_layout(table, parallel(2, tensor=2))
    assert "parallel.sequence_parallel=true" in str(error.value)
    check_layout(table, parallel(2, tensor=2, sequence_parallel=True))


@pytest.mark.parametrize("extra", [[], ["--dry-run=full"]])
def test_no_process_starts(
    extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megarl.config import load

    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path)},
        "optimizer": {"lr": 1e-4},
        "training": {"num_steps": 1, "batch_size": 2},
        "data": {"train": {"source": "jsonl", "path": "data.jsonl"}},
        "parallel": {"num_processes": 2, "tensor_parallel_size": 2},
    }
    config = SftConfig(**settings)  # type: ignore[arg-type]
    transformers.LlamaConfig(**SMOLLM2).save_pretrained(tmp_path)
    monkeypatch.setattr(load, "load_config", lambda *args, **options: config)  # files are not its subject
    assert main(["sft", "--config", "any.yaml", *extra]) == 2
    assert "do not divide by 2 tensor ranks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        ("router.aux_loss_coef=0.1", transformers.LlamaConfig, "router.aux_loss_coef: llama has no experts"),
        ("router.aux_loss_coef=null", transformers.LlamaConfig, "router.aux_loss_coef: llama has no experts"),
        (
            "router.bias_update_rate=0.01",
            transformers.Qwen3MoeConfig,
            "router.bias_update_rate: the router of qwen3_moe has no bias",
        ),
        (
            "router.aux_loss_coef=null",
            functools.partial(transformers.Qwen3MoeConfig, router_aux_loss_coef=0.0),
            "router.aux_loss_coef: null, but config.json has no router_aux_loss_coef above 0",
        ),
    ],
)
def test_router_settings_need_a_router_that_has_a_use_for_them(
    settings: str, config: Any, message: str, tmp_path: Path
) -> None:
    """As written on the command line."""
    table = architecture(tmp_path, config(**(SIZES | EXPERTS)))
    name, value = settings.removeprefix("router.").split("=")
    with pytest.raises(UserError, match=f"^{message}$"):
        check_router(table, RouterConfig(**{name: yaml.safe_load(value)}))
    check_router(table, RouterConfig())
