"""What one backend lacks is refused before anything starts, by the line that names the one that has it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from megarl.config.sft import SftConfig
from megarl.config.training import OF_MEGATRON
from megarl.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OTHER = {
    "parallel.context_attention": "ring",
    "parallel.expert_dispatcher": "allgather",
    "router.aux_loss_coef": "0.1",
    "router.bias_update_rate": "0.1",
}


def error(overrides: list[str], kind: Any = SftConfig, file: str = "quickstart_sft.yaml") -> str:
    with pytest.raises(UserError) as caught:
        load_config(kind, CONFIGS / file, overrides, check_files=False)
    return str(caught.value)


@pytest.mark.parametrize("name", OF_MEGATRON)
def test_what_the_torch_backend_lacks(name: str) -> None:
    lines = error([f"{name}={OTHER.get(name, '2')}", "trainer.backend=torch", "parallel.num_processes=4"])
    (line,) = (line for line in lines.splitlines() if "trainer.backend = megatron has it" in line)
    assert name in line


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.replicate_size=2",
        "trainer.reshard_after_forward=false",
        "trainer.cpu_offload=true",
        "model.trust_remote_code=true",
    ],
)
def test_what_the_megatron_backend_lacks(setting: str) -> None:
    line = error([setting, "parallel.num_processes=2"])
    assert setting.partition("=")[0] in line and "needs trainer.backend = torch" in line


def test_replicas_divide_the_ranks() -> None:
    line = error(["trainer.backend=torch", "trainer.replicate_size=2", "parallel.num_processes=3"])
    assert "trainer.replicate_size" in line and "must divide the 3 data-parallel ranks (got 2)" in line


def test_rollouts_and_the_torch_backend() -> None:
    grpo = (GrpoConfig, "quickstart_grpo.yaml")
    lines = error(["trainer.backend=torch", "trainer.cpu_offload=true", "rollout.router_replay=true"], *grpo)
    assert "trainer.cpu_offload" in lines and "rollout.router_replay" in lines


def test_sizes_that_do_not_divide(tmp_path: Path) -> None:
    """Of a model without a table, which either engine generates with."""
    from megarl.models.layout_checks import check_training
    from tests.trainer.torch.families import save_family

    save_family("phi3", tmp_path)

    def refuse(kind: Any, file: str, *overrides: str) -> str:
        config = load_config(
            kind,
            CONFIGS / file,
            [f"model.path={tmp_path}", "trainer.backend=torch", *overrides],
            check_files=False,
        )
        with pytest.raises(UserError) as caught:
            check_training(config)
        return str(caught.value)

    three = "parallel.tensor_parallel_size=4", "parallel.num_processes=4"
    assert "num_key_value_heads = 2 does not divide by 4" in refuse(SftConfig, "quickstart_sft.yaml", *three)
    settings = [f"model.path={tmp_path}", "trainer.backend=torch"]
    check_training(load_config(GrpoConfig, CONFIGS / "quickstart_grpo.yaml", settings, check_files=False))


def test_code_of_a_model_runs_only_where_it_may(tmp_path: Path) -> None:
    import json

    from megarl.models.layout_checks import check_training
    from tests.trainer.torch.families import save_family

    save_family("phi3", tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "configuration_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import Phi3Config\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(Phi3Config):\n    model_type = 'own'\n"
    )
    facts = json.loads((tmp_path / "config.json").read_text())
    facts |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    settings = [f"model.path={tmp_path}", "trainer.backend=torch"]
    config = load_config(SftConfig, CONFIGS / "quickstart_sft.yaml", settings, check_files=False)
    with pytest.raises(UserError, match=r"model\.trust_remote_code: .* brings its own code"):
        check_training(config)
    facts.pop("auto_map")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="transformers has no language model of model_type 'own'"):
        check_training(config)
    assert not ran.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """A decoder with a class of its own, known by nobody else."""
    import json

    import transformers

    from megarl.config.model import ModelConfig
    from megarl.trainer.torch.model import build_decoder
    from tests.trainer.torch.families import save_family

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = tmp_path / "model"
    save_family("phi3", model)
    (model / "own_model.py").write_text(
        "from transformers import Phi3Config, Phi3ForCausalLM\n"
        "class OwnConfig(Phi3Config):\n    model_type = 'own'\n"
        "class OwnModel(Phi3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    facts = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    (model / "config.json").write_text(json.dumps(facts | {"model_type": "own", "auto_map": own}))
    config = ModelConfig(path=str(model), trust_remote_code=trusted)
    if trusted:
        assert type(build_decoder(config, torch.float32).lm).__name__ == "OwnModel"
    else:
        with pytest.raises(UserError, match=r"model\.path: "):
            build_decoder(config, torch.float32)
