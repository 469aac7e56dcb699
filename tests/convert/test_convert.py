"""Conversions against Hugging Face, stock Megatron and themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megarl.cli import main
from megarl.convert import commands, distcp
from megarl.convert.cli import parse_size
from megarl.errors import UserError
from megarl.models import load_architecture
from megarl.weights.hf import load_hf
from tests.convert import stock
from tests.models.test_families import MODELS as FAMILIES
from tests.models.test_families import SIZES
from tests.models.tiny import MODELS, hf_logits, save_model
from tests.trainer import ranks
from tests.trainer.world import world

SMALL = 30_000  # bytes per file: dozens of files


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_model(one: Path, two: Path) -> None:
    first, second = tensors_of(one), tensors_of(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_for_bit(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    commands.hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", dtype=None, max_bytes=SMALL)
    assert len(list((tmp_path / "megatron" / "release").glob("__0_*.distcp"))) > 4
    commands.megatron_to_hf(
        tmp_path / "megatron", tmp_path / "back", hf_config=None, dtype=None, max_bytes=SMALL
    )
    assert_same_model(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "back"))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.startswith(("deepseek", "gemma"))])
def test_round_trip_of_families_with_a_table_only(name: str, tmp_path: Path) -> None:
    """In bfloat16, the router's bias in float32, as such checkpoints are; with multi-token prediction."""
    config_class, options = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**(SIZES | options)))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = {key: torch.randn_like(value) for key, value in load_file(file).items()}
    for key in tensors:
        if key.endswith("e_score_correction_bias"):
            tensors[key] = torch.randn(tensors[key].shape)
    if name.startswith("deepseek"):
        tensors["model.layers.3.eh_proj.weight"] = torch.randn(64, 128, dtype=torch.bfloat16)
        tensors["model.layers.3.enorm.weight"] = torch.randn(64, dtype=torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    commands.hf_to_megatron(
        tmp_path / "hf", tmp_path / "megatron", dtype=None, max_bytes=SMALL, keep_mtp=True
    )
    commands.megatron_to_hf(
        tmp_path / "megatron", tmp_path / "back", hf_config=None, dtype=None, max_bytes=SMALL
    )
    assert_same_model(tmp_path / "hf", tmp_path / "back")
    assert {t.dtype for t in tensors_of(tmp_path / "back").values()} == {t.dtype for t in tensors.values()}


def test_verify_without_a_model_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_class, options = FAMILIES["gemma2"]
    config_class(**(SIZES | options)).save_pretrained(tmp_path / "hf")
    arguments = ["convert", "hf-to-megatron", str(tmp_path / "hf"), str(tmp_path / "out"), "--verify"]
    assert main(arguments) == 2
    assert "gemma2 can be converted, but not its logits computed" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_layers_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_class, options = FAMILIES["deepseek_v3"]
    transformers.AutoModelForCausalLM.from_config(config_class(**(SIZES | options))).save_pretrained(
        tmp_path / "hf"
    )
    file = tmp_path / "hf" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.3.enorm.weight": torch.ones(64)}, file)
    assert main(["convert", "hf-to-megatron", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    assert "dropped: 1 tensors of multi-token prediction" in capsys.readouterr().out
    assert main(["convert", "megatron-to-hf", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    missing = tensors_of(tmp_path / "hf").keys() - tensors_of(tmp_path / "back").keys()
    assert missing == {"model.layers.3.enorm.weight"}


@pytest.mark.parametrize(
    "name", ["llama", "llama-biases", "qwen2-tied", "qwen3", "qwen3-moe", "qwen3-moe-mixed-tied", "mixtral"]
)
def test_stock_megatron_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    """Loaded by megatron-core's own loader into megatron-core's own model; and written by it, read by us."""
    model = save_model(name, tmp_path / "hf")
    commands.hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", dtype=None, max_bytes=SMALL)
    token_ids = [3, 1, 4, 1, 5, 92, 65, 35, 89, 79]
    saved = tmp_path / "saved"
    saved.mkdir()
    [found] = world(1).run(
        stock.logits_and_save,
        str(tmp_path / "megatron" / "release"),
        token_ids,
        str(saved),
    )
    with torch.no_grad():
        expected = hf_logits(model, token_ids)
    assert (torch.tensor(found)[:, : expected.shape[1]] - expected).abs().max() < 2e-5
    commands.megatron_to_hf(saved, tmp_path / "back", hf_config=tmp_path / "hf", dtype=None, max_bytes=10**9)
    assert_same_model(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "parallel"),
    [("llama-biases", {"tensor_parallel_size": 2}), ("qwen3-moe-mixed-tied", {"expert_parallel_size": 2})],
)
def test_checkpoints_of_runs_become_hf(name: str, parallel: dict[str, int], tmp_path: Path) -> None:
    save_model(name, tmp_path / "hf")
    (tmp_path / "step_1").mkdir()
    result = world(2).run(
        ranks.train, str(tmp_path / "hf"), [0], None, {0: str(tmp_path / "step_1")}, parallel=parallel
    )[0]
    commands.megatron_to_hf(
        tmp_path / "step_1", tmp_path / "back", hf_config=tmp_path / "hf", dtype=None, max_bytes=10**9
    )
    back = tensors_of(tmp_path / "back")
    assert back.keys() == result["weights"].keys()
    for key, value in result["weights"].items():
        assert torch.equal(back[key], torch.from_numpy(value)), key


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("qwen3", tmp_path / "hf")
    written: list[str] = []
    original = distcp.write_file

    def stop_after_three(directory: Path, file: distcp.ShardFile, tensors: object) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file.name)
        original(directory, file, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(distcp, "write_file", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        commands.hf_to_megatron(tmp_path / "hf", tmp_path / "out", dtype=None, max_bytes=SMALL)
    assert not (tmp_path / "out").exists()
    torn = tmp_path / "out.partial" / "release" / written[-1]
    torn.write_bytes(torn.read_bytes()[:-1])  # as after a crash of the machine: written anew
    again: list[str] = []

    def count(directory: Path, file: distcp.ShardFile, tensors: object) -> None:
        again.append(file.name)
        original(directory, file, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(distcp, "write_file", count)
    commands.hf_to_megatron(tmp_path / "hf", tmp_path / "out", dtype=None, max_bytes=SMALL)
    assert set(written[:2]).isdisjoint(again) and written[2] in again
    assert not (tmp_path / "out.partial").exists()
    commands.megatron_to_hf(tmp_path / "out", tmp_path / "back", hf_config=None, dtype=None, max_bytes=10**9)
    assert_same_model(tmp_path / "hf", tmp_path / "back")


def test_all_that_disagrees_is_in_one_error(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    tensors["stranger"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        commands.hf_to_megatron(tmp_path / "hf", tmp_path / "out", dtype=None, max_bytes=SMALL)
    lines = str(caught.value).splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        "missing tensor model.norm.weight",
        "no rule maps tensor stranger",
        "tensor lm_head.weight has shape [100, 64], expected [250, 64]",
    ]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "llama")
    save_model("qwen3", tmp_path / "qwen3")
    commands.hf_to_megatron(tmp_path / "llama", tmp_path / "out", dtype=None, max_bytes=10**9)
    with pytest.raises(UserError, match=r"missing tensor decoder.layers.self_attention.q_layernorm.weight"):
        commands.megatron_to_hf(
            tmp_path / "out", tmp_path / "back", hf_config=tmp_path / "qwen3", dtype=None, max_bytes=10**9
        )


def test_commands_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model("llama", tmp_path / "hf")
    (tmp_path / "there").mkdir()
    source, there = str(tmp_path / "hf"), str(tmp_path / "there")
    assert main(["convert", "hf-to-megatron", source, there]) == 2
    assert f"{there} exists; give another directory or pass --overwrite" in capsys.readouterr().err
    assert main(["convert", "megatron-to-hf", there, str(tmp_path / "x")]) == 2
    assert "neither a Megatron checkpoint" in capsys.readouterr().err
    assert main(["convert", "hf-to-megatron", source, str(tmp_path / "y"), "--max-shard-size", "big"]) == 2
    assert "'big' is not a size" in capsys.readouterr().err
    assert (parse_size("500MB"), parse_size("2GiB"), parse_size("7")) == (500 * 10**6, 2**31, 7)


def test_verify_and_inspect(tmp_path: Path) -> None:
    """In a separate process, as a user runs them."""
    save_model("qwen3-moe", tmp_path / "hf")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/convert_checkpoint.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(
        "hf-to-megatron", str(tmp_path / "hf"), str(tmp_path / "out"), "--verify", "--dtype", "bfloat16"
    )
    assert done.returncode == 0, done.stderr
    assert "verified: logits differ by at most" in done.stdout
    facts = json.loads(run("inspect", str(tmp_path / "out"), "--json").stdout)
    count = sum(t.numel() for t in tensors_of(tmp_path / "hf").values())
    padding = 2 * (256 - 250) * 64  # rows of embedding and head
    norms = 2 * 64  # the norm before the experts is stored under two names
    assert facts["num_parameters"] == count + padding + norms
    assert (facts["format"], facts["family"]) == ("Megatron-LM (torch_dist)", "qwen3_moe")
    assert not facts["optimizer_state"] and facts["iteration"] == "release"
    assert (
        "decoder.layers.mlp.experts.experts.linear_fc1.weight" in run("inspect", str(tmp_path / "out")).stdout
    )
    save_model("qwen3-moe", tmp_path / "other", seed=1)
    code = "import sys; from pathlib import Path; from megarl.convert.check import verify; "
    code += "verify(Path(sys.argv[1]), Path(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "other")]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "logits differ from those of" in other.stderr


def test_a_tied_head_that_is_another_one_is_refused_by_trainer_and_converter_alike(tmp_path: Path) -> None:
    save_model("qwen2-tied", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    for change, refused in ((0.0, False), (0.5, True)):
        head[3, 4] += change
        save_file(tensors | {"lm_head.weight": head}, tmp_path / "hf" / "model.safetensors")
        target = tmp_path / f"megatron-{change}"
        if not refused:
            commands.hf_to_megatron(tmp_path / "hf", target, dtype=None, max_bytes=10**9)
            continue
        with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight") as told:
            commands.hf_to_megatron(tmp_path / "hf", target, dtype=None, max_bytes=10**9)
        architecture = load_architecture(tmp_path / "hf")
        with pytest.raises(UserError) as same:
            load_hf(tmp_path / "hf", architecture, [], {})
        assert str(told.value) in str(same.value)
        assert not target.exists()


def test_arguments_say_how_a_router_chooses(tmp_path: Path) -> None:
    """What Megatron-LM's load_args_from_checkpoint reads of a mixture, for what config.json says."""
    common = {
        "moe_router_group_topk": None,
        "moe_router_num_groups": None,
        "moe_router_topk_scaling_factor": None,
        "moe_shared_expert_intermediate_size": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
    }
    expected = {
        "qwen3-moe": common | {"moe_router_pre_softmax": False, "moe_layer_freq": 1},
        "qwen3-moe-mixed-tied": common | {"moe_router_pre_softmax": True, "moe_layer_freq": [0, 1]},
        "deepseek-v3": {
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_shared_expert_intermediate_size": 64,
            "moe_layer_freq": [0, 1],
        },
    }
    for name, values in expected.items():
        save_model(name, tmp_path / name)
        architecture = load_architecture(tmp_path / name)
        found = vars(commands.megatron_arguments(architecture, torch.float32))
        assert {key: found[key] for key in values} == values, name
        assert not found["add_bias_linear"]


def test_biases_on_one_side_alone_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model("llama-biases", tmp_path / "hf")
    for key, said in (("mlp_bias", True), (None, False)):
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        tensors = load_file(tmp_path / "hf" / "model.safetensors")
        place = tmp_path / str(key)
        shutil.copytree(tmp_path / "hf", place)
        if key is not None:
            (place / "config.json").write_text(json.dumps(config | {key: False}))
            kept = {n: t for n, t in tensors.items() if not (".mlp." in n and n.endswith("bias"))}
            save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
        commands.hf_to_megatron(place, tmp_path / f"{key}-megatron", dtype=None, max_bytes=10**9)
        assert ("--add-bias-linear" in capsys.readouterr().out) == said
