"""Models by their hub ids: what is downloaded, cached, pinned and written, and every way it can fail."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import yaml

from megarl.config import hub as hub_ids
from megarl.config.distill import DistillConfig
from megarl.config.load import dump_config, load_config
from megarl.config.plan import PlanConfig
from megarl.config.sft import SftConfig
from megarl.errors import UserError
from tests.hub.conftest import FILES
from tests.hub.server import FakeHub


def config(path, **sections):
    return {
        "run": {"dir": "runs/x"},
        "model": {"path": path},
        "optimizer": {"lr": 1e-3},
        "data": {"train": {"source": "reasoning_gym", "task": "chain_sum", "size": 64}},
        "training": {"num_steps": 1, "batch_size": 4},
    } | sections


def load(path, kind=SftConfig, **sections):
    file = Path("config.yaml")
    file.write_text(yaml.safe_dump(config(path, **sections)))
    return load_config(kind, file)


def test_small_files_come_first_and_weights_once(hub: FakeHub):
    """The field is the snapshot's directory; config.yaml has the id, and reads back the same."""
    loaded = load("org/tiny")
    directory = Path(loaded.model.path)
    assert {each.name for each in directory.iterdir()} == {"config.json", "tokenizer.json"}
    assert directory.name == hub.commit("org/tiny")
    assert yaml.safe_load(dump_config(loaded))["model"]["path"] == "org/tiny"
    assert loaded.model_dump(mode="json")["model"]["path"] == "org/tiny"
    assert pickle.loads(pickle.dumps(loaded)).model.path.written == "org/tiny"
    for _ in range(2):
        hub_ids.fetch_weights(loaded)
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert hub.gets == {"config.json": 1, "tokenizer.json": 1, "model.safetensors": 1}


def test_shards_are_those_of_the_index(hub: FakeHub):
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    files = hub.files["org/tiny"]["main"]
    files |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "consolidated.safetensors": b"twice",
    }
    files |= {"model-1-of-2.safetensors": b"1", "model-2-of-2.safetensors": b"2"}
    loaded = load("org/tiny")
    hub_ids.fetch_weights(loaded)
    got = {name for name in hub.gets if name.endswith(".safetensors")}
    assert got == {"model-1-of-2.safetensors", "model-2-of-2.safetensors"}


def test_a_revision_and_the_hubs_newest(hub: FakeHub):
    """A revision is a branch, a tag or a commit."""
    hub.files["org/tiny"]["v1"] = FILES | {"tokenizer.json": b'{"v": 1}'}
    first = hub.commit("org/tiny")
    for revision in ("v1", hub.commit("org/tiny", "v1")):
        loaded = load(f"org/tiny@{revision}")
        assert (Path(loaded.model.path) / "tokenizer.json").read_bytes() == b'{"v": 1}'
        assert loaded.model_dump()["model"]["path"] == f"org/tiny@{revision}"
    assert Path(load("org/tiny").model.path).name == first
    hub.files["org/tiny"]["main"]["tokenizer.json"] = b'{"v": 2}'
    assert Path(load("org/tiny").model.path).name == hub.commit("org/tiny") != first
    with pytest.raises(UserError, match=r"model.path: .*org/tiny has no revision 'v9' \[config.yaml"):
        load("org/tiny@v9")


def test_ranks_take_the_commit_of_the_process_that_started_them(hub: FakeHub, monkeypatch):
    """Without asking the hub, and although it has a newer one by then."""
    loaded = load("org/tiny")
    hub_ids.fetch_weights(loaded)
    commits = hub_ids.commits(loaded)
    assert json.loads(commits) == {"org/tiny": hub.commit("org/tiny")}
    hub.files["org/tiny"]["main"]["tokenizer.json"] = b'{"v": 2}'
    monkeypatch.setenv(hub_ids.COMMITS, commits)
    asked = len(hub.requests)
    again = load("org/tiny")
    hub_ids.fetch_weights(again)
    assert again.model.path == loaded.model.path
    assert hub.requests[asked:] == []


def test_a_directory_wins(hub: FakeHub):
    for name, data in FILES.items():
        file = Path("org/tiny") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    assert load("org/tiny").model.path == "org/tiny"
    assert hub.requests == []


def test_offline_with_and_without_a_cache(hub: FakeHub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    loaded = load("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = load("org/tiny")
    assert again.model.path == loaded.model.path
    what = r"model.path: no such directory .*, and as an id of the hub not in the cache \S+, and "
    with pytest.raises(UserError, match=rf"{what}HF_HUB_OFFLINE is set; .* run `hf download org/tiny`$"):
        hub_ids.fetch_weights(again)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=rf"{what}HF_HUB_OFFLINE is set; .*`hf download org/tiny` \[config"):
        load("org/tiny")
    with pytest.raises(UserError, match=r"`hf download org/tiny --revision v1` \[config.yaml"):
        load("org/tiny@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=rf"{what}http://127.0.0.1:9 does not answer; .*`hf download org/tiny`"
    ):
        load("org/tiny")


def test_tokens_and_missing_models(hub: FakeHub, monkeypatch):
    """The hub tells no stranger whether a private model is there."""
    hub.private["org/tiny"] = "secret"
    for name in ("org/tiny", "org/none"):
        with pytest.raises(
            UserError, match=f"{hub.url} has no such model, or HF_TOKEN may not read it"
        ) as raised:
            load(name)
        assert len(str(raised.value).splitlines()) == 1
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert Path(load("org/tiny").model.path).is_dir()


def test_pickled_weights_are_no_weights(hub: FakeHub):
    del hub.files["org/tiny"]["main"]["model.safetensors"]
    with pytest.raises(
        UserError, match=r"^model.path: org/tiny has no model.safetensors .*must be safetensors"
    ):
        hub_ids.fetch_weights(load("org/tiny"))


def test_nothing_is_downloaded_for_a_configuration_that_cannot_run(hub: FakeHub):
    with pytest.raises(UserError) as raised:
        load("org/tiny", optimizer={"lr": -1})
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(UserError, match="packing.max_sequence_length: the model has max_position_embeddings"):
        load("org/tiny", packing={"max_sequence_length": 256})
    assert "model.safetensors" not in hub.gets


def test_teachers_and_reward_models(hub: FakeHub):
    """Every field that names a model, also within an environment of a mixture."""
    hub.files["org/teacher"] = {"main": dict(FILES)}
    hub.files["org/judge"] = {"main": dict(FILES)}
    environment = {"kind": "reward_model", "path": "org/judge"}
    rows = Path("rows.jsonl")
    rows.write_text('{"prompt": "a"}\n')
    source = {"source": "jsonl", "path": str(rows), "environment": environment}
    gym = {"source": "reasoning_gym", "task": "chain_sum"}
    loaded = load(
        "org/tiny",
        DistillConfig,
        teacher={"path": "org/teacher"},
        data={"train": {"source": "mixture", "sources": {"a": source, "b": gym}}},
        rollout={"num_prompts_per_step": 4, "num_generations_per_prompt": 1, "max_new_tokens": 8},
        training={"num_steps": 1},
        evaluation={"at_start": False, "at_end": False},
    )
    assert json.loads(hub_ids.commits(loaded)).keys() == {"org/tiny", "org/teacher", "org/judge"}
    judge = loaded.data.train.sources["a"].environment.path
    assert (Path(judge) / "config.json").read_bytes() == FILES["config.json"]
    hub_ids.fetch_weights(loaded)
    assert hub.gets["model.safetensors"] == 3


def test_a_plan_of_a_model_on_the_hub(hub: FakeHub):
    from megarl.simulate.run import simulate

    settings = [
        *("model.path=org/tiny", "trainer={}", "engine.kv_cache_gib=1"),
        *("workload.sequence_length=64", "workload.tokens_per_microbatch=64"),
    ]
    planned = load_config(PlanConfig, None, settings, check_files=False)
    layer = 64 * (2 + 2 * 1) * 32 + 64 * 64 + 3 * 64 * 64 + 2 * 64 + 2 * 32  # q k v, o, mlp, norms
    assert simulate(planned, 1).num_parameters == layer + 64 + 2 * 64 * 64
    assert hub.gets == {"config.json": 1, "tokenizer.json": 1}


def test_a_data_set_that_is_out_of_reach(monkeypatch):
    """The line says what to run elsewhere; a benchmark's too."""
    import datasets.config

    from megarl.config.benchmarks import BenchmarkSource
    from megarl.config.data import HfLocation
    from megarl.data.benchmarks import load_questions
    from megarl.data.rows import read_rows

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = HfLocation(source="hf", dataset="org/none", subset="main")
    run = r"""not in the cache \S+, and HF_HUB_OFFLINE is set; .*load_dataset\("{}", "main"\)'`$"""
    with pytest.raises(UserError, match="of org/none: " + run.format("org/none")):
        list(read_rows(source, "data.train"))
    with pytest.raises(UserError, match=run.format("org/gsm8k")):
        load_questions(BenchmarkSource(source="benchmark", name="gsm8k", hub="org/gsm8k"), "data.train")
