"""A checkpoint as model.path: its weights bit for bit, converted once for a run that has begun."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megarl.config.model import is_checkpoint
from megarl.convert.commands import hf_to_megatron
from megarl.convert.torch_native import hf_to_torch
from megarl.errors import UserError
from megarl.loops.start_weights import convert_start, wait_for_start
from tests.convert.test_torch_native import tensors
from tests.models.tiny import save_model

BYTES = 10**9


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model("qwen3-tied", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def finished(tmp_path: Path, model: Path) -> Path:
    """The directory of a run of the torch backend with two checkpoints, of which the older is damaged."""
    run = tmp_path / "finished"
    (run / "checkpoints" / "step_9").mkdir(parents=True)
    hf_to_torch(model, run / "checkpoints" / "step_10", dtype=None, max_bytes=BYTES)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(model)}}))
    return run


def test_a_checkpoint_with_a_run_in_its_directory_stays_one(tmp_path: Path, model: Path) -> None:
    """`megarl eval` with the checkpoint's own directory as run.dir."""
    checkpoint = tmp_path / "checkpoint"
    hf_to_megatron(model, checkpoint, dtype=None, max_bytes=BYTES)
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(checkpoint)}}))
    (checkpoint / "checkpoints").mkdir()
    assert convert_start(checkpoint, checkpoint) is not None
    found = tensors(checkpoint / "model")
    assert all(found[name].equal(tensor) for name, tensor in tensors(model).items())


def test_an_adapter_is_merged_with_its_base(tmp_path: Path, model: Path) -> None:
    """As peft merges it, once."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapter, target = tmp_path / "adapter", tmp_path / "run" / "model"
    adapted.save_pretrained(adapter)
    assert is_checkpoint(adapter)
    line = f"model.path: {adapter} merged with its base: {target}"
    assert [convert_start(adapter, tmp_path / "run") for _ in range(2)] == [line, None]
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    expected, before, found = whole.merge_and_unload().state_dict(), tensors(model), tensors(target)
    assert sum(not found[name].equal(before[name]) for name in before) > 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model.path: .*adapter_model.safetensors: No such file"):
        convert_start(adapter, tmp_path / "other")


def same_weights(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_checkpoints_of_both_backends_are_taken(tmp_path: Path, model: Path, finished: Path) -> None:
    hf_to_megatron(model, tmp_path / "megatron", dtype=None, max_bytes=BYTES)
    for source in (finished, finished / "checkpoints" / "step_10", tmp_path / "megatron"):
        assert is_checkpoint(source)
        line = convert_start(source, tmp_path / "run")
        assert line is not None and "converted" in line
        assert same_weights(tmp_path / "run" / "model", model), source
        assert convert_start(source, tmp_path / "run") is None, "it is there already"
        wait_for_start(source, tmp_path / "run", 0.0)
    assert not is_checkpoint(model)
    assert not is_checkpoint("x" * 5000)


def test_a_run_that_has_begun_keeps_its_start(tmp_path: Path, model: Path, finished: Path) -> None:
    run = tmp_path / "run"
    convert_start(finished, run, keep=True)
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    newer = tmp_path / "newer"
    save_model("llama-biases", newer)
    hf_to_torch(newer, finished / "checkpoints" / "step_11", dtype=None, max_bytes=BYTES)
    assert convert_start(finished, run, keep=True) is None
    wait_for_start(finished, run, 0.0)
    assert same_weights(run / "model", model)
    with pytest.raises(UserError, match=r"model\.path: .* was started with .*finished \(got .*step_10\)"):
        convert_start(finished / "checkpoints" / "step_10", run, keep=True)
    with pytest.raises(UserError, match=r"run\.hang_timeout_seconds"):
        wait_for_start(finished, tmp_path / "elsewhere", 0.0)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "config.yaml").write_text("{}")
    with pytest.raises(
        UserError, match=r"model\.path: .*begun is the directory of a run without a checkpoint"
    ):
        convert_start(tmp_path / "begun", tmp_path / "run")
